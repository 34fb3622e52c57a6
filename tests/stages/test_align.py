import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    demonstration,
    instruction,
    loaded,
    nudged_policy,
    optimization,
    policy_artifact,
    preference,
    records_artifact,
    weights,
    workspace,
)
from mutation import assert_caught
from safetensors.torch import load_file
from scipy import stats

from selfalign.core.errors import SelfalignError
from selfalign.core.files import write_json
from selfalign.core.records import PairReference, PreferencePair
from selfalign.data.labelled import sides_of
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import Transformers
from selfalign.losses.logps import PairLogps
from selfalign.losses.preference import DPO, IPO, KTO, ODPO, SPPO, AlphaDPO, SimPO, SrDPO, SrIPO, log_ratio_margin
from selfalign.losses.protocol import (
    Offset,
    PreferenceLoss,
    UnpairedLoss,
    augmentation_of,
    is_unpaired,
    reference_augmentation_of,
    refinement_of,
)
from selfalign.losses.refinement import Refinement
from selfalign.metrics.accumulate import Mean
from selfalign.models.batches import PairExample, encode_pairs, make_batch
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.stages.align import align
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.store.artifacts import Artifact
from selfalign.training import preference as module
from selfalign.training.checkpoint_selection import CheckpointComparator, CheckpointSelection, CheckpointSelector
from selfalign.training.config import Optimization
from selfalign.training.objective import pair_logps
from selfalign.training.parallelism import Microbatch
from selfalign.training.preference import Preference
from selfalign.training.prepare import cast_frozen_layers, prepare
from selfalign.training.reference import (
    AdapterSwitchedOff,
    SecondModel,
    StoredReferences,
    open_references,
    with_reference,
)
from selfalign.training.splits import KnownTexts, split_pairs

PAIRS = [
    preference("a", "Name a bird.", "A wren.", "A stone, I think."),
    preference("b", "Name a fish that lives in rivers.", "The trout does.", "No."),
    preference("c", "Why is the sky blue?", "Air scatters blue light most.", "It likes it."),
    preference("d", "How is tea made?", "Pour hot water over the leaves.", "Tea tea tea tea."),
]
LOSSES: list[PreferenceLoss] = [DPO(beta=0.2), IPO(beta=0.2), SrDPO(beta=0.2), SrIPO(beta=0.2)]
FULL_BATCH = {"learning_rate": 5e-4, "epochs": 3, "batch_size": 4}


def direct_logps(policy: PolicyCheckpoint, pair: PreferencePair) -> tuple[float, float]:
    """Summed over both responses' tokens, from full logits."""
    reader = loaded(policy.path) if not (policy.path / "adapter").exists() else policy.load("float32", device="cpu")
    prompt = f"<|im_start|>user\n{pair.prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    start = len(reader.tokenizer(prompt)["input_ids"])
    sums = []
    for answer in (pair.chosen, pair.rejected):
        ids = torch.tensor(
            [reader.tokenizer(prompt)["input_ids"] + reader.tokenizer(f"{answer}<|im_end|>")["input_ids"]]
        )
        with torch.no_grad():
            logps = reader.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        sums.append(float(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
    return sums[0], sums[1]


def aligned(
    folder: Path,
    policy: PolicyCheckpoint,
    loss: PreferenceLoss | UnpairedLoss,
    *,
    judged_by: PolicyCheckpoint | None = None,
    rank: int = 0,
    seed: int = 0,
    starts_as_reference: bool = True,
    pairs: list[PreferencePair] = PAIRS,
    references: Artifact | None = None,
    held_out: int = 0,
    trained_on: Sequence[Artifact] = (),
    selection: CheckpointSelection | None = None,
    kept_in: str = "float32",
    **settings: object,
):
    """Scores the pairs under the reference and aligns on them; returns counts, policy and logged rows."""
    optimised: Optimization = optimization(**{**FULL_BATCH, **settings})
    given, start = records_artifact(folder / "pairs", pairs=pairs), policy_artifact(policy)
    scores, before = workspace(folder / "reference"), workspace(folder / "start")
    for place, asked in ((scores, judged_by or policy), (before, policy)):
        reference_logprobs(
            place,
            policy=policy_artifact(asked),
            pairs=given,
            augmentation=reference_augmentation_of(loss),
            precision=optimised.logprob_settings(kept_in),
            unpaired=is_unpaired(loss),
        )
    rows: list[dict] = []
    out = workspace(folder / "out", rows)
    counts = align(
        out,
        policy=start,
        base=start,
        pairs=given,
        reference=references or records_artifact(scores.path),
        loss=loss,
        start=None if starts_as_reference else records_artifact(before.path),
        held_out=held_out,
        trained_on=list(trained_on),
        selection=selection,
        optimization=optimised,
        weights=replace(weights(seed, rank), dtype=kept_in),
    )
    return counts, PolicyCheckpoint(out.path), rows


@pytest.mark.parametrize("older", [False, True], ids=["own_start", "older_reference"])
def test_changes_are_from_the_start_of_the_alignment_whatever_the_reference_is(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, older: bool
) -> None:
    other = nudged_policy(tiny_policy, tmp_path / "other", 0.005) if older else tiny_policy
    counts, policy, _ = aligned(tmp_path, tiny_policy, DPO(beta=0.3), judged_by=other, starts_as_reference=not older)
    reader = loaded(tiny_policy.path)
    for place, which in enumerate(("chosen", "rejected")):
        answers = [getattr(pair, which) for pair in PAIRS]
        changes = [direct_logps(policy, pair)[place] - direct_logps(tiny_policy, pair)[place] for pair in PAIRS]
        tokens = sum(len(reader.tokenizer(f"{answer}<|im_end|>")["input_ids"]) for answer in answers)
        assert counts[f"logps/{which}_change"] == pytest.approx(sum(changes) / 4, abs=1e-3)
        assert counts[f"logps/{which}_change_per_token"] == pytest.approx(sum(changes) / tokens, abs=1e-4)
    assert counts["logps/chosen_change"] > 0.01 > counts["logps/rejected_change"]
    if older:
        assert counts["logps/chosen_change"] != pytest.approx(counts["rewards/chosen"] / 0.3, abs=1e-3)


def test_rewards_are_correlated_with_length_over_both_responses(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts, policy, _ = aligned(tmp_path, tiny_policy, DPO(beta=0.3))
    reader = loaded(tiny_policy.path)
    rewards, tokens = [], []
    for pair in PAIRS:
        for after, before, answer in zip(
            direct_logps(policy, pair), direct_logps(tiny_policy, pair), (pair.chosen, pair.rejected), strict=True
        ):
            rewards.append(0.3 * (after - before))
            tokens.append(len(reader.tokenizer(f"{answer}<|im_end|>")["input_ids"]))
    assert counts["rewards/length_correlation"] == pytest.approx(stats.pearsonr(rewards, tokens).statistic, abs=1e-3)


START = "start = self.start(model, examples) if self.start else None"
CHANGES = partial(test_changes_are_from_the_start_of_the_alignment_whatever_the_reference_is, older=True)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        (START, "start = reference", CHANGES),
        ("(policy.rejected - start.rejected)", "(start.rejected - policy.rejected)", CHANGES),
        (".tolist(), policy.chosen_tokens.tolist()),\n", ".tolist(), policy.rejected_tokens.tolist()),\n", CHANGES),
        (
            "*policy.chosen_tokens.tolist(), *policy.rejected_tokens.tolist()]",
            "*policy.rejected_tokens.tolist(), *policy.chosen_tokens.tolist()]",
            test_rewards_are_correlated_with_length_over_both_responses,
        ),
    ],
    ids=["from the reference", "before minus after", "tokens of the other response", "lengths of the other response"],
)
def test_mutant_is_caught(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, old: str, new: str, check: Any
) -> None:
    given = {"tmp_path": tmp_path, "tiny_policy": tiny_policy, "monkeypatch": monkeypatch}
    assert_caught(module, sys.modules[__name__], old, new, check, given)


def known_start(loss: PreferenceLoss) -> float:
    return math.log(2) if isinstance(loss, DPO | SrDPO) else 1 / (4 * loss.beta**2)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_loss_starts_at_its_known_value_and_falls(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, loss: PreferenceLoss
) -> None:
    counts, policy, rows = aligned(tmp_path, tiny_policy, loss)
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(known_start(loss), rel=1e-3)
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert abs(rows[0]["rewards/chosen"]) < 1e-3
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert counts["pairs"] == 4
    assert counts["dropped"] == {"too_long": 0}
    assert counts["rewards/margins"] > rows[-1]["rewards/margins"] > 0
    assert counts["rewards/accuracies"] == 1.0
    assert policy.digest != tiny_policy.digest
    assert ("refinement/mean" in rows[0]) == isinstance(loss, SrDPO | SrIPO)
    if isinstance(loss, SrDPO | SrIPO):
        assert rows[0]["refinement/mean"] == pytest.approx(0, abs=1e-3)
        assert rows[-1]["refinement/mean"] > 1e-3


def test_simpo_starts_at_its_value_for_each_pair_and_has_rewards_against_the_reference(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    """-log σ(β/|y⁺| log π(y⁺) - β/|y⁻| log π(y⁻) - γ) under M_t, which differs from pair to pair."""
    counts, _, rows = aligned(tmp_path, tiny_policy, SimPO(beta=2.0, gamma=0.5))
    reader, starts = loaded(tiny_policy.path), []
    for pair in PAIRS:
        values = zip(direct_logps(tiny_policy, pair), (pair.chosen, pair.rejected), strict=True)
        chosen, rejected = (v / len(reader.tokenizer(f"{answer}<|im_end|>")["input_ids"]) for v, answer in values)
        starts.append(math.log(1 + math.exp(0.5 - 2 * (chosen - rejected))))
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(sum(starts) / 4, rel=1e-3)
    assert losses[-1] < losses[0]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert counts["rewards/margins"] > 0
    other = nudged_policy(tiny_policy, tmp_path / "other", 0.005)
    with pytest.raises(SelfalignError, match="does not start as its reference"):
        aligned(tmp_path / "wrong", tiny_policy, SimPO(), judged_by=other)


def test_counts_are_the_rewards_of_the_saved_policy(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts, policy, _ = aligned(tmp_path, tiny_policy, DPO(beta=0.3))
    chosen, rejected = [], []
    for pair in PAIRS:
        after, before = direct_logps(policy, pair), direct_logps(tiny_policy, pair)
        chosen.append(0.3 * (after[0] - before[0]))
        rejected.append(0.3 * (after[1] - before[1]))
    assert counts["rewards/chosen"] == pytest.approx(sum(chosen) / 4, abs=1e-3)
    assert counts["rewards/rejected"] == pytest.approx(sum(rejected) / 4, abs=1e-3)
    assert counts["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected)) / 4, abs=1e-3)


@pytest.mark.parametrize(
    ("plain", "refined"),
    [
        (DPO(beta=0.2), SrDPO),
        (DPO(beta=0.2, reduction="mean"), partial(SrDPO, reduction="mean")),
        (IPO(beta=0.2), SrIPO),
        (IPO(beta=0.2, reduction="mean"), partial(SrIPO, reduction="mean")),
    ],
    ids=["dpo", "dpo_mean", "ipo", "ipo_mean"],
)
def test_lambda_zero_trains_bit_for_bit_as_without_refinement(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, plain: PreferenceLoss, refined: Callable[..., PreferenceLoss]
) -> None:
    _, one, _ = aligned(tmp_path / "plain", tiny_policy, plain)
    _, other, _ = aligned(tmp_path / "zero", tiny_policy, refined(beta=0.2, lam=0.0))
    assert one.digest == other.digest


def test_refinement_changes_what_is_learnt(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    weights_of = [aligned(tmp_path / str(lam), tiny_policy, SrDPO(lam=lam))[1].digest for lam in (0.25, 0.5)]
    assert weights_of[0] != weights_of[1]


def test_same_seed_gives_the_same_weights_and_another_order_others(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    settings = {"batch_size": 1, "epochs": 1}
    digests = [
        aligned(tmp_path / str(n), tiny_policy, SrDPO(), seed=seed, **settings)[1].digest
        for n, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_reference_of_other_weights_is_noticed_with_likely_causes(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    other = nudged_policy(tiny_policy, tmp_path / "other", 0.005)
    with pytest.raises(SelfalignError) as stop:
        aligned(tmp_path, tiny_policy, DPO(), judged_by=other)
    message = str(stop.value)
    assert "does not start as its reference" in message
    assert all(cause in message for cause in ("dropout", "dtypes", "other weights", "token ids"))
    assert not (tmp_path / "out/weights.json").exists()


def test_differences_that_cancel_over_the_batch_are_noticed(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """Rewards far from 0 whose mean is 0 are no start as the reference: the loss is not at its known value."""
    off = [5.0, -5.0, 5.0, -5.0]
    values = [direct_logps(tiny_policy, pair) for pair in PAIRS]
    records = [
        PairReference(id=pair.id, chosen=chosen + more, rejected=rejected)
        for pair, (chosen, rejected), more in zip(PAIRS, values, off, strict=True)
    ]
    with pytest.raises(SelfalignError, match="does not start as its reference"):
        aligned(tmp_path, tiny_policy, DPO(), references=records_artifact(tmp_path / "wrong", references=records))


def test_older_reference_is_no_error_where_it_is_the_choice(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    other = nudged_policy(tiny_policy, tmp_path / "other", 0.005)
    _, _, rows = aligned(tmp_path, tiny_policy, DPO(), judged_by=other, starts_as_reference=False)
    assert abs(rows[0]["rewards/chosen"]) > 1e-3
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_missing_reference_names_the_pair(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    some = records_artifact(tmp_path / "some", references=[PairReference(id="a", chosen=-1.0, rejected=-1.0)])
    with pytest.raises(SelfalignError, match=r"log-probabilities of pair b are missing"):
        aligned(tmp_path, tiny_policy, DPO(), references=some)


@pytest.mark.parametrize(("interval", "told"), [(3, True), (2, False)])
def test_training_too_short_to_compare_two_checkpoints_says_so(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, caplog: pytest.LogCaptureFixture, interval: int, told: bool
) -> None:
    selection = CheckpointSelection(
        interval_steps=interval,
        level=0.005,
        instructions=records_artifact(tmp_path / "asked", instructions=[instruction("a")]),
        comparator=CheckpointComparator(prompt="{instruction} {first} {second}"),
        compared_by=policy_artifact(tiny_policy),
        engine=Transformers(dtype="float32"),
        sampling=Sampling(temperature=0, max_new_tokens=2),
        seed=0,
    )
    aligned(tmp_path, tiny_policy, DPO(), selection=selection)  # Three steps.
    assert ("interval_steps=3 has no two checkpoints to compare" in caplog.text) == told


def test_longer_pair_is_left_out_and_counted(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    long = preference("long", "Go on.", "and on " * 150, "no")
    counts, policy, _ = aligned(tmp_path / "with", tiny_policy, SrDPO(), pairs=[*PAIRS, long], max_length=120)
    _, without, _ = aligned(tmp_path / "without", tiny_policy, SrDPO(), max_length=120)
    assert counts["dropped"] == {"too_long": 1}
    assert counts["pairs"] == 4
    assert policy.digest == without.digest


def test_lora_saves_an_adapter_beside_a_link_to_its_base(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts, policy, rows = aligned(tmp_path, tiny_policy, SrDPO(), rank=2, learning_rate=2e-2)
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-3)
    assert counts["rewards/margins"] > 0
    assert (policy.path / "weights").resolve() == (tiny_policy.path / "weights").resolve()
    assert any(
        tensor.abs().max() > 0
        for name, tensor in load_file(policy.path / "adapter/adapter_model.safetensors").items()
        if "lora_B" in name
    )
    after, before = direct_logps(policy, PAIRS[0]), direct_logps(tiny_policy, PAIRS[0])
    assert abs(after[0] - before[0]) > 1e-2


def objective_on(policy: PolicyCheckpoint, loss: PreferenceLoss) -> tuple[Preference, object, list[PairExample]]:
    """The loss over the pairs with the policy a little away from its reference."""
    reader = policy.load("float32", device="cpu")
    prepare(reader, policy, weights(), 0.0)
    examples = []
    with torch.no_grad():
        for example in encode_pairs(reader.tokenizer, PAIRS, augmentation_of(loss), 2048, Counter()):
            values = []
            for group in (example.plain, example.augmented):
                batch = make_batch(reader.model, [group or example.plain])
                logps = reader.model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs)
                values += (batch.sum_by_response(logps) - torch.tensor([1.0, 3.0])).tolist()
            known = PairReference(
                id=example.id, chosen=values[0], rejected=values[1],
                augmented_chosen=values[2], augmented_rejected=values[3],
            )  # fmt: skip
            examples.append(with_reference(example, known, "reference"))
    return Preference(loss, StoredReferences(), True, "float32"), reader.model, examples


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # h = (log π - log π_ref)(y⁺) - (…)(y⁻) = 1 - 3 = -2 for every pair, and Δ = β·h = -0.4.
        (DPO(beta=0.2), math.log(1 + math.exp(0.4))),
        (IPO(beta=0.2), (-2 - 2.5) ** 2),
        (SrDPO(beta=0.2, lam=0.5), math.log(1 + math.exp(0.4 - 0.2))),
        (SrIPO(beta=0.2, lam=0.5), (-2 + 0.2 - 2.5) ** 2),
        (SrIPO(beta=0.2, lam=0.5, lambda_scale="derived"), (-2 + 1.0 - 2.5) ** 2),
    ],
    ids=["dpo", "ipo", "sr_dpo", "sr_ipo_printed", "sr_ipo_exact"],
)
def test_objective_equals_the_equation_worked_by_hand(
    tiny_policy: PolicyCheckpoint, loss: PreferenceLoss, expected: float
) -> None:
    objective, model, examples = objective_on(tiny_policy, loss)
    outcome = objective(model, examples)
    assert float(outcome.loss.detach()) / objective.weight(examples) == pytest.approx(expected, rel=1e-4)
    assert outcome.metrics["rewards/margins"].value == pytest.approx(0.2 * -2, rel=1e-4)
    assert outcome.metrics["rewards/accuracies"] == Mean(0.0, 4.0)
    assert outcome.metrics["logps/chosen"].value == pytest.approx(
        sum(direct_logps(tiny_policy, pair)[0] for pair in PAIRS) / 4, rel=1e-4
    )
    if refinement_of(loss):
        assert outcome.metrics["refinement/mean"].value == pytest.approx(-0.4, rel=1e-3)


@pytest.mark.parametrize("source", ["prompted", "naive"])
@pytest.mark.parametrize("target", ["paper", "derived"])
def test_averaged_sr_ipo_averages_both_passes(tiny_policy: PolicyCheckpoint, source: str, target: str) -> None:
    """The reference is 1 nat below the policy on every y⁺, 3 on every y⁻: h = 1/n⁺ - 3/n⁻ and Δ = β h, a token."""
    refinement = Refinement(source=source)
    loss = SrIPO(beta=0.2, lam=0.5, reduction="mean", lambda_scale=target, refinement=refinement)
    objective, model, examples = objective_on(tiny_policy, loss)
    outcome = objective(model, examples)
    margins = [1 / chosen - 3 / rejected for chosen, rejected in (e.plain.scored() for e in examples)]
    weight = 0.5 / 0.2 if target == "derived" else 0.5
    expected = [(h - weight * 0.2 * h - 2.5) ** 2 for h in margins]
    assert len(set(margins)) > 1
    assert float(outcome.loss.detach()) == pytest.approx(sum(expected), rel=1e-4)
    assert outcome.metrics["refinement/mean"] == Mean(pytest.approx(0.2 * sum(margins), rel=1e-3), 4.0)
    # Rewards are of whole responses, whatever the loss does.
    assert outcome.metrics["rewards/margins"].value == pytest.approx(0.2 * -2, rel=1e-4)


def test_refinement_is_recomputed_under_the_current_policy_and_takes_no_gradient(tiny_policy: PolicyCheckpoint) -> None:
    """∂/∂θ of -log σ(βh - λ⊥Δ) is -σ(λΔ - βh)·β·∂h/∂θ: the gradient of DPO, scaled; nothing through p⊕x."""
    gradients = []
    for loss in (DPO(beta=0.2), SrDPO(beta=0.2, lam=0.5)):
        objective, model, examples = objective_on(tiny_policy, loss)
        objective(model, examples).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    scale = (1 / (1 + math.exp(-0.2))) / (1 / (1 + math.exp(-0.4)))
    assert torch.allclose(gradients[1], scale * gradients[0], atol=1e-5, rtol=1e-3)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # h = -2 and Δ_π = -0.4 for every pair, as above; Δ_naive = β h is the same number without the second pass.
        (Refinement(), -0.4),
        (Refinement(source="naive"), -0.4),
        (Refinement(source="shuffled"), -0.4),
        (Refinement(source="random_prompt"), -0.4),
        (Refinement(source="constant", constant=0.7), 0.7),
    ],
    ids=lambda value: value.source if isinstance(value, Refinement) else "",
)
def test_every_source_of_the_refinement_offsets_the_loss(
    tiny_policy: PolicyCheckpoint, source: Refinement, expected: float
) -> None:
    objective, model, examples = objective_on(tiny_policy, SrDPO(beta=0.2, lam=0.5, refinement=source))
    outcome = objective(model, objective.arrange(examples))
    assert float(outcome.loss.detach()) / 4 == pytest.approx(math.log(1 + math.exp(0.4 + 0.5 * expected)), rel=1e-4)
    assert ("refinement/mean" in outcome.metrics) == (source.source != "constant")


@pytest.mark.parametrize("source", ["naive", "constant"])
def test_sources_without_a_second_pass_ask_the_model_once(tiny_policy: PolicyCheckpoint, source: str) -> None:
    refinement = Refinement(source=source, constant=0.5 if source == "constant" else 0.0)
    objective, model, examples = objective_on(tiny_policy, SrDPO(refinement=refinement))
    assert all(example.augmented is None for example in examples)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    objective(model, examples)
    assert len(calls) == 1


def test_refinement_is_normalised_over_all_pairs_of_the_step(tiny_policy: PolicyCheckpoint) -> None:
    """Δ = -0.4, -0.2, 0 and 0.2: the root mean square is √0.06, the mean -0.1, the standard deviation √0.05.

    The pairs come in two passes, and a third pass repeats one of them.
    """
    known = {"a": -0.4, "b": -0.2, "c": 0.0, "d": 0.2}
    normalised = {
        "none": known,
        "rms": {name: delta / math.sqrt(0.06) for name, delta in known.items()},
        "zscore": {name: (delta + 0.1) / math.sqrt(0.05) for name, delta in known.items()},
    }
    for kind, offsets in normalised.items():
        loss = SrDPO(beta=0.2, lam=0.5, refinement=Refinement(normalise=kind))
        objective, model, examples = objective_on(tiny_policy, loss)
        moved = [
            replace(example, augmented_reference=[chosen - number, rejected])
            for number, example in enumerate(examples)
            for chosen, rejected in [example.augmented_reference]
        ]
        passes = [Microbatch(moved[:1]), Microbatch(moved[1:]), Microbatch(moved[:1], repeated=True)]
        objective.begin_step(model, passes, 0.0)
        for part in passes:
            outcome = objective(model, part.examples)
            expected = sum(math.log(1 + math.exp(0.4 + 0.5 * offsets[example.id])) for example in part.examples)
            assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-3)
            delta = sum(known[example.id] for example in part.examples) / len(part.examples)
            assert outcome.metrics["refinement/mean"].value == pytest.approx(delta, abs=1e-3), "metrics show Δ itself"


def test_alpha_dpo_takes_the_z_score_of_the_step(tiny_policy: PolicyCheckpoint) -> None:
    loss = AlphaDPO(beta=0.2, gamma=0.3, alpha=0.5)
    objective, model, examples = objective_on(tiny_policy, loss)
    objective.begin_step(model, [Microbatch(examples[:2]), Microbatch(examples[2:])], 0.0)
    tokens = torch.tensor([example.plain.scored() for example in examples])
    gaps = 0.2 * (1 / tokens[:, 0] - 3 / tokens[:, 1])  # The reference is 1 nat below the policy on y⁺, 3 on y⁻.
    z = (gaps - gaps.mean()) / gaps.std(correction=0)
    logps = torch.tensor([direct_logps(tiny_policy, pair) for pair in PAIRS]) / tokens
    expected = -torch.nn.functional.logsigmoid(0.2 * (logps[:, 0] - logps[:, 1]) - 0.3 - 0.5 * z)
    assert float(objective(model, examples).loss.detach()) == pytest.approx(float(expected.sum()), rel=1e-3)


def test_lambda_rises_from_zero_over_the_warm_up(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """The first step is DPO's. With two steps and a warm-up over both, the second has half of λ."""
    one, two = {"epochs": 1, "schedule": "constant"}, {"epochs": 2, "schedule": "constant"}
    risen = SrDPO(beta=0.2, lam=0.6, lam_warmup=1.0)
    plain = aligned(tmp_path / "plain", tiny_policy, DPO(beta=0.2), **one)[1].digest
    assert aligned(tmp_path / "first", tiny_policy, risen, **one)[1].digest == plain
    digests = [
        aligned(tmp_path / str(n), tiny_policy, loss, **two)[1].digest
        for n, loss in enumerate((risen, SrDPO(beta=0.2, lam=0.3), SrDPO(beta=0.2, lam=0.6)))
    ]
    assert digests[0] == digests[1] != digests[2]  # Δ is 0 at the first step, so λ does not matter there.


def test_contrast_compares_the_current_policy_with_itself_behind_both_prompts(tiny_policy: PolicyCheckpoint) -> None:
    """Δ = β{[log π(y⁺|p⊕x) - log π(y⁺|p⁻⊕x)] - [the same of y⁻]}, from full logits; the reference has no part in it."""
    refinement = Refinement(source="contrastive", prompt="Do well. ", negative_prompt="Do badly, please. ")
    objective, model, examples = objective_on(tiny_policy, SrDPO(beta=0.2, lam=0.5, refinement=refinement))
    examples = [replace(example, augmented_reference=[]) for example in examples]
    expected = []
    for pair in PAIRS:
        asked = pair.prompt[0]["content"]
        behind = [replace(pair, prompt=[{"content": f"{p}{asked}"}]) for p in ("Do well. ", "Do badly, please. ")]
        (chosen, rejected), (chosen_n, rejected_n) = (direct_logps(tiny_policy, one) for one in behind)
        expected.append(0.2 * ((chosen - chosen_n) - (rejected - rejected_n)))
    outcome = objective(model, examples)
    assert outcome.metrics["refinement/mean"].value == pytest.approx(sum(expected) / 4, rel=1e-3)
    total = sum(math.log(1 + math.exp(0.4 + 0.5 * delta)) for delta in expected)
    assert float(outcome.loss.detach()) == pytest.approx(total, rel=1e-4)


def test_contrast_need_not_be_zero_at_the_first_step(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """A reference of other weights is still noticed."""
    loss = SrDPO(beta=0.2, refinement=Refinement(source="contrastive"))
    _, _, rows = aligned(tmp_path / "own", tiny_policy, loss)
    assert abs(rows[0]["refinement/mean"]) > 1e-3
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert rows[-1]["rewards/margins"] > 0
    other = nudged_policy(tiny_policy, tmp_path / "other", 0.005)
    with pytest.raises(SelfalignError, match="does not start as its reference"):
        aligned(tmp_path / "wrong", tiny_policy, loss, judged_by=other)


def test_shuffling_gives_every_pair_of_a_step_the_second_pass_of_another(tiny_policy: PolicyCheckpoint) -> None:
    objective, model, examples = objective_on(tiny_policy, SrDPO(refinement=Refinement(source="shuffled")))
    known = [example.augmented_reference for example in examples]
    examples = [
        replace(example, augmented_reference=[chosen - n, rejected])
        for n, (example, (chosen, rejected)) in enumerate(zip(examples, known, strict=True))
    ]
    arranged = objective.arrange(examples)
    assert sorted(example.id for example in arranged) == sorted(example.id for example in examples)
    partners = {example.id: example.augmented.id for example in arranged}
    assert sorted(partners.values()) == sorted(partners)
    assert all(one != other for one, other in partners.items())
    assert {e.id: e.augmented.id for e in objective.arrange(examples)} == partners, "another shuffle the second time"

    own = {example.id: example.augmented.id for example in objective.arrange(examples[:1])}
    assert own == {examples[0].id: examples[0].id}

    def deltas(some: list[PairExample]) -> list[float]:
        policy = pair_logps(model, [example.plain for example in some])
        return objective.offset(model, some, policy, policy).tolist()

    by_pair = dict(zip((e.id for e in examples), deltas(examples), strict=True))
    assert len({round(value, 3) for value in by_pair.values()}) == 4
    assert deltas(arranged) == pytest.approx([by_pair[partners[e.id]] for e in arranged], abs=1e-4)


def test_odpo_takes_the_logarithm_of_the_judges_score_difference(tiny_policy: PolicyCheckpoint) -> None:
    objective, model, examples = objective_on(tiny_policy, ODPO(beta=0.2, alpha=0.5))
    scored = [
        replace(example, scores=[3 + gap, 3.0]) for example, gap in zip(examples, (1.0, 2.0, 3.0, 0.5), strict=True)
    ]
    total = sum(math.log(1 + math.exp(0.4 + 0.5 * math.log(gap))) for gap in (1.0, 2.0, 3.0, 0.5))
    outcome = objective(model, scored)
    assert float(outcome.loss.detach()) == pytest.approx(total, rel=1e-4)
    assert "refinement/mean" not in outcome.metrics


@dataclass
class Margin:
    """-log σ(β h - (s⁺ - s⁻)), a loss that selfalign does not have."""

    title = "Margin"
    formula = "−log σ(β h − (s⁺ − s⁻))"
    pairwise = True
    offset = Offset.score_gap

    beta: float = 0.2

    def __call__(self, policy: PairLogps, reference: PairLogps, score_gap: torch.Tensor | None = None) -> torch.Tensor:
        assert score_gap is not None
        return -torch.nn.functional.logsigmoid(self.beta * log_ratio_margin(policy, reference) - score_gap)


def test_loss_of_a_stranger_gets_what_it_declares(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    objective, model, examples = objective_on(tiny_policy, Margin())
    scored = [
        replace(example, scores=[3 + gap, 3.0]) for example, gap in zip(examples, (1.0, 2.0, 3.0, 0.5), strict=True)
    ]
    total = sum(math.log(1 + math.exp(0.4 + gap)) for gap in (1.0, 2.0, 3.0, 0.5))
    assert float(objective(model, scored).loss.detach()) == pytest.approx(total, rel=1e-4)
    with pytest.raises(SelfalignError, match="the loss Margin needs chosen_score above rejected_score"):
        aligned(tmp_path, tiny_policy, Margin())


def test_sppo_trains_on_shares_of_wins_and_refuses_other_scores(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """The first step is known: Σ (P̂ - ½)²/β² of both responses, whose rewards are 0."""
    shares = [(1.0, 0.25), (0.75, 0.5), (0.5, 0.0), (1.0, 0.0)]
    scored = [
        replace(pair, chosen_score=chosen, rejected_score=rejected)
        for pair, (chosen, rejected) in zip(PAIRS, shares, strict=True)
    ]
    _, _, rows = aligned(tmp_path / "shares", tiny_policy, SPPO(beta=0.1), pairs=scored)
    start = sum((a - 0.5) ** 2 + (b - 0.5) ** 2 for a, b in shares) / 0.1**2 / 4
    assert rows[0]["loss"] == pytest.approx(start, rel=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "refinement/mean" not in rows[0]
    wrong = [replace(scored[0], chosen_score=4.0), *scored[1:3], PAIRS[3]]
    with pytest.raises(SelfalignError, match=r"SPPO needs .*shares of wins from 0 to 1, .* not in 2 pairs, such as a"):
        aligned(tmp_path / "wrong", tiny_policy, SPPO(), pairs=wrong)


def test_label_smoothing_of_a_pair_takes_the_place_of_the_losss_own(tiny_policy: PolicyCheckpoint) -> None:
    """h = -2 and β = 0.2: z = -0.4, or -0.2 with Sr-DPO's Δ; -log σ(z) + ε z."""
    for loss, z in ((DPO(beta=0.2, label_smoothing=0.1), -0.4), (SrDPO(beta=0.2, label_smoothing=0.1), -0.2)):
        objective, model, examples = objective_on(tiny_policy, loss)
        smoothed = [replace(examples[0], label_smoothing=0.0), replace(examples[1], label_smoothing=0.8), *examples[2:]]
        total = sum(math.log(1 + math.exp(-z)) + epsilon * z for epsilon in (0.0, 0.8, 0.1, 0.1))
        assert float(objective(model, smoothed).loss.detach()) == pytest.approx(total, rel=1e-4)


def test_label_smoothing_of_a_pair_is_refused_by_losses_without_any(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    pairs = [*PAIRS[:3], replace(PAIRS[3], label_smoothing=0.2)]
    with pytest.raises(SelfalignError, match="the loss IPO has no use for label_smoothing, but it is in 1 pair, such"):
        aligned(tmp_path / "ipo", tiny_policy, IPO(), pairs=pairs)
    _, one, _ = aligned(tmp_path / "own", tiny_policy, DPO(), pairs=[replace(p, label_smoothing=0.2) for p in PAIRS])
    _, other, _ = aligned(tmp_path / "all", tiny_policy, DPO(label_smoothing=0.2))
    assert one.digest == other.digest


def test_odpo_trains_on_scored_pairs_and_refuses_others(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    scored = [replace(pair, chosen_score=4.0, rejected_score=3.0 - n / 2) for n, pair in enumerate(PAIRS)]
    _, _, rows = aligned(tmp_path / "scored", tiny_policy, ODPO(beta=0.2), pairs=scored)
    assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(
        SelfalignError,
        match=r"the loss ODPO needs chosen_score above rejected_score .* not in 4 pairs, such as a",
    ):
        aligned(tmp_path / "none", tiny_policy, ODPO())
    tied = [*scored[1:], replace(scored[0], rejected_score=4.0)]
    with pytest.raises(SelfalignError, match="but it is not in 1 pair, such as a"):
        aligned(tmp_path / "tied", tiny_policy, ODPO(), pairs=tied)


@pytest.mark.parametrize("live", [False, True], ids=["stored", "live"])
@pytest.mark.parametrize(
    ("kept_in", "dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_a_policy_with_an_adapter_starts_as_its_reference_in_bfloat16(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, kept_in: str, dtype: str, live: bool
) -> None:
    """An adapter that is rounded into the weights is another policy than the one that is trained."""
    _, adapted, _ = aligned(tmp_path / "adapted", tiny_policy, DPO(), rank=4, learning_rate=5e-2)
    given = {"kept_in": kept_in, "dtype": dtype, "rank": 4, "microbatch_tokens": 10_000}
    references = replace(policy_artifact(adapted), digest="not the base's") if live else None
    _, _, rows = aligned(tmp_path / "again", adapted, SrDPO(beta=1.0), references=references, **given)
    assert abs(rows[0]["rewards/margins"]) < 1e-3


def test_frozen_layers_that_are_cast_once_train_the_same_adapter_to_the_bit(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"dtype": "bfloat16", "rank": 4, "learning_rate": 5e-2}
    cast: list[str] = []

    def watched(model: Any) -> None:
        cast_frozen_layers(model)
        cast.extend(name for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16)

    monkeypatch.setattr("selfalign.training.train.cast_frozen_layers", watched)
    _, once, _ = aligned(tmp_path / "once", tiny_policy, SrDPO(beta=0.2), **given)
    layers = tiny_policy.config.num_hidden_layers * 7  # q, k, v, o, gate, up, down
    assert len(cast) == layers
    assert all(name.endswith("base_layer.weight") for name in cast)
    monkeypatch.setattr("selfalign.training.train.cast_frozen_layers", lambda model: None)
    _, each_pass, _ = aligned(tmp_path / "each_pass", tiny_policy, SrDPO(beta=0.2), **given)
    assert once.digest == each_pass.digest != tiny_policy.digest


@pytest.mark.parametrize("rank", [0, 2], ids=["second_model", "adapter_switched_off"])
def test_live_reference_trains_as_the_stored_one(tmp_path: Path, tiny_policy: PolicyCheckpoint, rank: int) -> None:
    settings = {"rank": rank, "learning_rate": 2e-2 if rank else 5e-4, "microbatch_tokens": 10_000}
    _, _, stored = aligned(tmp_path / "stored", tiny_policy, SrDPO(beta=0.2), **settings)
    _, _, live = aligned(
        tmp_path / "live", tiny_policy, SrDPO(beta=0.2), references=policy_artifact(tiny_policy), **settings
    )
    for one, other in zip(stored, live, strict=True):
        for name in ("loss", "rewards/margins", "refinement/mean"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4)
    kind = AdapterSwitchedOff if rank else SecondModel
    base = policy_artifact(tiny_policy)
    assert isinstance(open_references(base, base, weights(0, rank)), kind)


def kto_by_hand(
    policy: PolicyCheckpoint, reference: PolicyCheckpoint, pairs: list[PreferencePair], beta: float
) -> tuple[float, float, list[float], list[float]]:
    """(mean loss, z₀ before it is raised to 0, r of chosen and of rejected responses), from full logits.

    A pair's chosen response stands behind the next pair's prompt, and so does its rejected one.
    """
    r, others = [[], []], []
    for pair, following in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
        mismatched = replace(pair, chosen=following.chosen, rejected=following.rejected)
        own, beside = (
            [a - b for a, b in zip(direct_logps(policy, one), direct_logps(reference, one), strict=True)]
            for one in (pair, mismatched)
        )
        others += beside
        for side, value in zip(r, own, strict=True):
            side.append(value)
    divergence = sum(others) / len(others)
    gains = [[beta * (value - max(0.0, divergence)) for value in side] for side in r]
    losses = [1 / (1 + math.exp(one)) for one in gains[0]] + [1 / (1 + math.exp(-one)) for one in gains[1]]
    return sum(losses) / len(losses), divergence, *r


@pytest.mark.parametrize("nudge", [0.02, 0.05])
def test_kto_on_the_sides_of_pairs_is_that_of_full_logits(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, nudge: float
) -> None:
    """In passes of one response or of all, with stored reference values or a reference that scores at every step."""
    other = nudged_policy(tiny_policy, tmp_path / "other", nudge)
    expected, divergence, chosen, rejected = kto_by_hand(tiny_policy, other, PAIRS, 0.3)
    live = policy_artifact(other)
    given = {"judged_by": other, "starts_as_reference": False, "batch_size": 8, "epochs": 1}
    first: dict[str, torch.Tensor] = {}
    for name, more in (("whole", {}), ("cut", {"microbatch_tokens": 1}), ("live", {"references": live})):
        _, policy, rows = aligned(tmp_path / name, tiny_policy, KTO(beta=0.3), **given, **more)
        assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4), name
        assert rows[0]["kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-3)
        assert rows[0]["rewards/chosen"] == pytest.approx(0.3 * sum(chosen) / 4, rel=1e-3, abs=1e-3)
        assert rows[0]["rewards/rejected"] == pytest.approx(0.3 * sum(rejected) / 4, rel=1e-3, abs=1e-3)
        weights_of = load_file(policy.path / "weights/model.safetensors")
        first = first or weights_of
        for key, value in weights_of.items():
            torch.testing.assert_close(value, first[key], rtol=0, atol=3e-5)


def test_kto_begins_at_half_of_each_weight_raises_desirable_responses_and_lowers_the_others(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    loss = KTO(beta=0.3, desirable_weight=1.4, undesirable_weight=0.6)
    counts, policy, rows = aligned(tmp_path, tiny_policy, loss, batch_size=8)
    assert rows[0]["loss"] == pytest.approx((1.4 / 2 + 0.6 / 2) / 2, rel=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (counts["labelled"], counts["desirable"]) == (8, 4)
    assert "pairs" not in counts
    _, divergence, chosen, rejected = kto_by_hand(policy, tiny_policy, PAIRS, 0.3)
    assert counts["rewards/chosen"] == pytest.approx(0.3 * sum(chosen) / 4, abs=1e-3)
    assert counts["rewards/rejected"] == pytest.approx(0.3 * sum(rejected) / 4, abs=1e-3)
    assert counts["rewards/margins"] == pytest.approx(counts["rewards/chosen"] - counts["rewards/rejected"], abs=1e-5)
    assert counts["logps/chosen_change"] == pytest.approx(sum(chosen) / 4, abs=3e-3)
    assert counts["kl"] == pytest.approx(divergence, abs=3e-3)
    assert counts["rewards/chosen"] > counts["rewards/rejected"]


def test_kto_refuses_a_policy_that_does_not_start_as_its_reference(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    other = nudged_policy(tiny_policy, tmp_path / "other", 0.05)
    with pytest.raises(SelfalignError, match="the policy does not start as its reference"):
        aligned(tmp_path / "out", tiny_policy, KTO(beta=0.3), judged_by=other)


def test_held_out_labelled_responses_are_measured_and_their_instructions_not_trained_on(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    """Of each held-out pair one side is measured, and the other one left out beside it."""
    counts, policy, _ = aligned(tmp_path, tiny_policy, KTO(beta=0.3), held_out=2, batch_size=8)
    assert (counts["labelled"], counts["validation_pairs"]) == (4, 2)
    assert counts["dropped"] == {"too_long": 0, "beside_held_out": 2}
    sides = [one for pair in PAIRS for one in sides_of(pair)]
    held = [sides[n] for n in split_pairs(sides, 2, KnownTexts.of([])).held_out]
    place = {pair.id: number for number, pair in enumerate(PAIRS)}
    _, _, chosen, rejected = kto_by_hand(policy, tiny_policy, PAIRS, 0.3)
    for name, r, label in (("chosen", chosen, True), ("rejected", rejected, False)):
        values = [0.3 * r[place[one.id.split("/")[0]]] for one in held if one.desirable is label]
        assert (f"held_out/rewards/{name}" in counts) == bool(values)
        if values:
            assert counts[f"held_out/rewards/{name}"] == pytest.approx(sum(values) / len(values), abs=1e-3)


def test_held_out_pairs_are_measured_and_not_trained_on(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts, policy, _ = aligned(tmp_path / "held", tiny_policy, SrDPO(beta=0.2), held_out=2)
    assert (counts["pairs"], counts["validation_pairs"], counts["held_out_passed_over"]) == (2, 2, 0)
    assert counts["dropped"] == {"too_long": 0, "beside_held_out": 0}
    split = split_pairs(PAIRS, 2, KnownTexts.of([]))
    _, alone, _ = aligned(tmp_path / "alone", tiny_policy, SrDPO(beta=0.2), pairs=[PAIRS[n] for n in split.training])
    assert policy.digest == alone.digest
    margins = []
    for pair in (PAIRS[n] for n in split.held_out):
        after, before = direct_logps(policy, pair), direct_logps(tiny_policy, pair)
        margins.append(0.2 * ((after[0] - before[0]) - (after[1] - before[1])))
    assert counts["held_out/rewards/margins"] == pytest.approx(sum(margins) / 2, abs=1e-3)
    assert counts["held_out/rewards/margins_low"] < counts["held_out/rewards/margins"]
    assert counts["held_out/rewards/margins_high"] > counts["held_out/rewards/margins"]
    assert counts["held_out/rewards/accuracies_augmented_low"] >= 0
    with pytest.raises(SelfalignError, match=r"train\.validation_pairs=4 of 4 pairs leaves none to train on"):
        aligned(tmp_path / "all", tiny_policy, DPO(), held_out=4)


def test_pairs_that_share_a_text_with_a_held_out_one_are_not_trained_on(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    """Two of one instruction, two with a response in common; what SFT has taught is left to train on."""
    more = [
        preference("e", "Name a bird.", "A crow.", "No bird."),
        preference("f", "Name a stone.", "A stone, I think.", "Flint, maybe."),
        preference("g", "Name a tree.", "An oak.", "No tree."),
        preference("h", "What does air do?", "Nothing.", "Air scatters blue light most."),
    ]
    taught = records_artifact(tmp_path / "seeds", demonstrations=[demonstration("s", "Name a plant.", "An oak.")])
    given = {"pairs": [*PAIRS, *more], "held_out": 5, "trained_on": [taught]}
    counts, policy, _ = aligned(tmp_path / "held", tiny_policy, DPO(), **given)
    assert (counts["pairs"], counts["validation_pairs"], counts["held_out_passed_over"]) == (1, 5, 1)
    assert counts["dropped"] == {"too_long": 0, "beside_held_out": 2}
    _, alone, _ = aligned(tmp_path / "alone", tiny_policy, DPO(), pairs=more[2:3])
    assert policy.digest == alone.digest


def test_dropout_that_is_asked_for_acts_on_the_policy_alone(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """Llama's only dropout is that of its attention; with it the policy does not start as its reference."""
    plain = aligned(tmp_path / "plain", tiny_policy, SrDPO(beta=0.2))[2][0]
    dropped = aligned(tmp_path / "dropped", tiny_policy, SrDPO(beta=0.2), dropout=0.5)[2][0]
    assert abs(dropped["rewards/chosen"]) > 1e-3 > abs(plain["rewards/chosen"])
    assert dropped["refinement/mean"] == pytest.approx(0, abs=1e-3)


def test_checkpoint_that_is_selected_becomes_the_policy(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worse after its fourth step, the policy is that of the second, weight for weight."""
    found = {2: {}, 4: {"wins": 0, "losses": 9, "win_rate": 0.0}}

    def compare(selector: CheckpointSelector, policy: Policy, step: int) -> None:
        files = selector.files(step)
        files.path.mkdir(parents=True)
        files.save(policy, selector.base)
        write_json(selector._result(step), found[step])

    monkeypatch.setattr(CheckpointSelector, "_compare", compare)
    nothing: Any = None
    selection = CheckpointSelection(
        interval_steps=2,
        level=0.005,
        instructions=nothing,
        comparator=nothing,
        compared_by=None,
        engine=nothing,
        sampling=nothing,
        seed=0,
    )
    settings = {"batch_size": 1, "epochs": 2, "schedule": "constant"}
    counts, policy, rows = aligned(tmp_path / "selection", tiny_policy, SrDPO(), selection=selection, **settings)
    assert len(rows) == 4
    assert counts["chosen_step"] == 2
    assert (counts["checkpoint_win_rate/4"], counts["checkpoint_losses/4"]) == (0.0, 9)
    after = [direct_logps(policy, pair) for pair in PAIRS]
    before = [direct_logps(tiny_policy, pair) for pair in PAIRS]
    margins = [0.1 * ((a[0] - b[0]) - (a[1] - b[1])) for a, b in zip(after, before, strict=True)]
    assert counts["rewards/margins"] == pytest.approx(sum(margins) / 4, abs=1e-3)
    _, whole, _ = aligned(tmp_path / "whole", tiny_policy, SrDPO(), **settings)
    assert policy.digest != whole.digest

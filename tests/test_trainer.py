"""The trainer: its steps against plain autograd, resuming, dropout, and everything it must stop at."""

import copy
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import training_jobs
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config, TrainingArguments

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import PairReference, PreferencePair
from selfalign.losses.preference import DPO, IPO, SrDPO
from selfalign.losses.refinement import Refinement
from selfalign.models import batches
from selfalign.models.batches import PairExample, SharedPrompt, encode_group, encode_pairs
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.config import LoRA
from selfalign.models.scorer import LogProbScorer, make_scoring
from selfalign.models.tokenizer import Answer
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.store.artifacts import Artifact, StageOutput
from selfalign.training import trainer as trainer_module
from selfalign.training.config import Optimization, TrainableWeights, TrainConfig
from selfalign.training.objective import Likelihood, ObjectiveOutput
from selfalign.training.parallelism import Parallelism
from selfalign.training.preference import Preference, open_objective
from selfalign.training.prepare import prepare
from selfalign.training.reference import StoredReferences, with_reference
from selfalign.training.train import train
from selfalign.training.trainer import StepDataset, last_checkpoint

FLOAT = TrainableWeights(dtype="float32", lora=LoRA(), seed=3)
ADAPTER = replace(FLOAT, lora=LoRA(rank=4))
ANSWERS = training_jobs.ANSWERS[:-1]


def settings(**options: Any) -> Optimization:
    given = {"learning_rate": 1e-3, "batch_size": 2, "checkpoint_steps": 2, "dtype": "float32", "max_length": 512}
    return Optimization(**given | options)


@pytest.fixture(scope="module")
def demonstrations(tiny_tokenizer: Any) -> list[SharedPrompt]:
    return [
        encode_group(tiny_tokenizer, f"d{i}", [{"role": "user", "content": f"Question {i}?"}], [Answer(text=answer)])
        for i, answer in enumerate(ANSWERS)
    ]


@dataclass
class Pairs:
    """Tokenised pairs and the tiny policy's own log-probabilities of them."""

    bare: list[PairExample]
    references: dict[str, PairReference]

    @property
    def examples(self) -> list[PairExample]:
        """The pairs with their reference values."""
        return self.against(self.references)

    def against(self, references: dict[str, PairReference]) -> list[PairExample]:
        """The pairs with other reference values."""
        return [with_reference(example, references[example.id], "reference") for example in self.bare]


@pytest.fixture(scope="module")
def pairs(tiny_policy: PolicyCheckpoint, tiny_tokenizer: Any) -> Pairs:
    records = [
        PreferencePair(
            id=f"p{i}",
            prompt=[{"role": "user", "content": f"Question {i}?"}],
            chosen=chosen,
            rejected=rejected,
        )
        for i, (chosen, rejected) in enumerate(pairwise(ANSWERS))
    ]
    examples = list(encode_pairs(tiny_tokenizer, records, Refinement(prompt="Do well: "), 512, Counter()))
    scorer = LogProbScorer(tiny_policy.load("float32"), 4096)
    plain = scorer.score([example.plain for example in examples])
    augmented = scorer.score([example.augmented for example in examples if example.augmented])
    references = {
        example.id: PairReference(
            id=example.id, chosen=x[0], rejected=x[1], augmented_chosen=p[0], augmented_rejected=p[1]
        )
        for example, x, p in zip(examples, plain, augmented, strict=True)
    }
    return Pairs(examples, references)


@dataclass
class Trained:
    """What a training left behind."""

    path: Path
    rows: list[dict[str, Any]]
    """The rows that were passed on, in their order."""

    @property
    def weights(self) -> dict[str, Tensor]:
        adapter = self.path / "adapter" / "adapter_model.safetensors"
        return load_file(adapter if adapter.exists() else self.path / "weights" / "model.safetensors")

    @property
    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "log.jsonl").read_text().splitlines()]


def run(
    folder: Path,
    policy: PolicyCheckpoint,
    examples: Sequence[Any],
    *,
    objective: Any = None,
    optimization: Optimization | None = None,
    weights: TrainableWeights = FLOAT,
) -> Trained:
    rows: list[dict[str, Any]] = []
    train(
        StageOutput(folder, "M1", rows.append),
        policy=policy,
        base=policy,
        examples=examples,
        objective=objective or Likelihood("tokens"),
        optimization=optimization or settings(),
        weights=weights,
    )
    return Trained(folder, rows)


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    speed = ("tokens_per_second", "step_seconds", "peak_memory_gb")
    return [{name: value for name, value in row.items() if name not in speed} for row in rows]


class Killed(Exception):
    """Stands for a kill."""


@dataclass
class Breaking:
    """An objective that raises in its n-th call, or turns a record's loss into NaN."""

    inner: Any
    kill_at: int = 0
    poisoned: str = ""
    calls: int = 0

    def weight(self, examples: Sequence[Any]) -> float:
        return self.inner.weight(examples)

    def __call__(self, model: Any, examples: Sequence[Any]) -> ObjectiveOutput:
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        outcome = self.inner(model, examples)
        if any(example.id == self.poisoned for example in examples):
            outcome.loss = outcome.loss * math.nan
        return outcome

    def arrange(self, examples: Sequence[Any]) -> Sequence[Any]:
        return self.inner.arrange(examples)

    def begin_step(self, model: Any, microbatches: Sequence[Any], share: float) -> None:
        self.inner.begin_step(model, microbatches, share)

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        self.inner.check_first_step(distance, loss_distance)


def response_logps(model: Any, group: SharedPrompt, index: int = 0) -> Tensor:
    """Token log-probabilities of a response by a plain pass over full logits."""
    ids = torch.tensor([[*group.prompt, *group.responses[index]]])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(group.prompt) - 1 :, 0]


def plain_step(model: Any, loss: Tensor, rate: float) -> dict[str, Tensor]:
    """The weights after one step of plain gradient descent."""
    loss.backward()
    return {name: (p - rate * p.grad).detach() for name, p in model.named_parameters()}


@pytest.fixture
def gradient_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD, whose step is the gradient itself: adaptive optimisers hide a wrong scale of it."""
    monkeypatch.setattr(
        trainer_module, "build_optimizer", lambda parameters, optimization: torch.optim.SGD(parameters, lr=0.5)
    )


ONE_STEP: dict[str, Any] = {"batch_size": 8, "schedule": "constant", "max_grad_norm": 1e9, "learning_rate": 0.5}


@pytest.mark.usefixtures("gradient_descent")
@pytest.mark.parametrize("average", ["tokens", "examples"])
@pytest.mark.parametrize("microbatch_tokens", [1, 100_000], ids=["eight_passes", "one_pass"])
def test_sft_step_is_that_of_the_mean_over_tokens_or_examples_however_it_is_cut(
    tiny_policy: PolicyCheckpoint,
    demonstrations: list[SharedPrompt],
    tmp_path: Path,
    average: str,
    microbatch_tokens: int,
) -> None:
    optimization = settings(microbatch_tokens=microbatch_tokens, loss_reduction=average, **ONE_STEP)
    trained = run(
        tmp_path / "M1", tiny_policy, demonstrations, objective=Likelihood(average), optimization=optimization
    )
    model = tiny_policy.load("float32").model
    logps = [response_logps(model, group) for group in demonstrations]
    loss = -(torch.cat(logps).mean() if average == "tokens" else torch.stack([part.mean() for part in logps]).mean())
    expected = plain_step(model, loss, 0.5)
    for name, value in trained.weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    (row,) = trained.rows
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert row["loss_per_token"] == pytest.approx(-float(torch.cat(logps).mean().detach()), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_process_that_sees_several_gpus_trains_on_one_as_on_a_machine_with_one(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would put the model into DataParallel, which shares batches out that are not its own."""
    devices = TrainingArguments._setup_devices.func

    def several(arguments: TrainingArguments) -> torch.device:
        device = devices(arguments)
        arguments._n_gpu = 2
        return device

    given = {"objective": Likelihood("tokens"), "optimization": settings(**ONE_STEP)}
    alone = run(tmp_path / "alone", tiny_policy, demonstrations, **given)
    patched = cached_property(several)
    patched.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", patched)
    again = run(tmp_path / "again", tiny_policy, demonstrations, **given)
    for name, value in alone.weights.items():
        assert torch.equal(value, again.weights[name]), name


@pytest.mark.parametrize("source", ["prompted", "contrastive", "shuffled"])
def test_step_is_the_same_where_the_pass_behind_p_goes_on_from_x(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def group(prompt: list[int], seed: int) -> SharedPrompt:
        return SharedPrompt(id=str(seed), prompt=prompt, responses=[[seed, 9, 8], [7, seed]], num_context_tokens=[0, 0])

    examples = [
        PairExample(
            plain=group([*x, 3], seed),
            augmented=group([*x, 40, 41, 3], seed),
            negative=group([*x, 42, 3], seed) if source == "contrastive" else None,
            reference=[-9.0, -11.0],
            augmented_reference=[-10.0, -9.5],
        )
        for seed, x in enumerate(([*range(20, 45)], [*range(20, 30), *range(50, 70)]), start=11)
    ]
    loss = SrDPO(beta=0.2, lam=0.3, refinement=Refinement(source=source, place="after"))
    computed: list[int] = []
    pack = batches.pack

    def counted(*given: Any) -> batches.Batch:
        batch = pack(*given)
        computed.append(batch.inputs["input_ids"].numel())
        return batch

    monkeypatch.setattr(batches, "pack", counted)
    found: list[tuple[float, dict[str, Tensor], int]] = []
    for reuses in (False, True):
        policy = tiny_policy.load("float32", trainable=True)
        make_scoring(policy)
        objective = Preference(loss, StoredReferences(), False, "float32", reuses=reuses)
        computed.clear()
        output = objective(policy.model, objective.arrange(examples))
        output.loss.backward()
        gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
        found.append((output.loss.item(), gradients, sum(computed)))
    (expected, by, all_tokens), (value, gradients, tokens) = found
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == by.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, by[name], rtol=1e-5, atol=1e-6)
    passes = 2 if source == "contrastive" else 1
    assert all_tokens - tokens == passes * (25 + 20), "x is computed once"


@pytest.mark.parametrize(
    ("options", "strategy", "reuses"),
    [
        ({}, "ddp", True),
        ({"dropout": 0.1}, "ddp", False),
        ({"gradient_checkpointing": True}, "ddp", False),
        ({}, "fsdp2", False),
    ],
    ids=["plain", "dropout", "checkpointing", "shards"],
)
def test_nothing_is_kept_where_passes_differ_or_memory_is_short(
    tmp_path: Path, options: dict[str, Any], strategy: str, reuses: bool
) -> None:
    (tmp_path / "references.jsonl").touch()
    one = Artifact(stage="any", key="k", path=tmp_path, digest="d", counts={}, seconds=0)
    weights = replace(FLOAT, parallelism=Parallelism(strategy=strategy))
    objective = open_objective(SrDPO(), one, one, one, None, settings(**options), weights)
    assert isinstance(objective, Preference)
    assert objective.reuses == reuses


@pytest.mark.usefixtures("gradient_descent")
@pytest.mark.parametrize("microbatch_tokens", [1, 100_000], ids=["one_pair_a_pass", "one_pass"])
def test_preference_step_is_that_of_the_mean_over_pairs_however_it_is_cut(
    tiny_policy: PolicyCheckpoint, pairs: Pairs, tmp_path: Path, microbatch_tokens: int
) -> None:
    """Against references that are off, so that h and Δ are not 0 and every term matters."""
    references = {
        name: replace(r, chosen=r.chosen + 3 * i - 4, rejected=r.rejected - i, augmented_rejected=-50.0 - i)
        for i, (name, r) in enumerate(pairs.references.items())
    }
    loss = SrDPO(beta=0.2, lam=0.3, refinement=Refinement(prompt="Do well: "))
    objective = Preference(loss, StoredReferences(), starts_as_reference=False, dtype="float32")
    trained = run(
        tmp_path / "M2",
        tiny_policy,
        pairs.against(references),
        objective=objective,
        optimization=settings(microbatch_tokens=microbatch_tokens, **ONE_STEP),
    )
    model = tiny_policy.load("float32").model
    losses = []
    for example in pairs.examples:
        assert example.augmented is not None
        reference = references[example.id]
        assert reference.augmented_chosen is not None
        assert reference.augmented_rejected is not None
        chosen, rejected = (response_logps(model, example.plain, i).sum() for i in (0, 1))
        h = (chosen - reference.chosen) - (rejected - reference.rejected)
        with torch.no_grad():
            chosen_p, rejected_p = (response_logps(model, example.augmented, i).sum() for i in (0, 1))
        delta = 0.2 * ((chosen_p - reference.augmented_chosen) - (rejected_p - reference.augmented_rejected))
        losses.append(torch.log1p(torch.exp(-(0.2 * h - 0.3 * delta))))
    expected = plain_step(model, torch.stack(losses).mean(), 0.5)
    for name, value in trained.weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert trained.rows[0]["loss"] == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)


def test_four_passes_of_one_equal_one_pass_of_four_over_a_whole_training(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    small, large = (
        run(
            tmp_path / str(microbatch_tokens),
            tiny_policy,
            demonstrations,
            optimization=settings(
                microbatch_tokens=microbatch_tokens, batch_size=4, learning_rate=1e-5, schedule="constant"
            ),
        )
        for microbatch_tokens in (1, 100_000)
    )
    start = load_file(tiny_policy.path / "weights" / "model.safetensors")
    moved = max(float((large.weights[name] - start[name]).abs().max()) for name in start)
    apart = max(float((large.weights[name] - small.weights[name]).abs().max()) for name in start)
    assert moved > 1e-5
    assert apart < 1e-6
    assert [row["loss"] for row in small.rows] == pytest.approx([row["loss"] for row in large.rows], rel=1e-5)


def test_a_step_with_fewer_examples_is_averaged_over_those_it_has(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    trained = run(
        tmp_path / "M1", tiny_policy, demonstrations[:3], optimization=settings(batch_size=2, learning_rate=1e-9)
    )
    model = tiny_policy.load("float32").model
    order = StepDataset(demonstrations[:3], 2, 1, FLOAT.seed)
    assert [len(step) for step in order] == [2, 1]
    for step, row in zip(order, trained.rows, strict=True):
        logps = torch.cat([response_logps(model, group) for group in step])
        assert row["loss"] == pytest.approx(-float(logps.mean().detach()), rel=1e-5)


def test_training_lowers_the_loss(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    trained = run(
        tmp_path / "M1",
        tiny_policy,
        demonstrations,
        optimization=settings(batch_size=8, epochs=8, learning_rate=5e-3),
    )
    assert trained.rows[-1]["loss"] < trained.rows[0]["loss"] - 1


def test_every_step_is_timed_and_its_speed_is_that_of_all_its_tokens(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    trained = run(tmp_path / "M1", tiny_policy, demonstrations, optimization=settings(batch_size=len(demonstrations)))
    (row,) = trained.logged
    assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(sum(map(len, demonstrations)), rel=1e-4)


def interrupted(
    folder: Path, policy: PolicyCheckpoint, examples: Sequence[Any], objective: Any, weights: TrainableWeights
) -> tuple[Trained, list[str]]:
    """A training killed in its fourth step, after the checkpoint of the second, and then run again."""
    with pytest.raises(Killed):
        run(
            folder,
            policy,
            examples,
            objective=Breaking(objective, kill_at=4),
            optimization=settings(epochs=2, batch_size=3),
            weights=weights,
        )
    checkpoints = sorted(path.name for path in (folder / "scratch" / "checkpoints").iterdir())
    again = run(
        folder,
        policy,
        examples,
        objective=objective,
        optimization=settings(epochs=2, batch_size=3),
        weights=weights,
    )
    return again, checkpoints


@pytest.mark.parametrize("weights", [FLOAT, ADAPTER], ids=["all_weights", "adapter"])
@pytest.mark.parametrize("kind", ["sft", "sr_dpo"])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(
    tiny_policy: PolicyCheckpoint,
    demonstrations: list[SharedPrompt],
    pairs: Pairs,
    tmp_path: Path,
    kind: str,
    weights: TrainableWeights,
) -> None:
    examples, objective = demonstrations, Likelihood("tokens")
    if kind == "sr_dpo":
        loss = SrDPO(refinement=Refinement(prompt="Do well: "))
        examples, objective = pairs.examples, Preference(loss, StoredReferences(), True, "float32")
    again, checkpoints = interrupted(tmp_path / "killed", tiny_policy, examples, objective, weights)
    assert checkpoints == ["checkpoint-2"]
    whole = run(
        tmp_path / "whole",
        tiny_policy,
        examples,
        objective=objective,
        optimization=settings(epochs=2, batch_size=3),
        weights=weights,
    )
    assert whole.weights.keys() == again.weights.keys()
    for name, value in whole.weights.items():
        assert torch.equal(value, again.weights[name]), name
    assert [row["step"] for row in again.logged] == [1, 2, 3, 4, 5, 6]
    assert without_speed(again.logged) == without_speed(whole.logged)
    # Those who listen hear the rows of the first attempt again.
    assert without_speed(again.rows) == without_speed(whole.rows)


@pytest.mark.parametrize("weights", [FLOAT, ADAPTER], ids=["all_weights", "adapter"])
def test_same_seed_same_weights_and_another_seed_another_order(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, weights: TrainableWeights
) -> None:
    first = run(tmp_path / "first", tiny_policy, demonstrations, weights=weights)
    # Whatever was drawn before: an adapter's first weights come from the seed as well.
    torch.manual_seed(99)
    second = run(tmp_path / "second", tiny_policy, demonstrations, weights=weights)
    other = run(tmp_path / "other", tiny_policy, demonstrations, weights=replace(weights, seed=4))
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert [row["loss"] for row in first.rows] != [row["loss"] for row in other.rows]


def test_resumed_training_drops_the_same_activations(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    """A checkpoint holds no random state: what is dropped follows from the seed and the step."""
    dropping = settings(dropout=0.3)
    whole = run(tmp_path / "whole", tiny_policy, demonstrations, optimization=dropping)
    killed = Breaking(Likelihood("tokens"), kill_at=4)
    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny_policy, demonstrations, objective=killed, optimization=dropping)
    again = run(tmp_path / "killed", tiny_policy, demonstrations, optimization=dropping)
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)
    other = run(tmp_path / "none", tiny_policy, demonstrations, optimization=settings())
    assert whole.rows[0]["loss"] != other.rows[0]["loss"]


def whole_and_killed(folder: Path, policy: PolicyCheckpoint, examples: Sequence[Any]) -> tuple[Trained, Path]:
    """A training, and the checkpoints of the same one in folder/killed, which broke off behind its second step."""
    whole = run(folder / "whole", policy, examples)
    with pytest.raises(Killed):
        run(folder / "killed", policy, examples, objective=Breaking(Likelihood("tokens"), kill_at=4))
    return whole, folder / "killed" / "scratch" / "checkpoints"


def test_a_checkpoint_that_was_not_written_to_its_end_is_skipped(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    whole, checkpoints = whole_and_killed(tmp_path, tiny_policy, demonstrations)
    good = checkpoints / "checkpoint-2"
    state = (good / "trainer_state.json").read_text()
    for step, text in ((3, None), (4, state[: len(state) // 2]), (5, "")):
        half = checkpoints / f"checkpoint-{step}"
        half.mkdir()
        (written,) = good.glob("*.safetensors")
        (half / written.name).write_bytes(written.read_bytes()[:1000])
        if text is not None:
            (half / "trainer_state.json").write_text(text)
    assert last_checkpoint(checkpoints) == good
    again = run(tmp_path / "killed", tiny_policy, demonstrations)
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)


def test_damaged_checkpoint_stops_the_training_and_names_the_folder_that_is_in_its_way(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    whole, checkpoints = whole_and_killed(tmp_path, tiny_policy, demonstrations)
    folder = checkpoints / "checkpoint-2"
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SelfalignError, match=rf"^{folder}: this checkpoint is damaged.*\. Delete the folder; th"):
        run(tmp_path / "killed", tiny_policy, demonstrations)
    shutil.rmtree(folder)
    again = run(tmp_path / "killed", tiny_policy, demonstrations)
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)


def test_the_newest_checkpoint_is_taken_by_number(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step in (2, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("checkpoint-20", "[]"),
        ("checkpoint-20", "{}"),
        ("checkpoint-20", '{"global_step": 10}'),
        ("checkpoint-20", '{"global_step": 20, "foreign": 1}'),
        ("checkpoint-best", '{"global_step": 20}'),
        ("checkpoint-", '{"global_step": 20}'),
    ],
)
def test_folder_of_something_else_is_no_checkpoint(tmp_path: Path, name: str, state: str) -> None:
    for folder, text in (("checkpoint-10", '{"global_step": 10}'), (name, state)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


DROPPING = {
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
    ),
    "qwen2": Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt2": GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        attn_pdrop=0.5,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_dropout=0.5,
        hidden_dropout=0.5,
    ),
}


# peft turns its layers for GPT-2, whose weights lie the other way round, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("weights", [FLOAT, ADAPTER], ids=["all_weights", "adapter"])
def test_training_is_free_of_every_dropout_the_config_asks_for(
    tiny_policy: PolicyCheckpoint, tiny_tokenizer: Any, name: str, weights: TrainableWeights
) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(DROPPING[name]))
    group = SharedPrompt(id="a", prompt=[5, 6, 7, 8], responses=[[9, 10, 11], [12, 13]], num_context_tokens=[0, 0])
    ids = torch.tensor([[*group.prompt, *group.responses[0]]])
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits), "nothing to switch off"
        model.eval()
        expected = response_logps(model, group).sum()
        prepared = Policy(model, tiny_tokenizer, "")
        prepare(prepared, tiny_policy, weights, 0.0)
        prepared.model.train()
        first, second = (Likelihood("tokens")(prepared.model, [group]).loss for _ in range(2))
        single = SharedPrompt(id="a", prompt=group.prompt, responses=group.responses[:1], num_context_tokens=[0])
        alone = -Likelihood("tokens")(prepared.model, [single]).loss
    assert torch.equal(first, second)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)


def test_first_two_steps_of_a_policy_with_dropout_in_its_config_start_as_the_reference(
    tiny_policy: PolicyCheckpoint, pairs: Pairs, tmp_path: Path
) -> None:
    config = json.loads((tiny_policy.path / "weights" / "config.json").read_text())
    folder = tmp_path / "M0"
    (folder / "weights").mkdir(parents=True)
    for path in (tiny_policy.path / "weights").iterdir():
        (folder / "weights" / path.name).write_bytes(path.read_bytes())
    (folder / "weights" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    (folder / "tokenizer").symlink_to(tiny_policy.path / "tokenizer")
    (folder / "weights.json").write_text("{}")
    objective = Preference(DPO(), StoredReferences(), True, "float32")
    trained = run(
        tmp_path / "M1",
        PolicyCheckpoint(folder),
        pairs.examples,
        objective=objective,
        optimization=settings(learning_rate=1e-12),
    )
    for row in trained.rows[:2]:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_loss_that_is_not_finite_stops_with_the_records_and_keeps_the_checkpoint(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    steps = list(StepDataset(demonstrations, 2, 1, FLOAT.seed))
    poisoned = steps[2][0].id
    objective = Breaking(Likelihood("tokens"), poisoned=poisoned)
    one_by_one = settings(microbatch_tokens=1)
    with pytest.raises(SelfalignError, match=rf"M1: the loss is not finite at step 3 \(records {poisoned}\)"):
        run(tmp_path / "M1", tiny_policy, demonstrations, objective=objective, optimization=one_by_one)
    assert not (tmp_path / "M1" / "weights").exists()
    assert last_checkpoint(tmp_path / "M1" / "scratch" / "checkpoints") is not None


@pytest.mark.parametrize("weights", [FLOAT, ADAPTER], ids=["full", "adapter"])
def test_policy_whose_last_step_was_not_finite_is_not_kept(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, weights: TrainableWeights
) -> None:
    steep = settings(learning_rate=1e39, batch_size=len(demonstrations))  # The only loss is that before the step.
    with pytest.raises(SelfalignError, match=r"the trained weights .* are not all finite"):
        run(tmp_path / "M1", tiny_policy, demonstrations, optimization=steep, weights=weights)
    assert not (tmp_path / "M1" / "weights.json").exists()


def test_policy_whose_log_probabilities_are_not_finite_has_no_metrics(
    tiny_policy: PolicyCheckpoint, pairs: Pairs
) -> None:
    loaded = tiny_policy.load("float32")
    prepare(loaded, tiny_policy, FLOAT, 0.0)
    with torch.no_grad():
        next(loaded.model.parameters()).fill_(math.nan)
    objective = Preference(DPO(), StoredReferences(), True, "float32")
    with pytest.raises(SelfalignError, match=r"record p\d: its log-probabilities are not finite"):
        objective.measure(loaded, pairs.examples, settings())


@pytest.mark.parametrize("loss", [DPO(), IPO(), SrDPO(refinement=Refinement(prompt="Do well: "))], ids=repr)
@pytest.mark.parametrize("microbatch_tokens", [1, 100_000])
def test_first_step_of_a_policy_that_is_its_reference_has_the_known_loss(
    tiny_policy: PolicyCheckpoint, pairs: Pairs, tmp_path: Path, loss: Any, microbatch_tokens: int
) -> None:
    optimization = settings(batch_size=8, microbatch_tokens=microbatch_tokens)
    objective = Preference(loss, StoredReferences(), True, "float32")
    row = run(tmp_path, tiny_policy, pairs.examples, objective=objective, optimization=optimization).rows[0]
    assert row["loss"] == pytest.approx(25 if isinstance(loss, IPO) else math.log(2), abs=1e-3)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert row[name] == pytest.approx(0, abs=1e-4)
    if isinstance(loss, SrDPO):
        assert row["refinement/mean"] == pytest.approx(0, abs=1e-4)


WRONG = {
    "every chosen value off": lambda i, r: replace(r, chosen=r.chosen - 0.5),
    "every rejected value off": lambda i, r: replace(r, rejected=r.rejected + 0.5),
    "every augmented value off": lambda i, r: replace(r, augmented_chosen=r.augmented_chosen + 0.5),
    "errors that cancel in the mean": lambda i, r: replace(r, chosen=r.chosen + (-1) ** i * 20 * (i < 6)),
}


@pytest.mark.parametrize("name", WRONG)
def test_first_step_against_a_wrong_reference_stops_with_the_likely_causes(
    tiny_policy: PolicyCheckpoint, pairs: Pairs, tmp_path: Path, name: str
) -> None:
    wrong = {key: WRONG[name](i, r) for i, (key, r) in enumerate(pairs.references.items())}
    loss = SrDPO(refinement=Refinement(prompt="Do well: "))
    optimization = settings(batch_size=8)
    checked = Preference(loss, StoredReferences(), True, "float32")
    with pytest.raises(SelfalignError, match=r"does not start as its reference: at the first step .* Likely causes:"):
        run(tmp_path / "checked", tiny_policy, pairs.against(wrong), objective=checked, optimization=optimization)


def test_first_step_against_another_reference_that_is_meant_is_not_stopped(
    tiny_policy: PolicyCheckpoint, pairs: Pairs, tmp_path: Path
) -> None:
    other = {name: replace(r, chosen=r.chosen - 5) for name, r in pairs.references.items()}
    objective = Preference(DPO(), StoredReferences(), starts_as_reference=False, dtype="float32")
    row = run(tmp_path, tiny_policy, pairs.against(other), objective=objective).rows[0]
    assert row["rewards/chosen"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_step_check_allows_rounding_of_the_dtype_and_no_more(dtype: str) -> None:
    objective = Preference(DPO(beta=0.1), StoredReferences(), True, dtype)
    nats = {"float32": 1e-2, "bfloat16": 1.0}[dtype]
    share = {"float32": 0.05, "bfloat16": 0.5}[dtype]
    objective.check_first_step(0.1 * nats * 0.9, share * 0.9)
    for distance, loss_distance in ((0.1 * nats * 1.1, 0.0), (0.0, share * 1.1)):
        with pytest.raises(SelfalignError, match="does not start as its reference"):
            objective.check_first_step(distance, loss_distance)


def test_a_reference_value_that_is_missing_is_an_error(
    tiny_policy: PolicyCheckpoint, pairs: Pairs, tmp_path: Path
) -> None:
    missing = {name: replace(r, augmented_chosen=None) for name, r in pairs.references.items()}
    objective = Preference(SrDPO(refinement=Refinement(prompt="Do well: ")), StoredReferences(), True, "float32")
    with pytest.raises(ValueError, match="a stored reference log-probability is missing"):
        run(tmp_path, tiny_policy, pairs.against(missing), objective=objective)


def artifact_of(folder: Path) -> Artifact:
    return Artifact(stage="s", key="k", path=folder, digest="d", counts={}, seconds=0.0)


def test_references_of_a_killed_scoring_are_right_although_the_batches_became_larger(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`microbatch_tokens` is no part of the key, so what was scored before the kill may have been cut otherwise."""
    records = [
        PreferencePair(id=f"p{i}", prompt=[{"role": "user", "content": f"Question {i}?"}], chosen=a, rejected=b)
        for i, (a, b) in enumerate(pairwise(ANSWERS))
    ]
    write_records(tmp_path / "pairs.jsonl", records)

    def score(folder: str, microbatch_tokens: int) -> list[PairReference]:
        out = StageOutput(tmp_path / folder, "reference", lambda row: None)
        precision = settings(microbatch_tokens=microbatch_tokens).logprob_settings("float32")
        policy, pairs = artifact_of(tiny_policy.path), artifact_of(tmp_path)
        reference_logprobs(out, policy=policy, pairs=pairs, augmentation=None, precision=precision)
        return read_records(out.path / "references.jsonl", PairReference)

    whole = score("whole", 100_000)
    original, calls = LogProbScorer.score, 0

    def dying(self: LogProbScorer, groups: Sequence[SharedPrompt]) -> list[list[float]]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return original(self, groups)

    with monkeypatch.context() as patch:
        patch.setattr(LogProbScorer, "score", dying)
        with pytest.raises(Killed):
            score("killed", 1)
    again = score("killed", 100_000)
    assert [(r.id, r.rejected) for r in again] == [(r.id, pytest.approx(r.rejected, abs=1e-4)) for r in whole]
    assert [r.chosen for r in again] == pytest.approx([r.chosen for r in whole], abs=1e-4)


@pytest.mark.usefixtures("gradient_descent")
@pytest.mark.parametrize("weights", [FLOAT, ADAPTER], ids=["all_weights", "adapter"])
def test_gradient_checkpointing_changes_nothing(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, weights: TrainableWeights
) -> None:
    plain, saving = (
        run(
            tmp_path / str(on),
            tiny_policy,
            demonstrations,
            optimization=settings(gradient_checkpointing=on, **ONE_STEP),
            weights=weights,
        )
        for on in (False, True)
    )
    for name, value in plain.weights.items():
        torch.testing.assert_close(saving.weights[name], value, rtol=1e-6, atol=1e-7)


def rates(tiny_policy: PolicyCheckpoint, examples: list[SharedPrompt], folder: Path, **options: Any) -> list[float]:
    """The learning rate of each of eight steps."""
    optimization = settings(batch_size=1, learning_rate=0.01, checkpoint_steps=100, **options)
    return [row["learning_rate"] for row in run(folder, tiny_policy, examples, optimization=optimization).rows]


def test_learning_rates_follow_each_schedule(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    cosine = rates(tiny_policy, demonstrations, tmp_path / "1", schedule="cosine", final_learning_rate=0.002)
    assert cosine == pytest.approx(
        [0.002 + 0.008 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)], rel=1e-4
    )
    linear = rates(tiny_policy, demonstrations, tmp_path / "2", schedule="linear")
    assert linear == pytest.approx([0.01 * (1 - step / 8) for step in range(8)], rel=1e-4)
    assert rates(tiny_policy, demonstrations, tmp_path / "3", schedule="constant") == [0.01] * 8


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_schedule_warms_up_from_zero(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, schedule: str
) -> None:
    warmed = rates(tiny_policy, demonstrations, tmp_path, schedule=schedule, warmup_ratio=0.5)
    assert warmed[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01], rel=1e-4)


def test_only_step_is_no_warm_up(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    optimization = settings(**ONE_STEP | {"warmup_ratio": 0.1, "learning_rate": 0.01})
    assert [
        row["learning_rate"] for row in run(tmp_path, tiny_policy, demonstrations, optimization=optimization).rows
    ] == [0.01]


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_both_optimisers_move_the_weights_their_own_way(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, optimizer: str
) -> None:
    optimization = settings(optimizer=optimizer, **ONE_STEP | {"learning_rate": 1e-3})
    trained = run(tmp_path, tiny_policy, demonstrations, optimization=optimization)
    start = load_file(tiny_policy.path / "weights" / "model.safetensors")
    # The first step: Adam moves by the rate; RMSprop (α = 0.99) by the rate / √0.01.
    largest = max(float((trained.weights[name] - start[name]).abs().max()) for name in start)
    assert largest == pytest.approx({"adamw": 1e-3, "rmsprop": 1e-2}[optimizer], rel=0.01)


def test_weight_decay_pulls_every_weight_towards_zero_on_top_of_the_step(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    plain, decayed = (
        run(
            tmp_path / str(decay),
            tiny_policy,
            demonstrations,
            optimization=settings(**ONE_STEP | {"learning_rate": 1e-3, "weight_decay": decay}),
        )
        for decay in (0.0, 0.5)
    )
    start = load_file(tiny_policy.path / "weights" / "model.safetensors")
    for name, value in start.items():
        expected = plain.weights[name] - 1e-3 * 0.5 * value
        torch.testing.assert_close(decayed.weights[name], expected, rtol=1e-6, atol=1e-7)


def test_training_multiplies_in_the_dtype_asked_for_whatever_its_launcher_says(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(tmp_path / "alone", tiny_policy, demonstrations)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = run(tmp_path / "launched", tiny_policy, demonstrations)
    assert without_speed(launched.rows) == without_speed(alone.rows)


def test_gradients_are_clipped_to_the_norm_asked_for(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, gradient_descent: None
) -> None:
    optimization = settings(**ONE_STEP | {"max_grad_norm": 0.01})
    trained = run(tmp_path, tiny_policy, demonstrations, optimization=optimization)
    start = load_file(tiny_policy.path / "weights" / "model.safetensors")
    step = torch.cat([(trained.weights[name] - start[name]).flatten() for name in start]).norm()
    assert float(step) == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert trained.rows[0]["grad_norm"] > 0.1


def test_adapter_alone_is_trained_and_saved(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    trained = run(tmp_path, tiny_policy, demonstrations, weights=ADAPTER)
    assert all("lora_" in name for name in trained.weights)
    assert any(float(value.abs().max()) > 0 for name, value in trained.weights.items() if "lora_B" in name)
    assert (tmp_path / "weights").resolve() == (tiny_policy.path / "weights").resolve()


def test_spaces_between_the_names_of_adapted_layers_are_not_part_of_them(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    adapter = replace(ADAPTER, lora=LoRA(rank=4, targets="q_proj, k_proj"))
    trained = run(tmp_path, tiny_policy, demonstrations, weights=adapter)
    assert {name.split(".")[-3] for name in trained.weights} == {"q_proj", "k_proj"}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_proj,w_proj", r"LlamaForCausalLM has no layer 'w_proj'"),
        ("w_proj", r"Target modules .*'w_proj'.* not found"),
        ("input_layernorm", r".*LlamaRMSNorm.* is not supported"),
        ("embed_tokens,q_proj", r"the embedding is tied to the output layer"),
        ("lm_head", r"the output layer cannot have an adapter: remove it"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_layers_that_cannot_be_adapted_are_refused_with_those_that_can(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path, targets: str, said: str
) -> None:
    adapter = replace(ADAPTER, lora=LoRA(rank=4, targets=targets))
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(SelfalignError, match=rf"model\.lora\.targets={targets}: {said}.*; linear layers are {layers}$"):
        run(tmp_path, tiny_policy, demonstrations, weights=adapter)


def test_policy_with_an_adapter_is_not_trained_without_one(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    run(tmp_path / "M1", tiny_policy, demonstrations, weights=ADAPTER)
    with pytest.raises(
        SelfalignError, match=r"has an adapter, but model\.lora\.rank=0 trains all weights: set model\.lora\.rank"
    ):
        run(tmp_path / "M2", PolicyCheckpoint(tmp_path / "M1"), demonstrations)


def test_training_goes_on_with_the_adapter_that_is_there(
    tiny_policy: PolicyCheckpoint, demonstrations: list[SharedPrompt], tmp_path: Path
) -> None:
    first = run(tmp_path / "M1", tiny_policy, demonstrations, weights=ADAPTER)
    second = run(
        tmp_path / "M2",
        PolicyCheckpoint(tmp_path / "M1"),
        demonstrations,
        weights=ADAPTER,
        optimization=settings(learning_rate=1e-9),
    )
    assert first.weights.keys() == second.weights.keys()
    for name, value in first.weights.items():
        torch.testing.assert_close(second.weights[name], value, rtol=0, atol=1e-6)


def test_every_example_occurs_once_an_epoch_in_an_order_of_its_own() -> None:
    examples: list[Any] = list(range(10))
    steps = [list(step) for step in StepDataset(examples, 4, 2, seed=5)]
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == examples
    assert first != second != examples
    assert [list(step) for step in StepDataset(examples, 4, 2, seed=5)] == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0 and finite, got nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"microbatch_tokens": 0}, "microbatch_tokens must be 1 or more"),
        ({"max_length": 0}, "max_length must be 1 or more"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be 1 or more"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"final_learning_rate": 0.1}, "final_learning_rate must lie between 0 and learning_rate, got 0.1"),
        ({"final_learning_rate": -0.1}, "final_learning_rate must lie between 0 and learning_rate, got -0.1"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0 and finite, got inf"),
        (
            {"schedule": "linear", "final_learning_rate": 1e-4},
            "final_learning_rate has no meaning with schedule=linear",
        ),
        ({"optimizer": "rmsprop", "weight_decay": 0.1}, "weight_decay has no meaning with optimizer=rmsprop"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1, got 1.0"),
        ({"warmup_ratio": -0.1}, "warmup_ratio must be at least 0 and below 1"),
        ({"schedule": "cosin"}, "schedule must be one of cosine, linear, constant; got 'cosin'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, rmsprop, adamw_8bit; got 'sgd'"),
        ({"loss_reduction": "pairs"}, "loss_reduction must be one of tokens, examples; got 'pairs'"),
        ({"dtype": "float16"}, "dtype must be one of auto, float32, bfloat16; got 'float16'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=rf"^train\.sft\.{message}"):
        settings(**options).check("train.sft")
    with pytest.raises(SelfalignError, match=rf"^train\.align\.{message}"):
        TrainConfig(sft=settings(), align=settings(**options))


def test_unknown_reference_is_refused() -> None:
    with pytest.raises(SelfalignError, match=r"train\.reference_policy must be previous, sft or base; got 'last'"):
        TrainConfig(sft=settings(), align=settings(), reference_policy="last")


def test_precision_says_what_a_log_probability_depends_on() -> None:
    assert settings(dtype="bfloat16").logprob_settings("float32").autocast == "bfloat16"
    assert settings(dtype="bfloat16").logprob_settings("bfloat16").autocast == "bfloat16", (
        "as in training, norms are float32"
    )
    assert settings(dtype="float32").logprob_settings("bfloat16").autocast == ""
    precision = settings(dtype="float32", max_length=77, microbatch_tokens=11).logprob_settings("float32")
    assert (precision.dtype, precision.autocast, precision.max_length, precision.max_batch_tokens) == (
        "float32",
        "",
        77,
        11,
    )


def test_likelihood_of_shared_prompts_weighs_the_scored_tokens_alone() -> None:
    group = SharedPrompt(id="a", prompt=[1, 2], responses=[[3, 4, 5], [6, 7]], num_context_tokens=[1, 0])
    assert Likelihood("tokens").weight([group, group]) == 8
    assert Likelihood("examples").weight([group, group]) == 4

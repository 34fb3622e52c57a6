"""Trainings to be done by one process and by several: `torchrun tests/training_jobs.py JOBS.json`, or `train_here`."""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from architectures import ARCHITECTURES, as_policy
from builders import preference

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.records import LabelledResponse, PairReference
from selfalign.losses.preference import DPO, KTO, SrDPO
from selfalign.losses.refinement import Refinement
from selfalign.metrics.accumulate import averages
from selfalign.models.batches import PairExample, SharedPrompt, encode_group, encode_pairs
from selfalign.models.capabilities import Capabilities
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import LoRA
from selfalign.models.labelled import encode_labelled
from selfalign.models.tokenizer import Answer
from selfalign.store.artifacts import StageOutput
from selfalign.training import trainer as trainer_module
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.objective import Likelihood
from selfalign.training.parallelism import Parallelism
from selfalign.training.preference import Preference
from selfalign.training.reference import AdapterSwitchedOff, StoredReferences, with_reference
from selfalign.training.train import train
from selfalign.training.unpaired import Unpaired

ANSWERS = [
    "Red.",
    "Because the sky is blue, and the sea under it is too.",
    "Twelve",
    "No one knows.",
    "First open the window, then close the door.",
    "It depends.",
    "A poem about rain, in four lines, with a rhyme at the end of each.",
    "Yes.",
    "Never on a Sunday.",
]


@dataclass(frozen=True)
class Job:
    """A training: of which kind, on which weights, in which layout, and after how many steps it is killed.

    `architecture` is whose tiny model it starts from instead of the policy that is given.

    Nine examples in batches of eight are two steps an epoch, the second of one example: with two processes, one of
    them has none.
    """

    folder: str
    kind: str = "sft"
    rank: int = 0
    targets: str = "all-linear"
    architecture: str = ""
    layout: str = "ddp"
    dtype: str = "float32"
    killed_after: int = 0
    breaks: str = ""
    epochs: int = 2
    options: tuple[tuple[str, Any], ...] = ()


class Killed(Exception):
    """Stands for a kill."""


@dataclass
class Stopping:
    """An objective whose training ends when it begins a step too many, or goes wrong in one process."""

    inner: Any
    job: Job
    steps: int = 0

    def arrange(self, examples: Sequence[Any]) -> Sequence[Any]:
        self.steps += 1
        if self.steps == self.job.killed_after + 1 > 1:
            raise Killed
        if self.job.breaks == "raise" and distributed.rank() == 1:
            raise RuntimeError("this process is broken")
        return self.inner.arrange(examples)

    def weight(self, examples: Sequence[Any]) -> float:
        return self.inner.weight(examples)

    def __call__(self, model: Any, examples: Sequence[Any]) -> Any:
        outcome = self.inner(model, examples)
        if any(example.id == self.job.breaks for example in examples):
            outcome.loss = outcome.loss * float("nan")
        return outcome

    def begin_step(self, model: Any, microbatches: Sequence[Any], share: float) -> None:
        self.inner.begin_step(model, microbatches, share)

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        self.inner.check_first_step(distance, loss_distance)


def demonstrations(tokenizer: Any) -> list[SharedPrompt]:
    return [
        encode_group(tokenizer, f"d{i}", [{"role": "user", "content": f"Question {i}?"}], [Answer(text=answer)])
        for i, answer in enumerate(ANSWERS)
    ]


def pairs(tokenizer: Any) -> list[PairExample]:
    """Pairs with reference values that are off, each in its own way, so that every term matters."""
    records = [
        preference(f"p{i}", f"Question {i}?", answer, ANSWERS[i - 1] + " Or so.") for i, answer in enumerate(ANSWERS)
    ]
    examples = list(encode_pairs(tokenizer, records, Refinement(prompt="Do well: "), 512, Counter()))
    nats = {example.id: [-6.9 * tokens for tokens in example.plain.scored()] for example in examples}
    references = [
        PairReference(
            id=name,
            chosen=chosen + 3 * i - 4,
            rejected=rejected - i,
            augmented_chosen=chosen,
            augmented_rejected=rejected - 2 * i,
        )
        for i, (name, (chosen, rejected)) in enumerate(nats.items())
    ]
    return [with_reference(example, known, "reference") for example, known in zip(examples, references, strict=True)]


def labelled(tokenizer: Any) -> list[PairExample]:
    """Labelled responses with reference values that are off, so that z₀ is above 0 and every term matters."""
    records = [
        LabelledResponse(
            id=f"l{i}",
            prompt=[{"role": "user", "content": f"Question {i // 2}?"}],
            response=answer,
            desirable=i % 3 != 0,
        )
        for i, answer in enumerate(ANSWERS)
    ]
    examples = list(encode_labelled(tokenizer, records, 512, Counter()))
    return [
        replace(example, reference=[-6.9 * own + 3 * i - 4, -6.9 * other - 2 - i])
        for i, example in enumerate(examples)
        for own, other in [example.plain.scored()]
    ]


def task(kind: str, tokenizer: Any) -> tuple[Sequence[Any], Any]:
    """What a job of a kind trains on, and its objective."""
    if kind == "sft":
        return demonstrations(tokenizer), Likelihood("tokens")
    if kind == "kto":
        loss = KTO(beta=0.2, desirable_weight=1.5, undesirable_weight=0.75)
        return labelled(tokenizer), Unpaired(loss, StoredReferences(), starts_as_reference=False, dtype="float32")
    examples = pairs(tokenizer)
    if kind == "live":
        return examples, Preference(DPO(), AdapterSwitchedOff(), starts_as_reference=True, dtype="float32")
    refinement = Refinement(source="shuffled", prompt="Do well: ", normalise="rms")
    loss = SrDPO(beta=0.2, lam=0.3, lam_warmup=0.5, refinement=refinement)
    return examples, Preference(loss, StoredReferences(), starts_as_reference=False, dtype="float32")


def as_fetched(architecture: str, folder: Path) -> None:
    """Makes an architecture's tiny model with the capabilities that its check finds."""
    one = ARCHITECTURES[architecture]
    as_policy(one.build(), folder)
    shares = one.scores == "prompt states shared"
    Capabilities(packs=one.packs, shares_states=shares, writes=one.writes, dropout=one.dropout).save(folder)


def train_here(job: Job, policy: PolicyCheckpoint) -> None:
    """Does a training in this process and the others there are; its measures go into measured.json."""
    if job.architecture:
        own = Path(f"{job.folder}-M0")
        distributed.on_main(lambda: as_fetched(job.architecture, own))
        policy = PolicyCheckpoint(own)
    folder = Path(job.folder)
    out = StageOutput(folder, "M1", lambda row: None)
    settings = {"learning_rate": 1e-3, "batch_size": 8, "microbatch_tokens": 60, "dtype": "float32"}
    settings["checkpoint_steps"] = 1 if job.killed_after else 100
    optimization = Optimization(**settings | {"epochs": job.epochs} | dict(job.options))
    weights = TrainableWeights(
        dtype=job.dtype,
        lora=LoRA(rank=job.rank, targets=job.targets),
        seed=3,
        parallelism=Parallelism(strategy=job.layout),
    )
    examples, objective = task(job.kind, policy.load_tokenizer())
    try:
        trained = train(
            out,
            policy=policy,
            base=policy,
            examples=examples,
            objective=Stopping(objective, job),
            optimization=optimization,
            weights=weights,
        )
        if isinstance(objective, Preference | Unpaired):
            measured = averages(objective.measure(trained, examples, optimization))
            (out.path / "measured.json").write_text(json.dumps(measured))
    except Killed:
        pass
    except SelfalignError as error:
        (folder / f"error-{distributed.rank()}").write_text(str(error))


def shard_on_the_cpu() -> None:
    """Lets accelerate share weights out among CPU processes, which it otherwise leaves to GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    original = trainer_module._arguments

    def arguments(*given: Any) -> Any:
        made = original(*given)
        assert made.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        return made

    trainer_module._arguments = arguments


def main(path: Path) -> None:
    """Does all jobs of a file, every process all of them."""
    given = json.loads(path.read_text())
    distributed.join()
    if given["shard"]:
        shard_on_the_cpu()
    for fields in given["jobs"]:
        train_here(Job(**fields), PolicyCheckpoint(Path(given["policy"])))
    distributed.leave()


def as_file(path: Path, jobs: Sequence[Job], policy: PolicyCheckpoint, *, shard: bool) -> Path:
    """The jobs as `main` reads them."""
    path.write_text(json.dumps({"jobs": [asdict(job) for job in jobs], "policy": str(policy.path), "shard": shard}))
    return path


def moved(job: Job, folder: Path, **changes: Any) -> Job:
    """The job with another folder and whatever else."""
    return replace(job, folder=str(folder), **changes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

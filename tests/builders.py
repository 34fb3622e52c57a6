"""What tests of stages and of whole runs stand on: finished artifacts, workspaces, composed configurations."""

import functools
import json
import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selfalign.cli.environment import conf_folder
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.extensions import import_component
from selfalign.config.hydra import compose_experiment
from selfalign.core.files import digest_folder, digest_json, write_json
from selfalign.core.jsonl import HasId, write_records
from selfalign.core.records import (
    Demonstration,
    FinishReason,
    Instruction,
    Judgement,
    JudgementStatus,
    PreferencePair,
    Response,
    ResponseScore,
)
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.engines.transformers import Transformers, TransformersGenerator
from selfalign.launch.experiment import run_experiment
from selfalign.models.checkpoint import Policy, PolicyCheckpoint, digest_weights
from selfalign.models.config import LoRA
from selfalign.pipeline.loop import plan
from selfalign.stages.sft import sft
from selfalign.store.artifacts import Artifact, StageOutput
from selfalign.training.config import Optimization, TrainableWeights

ROOT = Path(__file__).resolve().parents[1]

RUBRIC = (
    "Grade.\n<instruction>\n{instruction}\n</instruction>\n<response>\n{response}\n</response>\nReply: Score: <points>"
)
"""A judge's prompt that is short enough for a tiny model to be quick."""


# --- artifacts ---------------------------------------------------------------------------------------------------


def floors() -> list[list[str]]:
    """The packages of each floor, as docs/architecture.md has them, from the ground up."""
    [block] = re.findall(r"^```floors\n(.*?)^```$", (ROOT / "docs/architecture.md").read_text("utf-8"), re.M | re.S)
    return [line.split() for line in block.splitlines()]


def components() -> dict[str, set[type]]:
    """{group: the classes that its options name}."""
    found: dict[str, set[type]] = {}
    for option in (ROOT / "conf").glob("*/*.yaml"):
        names = re.findall(r"^  - /schema/(.+)@", option.read_text("utf-8"), re.M)
        found.setdefault(option.parent.name, set()).update(map(import_component, names))
    return {group: classes for group, classes in found.items() if classes}


def artifact(folder: Path, stage: str = "given", counts: dict[str, Any] | None = None) -> Artifact:
    """A folder as a finished artifact."""
    digest = digest_json(digest_folder(folder))
    return Artifact(stage=stage, key=folder.name, path=folder, digest=digest, counts=counts or {}, seconds=0.0)


def records_artifact(folder: Path, **files: Sequence[HasId]) -> Artifact:
    """A finished artifact that holds `<name>.jsonl` for every keyword, and beside judgements their scores."""
    folder.mkdir(parents=True, exist_ok=True)
    if "judgements" in files and "scores" not in files:
        files["scores"] = mean_scores(files["judgements"])
    for name, records in files.items():
        write_records(folder / f"{name}.jsonl", records)
    return artifact(folder)


def linked_artifact(
    folder: Path, label: str, stage: str, inputs: dict[str, Any] | None = None, **files: Sequence[HasId]
) -> dict[str, str]:
    """Put a finished artifact into the store beside a run folder and link it there; return it as an input of others."""
    place = folder.parent / "store" / stage / label.replace("/", "-")
    made = records_artifact(place, **files)
    manifest = {"stage": stage, "format": 0, "digest": made.digest, "inputs": inputs or {}, "counts": {}}
    write_json(place / "manifest.json", manifest)
    link = folder / "artifacts" / label
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(place)
    return {"artifact": stage, "digest": made.digest}


def policy_artifact(files: PolicyCheckpoint) -> Artifact:
    """A policy's folder as a finished artifact."""
    return Artifact(stage="load_model", key="tiny", path=files.path, digest=files.digest, counts={}, seconds=0.0)


def nudged_policy(files: PolicyCheckpoint, folder: Path, size: float = 0.02) -> PolicyCheckpoint:
    """The same architecture with other weights: every parameter moved by noise of this size."""
    policy = files.load("float32")
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=noise)
    policy.model.save_pretrained(folder / "weights")
    policy.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "weights.json", digest_weights(folder / "weights"))
    return PolicyCheckpoint(folder)


def wider_policy(files: PolicyCheckpoint, folder: Path, rows: int = 1152) -> PolicyCheckpoint:
    """The policy with moved weights and more rows in its vocabulary, for tokenizers to which a test adds tokens."""
    policy = nudged_policy(files, folder / "nudged", size=0.2).load("float32")
    torch.manual_seed(1)
    policy.model.resize_token_embeddings(rows, mean_resizing=False)
    policy.model.save_pretrained(folder / "weights")
    policy.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "weights.json", digest_weights(folder / "weights"))
    return PolicyCheckpoint(folder)


def small_context_policy(files: PolicyCheckpoint, folder: Path, context: int) -> PolicyCheckpoint:
    """The same weights, said to take sequences of at most `context` tokens."""
    policy = files.load("float32")
    policy.model.config.max_position_embeddings = context
    policy.model.save_pretrained(folder / "weights")
    policy.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "weights.json", digest_weights(folder / "weights"))
    return PolicyCheckpoint(folder)


def taught_policy(files: PolicyCheckpoint, folder: Path, epochs: int = 4) -> PolicyCheckpoint:
    """The policy after a few steps of SFT on short answers, so that it ends its turns by itself."""
    subjects = ["bees", "rivers", "clocks", "bread", "stars", "trains", "songs", "boats"]
    taught = [demonstration(f"t{n}", f"Say one thing about {s}.", f"Old {s} are good.") for n, s in enumerate(subjects)]
    given, policy = records_artifact(folder / "given", demonstrations=taught), policy_artifact(files)
    settings = optimization(learning_rate=1e-2, epochs=epochs, batch_size=4)
    out = workspace(folder / "taught")
    sft(out, policy=policy, base=policy, demonstrations=given, optimization=settings, weights=weights())
    return PolicyCheckpoint(out.path)


@functools.cache
def loaded(path: Path) -> Policy:
    """A policy for reading logits from, loaded once."""
    return PolicyCheckpoint(path).load("float32", device="cpu")


def logits_of(policy: Policy) -> torch.Tensor:
    """What a policy says to a few tokens."""
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([[5, 77, 300, 41, 8, 9]])).logits


def workspace(folder: Path, rows: list[dict[str, Any]] | None = None) -> StageOutput:
    """A place for a stage to write to; its rows go to the list."""
    return StageOutput(folder, "stage", (lambda row: None) if rows is None else rows.append)


# --- records -----------------------------------------------------------------------------------------------------


def instruction(name: str, text: str = "") -> Instruction:
    return Instruction(id=name, text=text or f"Tell me about {name}.", source="self")


def response(name: str, text: str = "", *, reason: FinishReason = FinishReason.EOS) -> Response:
    """A response `<instruction>-<n>` to the instruction its name begins with."""
    owner = name.rsplit("-", 1)[0]
    return Response(
        id=name, instruction_id=owner, text=text or f"Answer {name}", finish_reason=reason, tokens=3, model="m"
    )


def judgement(name: str, score: float | None, sample: int = 1) -> Judgement:
    """A judgement of the response of this name; without a score it found none."""
    status = JudgementStatus.NO_SCORE if score is None else JudgementStatus.OK
    return Judgement(id=f"{name}-{sample}", response_id=name, status=status, score=score, text="", model="m")


def mean_scores(judgements: Sequence[Any]) -> list[ResponseScore]:
    """Every response's mean over its valid judgements."""
    names = dict.fromkeys(j.response_id for j in judgements)
    valid = {name: [j.score for j in judgements if j.response_id == name and j.score is not None] for name in names}
    means = {name: sum(scores) / len(scores) if scores else None for name, scores in valid.items()}
    return [ResponseScore(id=n, score=means[n], valid=len(valid[n]), variance=None) for n in names]


def demonstration(name: str, text: str, answer: str = "Yes.") -> Demonstration:
    return Demonstration(id=name, prompt=as_prompt(text), response=answer, source="ift")


def preference(name: str, prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(id=name, prompt=as_prompt(prompt), chosen=chosen, rejected=rejected)


# --- settings ----------------------------------------------------------------------------------------------------


def optimization(**changes: Any) -> Optimization:
    """A few quick full-precision steps."""
    settings = {"learning_rate": 1e-3, "schedule": "constant", "batch_size": 2, "dtype": "float32"}
    return Optimization(**{**settings, **changes})


def weights(seed: int = 0, rank: int = 0) -> TrainableWeights:
    return TrainableWeights(dtype="float32", lora=LoRA(rank=rank), seed=seed)


# --- a generator that says what it is told -----------------------------------------------------------------------


class Script:
    """A Generator whose completions are given, prompt by prompt; it keeps the requests it was sent."""

    def __init__(
        self, policy: Policy, replies: Sequence[Completion], per_batch: int = 1 << 20, dies_after: int = 1 << 20
    ) -> None:
        self.policy = policy
        self.replies = iter(replies)
        self.per_batch = per_batch
        self.batches_left = dies_after
        self.requests: list[Request] = []
        self.context = policy.context
        self.digest = policy.digest
        self.tokenizer = policy.tokenizer
        self.counts: dict[str, Any] = {}

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        """Others may still use it."""

    def load(self, files: PolicyCheckpoint) -> "Script":
        """Stands in for the backend and for the generator it loads."""
        return self

    def plan(self, lengths: Sequence[int], samples: int, max_new_tokens: int) -> list[list[int]]:
        """Batches of `per_batch`, in the order of the records."""
        return [list(range(len(lengths)))[i : i + self.per_batch] for i in range(0, len(lengths), self.per_batch)]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """The next replies; when they run out, empty ones."""
        if not self.batches_left:
            raise Killed
        self.batches_left -= 1
        self.requests += requests
        nothing = Completion(text="", finish_reason=FinishReason.EOS, tokens=0)
        return [[next(self.replies, nothing) for _ in request.seeds] for request in requests]


class ScriptedWriter:
    """An engine whose texts come from a script, and whose reader is real."""

    def __init__(self, script: Script) -> None:
        real = Transformers(dtype="float32")
        self.script, self.dtype, self.load_scorer = script, real.dtype, real.load_scorer

    def load(self, files: PolicyCheckpoint) -> Script:
        return self.script


def completion(text: str, *, cut: bool = False) -> Completion:
    reason = FinishReason.LENGTH if cut else FinishReason.EOS
    return Completion(text=text, finish_reason=reason, tokens=len(text.split()))


class Killed(BaseException):
    """What a test raises where a real run would be killed."""


@contextmanager
def killed_after(batches: int, monkeypatch: Any) -> Iterator[list[int]]:
    """Generation raises once so many batches are written; yields the sizes of all batches that were asked for."""
    original = TransformersGenerator.generate
    sizes: list[int] = []

    def generate(
        self: TransformersGenerator, requests: Sequence[Request], sampling: Sampling
    ) -> list[list[Completion]]:
        if len(sizes) >= batches:
            raise Killed
        sizes.append(len(requests))
        return original(self, requests, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersGenerator, "generate", generate)
        yield sizes


# --- a machine that refuses --------------------------------------------------------------------------------------

LIMIT = 20_000
"""Bytes that a file may have inside of `file_limit`."""


@contextmanager
def file_limit(size: int = LIMIT) -> Iterator[None]:
    """As `ulimit -f`: the system lets no file grow beyond so many bytes."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


# --- configurations and runs -------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What the command line answered."""

    code: int
    out: str
    err: str


def planned(config: ExperimentConfig) -> list[str]:
    """The labels of a run's stages, in their order."""
    return [str(one.label) for one in plan(config)]


def composed(*overrides: str) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """The experiment that the command line makes of these overrides, as live objects, as YAML and plain."""
    return compose_experiment(conf_folder(), overrides)


def run(output: Path, *overrides: str) -> Path:
    """One experiment, in this process; returns its folder."""
    overrides = (*overrides, f"output_dir={output}")
    config, text, plain = composed(*overrides)
    return run_experiment(config, text, {**plain, "overrides": list(overrides)})


def write_tiny_data(folder: Path) -> list[str]:
    """A handful of seeds and evaluation instructions; returns the overrides that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    subjects = ["bees", "rivers", "clocks", "bread", "stars", "trains", "songs", "maps"]
    ift = [
        {"id": f"i{n}", "instruction": f"Say one thing about {s}.", "response": f"Old {s} are good."}
        for n, s in enumerate(subjects)
    ]
    ranked = [
        {
            "id": f"r{n}",
            "instruction": f"Which is the best {s}, and why?",
            "responses": [
                {"text": f"The oldest {s}, for its craft.", "rank": 1},
                {"text": f"Some {s}.", "rank": 2},
                {"text": "No.", "rank": 3},
            ],
        }
        for n, s in enumerate(subjects[:4])
    ]
    asked = [{"id": f"q{n}", "instruction": f"What do people make of {s}?"} for n, s in enumerate(subjects[:3])]
    for name, rows in (("ift", ift), ("ranked", ranked), ("asked", asked)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return [
        f"data.seed_data.demonstrations={folder / 'ift.jsonl'}",
        f"data.seed_data.ranked={folder / 'ranked.jsonl'}",
        f"evaluate.instructions={folder / 'asked.jsonl'}",
        "evaluate.count=0",
    ]


TINY_RUN = [
    "experiment=smoke",
    "name=tiny",
    "engine.dtype=float32",
    "engine.max_batch_tokens=120",
    "train.sft.dtype=float32",
    "train.sft.learning_rate=0.01",
    "train.sft.epochs=3",
    "train.align.dtype=float32",
    "train.align.batch_size=1",
    "data.instruct.count=3",
    "data.instruct.min_words=1",
    "data.instruct.prompts_per_batch=4",
    "data.instruct.sampling.max_new_tokens=20",
    "data.instruct.sampling.temperature=1",
    "data.instruct.sampling.top_p=1",
    "data.respond.candidates=3",
    "data.respond.sampling.max_new_tokens=8",
    "evaluate.sampling.max_new_tokens=8",
]
"""Smoke, smaller: two iterations in a few seconds."""


def record_files(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of every record and weight file of a run, through its links."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for link in sorted((folder / "artifacts").rglob("*"))
        if link.is_symlink()
        for path in sorted(
            [*link.glob("*.jsonl"), *link.glob("weights/*.safetensors"), *link.glob("adapter/*.safetensors")]
        )
        if path.name != "log.jsonl"
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

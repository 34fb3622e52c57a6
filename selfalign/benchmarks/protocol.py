"""The protocol of a benchmark, its run-time context, and files of installed packages."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from selfalign.core.errors import SelfalignError
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Engine
from selfalign.judges.protocol import OWN_MODELS, JudgeContext
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Counts, StageOutput
from selfalign.store.journal import Journal

UNSAFE = re.compile(r"[^\w.-]+")
"""Characters that names of files must not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkContext:
    """Run-time context of a benchmark on one model.

    Attributes:
        key: of the benchmark's settings, for messages: "benchmark.NAME".
        label: of the model in its run, such as "M2".
        policy: the model's files.
        judge: the policy that judges its answers; None for a server, or if nothing is judged.
        engine: the engine that generates.
        seed: of all random draws.
        reference: the policy that the judging policy was trained from, for judges that compare the two.
    """

    key: str
    label: str
    policy: PolicyCheckpoint
    judge: PolicyCheckpoint | None
    engine: Engine
    seed: int
    reference: PolicyCheckpoint | None = None

    @property
    def name(self) -> str:
        """Name of the model in files for other tools: its label and the first digits of its weights' digest."""
        return f"{self.label}-{self.policy.digest[:8]}"

    def name_of_judge(self, model: str, endpoint: Endpoint) -> str:
        """Return the name of the judge in files for other tools, from the settings that name it."""
        if self.judge is None:
            return UNSAFE.sub("_", endpoint.model)
        called = model if model in OWN_MODELS else model.rstrip("/").rsplit("/", 1)[-1]
        return f"{UNSAFE.sub('_', called)}-{self.judge.digest[:8]}"

    def judge_context(self, journal: Journal) -> JudgeContext:
        """Return the context of the judge."""
        return JudgeContext(
            journal=journal, policy=self.judge, reference=self.reference, engine=self.engine, seed=self.seed
        )


class Benchmark(Protocol):
    """A published benchmark of one model, configured in `conf/benchmark/NAME.yaml` under `benchmark.NAME`.

    `judge_model` is the judge: one of the run's own models ("self", "sft", "base"), a model source like `model.path`,
    or None if no policy judges. `size` is for the plan and reads no file.
    """

    @property
    def judge_model(self) -> str | None: ...

    @property
    def size(self) -> str: ...

    def check(self, key: str) -> None:
        """Check every setting once, and read the prompts that name files. Messages name a setting as `key`.name."""
        ...

    def sources(self, key: str) -> dict[str, str]:
        """Return {name: digest} of all files and packages that are read, before anything is made.

        Raises:
            SelfalignError: one is missing; the message names the package to install, or the setting as `key`.name.
        """
        ...

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Measure one model. Long work goes through `out.journal`.

        Returns:
            Metrics by their names without the benchmark's, and under "dropped" {reason: dropped records}.
        """
        ...


@runtime_checkable
class TellsQuestions(Protocol):
    """What a benchmark has besides if it can tell its questions, so that those that were taught are told."""

    def asked(self, key: str) -> list[str]:
        """Return the first turn of every question. Messages name a setting as `key`.name."""
        ...


def judges_to_load(benchmarks: Mapping[str, Benchmark]) -> dict[str, str]:
    """Return {benchmark: the model that judges there} for judges that are none of the run's own models."""
    judges = {name: benchmark.judge_model for name, benchmark in benchmarks.items()}
    return {name: model for name, model in judges.items() if model is not None and model not in OWN_MODELS}


def check_count(key: str, wanted: int, available: int, source: str) -> None:
    """Check that a file has as many questions as a benchmark's `count`.

    Raises:
        SelfalignError: it has fewer.
    """
    if available < wanted:
        raise SelfalignError(f"{key}.count={wanted}, but {source} has {available}: lower it (0 takes all)")


def packaged_file(package: str, inside: str, key: str, install: str) -> Path:
    """Return a file of an installed package, without importing the package.

    Args:
        package: its top-level module.
        inside: the file's path below that.
        key: the setting that can name a file instead.
        install: the arguments for `pip install`.

    Raises:
        SelfalignError: the package is not installed, or lacks the file.
    """
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or []) if found else []
    for folder in folders:
        if (path := Path(folder) / inside).is_file():
            return path
    trouble = f"{package} has no {inside}" if folders else f"{package} is not installed"
    raise SelfalignError(f"{key}: {trouble}: pip install {install}, or name a file")

"""What all benchmarks share: what they are given, what they answer for, and where their packages' files lie."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfalign.core.errors import SelfalignError
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Engine
from selfalign.judges.protocol import OWN_MODELS, JudgeContext
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Counts, StageOutput
from selfalign.store.journal import Journal

UNSAFE = re.compile(r"[^\w.-]+")
"""What names of files should not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkContext:
    """A model that a benchmark measures, and what it is measured with.

    Attributes:
        key: of the benchmark's settings, for messages: "benchmark.NAME".
        label: of the model in its run, such as "M2".
        policy: its files.
        judge: the policy that judges its answers; None where a server does, or nobody.
        engine: the engine that writes.
        seed: draws whatever is drawn.
    """

    key: str
    label: str
    policy: PolicyCheckpoint
    judge: PolicyCheckpoint | None
    engine: Engine
    seed: int

    @property
    def name(self) -> str:
        """What files for other tools call the model: its label and the beginning of its weights' digest."""
        return f"{self.label}-{self.policy.digest[:8]}"

    def name_of_judge(self, model: str, endpoint: Endpoint) -> str:
        """What files for other tools call the judge, given the settings that name it."""
        if self.judge is None:
            return UNSAFE.sub("_", endpoint.model)
        called = model if model in OWN_MODELS else model.rstrip("/").rsplit("/", 1)[-1]
        return f"{UNSAFE.sub('_', called)}-{self.judge.digest[:8]}"

    def judge_context(self, journal: Journal) -> JudgeContext:
        """What its judge works with."""
        return JudgeContext(journal=journal, policy=self.judge, reference=None, engine=self.engine, seed=self.seed)


class Benchmark(Protocol):
    """A published measurement of one model, configured as `conf/benchmark/NAME.yaml` under `benchmark.NAME`.

    `judge_model` names who judges: one of the run's own models ("self", "sft", "base"), a model source as
    `model.path` takes, or None where no policy does. `size` is for the plan and reads no file.
    """

    @property
    def judge_model(self) -> str | None: ...

    @property
    def size(self) -> str: ...

    def check(self, key: str) -> None:
        """Checks every setting, once, and reads the prompts that name files; messages name them as `key`.setting."""
        ...

    def sources(self, key: str) -> dict[str, str]:
        """{what: digest} of all files and packages that are read, before anything is made.

        Raises:
            SelfalignError: one is missing; the message says which package to install, or which `key`.setting to set.
        """
        ...

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Measures one model; what takes long goes through `out.journal`.

        Returns:
            Metrics by their names without the benchmark's, and under "dropped" what was dropped, by reason.
        """
        ...


def judges_to_load(benchmarks: Mapping[str, Benchmark]) -> dict[str, str]:
    """{benchmark: the model that judges there}, of those whose judge is none of the run's own models."""
    asked = {name: benchmark.judge_model for name, benchmark in benchmarks.items()}
    return {name: model for name, model in asked.items() if model is not None and model not in OWN_MODELS}


def check_count(key: str, wanted: int, there: int, source: str) -> None:
    """Checks that a file has as many questions as a benchmark's `count` asks for.

    Raises:
        SelfalignError: it has fewer.
    """
    if there < wanted:
        raise SelfalignError(f"{key}.count={wanted}, but {source} has {there}: lower it (0 takes all)")


def packaged_file(package: str, inside: str, key: str, install: str) -> Path:
    """A file of an installed package, which is not imported for it.

    Args:
        package: its top-level module.
        inside: the file's place below that.
        key: the setting that can name a file instead.
        install: what to give to pip.

    Raises:
        SelfalignError: the package is not installed, or lacks the file.
    """
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        if (path := Path(place) / inside).is_file():
            return path
    trouble = f"{package} has no {inside}" if places else f"{package} is not installed"
    raise SelfalignError(f"{key}: {trouble}: pip install {install}, or name a file")

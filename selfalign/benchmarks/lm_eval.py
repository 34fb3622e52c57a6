"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), run in this process on a policy of the run."""

import importlib.metadata
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfalign.benchmarks.lm_eval_settings import LmEvalSettings, LoadedTask, Results
from selfalign.benchmarks.protocol import BenchmarkContext
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_folder, path_of
from selfalign.metrics import catalog
from selfalign.metrics.intervals import Estimate
from selfalign.models.checkpoint import resolve_dtype
from selfalign.store.artifacts import Counts, StageOutput

NORMAL_95 = 1.96
"""Half the width of a 95 % interval, in standard errors."""

OF_TASK = (catalog.BENCHMARK_TASK_METRIC, catalog.BENCHMARK_TASK_DOCUMENTS, catalog.BENCHMARK_TASK_PROMPTS_CUT)
"""Metrics of a task."""


@dataclass(kw_only=True, slots=True)
class LmEval(LmEvalSettings):
    """Benchmark of one or more tasks of lm-eval."""

    @property
    def judge_model(self) -> None:
        """None: no judge is needed."""

    @property
    def size(self) -> str:
        """The documents and the tasks, for the plan."""
        return f"{self.limit or 'all'} documents of {', '.join(task.name for task in self.tasks)}"

    def check(self, key: str) -> None:
        """Check ranges, and that every task is named once."""
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise SelfalignError(f"{key}.tasks must name at least one task, and none twice; got {names}")
        for task in self.tasks:
            if task.num_fewshot is not None and task.num_fewshot < 0:
                raise SelfalignError(f"{key}.tasks: num_fewshot of {task.name} must be 0 or more")
        if self.limit < 0:
            raise SelfalignError(f"{key}.limit must be 0 (all) or more, got {self.limit}")
        if self.batch_size < 1:
            raise SelfalignError(f"{key}.batch_size must be 1 or more, got {self.batch_size}")

    def sources(self, key: str) -> dict[str, str]:
        """Return lm-eval's version, and the digests of the user's own task and data files."""
        if importlib.util.find_spec("lm_eval") is None:
            raise SelfalignError(f"{key}: lm-eval is not installed: pip install 'selfalign[lm-eval]'")
        found = {"lm-eval": importlib.metadata.version("lm_eval")}
        if self.include_path:
            folder = path_of(self.include_path)
            if not folder.is_dir():
                raise SelfalignError(f"{key}.include_path: no folder {self.include_path!r}")
            # Running a task's Python files creates __pycache__.
            found |= {name: digest for name, digest in digest_folder(folder).items() if "__pycache__" not in name}
        return found

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Write lm-eval's results.json and samples_TASK.jsonl, and return the metrics."""
        from selfalign.benchmarks.lm_eval_adapter import load_tasks, run_tasks, write_results

        loaded = load_tasks(self, context.key)
        policy = context.policy.load(resolve_dtype(context.engine.dtype, writing=True))
        with out.journal(sum(task.documents(self.limit) for task in loaded), "documents") as journal:
            results, prompts_cut = run_tasks(self, loaded, policy, journal)
        write_results(out.path, results)
        return describe(loaded, results, prompts_cut, average=self.average) | {
            "lm_eval_version": importlib.metadata.version("lm_eval")
        }


def describe(loaded: Sequence[LoadedTask], results: Results, prompts_cut: dict[str, int], *, average: bool) -> Counts:
    """Return each task's metric with its interval, its number of documents, and how many prompts were cut.

    Raises:
        SelfalignError: lm-eval has no finite value for a task.
    """
    counts: Counts = {}
    found = [estimate(results, task.name, task.metric) for task in loaded]
    for task, number in zip(loaded, found, strict=True):
        parts = {"task": task.name, "metric": task.metric.partition(",")[0]}
        measured, asked, cut = (metric.of(**parts).own for metric in OF_TASK)
        counts |= named(number, measured)
        counts[asked] = sum(results["n-samples"][leaf]["effective"] for leaf in task.leaves)
        counts[cut] = sum(prompts_cut.get(leaf, 0) for leaf in task.leaves)
        counts[f"{task.name}/version"] = str(results["versions"][task.name])
    if average:
        mean = math.fsum(number.value for number in found) / len(found)
        error = math.sqrt(math.fsum((number.high - number.value) ** 2 for number in found)) / len(found)
        counts |= named(Estimate(mean, mean - error, mean + error), catalog.BENCHMARK_AVERAGE.own)
    return counts


def estimate(results: Results, task: str, metric: str) -> Estimate:
    """Return a task's metric ± 1.96 of lm-eval's standard errors; the ends are NaN if lm-eval has no error.

    Raises:
        SelfalignError: the value is missing or not finite.
    """
    name, _, kind = metric.partition(",")
    value: Any = results["results"][task].get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise SelfalignError(f"{task}: lm-eval gives {value!r} for {metric}, which is not a finite number")
    error: Any = results["results"][task].get(f"{name}_stderr,{kind}")
    half = NORMAL_95 * error if isinstance(error, int | float) else math.nan
    return Estimate(float(value), float(value - half), float(value + half))


def named(number: Estimate, name: str) -> dict[str, float]:
    """Return the metric, and the finite ends of its interval."""
    return {key: value for key, value in number.named(name).items() if math.isfinite(value)}

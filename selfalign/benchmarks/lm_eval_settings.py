"""Settings of lm-eval and its results, without importing lm-eval."""

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, slots=True)
class LmEvalTask:
    """A task or a group of tasks, and the metric that is reported.

    Attributes:
        name: name in lm-eval, or of a task in `include_path`.
        metric: name in lm-eval, such as "acc_norm"; with its filter if there are several: "exact_match,strict-match".
        num_fewshot: the number of solved examples in the prompt; null takes the task's own.
    """

    name: str
    metric: str
    num_fewshot: int | None = None


Results = dict[str, Any]
"""Results in lm-eval's format."""


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task with its data, or a group of tasks.

    Attributes:
        name: name in lm-eval.
        metric: the reported metric with its filter: "acc,none".
        leaves: {name: task} below it; the task itself, if it is no group.
        groups: {name: group} among them.
    """

    name: str
    metric: str
    leaves: dict[str, Any]
    groups: dict[str, Any]

    def documents(self, limit: int) -> int:
        """Return the number of documents; `limit` bounds those of each task, 0 is no bound."""
        counts = [len(leaf.eval_docs) for leaf in self.leaves.values()]
        return sum(min(limit, count) if limit else count for count in counts)


@dataclass(kw_only=True, slots=True)
class LmEvalSettings:
    """Settings of lm-eval.

    Attributes:
        tasks: in the order of the metrics.
        include_path: a folder with your own tasks (lm-eval's YAML) and their data. A relative path in `data_files`
            counts from this folder. Python files that a task names there are run.
        limit: the number of documents of every task, taken from the beginning; 0 takes all.
        average: also report the mean over the tasks, as leaderboards do.
        apply_chat_template: apply the chat template to prompts, with examples as turns of their own. lm-eval's
            published numbers are without.
        batch_size: the number of sequences in a forward pass.
        seed: draws the examples in the prompts. The default is lm-eval's own, so that numbers are comparable.
    """

    tasks: list[LmEvalTask]
    include_path: str = ""
    limit: int = 0
    average: bool = False
    apply_chat_template: bool = False
    batch_size: int = 8
    seed: int = 1234

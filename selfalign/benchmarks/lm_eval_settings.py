"""What lm-eval is asked and what it returns, without lm-eval itself."""

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, slots=True)
class LmEvalTask:
    """A task or a group of tasks, and what is read off it.

    Attributes:
        name: lm-eval's, or that of a task in `include_path`.
        metric: lm-eval's, such as "acc_norm"; with its filter, "exact_match,strict-match", where there are several.
        num_fewshot: solved examples in the prompt; null takes as many as the task says.
    """

    name: str
    metric: str
    num_fewshot: int | None = None


Results = dict[str, Any]
"""What lm-eval returns."""


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task with its data, or a group of tasks.

    Attributes:
        name: lm-eval's.
        metric: what is read off, with its filter: "acc,none".
        leaves: the tasks below it by name; the task itself, if it is one.
        groups: the groups among them, by name.
    """

    name: str
    metric: str
    leaves: dict[str, Any]
    groups: dict[str, Any]

    def documents(self, limit: int) -> int:
        """How many documents are asked."""
        counts = [len(leaf.eval_docs) for leaf in self.leaves.values()]
        return sum(min(limit, count) if limit else count for count in counts)


@dataclass(kw_only=True, slots=True)
class LmEvalSettings:
    """What lm-eval measures.

    Attributes:
        tasks: in the order they are made.
        include_path: a folder with tasks of your own (lm-eval's YAML) and their data; a relative path in `data_files`
            counts from this folder. Python files that a task names there are run.
        limit: the first so many documents of every task; 0 takes all.
        average: also the mean over the tasks, as leaderboards have it.
        apply_chat_template: prompts go through the chat template, examples as turns of their own; lm-eval's published
            numbers are without.
        batch_size: sequences that the model reads at once.
        seed: draws the examples in the prompts; lm-eval's own, so that its numbers compare.
    """

    tasks: list[LmEvalTask]
    include_path: str = ""
    limit: int = 0
    average: bool = False
    apply_chat_template: bool = False
    batch_size: int = 8
    seed: int = 1234

"""Adapter to lm-eval, the only module that imports it: load its tasks, and answer its requests through a journal."""

# lm-eval is an extra, and its decorators hide the types of its classes.
# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false

import difflib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from functools import cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as evaluate_tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from selfalign.benchmarks.lm_eval_settings import LmEvalSettings, LmEvalTask, LoadedTask, Results
from selfalign.core.errors import SelfalignError
from selfalign.core.files import path_of, write_atomically
from selfalign.metrics.intervals import RESAMPLES
from selfalign.models.chat_template import empty_thought, render_prompt
from selfalign.models.checkpoint import Policy
from selfalign.models.tokenizer import split_written
from selfalign.store.journal import Journal

logger = logging.getLogger(__name__)

# lm-eval warns of every cut prompt, which is counted here, and of a model that is no name.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(settings: LmEvalSettings, place: str) -> list[LoadedTask]:
    """Load tasks with their data, so that errors come before the model is used.

    Args:
        settings: the tasks' names, metrics and examples.
        place: prefix of messages.

    Raises:
        SelfalignError: a task does not exist, its data cannot be loaded, it lacks the metric, or two share a subtask.
    """
    folder = path_of(settings.include_path).resolve()
    manager = _manager(str(folder) if settings.include_path else "", {task.name for task in settings.tasks})
    with chdir(folder):
        loaded = [_load(manager, task, place) for task in settings.tasks]
    twice = [name for name, count in Counter(name for one in loaded for name in one.leaves).items() if count > 1]
    if twice:
        raise SelfalignError(f"{place}: {twice[0]} is a part of two tasks; leave one of them out")
    return loaded


def _manager(folder: str, names: set[str]) -> TaskManager:
    """Return a task manager for these tasks.

    If all of them are in the folder, only the folder is read, because lm-eval's own thousands take long.
    """
    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if names <= set(own.all_subtasks):
            return own
    return _manager_of_all(folder)


@cache
def _manager_of_all(folder: str) -> TaskManager:
    logger.info("reading the list of lm-eval's tasks")
    return TaskManager(include_path=folder or None)


def _load(manager: TaskManager, wanted: LmEvalTask, place: str) -> LoadedTask:
    if wanted.name not in manager.all_tasks:
        near = difflib.get_close_matches(wanted.name, manager.all_tasks, 3)
        hint = f"did you mean {', '.join(near)}?" if near else "set include_path to the folder of your own tasks"
        raise SelfalignError(f"{place}: lm-eval has no task {wanted.name!r}; {hint}")
    try:
        found = manager.load([wanted.name])
    except (OSError, ValueError, ImportError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise SelfalignError(
            f"{place}: task {wanted.name} cannot be loaded ({type(error).__name__}: {reason}); data on the hub need "
            "the network, and your own data need include_path"
        ) from error
    leaves, groups = found["tasks"], found.get("groups", {})
    if wanted.name not in (*leaves, *groups):
        raise SelfalignError(f"{place}: {wanted.name} has no metric of its own; name its tasks: {', '.join(leaves)}")
    for name, leaf in leaves.items():
        if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
            raise SelfalignError(f"{place}: {name} runs code that the model generates, or has images; leave it out")
        examples = leaf.get_config("num_fewshot") if wanted.num_fewshot is None else wanted.num_fewshot
        leaf.set_config(key="num_fewshot", value=examples or 0)
    first = next(iter(leaves.values()))
    metric = find_metric(first, groups.get(wanted.name), wanted.metric, f"{place}: {wanted.name}")
    return LoadedTask(wanted.name, metric, leaves, groups)


def find_metric(task: Task, group: "Group | None", wanted: str, place: str) -> str:
    """Return the metric of a task or group with its filter, by its name in lm-eval's results.

    Raises:
        SelfalignError: the task has no such metric, or several of this name.
    """
    filters = [one["name"] for one in task.get_config("filter_list") or [{"name": "none"}]]
    own: Any = task.aggregation()
    metrics = [one.metric for one in group.aggregate_metric_list or ()] if group else list(own)
    offered = [f"{metric},{kind}" for metric in metrics for kind in filters]
    meant = [one for one in offered if wanted in (one, one.partition(",")[0])]
    if len(meant) != 1:
        names = "; ".join(one.removesuffix(",none") for one in offered) or "none"
        raise SelfalignError(f"{place} has {len(meant)} metrics {wanted!r}, and one is needed; it has {names}")
    return meant[0]


def run_tasks(
    settings: LmEvalSettings, loaded: Sequence[LoadedTask], policy: Policy, journal: Journal
) -> tuple[Results, Counter[str]]:
    """Return lm-eval's results, and {task: number of prompts that lost their beginning}."""
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    model = JournaledLM(policy, settings.batch_size, journal)
    tasks = {name: leaf for one in loaded for name, leaf in one.leaves.items()}
    for leaf in tasks.values():
        leaf.set_fewshot_seed(seed=settings.seed)
    # simple_evaluate does the same, but also describes the machine at length.
    results: Any = evaluate_tasks(
        lm=model,
        task_dict={"tasks": tasks, "groups": {name: group for one in loaded for name, group in one.groups.items()}},
        limit=settings.limit or None,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=True,
        bootstrap_iters=RESAMPLES,
    )
    return results, model.prompts_cut


def write_results(folder: Path, results: Results) -> None:
    """Write results.json, and for every task the answers in the format of lm-eval's log."""
    kept = {name: value for name, value in results.items() if name != "samples"}
    write_atomically(folder / "results.json", [_as_json(kept, indent=2).encode()])
    for task, samples in results["samples"].items():
        lines = (_as_json(sample).encode() + b"\n" for sample in samples)
        write_atomically(folder / f"samples_{task}.jsonl", lines)


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent)


class JournaledLM(HFLM):
    """lm-eval's view of a policy: requests are answered in batches of `batch_size` documents that the journal keeps.

    A batch has documents of one task, the longest first, so it depends only on the records. Log-probabilities are
    computed in float32 for every dtype of the weights.
    """

    def __init__(self, policy: Policy, batch_size: int, journal: Journal) -> None:
        super().__init__(
            pretrained=policy.model,
            tokenizer=policy.tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self.journal = journal
        self.documents_per_batch = batch_size
        self.prompts_cut: Counter[str] = Counter()
        self._cut = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) in nats, and whether greedy decoding would give the continuation."""
        return [(value, greedy) for value, greedy in self._answer("loglikelihood", requests, super().loglikelihood)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p(text) in nats for texts of any length."""
        return self._answer("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context, up to one of its stop texts: the answer without its thought."""
        written = self._answer("generate_until", requests, super().generate_until)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        parted = [split_written(self.tokenizer, ids, text) for ids, text in zip(contexts, written, strict=True)]
        return [answer or "" for _, answer in parted]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the run renders it, with the beginning of its last answer if there is one."""
        if add_generation_prompt:
            return render_prompt(self.tokenizer, chat_history)
        *messages, begun = chat_history
        return render_prompt(self.tokenizer, messages) + empty_thought(self.tokenizer) + begun["content"]

    def _answer(self, kind: str, requests: list[Instance], ask: Callable[..., list[Any]]) -> list[Any]:
        def work(documents: list[list[int]]) -> dict[str, Any]:
            self._cut = 0
            answered = ask([requests[index] for index in chain.from_iterable(documents)], disable_tqdm=True)
            return {"answers": answered, "cut": self._cut}

        planned = list(plan(requests, self.documents_per_batch))
        tasks = ((f"{kind}/{task}/{start}", len(members), partial(work, members)) for task, start, members in planned)
        answers: dict[int, Any] = {}
        for (task, _, documents), made in zip(planned, self.journal.batches(tasks), strict=True):
            answers |= dict(zip(chain.from_iterable(documents), made["answers"], strict=True))
            self.prompts_cut[task] += made["cut"]
        return [answers[index] for index in range(len(requests))]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        self._cut += sum(len(context) + len(ending) > self.max_length + 1 for _, context, ending in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        """Return token ids and mask of prompts; those longer than `left_truncate_len` lose their beginning."""
        if left_truncate_len:
            self._cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)


def plan(requests: Sequence[Instance], size: int) -> Iterator[tuple[str, int, list[list[int]]]]:
    """Yield batches of at most `size` documents of one task, the longest first.

    Yields:
        The task, the index of the batch's first document in it, and the indices of every document's requests.
    """
    documents: dict[tuple[str, int], list[int]] = {}
    for index, request in enumerate(requests):
        documents.setdefault((str(request.task_name), int(request.doc_id or 0)), []).append(index)
    ordered = sorted(documents.items(), key=lambda item: (item[0][0], -len(requests[item[1][0]].args[0]), item[0][1]))
    for task, members in groupby(ordered, key=lambda item: item[0][0]):
        of_task = [indices for _, indices in members]
        for start in range(0, len(of_task), size):
            yield task, start, of_task[start : start + size]

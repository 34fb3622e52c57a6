"""Reading instead of writing: how likely a policy finds given responses, or given next tokens.

Prompts are shared and packed (`selfalign.batches`), so a prompt is computed once for all that follows it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from selfalign.attention import enable_packing
from selfalign.batches import Batch, Group, make_batch, split_by_tokens
from selfalign.journal import Journal
from selfalign.logprobs import score_responses_only
from selfalign.models import InMemory, autocast


def responses_in(group: Group) -> int:
    """How many there are."""
    return len(group.responses)


@dataclass(slots=True)
class Scorer(InMemory):
    """A policy made to score.

    Attributes:
        policy: its model serves for nothing else afterwards.
        batch_tokens: the most tokens of a batch.
        autocast: "bfloat16" to multiply in it while the weights keep their dtype; empty for the weights' own.
    """

    batch_tokens: int
    autocast: str = ""

    def __post_init__(self) -> None:
        self.policy.model.eval()
        enable_packing(self.policy.model)
        score_responses_only(self.policy.model)

    def plan(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups, in their order, in batches of at most `batch_tokens`."""
        return list(split_by_tokens(groups, self.batch_tokens))

    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """Summed log-probabilities (nats) of each group's responses."""
        batch = make_batch(self.policy.model, groups)
        sums = iter(batch.sum_by_response(self._logps(batch)).tolist())
        return [[next(sums) for _ in group.responses] for group in groups]

    def choose(self, groups: Sequence[Group], alternatives: Sequence[int]) -> list[list[list[float]]]:
        """log p (nats) of each alternative as the token after each response, for every group."""
        batch = make_batch(self.policy.model, [with_next_token(group) for group in groups])
        ends = batch.tokens.long().cumsum(0) - 1
        batch.predict_at = batch.predict_at[ends].repeat_interleave(len(alternatives))
        batch.targets = torch.tensor(list(alternatives)).repeat(len(ends))
        rows = iter(self._logps(batch).view(len(ends), len(alternatives)).tolist())
        return [[next(rows) for _ in group.responses] for group in groups]

    def score_all(
        self, groups: Sequence[Group], journal: Journal, name: str, size: Callable[[Group], int] = responses_in
    ) -> Iterator[list[float]]:
        """What `score` says of each group, in journalled batches.

        Args:
            groups: any number of them.
            journal: keeps finished batches.
            name: what these begin with there.
            size: how far a group moves the progress bar.
        """
        return ask_all(self.score, self.plan(groups), journal, name, size)

    @torch.inference_mode()
    def _logps(self, batch: Batch) -> torch.Tensor:
        device = self.policy.model.device
        with autocast(device, self.autocast):
            batch = batch.to(device)
            return self.policy.model(predict_at=batch.predict_at, targets=batch.targets, **batch.inputs).cpu()


def ask_all(
    ask: Callable[[list[Group]], list[Any]],
    batches: Sequence[list[Group]],
    journal: Journal,
    name: str,
    size: Callable[[Group], int],
) -> Iterator[Any]:
    """What a loaded policy says of each group, in journalled batches."""
    # Named by what is in them, because `batch_tokens` may be another when a killed stage is resumed.
    tasks = ((f"{name}-{batch[0].id}-{len(batch)}", sum(map(size, batch)), partial(ask, batch)) for batch in batches)
    for rows in journal.batches(tasks):
        yield from rows


def with_next_token(group: Group) -> Group:
    """The group with a placeholder behind each response: the token whose alternatives are asked for."""
    responses = [[*response, 0] for response in group.responses]
    return Group(id=group.id, prompt=group.prompt, responses=responses, given=[len(r) - 1 for r in responses])

"""Log-probabilities of given responses, or of given next tokens, under a policy.

Prompts are shared and packed (`selfalign.models.batches`), so a prompt is computed once for all that follows it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from selfalign.core.errors import SelfalignError
from selfalign.models.batches import Batch, SharedPrompt, make_batch, split_by_tokens
from selfalign.models.checkpoint import LoadedPolicy, Policy, autocast
from selfalign.models.logprobs import score_responses_only
from selfalign.models.packed_attention import enable_packing, is_packing
from selfalign.models.prompt_states import share_prompt_states
from selfalign.store.journal import Journal

DROPOUT = ("dropout", "pdrop", "dropout_p")
"""Endings of attributes that are dropout rates."""

LAYER_DROP = "layerdrop"
"""The rate of layer dropout in some architectures; it is always 0 here."""

NOISE = "jitter_noise"
"""Endings of attributes that are the size of a router's noise."""


def make_scoring(policy: Policy, dropout: float = 0.0) -> None:
    """Make a policy's model return log-probabilities of given tokens, packed if it can, and set its dropout."""
    if policy.capabilities.packs:
        enable_packing(policy.model)
    share_prompt_states(policy.model, enabled=policy.capabilities.shares_states)
    score_responses_only(policy.model)
    set_dropout(policy.model, dropout)


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Set every dropout: layers, the rates of attention, and those that layers read from their config.

    Such layers get a config of their own, because the model's is saved with it. Routers that add noise in training, as
    in some mixtures of experts, route as in inference: their noise cannot be told from a dropout.
    """
    from transformers import PreTrainedModel

    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = dropout
        if stays_in_inference(module):
            module.eval()
            module.train = MethodType(_stay, module)
        set_rates(module, dropout)
        if hasattr(module, LAYER_DROP):
            setattr(module, LAYER_DROP, 0.0)
        own = vars(module).get("config")
        if own is not None and not isinstance(module, PreTrainedModel) and rates_of(own):
            if id(own) not in configs:
                configs[id(own)] = copy.copy(own)
                set_rates(configs[id(own)], dropout)
            module.config = configs[id(own)]


def set_rates(owner: Any, dropout: float) -> None:
    """Set the attributes that are dropout rates."""
    for name in rates_of(owner):
        setattr(owner, name, dropout)


def rates_of(owner: Any) -> list[str]:
    """Return the attributes that are dropout rates. A config may have 0 for 0.0."""
    numbers = (name for name, value in vars(owner).items() if type(value) in (int, float))
    return [name for name in numbers if name.endswith(DROPOUT)]


def stays_in_inference(module: nn.Module) -> bool:
    """Whether a module adds noise in training, so that it is kept in inference mode."""
    return any(name.endswith(NOISE) for name in vars(module))


def _stay(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `train` of a module that stays in inference mode."""
    return self


def responses_in(group: SharedPrompt) -> int:
    """Return the number of responses in a group."""
    return len(group.responses)


@dataclass(slots=True)
class LogProbScorer(LoadedPolicy):
    """A policy made to score.

    Attributes:
        policy: its model serves for nothing else afterwards.
        max_batch_tokens: the most tokens of a batch.
        autocast: "bfloat16" to multiply in it while the weights keep their dtype; empty for the dtype of the weights.
    """

    max_batch_tokens: int
    autocast: str = ""

    def __post_init__(self) -> None:
        self.policy.model.eval()
        make_scoring(self.policy)

    def plan(self, groups: Sequence[SharedPrompt]) -> list[list[SharedPrompt]]:
        """Return the groups, in their order, in batches of at most `max_batch_tokens`."""
        return list(split_by_tokens(groups, self.max_batch_tokens, packed=is_packing(self.policy.model)))

    def score(self, groups: Sequence[SharedPrompt]) -> list[list[float]]:
        """Return the summed log-probabilities (nats) of each group's responses."""
        batch = make_batch(self.policy.model, groups)
        sums = iter(batch.sum_by_response(self._logps(batch)).tolist())
        return [[next(sums) for _ in group.responses] for group in groups]

    def score_tokens(self, groups: Sequence[SharedPrompt]) -> list[list[list[float]]]:
        """Return the log-probability (nats) of each scored token of each group's responses."""
        batch = make_batch(self.policy.model, groups)
        tokens = iter(self._logps(batch)[batch.occurrences].split(batch.tokens.long().tolist()))
        return [[next(tokens).tolist() for _ in group.responses] for group in groups]

    def next_token_logprobs(
        self, groups: Sequence[SharedPrompt], alternatives: Sequence[int]
    ) -> list[list[list[float]]]:
        """Return log p (nats) of each alternative as the token after each response, for every group."""
        batch = make_batch(self.policy.model, [with_next_token(group) for group in groups])
        ends = batch.tokens.long().cumsum(0) - 1
        last = batch.occurrences[ends]
        batch.logit_positions = batch.logit_positions[last].repeat_interleave(len(alternatives))
        batch.targets = torch.tensor(list(alternatives)).repeat(len(ends))
        rows = iter(self._logps(batch).view(len(ends), len(alternatives)).tolist())
        return [[next(rows) for _ in group.responses] for group in groups]

    def score_all(
        self,
        groups: Sequence[SharedPrompt],
        journal: Journal,
        name: str,
        size: Callable[[SharedPrompt], int] = responses_in,
    ) -> Iterator[list[float]]:
        """Yield the scores of each group, in journalled batches.

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
            return self.policy.model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs).cpu()


def ask_all(
    ask: Callable[[list[SharedPrompt]], list[Any]],
    batches: Sequence[list[SharedPrompt]],
    journal: Journal,
    name: str,
    size: Callable[[SharedPrompt], int],
) -> Iterator[Any]:
    """Yield a loaded policy's answer to each group, in journalled batches.

    Raises:
        SelfalignError: a log-probability is not finite.
    """
    # Named by what is in them, because `max_batch_tokens` may be another when a killed stage is resumed.
    tasks = (
        (f"{name}-{batch[0].id}-{len(batch)}", sum(map(size, batch)), partial(_ask_finite, ask, batch))
        for batch in batches
    )
    for rows in journal.batches(tasks):
        yield from rows


def _ask_finite(ask: Callable[[list[SharedPrompt]], list[Any]], batch: list[SharedPrompt]) -> list[Any]:
    rows = ask(batch)
    for group, row in zip(batch, rows, strict=True):
        if not np.isfinite(row).all():
            raise SelfalignError(
                f"record {group.id}: its log-probabilities are not finite under this policy: the training that made it "
                "has diverged (lower its learning rate), or its dtype is too small for it"
            )
    return rows


def with_next_token(group: SharedPrompt) -> SharedPrompt:
    """Return the group with a placeholder after each response: the token whose alternatives are scored."""
    responses = [[*response, 0] for response in group.responses]
    return SharedPrompt(
        id=group.id, prompt=group.prompt, responses=responses, num_context_tokens=[len(r) - 1 for r in responses]
    )

"""Responses that go on from the state behind their prompt, for models that cannot be packed.

A convolution, a recurrence or a state-space layer carries what it has read along in a state. The prompt of a group is
read once, its states are repeated for every response, and the responses are read side by side from there. The gradient
goes through the states into the prompt.
"""

from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

MARK = "_selfalign_shares_prompt_states"
"""Attribute of models whose responses go on from the states behind their prompt."""

LEAST_SAVED = 1 / 3
"""Share of the tokens that must be saved, because groups are read one by one instead of in one pass.

On a CPU, a quarter saved no time with four pairs a pass, and three eighths made it 1.2 to 1.4 times as fast.
"""

SHORTEST = 2
"""Responses are read as so many tokens at least: a single one takes another way, in place, without a gradient."""


class PromptStates:
    """The lengths of a row of groups, each a prompt and the responses that go on from its state.

    Attributes:
        groups: (prompt length, response lengths) of each group.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.groups = [(prompt, list(responses)) for prompt, responses in groups]

    def to(self, device: torch.device) -> "PromptStates":
        """Return the same lengths: they lie on no device."""
        return self

    @property
    def saves(self) -> bool:
        """Whether reading prompts once leaves out `LEAST_SAVED` of the tokens of padded rows."""
        if not all(prompt for prompt, _ in self.groups):
            return False  # Responses whose prompts have no common beginning start from no state.
        read = sum(prompt + len(responses) * max(SHORTEST, *responses) for prompt, responses in self.groups)
        width = max(prompt + max(responses) for prompt, responses in self.groups)
        return read <= (1 - LEAST_SAVED) * width * sum(len(responses) for _, responses in self.groups)


def share_prompt_states(model: "PreTrainedModel", *, enabled: bool = True) -> None:
    """Make the responses of a group go on from the states behind their prompt, or no longer."""
    setattr(model, MARK, enabled)


def shares_prompt_states(model: "PreTrainedModel") -> bool:
    """Whether responses go on from the states behind their prompt. They cannot if activations are computed again."""
    # transformers 5.23 renamed the property; older versions have the second name only.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    again = next((getattr(model, name) for name in names if hasattr(model, name)), False)
    return getattr(model, MARK, False) and not again


def read_groups(
    decoder: nn.Module, ids: Tensor, layout: PromptStates, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Read groups one by one, each prompt once.

    Args:
        decoder: the model without its output layer.
        ids: the tokens of all groups, each a prompt and its responses, shape (1, tokens).
        layout: their lengths.
        options: keywords of the decoder.

    Returns:
        (last hidden states in the order of the tokens, shape (1, tokens, hidden size); router logits by layer, each of
        shape (tokens, experts), empty for a model without experts).
    """
    hidden: list[Tensor] = []
    routers: list[list[Tensor]] = []
    rest = ids[0]
    for length, lengths in layout.groups:
        prompt, *responses = rest[: length + sum(lengths)].split([length, *lengths])
        rest = rest[length + sum(lengths) :]
        first = decoder(input_ids=prompt[None], use_cache=True, **options)
        width = max(SHORTEST, *lengths)
        rows = torch.stack([nn.functional.pad(response, (0, width - len(response))) for response in responses])
        second = decoder(
            input_ids=rows, past_key_values=repeated(first.past_key_values, len(rows)), use_cache=True, **options
        )
        real = torch.arange(width, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
        hidden += [first.last_hidden_state[0], second.last_hidden_state[real]]
        both = zip(*(getattr(output, "router_logits", None) or () for output in (first, second)), strict=True)
        routers.append([torch.cat([one, two[real.flatten()]]) for one, two in both if one is not None])
    return torch.cat(hidden)[None], tuple(torch.cat(layer) for layer in zip(*routers, strict=True))


def repeated(cache: "Cache", count: int) -> "Cache":
    """Return the states behind one prompt for several rows. They are replaced by later ones, not written over."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "recurrent_states"):
            layer.update_recurrent_state = MethodType(_replace_state, layer)
    cache.reorder_cache(torch.zeros(count, dtype=torch.long))  # pyright: ignore[reportArgumentType]
    return cache


def _replace_state(self: Any, recurrent_states: Tensor, state_idx: int = 0, **others: Any) -> Tensor:
    """Keep a state without writing over the one that the backward pass needs."""
    self.recurrent_states[state_idx] = recurrent_states
    return recurrent_states

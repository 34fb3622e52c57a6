"""Attention in a packed row: groups of a prompt and its responses that do not see each other."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from selfalign.errors import SelfalignError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "selfalign_packed"

WITHOUT_EFFECT = ("position_ids", "cache_position", "use_cache", "is_causal", "output_attentions")
"""Keywords of an attention that packing may ignore: what they say is in the layout, or is about the outputs."""


class Layout:
    """Who sees whom in a packed row: a token sees its prompt and its own response, up to itself.

    Made once for a batch and used by every layer. The *trunk* of a group, its prompt (and its response if it has but
    one), is seen causally; only the responses behind it need a mask.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Takes each group's prompt length and the lengths of its responses."""
        self.lengths = [prompt + sum(responses) for prompt, responses in groups]
        self.trunks = [prompt + sum(responses) * (len(responses) == 1) for prompt, responses in groups]
        self._segments = [torch.arange(len(r) + 1).repeat_interleave(torch.tensor([p, *r])) for p, r in groups]
        self._positions = [torch.cat([torch.arange(p), *(torch.arange(p, p + n) for n in r)]) for p, r in groups]
        self._masks: dict[int | None, list[tuple[Tensor | None, Tensor]]] = {}

    def to(self, device: torch.device) -> "Layout":
        """Moves it, in place."""
        self._segments = [segment.to(device) for segment in self._segments]
        self._positions = [position.to(device) for position in self._positions]
        return self

    def masks(self, window: int | None) -> list[tuple[Tensor | None, Tensor]]:
        """Of every group, two masks that are true where the row's token sees the column's.

        The first is the trunk's, (trunk, trunk), or None where it is plainly causal; the second that of the tokens
        behind it, (tokens - trunk, tokens).

        Args:
            window: how far back a token sees, in positions; None sees all.
        """
        if window not in self._masks:
            self._masks[window] = [
                (
                    _visible(segment, position, 0, trunk, window) if window and window < trunk else None,
                    _visible(segment, position, trunk, len(segment), window),
                )
                for segment, position, trunk in zip(self._segments, self._positions, self.trunks, strict=True)
            ]
        return self._masks[window]


def _visible(segment: Tensor, position: Tensor, start: int, stop: int, window: int | None) -> Tensor:
    """Whom the tokens from `start` to `stop` see of those up to `stop`."""
    same = (segment[None, :stop] == 0) | (segment[None, :stop] == segment[start:stop, None])
    distance = position[start:stop, None] - position[None, :stop]
    seen = same & (distance >= 0)
    return seen & (distance < window) if window else seen


def enable_packing(model: "PreTrainedModel") -> bool:
    """Switches the model to packed attention; False, with one log line, where its architecture has none to switch."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not _mixes_tokens_by_attention_alone(model):
        logger.info("%s cannot be packed; batches are padded instead", type(model).__name__)
        return False
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)
    model.set_attn_implementation(PACKED_ATTENTION)
    return True


def _mixes_tokens_by_attention_alone(model: "PreTrainedModel") -> bool:
    """Whether no token sees another except through an attention that can be exchanged.

    A convolution or a recurrence would carry one response over into the next.
    """
    kinds = {kind for name in ("layer_types", "layers_block_type") for kind in getattr(model.config, name, None) or ()}
    return (
        getattr(model, "_supports_attention_backend", False)
        and not getattr(model, "_is_stateful", False)
        and kinds <= {"full_attention", "sliding_attention", "attention"}
    )


def is_packing(model: "PreTrainedModel") -> bool:
    """Whether the model takes packed rows."""
    return model.config._attn_implementation == PACKED_ATTENTION


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, group by group.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head size); `key` and `value` may have fewer heads.
        key: as query.
        value: as query.
        attention_mask: none; the layout says who sees whom.
        layout: which tokens see which.
        scaling: factor on the scores; the head size's inverse root if None.
        dropout: share of attention weights dropped while training.
        sliding_window: how far back a token sees, in positions.
        others: what else the model hands its attention; refused unless known to leave the result alone.

    Returns:
        (1, tokens, heads, head size), and no weights.

    Raises:
        SelfalignError: the architecture does more here, like capping scores or adding sinks.
    """
    for name, other in others.items():
        if other is not None and name not in WITHOUT_EFFECT:
            raise SelfalignError(f"{type(module).__name__} uses {name!r} in its attention, which packing lacks")
    dropout = dropout if module.training else 0.0
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    groups = zip(*(tensor.split(layout.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    for (q, k, v), trunk, (within, behind) in zip(groups, layout.trunks, layout.masks(sliding_window), strict=True):
        if trunk:
            causal = within is None
            first, *seen = (tensor[:, :, :trunk] for tensor in (q, k, v))
            outputs.append(scaled_dot_product_attention(first, seen[0], seen[1], within, is_causal=causal, **options))
        if len(behind):
            outputs.append(scaled_dot_product_attention(q[:, :, trunk:], k, v, behind, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

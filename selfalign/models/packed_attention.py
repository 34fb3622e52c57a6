"""Attention in a packed row, where a token sees only those before it in its own sequences."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from selfalign.core.errors import SelfalignError
from selfalign.models.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "selfalign_packed"

WITHOUT_EFFECT = (
    "position_ids",
    "cache_position",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_router_logits",
)
"""Keywords of an attention that packing may ignore: the layout has their content, or they are about outputs."""


SMALLEST_HEAD = 16
"""The smallest head size that FlexAttention takes on a GPU."""

FLEX_GRAPHS = 64
"""The most graphs of FlexAttention that are compiled.

There is one for each kind of pass (training, without gradient, inference), for rows of one block and of more, for each
window and dtype. Beyond torch's own limit of 8 it would go on uncompiled, with the scores of the whole row in memory.
"""


class PackedLayout:
    """Which tokens see which in a packed row: a token sees those before it in its own sequences.

    A layout is made once for a batch and used by every layer. The row is the tree's, but for the tokens that another
    row, computed before by the same weights, has too: their keys and values are taken from there.

    Attributes:
        tree: the tree of the sequences.
        own: the tree's index of each token of the row.
        lengths: the number of tokens of each branch of the tree. Together they are the row.
        parts: the lengths of the tree's parts, cut wherever a branch begins, ends or parts from another.
        seen: for each branch, the parts that its tokens see.
        kept: {attention layer: keys and values of this row}, for rows that go on from it; None keeps none.
    """

    def __init__(
        self, tree: PrefixTree, known: Mapping[int, int] | None = None, before: "PackedLayout | None" = None
    ) -> None:
        """Lay out a tree.

        Args:
            tree: the tree of the sequences.
            known: {the tree's index of a token: its index in the row before}. Whatever a known token sees is known.
            before: the layout of the row before; its `kept` has the keys and values.
        """
        self.tree, known = tree, dict(known or {})
        self.kept: dict[torch.nn.Module, tuple[Tensor, Tensor]] | None = None
        begins = [next((at for at in range(*path[-1]) if at not in known), path[-1][1]) for path in tree.branches]
        branches = [(path, begin) for path, begin in zip(tree.branches, begins, strict=True) if begin < path[-1][1]]
        self.lengths = [path[-1][1] - begin for path, begin in branches]
        edges = sorted({edge for path in tree.branches for span in path for edge in span})
        self.parts = [end - start for start, end in pairwise(edges)]
        numbers = {edge: number for number, edge in enumerate(edges)}
        self.seen = [
            [part for start, end in path for part in range(numbers[start], numbers[end])] for path, _ in branches
        ]
        self._contexts = [
            sum(end - start for start, end in path[:-1]) + begin - path[-1][0] for path, begin in branches
        ]
        self._ends, self._position = torch.tensor(tree.ends), torch.tensor(tree.positions)
        self._masks: dict[int | None, list[Tensor | None]] = {}
        self._block_masks: dict[int | None, Any] = {}
        self.own = [at for at in range(len(tree.ids)) if at not in known]
        self._own, self._before, self._order = torch.tensor(self.own), None, None
        if before is not None and known:
            places = known | {at: place for place, at in enumerate(self.own, start=len(before.own))}
            self._before, self._order = before, torch.tensor([places[at] for at in range(len(tree.ids))])

    def to(self, device: torch.device) -> "PackedLayout":
        """Move the layout to a device, in place."""
        self._ends, self._position = self._ends.to(device), self._position.to(device)
        self._own = self._own.to(device)
        self._order = None if self._order is None else self._order.to(device)
        return self

    def in_order(self, layer: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of the whole tree from those of the row, in the tree's order.

        All are of shape (1, heads, tokens, head size).
        """
        if self.kept is not None and layer in self.kept:
            self.kept = None  # A layer that is passed twice has other keys each time.
        if self.kept is not None:
            self.kept[layer] = key.detach(), value.detach()
        if self._before is None or self._order is None:
            return key, value
        assert self._before.kept is not None
        both = zip(self._before.kept[layer], (key, value), strict=True)
        first, second = (torch.cat(pair, dim=2).index_select(2, self._order) for pair in both)
        return first, second

    def sees(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Whether the tokens at the row's indices `query` see those at the tree's `key`; the two broadcast."""
        query = self._own[query]
        seen = (key <= query) & (query < self._ends[key])
        return seen & (self._position[query] - self._position[key] < window) if window else seen

    def masks(self, window: int | None) -> list[Tensor | None]:
        """Return a mask of every branch, or None where it is plainly causal.

        It is true where a token of the branch sees the column's token, shape (own tokens, seen tokens).

        Args:
            window: how far back a token sees, in positions; None sees all.
        """
        if window not in self._masks:
            self._masks[window] = [
                self._mask(length, context, window)
                for length, context in zip(self.lengths, self._contexts, strict=True)
            ]
        return self._masks[window]

    def _mask(self, length: int, context: int, window: int | None) -> Tensor | None:
        if not context and not (window and window < length):
            return None
        mask = torch.ones(length, context + length, dtype=torch.bool, device=self._ends.device).tril(context)
        return mask.triu(context - window + 1) if window else mask

    def block_mask(self, window: int | None) -> Any:
        """Return the mask of the whole row for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._block_masks:
            device = self._ends.device
            self._block_masks[window] = create_block_mask(
                lambda batch, head, query, key: self.sees(query, key, window),
                None,
                None,
                len(self.own),
                len(self._ends),
                device=str(device),
            )
        return self._block_masks[window]


def enable_packing(model: "PreTrainedModel") -> bool:
    """Switch the model to packed attention. Return False, with one log line, if its architecture cannot."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not mixes_tokens_by_attention_alone(model):
        logger.info("%s cannot be packed; batches are padded instead", type(model).__name__)
        return False
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)
    model.set_attn_implementation(PACKED_ATTENTION)
    return True


@contextmanager
def packing(model: "PreTrainedModel") -> Iterator[None]:
    """Pack inside the block. Afterwards the model has its own attention again."""
    own = str(model.config._attn_implementation)
    enable_packing(model)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def mixes_tokens_by_attention_alone(model: "PreTrainedModel") -> bool:
    """Whether a token sees another only through an attention that can be exchanged.

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
    layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within one packed row: branch by branch, or on a GPU in one FlexAttention over the whole row.

    Scores that are capped, or that share their weights with a sink, are made branch by branch on every device.

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
        softcap: scores are squashed to softcap·tanh(score/softcap), as Gemma 2 does; None leaves them.
        s_aux: the score of each head's sink, which takes a share of the weights and has no value, as in gpt-oss.
        others: what else the model hands its attention; refused unless known to leave the result alone.

    Returns:
        (1, tokens, heads, head size), and no weights.

    Raises:
        SelfalignError: the architecture does more here, like adding a bias to the scores.
    """
    for name, other in others.items():
        if other is not None and other is not False and name not in WITHOUT_EFFECT:
            raise SelfalignError(
                f"{type(module).__name__} uses {name!r} in its attention, which packing does not support"
            )
    dropout = dropout if module.training else 0.0
    key, value = layout.in_order(module, key, value)
    if softcap or s_aux is not None:
        attend = partial(attend_by_scores, softcap=softcap, sinks=s_aux)
        output = branch_by_branch(query, key, value, layout, scaling, sliding_window, dropout, attend)
    elif not dropout and query.is_cuda and query.shape[3] >= SMALLEST_HEAD and flex_works(query.device):
        output = whole_row(query, key, value, layout, scaling, sliding_window)
    else:
        output = branch_by_branch(query, key, value, layout, scaling, sliding_window, dropout)
    return output.transpose(1, 2).contiguous(), None


def branch_by_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
    attend: Callable[..., Tensor] = scaled_dot_product_attention,
) -> Tensor:
    """Attend from the tokens of each branch of the tree; arguments as of `packed_attention`.

    `attend` takes and returns what `scaled_dot_product_attention` does.
    """
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    keys, values = (tensor.split(layout.parts, dim=2) for tensor in (key, value))
    outputs: list[Tensor] = []
    for own, seen, mask in zip(query.split(layout.lengths, dim=2), layout.seen, layout.masks(window), strict=True):
        k, v = (
            parts[seen[0]] if len(seen) == 1 else torch.cat([parts[number] for number in seen], dim=2)
            for parts in (keys, values)
        )
        outputs.append(attend(own, k, v, mask, is_causal=mask is None, **options))
    return torch.cat(outputs, dim=2)


def attend_by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend by scores that are capped, or that share their weights with a sink for each head.

    Args:
        query: (1, heads, tokens, head size).
        key: the same for the tokens seen, with as many heads or fewer.
        value: as key.
        mask: true where the row's token sees the column's; None with `is_causal`.
        is_causal: whether a token sees all before it.
        dropout_p: share of the weights dropped.
        scale: factor on the scores; the head size's inverse root if None.
        enable_gqa: whether several heads of the query have one of the key.
        softcap: as of `packed_attention`.
        sinks: (heads,), as `s_aux` there.
    """
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (scale or query.shape[3] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=3)
    shares = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]].to(value.dtype)
    return torch.dropout(shares, dropout_p, train=True) @ value


def whole_row(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    """Attend by FlexAttention with the layout's block mask; arguments as of `packed_attention`."""
    grouped = key.shape[1] != query.shape[1]
    return _compiled_flex()(query, key, value, block_mask=layout.block_mask(window), scale=scaling, enable_gqa=grouped)


@cache
def flex_works(device: torch.device) -> bool:
    """Whether FlexAttention compiles for this device and gives the values and gradients of `branch_by_branch`.

    It is tried once on a small row. If it fails, one log line says why, and attention goes branch by branch.
    """
    texts = [[1] * 70 + [2] * 40, [1] * 70 + [3] * 30, [4] * 5 + [5] * 9]
    layout = PackedLayout(PrefixTree(texts)).to(device)
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(layout.lengths), 64) for heads in (4, 2, 2)]
    query, key, value = (torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes)
    try:
        results: list[list[Tensor]] = []
        for attend in (branch_by_branch, whole_row):
            output = attend(query, key, value, layout, None, None)
            gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
            results.append([output.detach(), *gradients])
        worst = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
        problem = f"it is {worst:.1e} off" if not worst < 2e-2 else None
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        logger.info("FlexAttention does not work on %s (%s); attention goes branch by branch", device, problem)
    return not problem


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_GRAPHS)
    return torch.compile(flex_attention, dynamic=True)

"""The engine in this process: transformers' models with a decoding loop of our own, one random stream a sequence.

Batches are planned from the records alone, so the same records give the same texts however often a run is interrupted.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason
from selfalign.engines.protocol import Completion, Request, Sampling, check_dtype
from selfalign.models.checkpoint import LoadedPolicy, PolicyCheckpoint, resolve_dtype
from selfalign.models.packed_attention import PackedLayout, packing
from selfalign.models.prefix_tree import PrefixTree
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import decode_response, silent_ids, stop_ids

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicCache

TOGETHER = ("tree", "batches")
"""Ways to write that take several prompts at a time."""

STATES = ("past_key_values", "cache_params", "state")
"""Names of the state that architectures continue from."""

NUCLEUS_CANDIDATES = 256
"""Tokens that top-p looks at first; the whole vocabulary is sorted only for rows where these do not suffice."""


@dataclass(kw_only=True, slots=True)
class Transformers:
    """Generation in this process with transformers.

    A text depends on its record, its seed and the weights. The batch it is written in has an effect only through the
    rounding of matrix products, which differs with a batch's shape and between devices. So if two tokens are almost
    equally likely, or a draw falls between two, another max_batch_tokens or dtype can give another text.

    Attributes:
        max_batch_tokens: the most tokens, prompts and responses together, that one batch holds in its cache.
        dtype: of the weights while generating: "float32", "bfloat16", or "auto" for the faster one on this machine.
        scoring_dtype: of the weights while scoring, for judges that read probabilities; "auto" for `dtype`, or for the
            faster one to score if that is "auto" too.
    """

    max_batch_tokens: int = 16384
    dtype: str = "auto"
    scoring_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1:
            raise SelfalignError(f"engine.max_batch_tokens must be 1 or more, got {self.max_batch_tokens}")
        check_dtype(self.dtype)
        check_dtype(self.scoring_dtype, "scoring_dtype")

    def load(self, policy: PolicyCheckpoint) -> "TransformersGenerator":
        """Load a policy to write."""
        return TransformersGenerator(policy.load(resolve_dtype(self.dtype, writing=True)), self.max_batch_tokens)

    def load_scorer(self, policy: PolicyCheckpoint, max_batch_tokens: int) -> LogProbScorer:
        """Load a policy to score next tokens."""
        return LogProbScorer(
            policy.load(resolve_dtype(self.scoring_dtype if self.scoring_dtype != "auto" else self.dtype)),
            max_batch_tokens,
        )


@dataclass(slots=True)
class TransformersGenerator(LoadedPolicy):
    """A policy that writes through transformers' models and caches.

    Attributes:
        max_batch_tokens: the most tokens that one batch holds in its cache.
        watch: called at each step with the sequences being written and the logits of their next tokens.
        stops: the tokens that end a text.
        silent: the ids that stand for no text, such as those that pad the embedding, and are never drawn.
    """

    max_batch_tokens: int
    watch: Callable[[Sequence[int], Tensor], None] = lambda sequences, logits: None
    stops: Tensor = field(init=False)
    silent: Tensor = field(init=False)

    def __post_init__(self) -> None:
        model, tokenizer = self.policy.model, self.policy.tokenizer
        silent = silent_ids(tokenizer, model.config.get_text_config().vocab_size)
        self.stops = torch.tensor(stop_ids(tokenizer), device=model.device)
        self.silent = torch.tensor(silent, dtype=torch.long, device=model.device)

    def plan(self, lengths: Sequence[int], samples: int, max_new_tokens: int) -> list[list[int]]:
        """Put prompts of similar length together, within `max_batch_tokens`: indices, batch by batch.

        Each prompt is a batch of its own if the model cannot write several at a time.
        """
        if self.policy.capabilities.writes not in TOGETHER:
            return [[index] for index in range(len(lengths))]
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            width = lengths[batches[-1][0]] if batches else 0
            cached = (len(batches[-1]) + 1) * samples * (width + max_new_tokens) if batches else 0
            if not batches or cached > self.max_batch_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Write every request's completions in one batch. Each prompt is computed once.

        A completion depends on its request's seed. The batch it is in has an effect only through rounding, and through
        the order of equally likely tokens.
        """
        owners = [index for index, request in enumerate(requests) for _ in request.seeds]
        seeds = [seed for request in requests for seed in request.seeds]
        written = self.decode([request.prompt for request in requests], owners, seeds, sampling)
        completions: list[list[Completion]] = [[] for _ in requests]
        stops = set(self.stops.tolist())
        for owner, ids in zip(owners, written, strict=True):
            ended = bool(ids) and ids[-1] in stops
            reason = FinishReason.EOS if ended else FinishReason.LENGTH
            text = decode_response(self.tokenizer, ids)
            completions[owner].append(Completion(text=text, finish_reason=reason, tokens=len(ids), ids=ids))
        return completions

    def decode(
        self, prompts: Sequence[list[int]], owners: Sequence[int], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """Return the generated ids of each sequence, its stop token included.

        Args:
            prompts: token ids.
            owners: for each sequence, the index of its prompt.
            seeds: for each sequence, its sampling seed.
            sampling: how tokens are sampled.
        """
        if self.policy.capabilities.writes in TOGETHER:
            return self._decode_together(prompts, owners, seeds, sampling)
        written: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            own = {index: seeds[index] for index, owner in enumerate(owners) if owner == number}
            written |= self._decode_prompt(prompt, own, sampling)
        return [written[index] for index in range(len(seeds))]

    def _draw(self, logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
        """Draw one token a row. Each token stands for text or ends it."""
        heard = logits.index_fill(-1, self.silent, float("-inf")) if len(self.silent) else logits
        return draw_tokens(heard, uniforms, sampling)

    def _decode_prompt(self, prompt: list[int], seeds: dict[int, int], sampling: Sampling) -> dict[int, list[int]]:
        """Write several sequences after one prompt, without padding. A row that has ended stays until all have.

        The model continues from the state that it returned, in its own form. If that is not exact, it continues from
        the whole text.
        """
        model, device = self.policy.model, self.policy.model.device
        cached = self.policy.capabilities.writes != "without_cache"
        uniforms, stops = draw_uniforms([*seeds.values()], sampling).to(device), set(self.stops.tolist())
        written: dict[int, list[int]] = {sequence: [] for sequence in seeds}
        ended: set[int] = set()
        ids, state = torch.tensor([prompt] * len(seeds), device=device), {}
        # Some architectures would start again at 0 behind a cache.
        positioned = "position_ids" in inspect.signature(model.forward).parameters
        for step in range(sampling.max_new_tokens):
            if positioned:
                end = len(prompt) + step
                state["position_ids"] = torch.arange(end - ids.shape[1], end, device=device)[None]
            output = model(input_ids=ids, use_cache=cached, **state)
            state = {name: output[name] for name in STATES if cached and output.get(name) is not None}
            logits = output.logits[:, -1]
            self.watch([*seeds], logits)
            tokens = self._draw(logits, uniforms[:, step], sampling)
            for sequence, token in zip(seeds, tokens.tolist(), strict=True):
                if sequence not in ended:
                    written[sequence].append(token)
                    ended |= {sequence} if token in stops else set()
            if len(ended) == len(seeds):
                break
            ids = tokens[:, None] if cached else torch.cat((ids, tokens[:, None]), dim=1)
        return written

    def _decode_together(
        self, prompts: Sequence[list[int]], owners: Sequence[int], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """Write sequences after several prompts in one batch. Rows that have ended are dropped."""
        from selfalign.engines.kv_cache import roomy_cache

        model, device = self.policy.model, self.policy.model.device
        longest, most = max(map(len, prompts)), sampling.max_new_tokens
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * (len(p) + most) for p in prompts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = roomy_cache(model.config, most)

        def logits_behind(ids: Tensor, end: int) -> Tensor:
            """Return the logits of the next token, where these `ids` are the last before column `end`."""
            at = positions[:, end - ids.shape[1] : end]
            arguments = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            return model(input_ids=ids, attention_mask=mask[:, :end], position_ids=at, **arguments).logits[:, -1]

        if self.policy.capabilities.writes == "tree":
            logits = read_as_tree(model, prompts, cache)
        else:
            padded = [[0] * (longest - len(p)) + p for p in prompts]  # Nobody sees the padding.
            logits = logits_behind(torch.tensor(padded, device=device), longest)
        rows = torch.tensor(owners, device=device)
        cache.batch_select_indices(rows)
        mask, positions, logits = mask[rows], positions[rows], logits[rows]
        uniforms = draw_uniforms(seeds, sampling).to(device)
        written: list[list[int]] = [[] for _ in seeds]
        active = list(range(len(seeds)))
        stops = set(self.stops.tolist())
        for step in range(most):
            self.watch(active, logits)
            tokens = self._draw(logits, uniforms[:, step], sampling)
            drawn = tokens.tolist()
            for sequence, token in zip(active, drawn, strict=True):
                written[sequence].append(token)
            order = fill_gaps([token in stops for token in drawn])
            if step + 1 == most or not order:
                break
            if len(order) < len(drawn):
                active = [active[row] for row in order]
                rows = torch.tensor(order, device=device)
                cache.batch_select_indices(rows)
                mask, positions, uniforms, tokens = mask[rows], positions[rows], uniforms[rows], tokens[rows]
            logits = logits_behind(tokens[:, None], longest + step + 1)
        return written


def read_as_tree(model: Any, prompts: Sequence[list[int]], cache: "DynamicCache") -> Tensor:
    """Fill a cache with prompts, every distinct prefix computed once.

    Args:
        model: the model.
        prompts: token ids.
        cache: the empty cache. It receives a row for each prompt, filled up on the left to the longest.

    Returns:
        The logits behind each prompt, shape (prompts, vocabulary).
    """
    from transformers.cache_utils import DynamicCache

    tree, longest = PrefixTree(prompts), max(map(len, prompts))
    rows = [tree.row(index) for index in range(len(prompts))]
    ids, positions = torch.tensor([tree.ids, tree.positions], device=model.device)[:, None]
    read, layout = DynamicCache(), PackedLayout(tree).to(model.device)
    ends = torch.tensor([row[-1] for row in rows], device=model.device)
    arguments = {"past_key_values": read, "use_cache": True, "logits_to_keep": ends}
    with packing(model):
        logits = model(input_ids=ids, position_ids=positions, layout=layout, **arguments).logits[0]
    columns = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    layers: list[Any] = read.layers
    for number, layer in enumerate(layers):
        keys, values = (states[0][:, columns].transpose(0, 1) for states in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return logits


def fill_gaps(ended: Sequence[bool]) -> list[int]:
    """Return the rows that go on, with the last ones moved into the gaps, so that as few rows move as possible."""
    count = sum(not end for end in ended)
    later = [row for row in range(count, len(ended)) if not ended[row]]
    return [later.pop() if ended[row] else row for row in range(count)]


def draw_uniforms(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Return the uniform numbers of each sequence, one a step: (sequences, max_new_tokens), from its seed alone."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(sampling.max_new_tokens, generator=stream) for stream in streams])


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row: (rows, vocabulary) and (rows,) → (rows,), by inverse CDF within the nucleus.

    Raises:
        SelfalignError: a row has no probabilities to draw from.
    """
    if sampling.temperature == 0:
        likeliest, tokens = logits.max(-1)
        _check_finite(likeliest, sampling)
        return tokens
    shares = (logits.float() / sampling.temperature).softmax(-1)
    _check_finite(shares[:, 0], sampling)
    if sampling.top_p == 1:
        return _invert(shares, uniforms, 1.0)
    likely, tokens = shares.topk(min(NUCLEUS_CANDIDATES, shares.shape[-1]))
    drawn = tokens.gather(1, _invert(likely, uniforms, sampling.top_p)[:, None]).squeeze(1)
    wide = (likely.sum(-1) < sampling.top_p).nonzero().squeeze(1)
    if len(wide):
        likely, tokens = shares[wide].sort(descending=True)
        drawn[wide] = tokens.gather(1, _invert(likely, uniforms[wide], sampling.top_p)[:, None]).squeeze(1)
    return drawn


def _check_finite(values: Tensor, sampling: Sampling) -> None:
    """Check a value of each row that tells of all: the highest logit, or any share, which are all NaN if one is."""
    if not values.isfinite().all():
        raise SelfalignError(
            "the policy's next-token probabilities are not finite: the training that made it has diverged (lower its "
            f"learning rate), its dtype is too small for it, or temperature={sampling.temperature:g} is too close to 0 "
            "(0 takes the likeliest token)"
        )


def _invert(shares: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """Return the column that each uniform falls on, among the first ones that together have at least `top_p`."""
    cumulative = shares.cumsum(-1)
    ends = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    mass = cumulative.gather(1, ends)
    return torch.searchsorted(cumulative, uniforms[:, None] * mass, right=True).minimum(ends).squeeze(1)

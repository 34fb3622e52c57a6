"""What selfalign does with a model, tried on a few tokens and held against the model's own plain forward pass.

Packing texts, writing with a cache, training through it, switching dropout: architectures differ in all of these in
ways that no list keeps up with. What differs from the plain pass gets another way that does not, or is refused.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from selfalign.attention import enable_packing
from selfalign.batches import Group, make_batch
from selfalign.capabilities import Capabilities
from selfalign.errors import SelfalignError, first_line
from selfalign.generation import Sampling, TransformersGenerator
from selfalign.logprobs import score_responses_only
from selfalign.models import Policy
from selfalign.scoring import set_dropout
from selfalign.tokenization import control_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FARTHEST_WINDOW = 4352
"""Windows up to so many tokens are crossed by the texts that are scored; most are 128 to 4,096."""

FARTHEST_WRITTEN = 1100
"""Those up to so many by the texts that are written."""

STEPS = 6
"""Tokens that are written."""

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}
"""How far a token's log-probability (nats) may be from the model's own, by the dtype of the check."""

DIFFERENCE_STEPS = (1e-2, 1e-3)
"""How far embeddings are moved, as a share of their size, to see whether the gradient tells what that changes."""


def writing_of(policy: Policy) -> str:
    """How the model can write: the first way that draws tokens from what forward passes without a cache give.

    Raises:
        SelfalignError: none does.
    """
    window = crossed_window(policy.model, FARTHEST_WRITTEN)
    prompts = [draw_tokens(policy, window + 9, 1), draw_tokens(policy, 5, 2)]
    for way in ("batches", "prompts", "without_cache"):
        trial = replace(policy, capabilities=Capabilities(writes=way))
        try:
            if all(writes_rightly(trial, prompts, stop) for stop in (None, 2)):
                return way
        except Exception as error:  # noqa: BLE001 - other people's code may fail in any way
            logger.debug("writing in %s fails: %s", way, first_line(error))
    raise SelfalignError(
        f"{type(policy.model).__name__} gives other probabilities when it writes than when it reads the whole text: "
        "what it writes could not be trusted"
    )


@torch.inference_mode()
def writes_rightly(policy: Policy, prompts: Sequence[list[int]], stop_after: int | None) -> bool:
    """Whether the logits of every token of a few texts are, but for rounding, those without a cache.

    Args:
        policy: who writes.
        prompts: of unlike length, the first one answered twice.
        stop_after: makes the last text end after so many tokens, so that its row is dropped.
    """
    generator = TransformersGenerator(policy, batch_tokens=1 << 20)
    generator.stops = generator.stops[:0]
    sampling, owners = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=STEPS), [0, 0, 1]
    written = generator.decode(prompts, owners, [0, 1, 2], sampling)
    if stop_after is not None:
        generator.stops = torch.tensor([written[2][stop_after]], device=policy.model.device)
    seen: list[list[Tensor]] = [[] for _ in owners]

    def keep(sequences: Sequence[int], logits: Tensor) -> None:
        for sequence, row in zip(sequences, logits, strict=True):
            seen[sequence].append(row)

    generator.watch = keep
    written = generator.decode(prompts, owners, [0, 1, 2], sampling)
    return all(
        without_cache(policy.model, prompts[owner], ids, rows)
        for owner, ids, rows in zip(owners, written, seen, strict=True)
    )


def without_cache(model: "PreTrainedModel", prompt: list[int], written: list[int], seen: Sequence[Tensor]) -> bool:
    """Whether a pass over the whole text, which needs no cache, gives the logits that its tokens were drawn from."""
    ids = torch.tensor([[*prompt, *written]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    distance = (own.float().log_softmax(-1) - torch.stack(list(seen[: len(own)])).float().log_softmax(-1)).abs()
    return float(distance.max()) <= TOLERANCE[model.dtype]


@dataclass(slots=True)
class Scoring:
    """A few texts, and the way to score them that gives the model's own log-probabilities.

    Attributes:
        policy: its model serves for nothing but scoring afterwards.
        packs: whether that is by packed rows.
        notes: why not.
        groups: the texts; together they are longer than any window.
    """

    policy: Policy
    packs: bool = False
    notes: list[str] = field(default_factory=list)
    groups: list[Group] = field(init=False)

    def __post_init__(self) -> None:
        window = crossed_window(self.policy.model, FARTHEST_WINDOW)
        lengths = [(window + 12, (7, 12)), (5, (9, 4))]
        self.groups = [
            Group(
                id=f"check-{number}",
                prompt=draw_tokens(self.policy, prompt, 10 + number),
                responses=[draw_tokens(self.policy, n, 20 + 10 * number + n) for n in responses],
                given=[0] * len(responses),
            )
            for number, (prompt, responses) in enumerate(lengths)
        ]

    def settle(self) -> None:
        """Packs if that is right, else pads if that is.

        Raises:
            SelfalignError: neither is.
        """
        own = own_logps(self.policy.model, self.groups)
        problem = self._packing_problem(own)
        self.packs = not problem
        if self.packs:
            return
        self.notes.append(f"cannot be packed ({problem}); batches are padded instead")
        if problem := self._difference(own):
            raise SelfalignError(
                f"{type(self.policy.model).__name__} scores a text differently when others stand beside it, padded too "
                f"({problem}): no log-probability of it could be trusted"
            )

    def _packing_problem(self, own: Tensor) -> str:
        """Why packed rows are not scored as each text alone, with the model as it was; nothing where they are."""
        model = self.policy.model
        implementation = str(model.config._attn_implementation)
        try:
            if not enable_packing(model):
                return "its attention cannot be exchanged, or is not all that mixes tokens"
            problem = self._difference(own)
        except Exception as error:  # noqa: BLE001 - other people's code may fail in any way
            problem = first_line(error)
        if problem:
            model.set_attn_implementation(implementation)
        return problem

    @torch.no_grad()
    def _difference(self, own: Tensor) -> str:
        """How far off the scores are, where that is more than rounding; nothing where it is not."""
        score_responses_only(self.policy.model)
        worst = float((self.logps(self.groups) - own).abs().max())
        return "" if worst <= TOLERANCE[self.policy.model.dtype] else f"a token's log-probability is {worst:.2g} off"

    def logps(self, groups: Sequence[Group]) -> Tensor:
        """log p of all responses' tokens, shape (response tokens,)."""
        model = self.policy.model
        batch = make_batch(model, groups).to(model.device)
        return model(predict_at=batch.predict_at, targets=batch.targets, **batch.inputs)

    def short(self) -> Tensor:
        """The same of the short texts alone, which a backward pass has memory for."""
        return self.logps(self.groups[1:])


@torch.no_grad()
def own_logps(model: "PreTrainedModel", groups: Sequence[Group]) -> Tensor:
    """log p of the responses' tokens, by a plain forward pass for each.

    Raises:
        SelfalignError: that fails.
    """
    found: list[Tensor] = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]], device=model.device)
            try:
                logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
            except Exception as error:
                raise SelfalignError(f"{type(model).__name__} fails on a plain text: {first_line(error)}") from error
            found.append(logits.float().log_softmax(-1).gather(1, ids[0, len(group.prompt) :, None]).squeeze(1))
    return torch.cat(found)


def check_gradient(scoring: Scoring) -> None:
    """The gradient that reaches the embeddings tells what moving them changes, after an inference too.

    Raises:
        SelfalignError: none reaches them, or it is another.
    """
    with moved_embeddings(scoring.policy.model) as shift:
        scoring.policy.model.train()
        set_dropout(scoring.policy.model, 0.0)
        value = scoring.short().sum()
        slope = torch.autograd.grad(value, shift.value, allow_unused=True)[0] if value.requires_grad else None
        scoring.policy.model.eval()
        size = 0.0 if slope is None else float(slope.norm())
        ratios = [] if slope is None or not size else [shift.ratio(scoring, slope, step) for step in DIFFERENCE_STEPS]
    if not size:
        raise SelfalignError(
            f"no gradient reaches the first layer of {type(scoring.policy.model).__name__}: most of it would not be "
            "trained"
        )
    low, high = (0.9, 1.1) if scoring.policy.model.dtype == torch.float32 else (0.5, 2.0)
    if not any(low < ratio < high for ratio in ratios):
        raise SelfalignError(
            f"the gradient of {type(scoring.policy.model).__name__} does not tell how its log-probabilities change "
            f"(by {ratios[-1]:.2g} of what they do): its training would go astray"
        )


@dataclass(slots=True)
class Shift:
    """What is added to the embeddings of a pass, and how large these are."""

    value: Tensor
    scale: float = 0.0

    @torch.no_grad()
    def ratio(self, scoring: Scoring, slope: Tensor, step: float) -> float:
        """The change along the slope, as a share of what the slope says."""
        direction = slope / slope.norm()
        far = step * self.scale * direction.numel() ** 0.5
        values: list[float] = []
        for sign in (1.0, -1.0):
            self.value = sign * far * direction
            values.append(float(scoring.short().double().sum()))
        return (values[0] - values[1]) / (2 * far * float(slope.norm()))


@contextmanager
def moved_embeddings(model: "PreTrainedModel") -> Iterator[Shift]:
    """Adds something to what the embedding gives, which takes a gradient."""
    shift = Shift(torch.zeros(1, device=model.device, dtype=model.dtype, requires_grad=True))

    def add(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not shift.scale:
            shift.scale = float(output.detach().float().square().mean().sqrt())
            shift.value = torch.zeros_like(output, requires_grad=True)
        return output + shift.value

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield shift
    finally:
        hook.remove()


def dropout_applies(scoring: Scoring) -> bool:
    """Whether dropout does something where it is asked for.

    Raises:
        SelfalignError: it does where it is not.
    """
    model = scoring.policy.model
    model.train()
    found: dict[float, bool] = {}
    for rate in (0.5, 0.0):
        set_dropout(model, rate)
        with torch.no_grad(), torch.random.fork_rng():
            first, second = scoring.short(), scoring.short()
        found[rate] = not torch.allclose(first, second, rtol=0, atol=TOLERANCE[model.dtype])
    model.eval()
    if found[0.0]:
        raise SelfalignError(
            f"{type(model).__name__} drops activations in training whatever is asked for: a policy would not start as "
            "its reference does"
        )
    return found[0.5]


def draw_tokens(policy: Policy, count: int, seed: int) -> list[int]:
    """Tokens that are no control tokens, drawn by seed."""
    control = control_ids(policy.tokenizer)
    rows = cast(Any, policy.model.get_input_embeddings()).weight.shape[0]
    usable = [token for token in range(min(rows, len(policy.tokenizer))) if token not in control]
    places = torch.randint(len(usable), (count,), generator=torch.Generator().manual_seed(seed))
    return [usable[place] for place in places.tolist()]


def crossed_window(model: "PreTrainedModel", farthest: int) -> int:
    """The longest stretch that a layer sees by its config, if texts can be so long here; else 0."""
    settings = model.config.get_text_config().to_dict()
    names = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "index_topk")
    windows = [int(settings.get(name) or 0) for name in names]
    context = settings.get("max_position_embeddings") or farthest
    return max((window for window in windows if 0 < window <= min(farthest, context - 32)), default=0)

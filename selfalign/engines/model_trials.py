"""Trials of a model: packing, writing with a cache, training, and dropout, compared with plain forward passes.

Architectures differ in all of these in ways that no list keeps up with. If something differs from the plain pass, a
way that does not is used instead, or the model is refused.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selfalign.core.errors import SelfalignError, reason_of
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import TransformersGenerator
from selfalign.models.batches import SharedPrompt, make_batch, share_states
from selfalign.models.capabilities import Capabilities
from selfalign.models.chat_template import control_ids
from selfalign.models.checkpoint import Policy, longest_sequence
from selfalign.models.logprobs import score_responses_only
from selfalign.models.packed_attention import enable_packing, mixes_tokens_by_attention_alone
from selfalign.models.prompt_states import share_prompt_states, shares_prompt_states
from selfalign.models.scorer import set_dropout, stays_in_inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FARTHEST_WINDOW = 4352
"""Scored texts cross windows up to this many tokens; most windows have 128 to 4,096."""

FARTHEST_WRITTEN = 1100
"""Written texts cross windows up to this many tokens."""

STEPS = 6
"""Tokens that are written."""

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}
"""How far a token's log-probability (nats) may be from the model's own, by the dtype of the check."""

STEP_SIZES = (1e-3, 1e-2, 3e-2, 1e-1, 1e-4)
"""How far a layer's input is moved, as a share of its size, to compare the effect with the gradient.

They are tried in this order until one agrees. Rounding hides the effect of small ones, curvature spoils that of large
ones.
"""

LINEAR_LAYERS = 8
"""Number of linear layers that are tested: those of a decoder layer."""


def writing_of(policy: Policy) -> str:
    """Return the first way to write whose logits are those of forward passes without a cache.

    Raises:
        SelfalignError: none does.
    """
    window = crossed_window(policy.model, FARTHEST_WRITTEN)
    longer = draw_tokens(policy, window + 9, 1)
    prompts = [longer, [*longer[:2], *draw_tokens(policy, 3, 2)]]
    tree = ["tree"] if mixes_tokens_by_attention_alone(policy.model) else []
    for way in (*tree, "batches", "prompts", "without_cache"):
        trial = replace(policy, capabilities=Capabilities(writes=way))
        try:
            if all(writes_rightly(trial, prompts, stop) for stop in (None, 2)):
                return way
        except Exception as error:  # noqa: BLE001 - other people's code may fail in any way
            logger.debug("writing in %s fails: %s", way, reason_of(error))
    raise SelfalignError(
        f"{type(policy.model).__name__} gives other probabilities when it writes than when it reads the whole text, so "
        "its texts cannot be trusted. Use another model."
    )


@torch.inference_mode()
def writes_rightly(policy: Policy, prompts: Sequence[list[int]], stop_after: int | None) -> bool:
    """Whether a way to write gives the logits of passes without a cache for every token, but for rounding.

    Args:
        policy: who writes.
        prompts: of unlike length, the first one answered twice.
        stop_after: makes the last text end after so many tokens, so that its row is dropped.
    """
    generator = TransformersGenerator(policy, max_batch_tokens=1 << 20)
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
    """Whether passes over the whole text, which need no cache, give the logits that the tokens were drawn from."""
    ids = torch.tensor([[*prompt, *written]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    distance = (own.float().log_softmax(-1) - torch.stack(list(seen[: len(own)])).float().log_softmax(-1)).abs()
    return float(distance.max()) <= TOLERANCE[model.dtype]


@dataclass(slots=True)
class ScoringTrial:
    """A few texts, and the way to score them that gives the model's own log-probabilities.

    Attributes:
        policy: its model serves for nothing but scoring afterwards.
        packs: whether that is by packed rows.
        shares_states: whether it is by responses that go on from the states behind their prompt.
        notes: why not by packed rows.
        groups: the texts; together they are longer than any window.
    """

    policy: Policy
    packs: bool = False
    shares_states: bool = False
    notes: list[str] = field(default_factory=list)
    groups: list[SharedPrompt] = field(init=False)

    def __post_init__(self) -> None:
        window = crossed_window(self.policy.model, FARTHEST_WINDOW)
        lengths = [(window + 12, (7, 12)), (5, (9, 4))]
        self.groups = [
            SharedPrompt(
                id=f"check-{number}",
                prompt=draw_tokens(self.policy, prompt, 10 + number),
                responses=[draw_tokens(self.policy, n, 20 + 10 * number + n) for n in responses],
                num_context_tokens=[0] * len(responses),
            )
            for number, (prompt, responses) in enumerate(lengths)
        ]

    def settle(self) -> None:
        """Choose packed rows if their scores are right, else shared states, else padded rows if theirs are.

        Raises:
            SelfalignError: neither scores are right.
        """
        own = own_logps(self.policy.model, self.groups)
        problem = self._packing_problem(own)
        self.packs = not problem
        if self.packs:
            return
        self.shares_states = self._shares_states(own)
        if self.shares_states:
            self.notes.append(f"cannot be packed ({problem}); responses go on from the states behind their prompt")
            return
        self.notes.append(f"cannot be packed ({problem}); batches are padded instead")
        if problem := self._difference(own):
            raise SelfalignError(
                f"{type(self.policy.model).__name__} scores a text differently in a batch, padded too ({problem}): its "
                "log-probabilities cannot be trusted. Use another model."
            )

    def _packing_problem(self, own: Tensor) -> str | None:
        """Return why packed rows are not scored as each text alone, or None where they are.

        Where they are not, the model keeps the attention it had.
        """
        model = self.policy.model
        implementation = str(model.config._attn_implementation)
        try:
            if not enable_packing(model):
                return "its attention cannot be exchanged, or is not all that mixes tokens"
            problem = self._difference(own)
        except Exception as error:  # noqa: BLE001 - other people's code may fail in any way
            problem = reason_of(error)
        if problem:
            model.set_attn_implementation(implementation)
        return problem

    def _shares_states(self, own: Tensor) -> bool:
        """Return whether responses that go on from the states behind their prompt are scored as each text alone."""
        model = self.policy.model
        share_prompt_states(model)
        try:
            problem = self._difference(own)
        except Exception as error:  # noqa: BLE001 - other people's code may fail in any way
            problem = reason_of(error)
        share_prompt_states(model, enabled=not problem)
        if problem:
            logger.debug("%s cannot share the states behind a prompt: %s", type(model).__name__, problem)
        return not problem

    @torch.no_grad()
    def _difference(self, own: Tensor) -> str | None:
        """Return how far off the scores are, or None where that is no more than rounding."""
        score_responses_only(self.policy.model)
        worst = float((self.logps(self.groups) - own).abs().max())
        return None if worst <= TOLERANCE[self.policy.model.dtype] else f"a token's log-probability is {worst:.2g} off"

    def logps(self, groups: Sequence[SharedPrompt]) -> Tensor:
        """Return log p of all responses' tokens, shape (response tokens,)."""
        model = self.policy.model
        batch = share_states(groups) if shares_prompt_states(model) else make_batch(model, groups)
        batch = batch.to(model.device)
        return model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs)

    def short(self) -> Tensor:
        """Return log p of the short texts alone, which a backward pass has memory for."""
        return self.logps(self.groups[1:])


@torch.no_grad()
def own_logps(model: "PreTrainedModel", groups: Sequence[SharedPrompt]) -> Tensor:
    """Return log p of the responses' tokens, by a plain forward pass for each.

    Raises:
        SelfalignError: the forward pass fails.
    """
    found: list[Tensor] = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]], device=model.device)
            try:
                logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
            except Exception as error:
                raise SelfalignError(f"{type(model).__name__} fails on a plain text: {reason_of(error)}") from error
            found.append(logits.float().log_softmax(-1).gather(1, ids[0, len(group.prompt) :, None]).squeeze(1))
    return torch.cat(found)


def check_gradient(scoring: ScoringTrial) -> None:
    """Check the gradient of a layer's input against the effect of moving that input, also after an inference pass.

    The places are behind the embedding and before the first linear layers: there no residual connection leads around a
    layer that computes but lets no gradient back.

    Raises:
        SelfalignError: a gradient is lost or wrong.
    """
    model = scoring.policy.model
    with nudged(model) as nudges, HeldSelections() as selections:
        model.train()
        set_dropout(model, 0.0)
        value = scoring.short().sum()
        selections.first = False
        used = [nudge for nudge in nudges if nudge.passes == nudges[0].passes]
        slopes = slopes_after_inference(scoring, value, [nudge.value for nudge in used])
        for nudge, slope in zip(used, slopes, strict=True):
            if problem := nudge.problem(scoring, slope):
                raise SelfalignError(
                    f"{type(model).__name__}: the gradient {nudge.place} {problem}, so training would be wrong. Use "
                    "another model."
                )
        model.eval()


def slopes_after_inference(scoring: ScoringTrial, value: Tensor, places: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of a value at some places, taken after another pass in inference mode.

    A loss with a refinement has such a pass between its forward and its backward pass.

    Raises:
        SelfalignError: the inference pass changes what the backward pass needs.
    """
    model = scoring.policy.model
    if not value.requires_grad:
        return [None] * len(places)
    model.eval()
    with torch.no_grad():
        scoring.short()
    model.train()
    try:
        return torch.autograd.grad(value, places, allow_unused=True)
    except RuntimeError as error:
        raise SelfalignError(
            f"{type(model).__name__}: an inference pass spoils the gradient of the pass before it "
            f"({reason_of(error)}), so it cannot be trained. Use another model."
        ) from error


class HeldSelections(TorchFunctionMode):
    """Inside the block, passes over the same input select the same entries by `topk` as the first one.

    A token that goes to another expert would make a step in the log-probabilities, which no gradient knows of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []
        self.calls = 0
        self.first = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        if self.first:
            selected = func(*args, **kwargs)
            self.held.append(selected.indices)
            return selected
        indices = self.held[self.calls % len(self.held)]
        self.calls += 1
        given = args[0] if args else kwargs["input"]
        dimension = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((given.gather(dimension, indices), indices))


@dataclass(slots=True)
class Nudge:
    """A tensor added to the activations at one place of a model.

    Attributes:
        place: where, for a message.
        value: what is added; it takes a gradient.
        scale: how large what passes is, the root of its mean square.
        passes: how often something has passed.
    """

    place: str
    value: Tensor = field(default_factory=lambda: torch.zeros(1))
    scale: float = 0.0
    passes: int = 0

    def add(self, passing: Tensor) -> Tensor:
        """Return the activations with the value added."""
        self.passes += 1
        if self.passes == 1:
            self.scale = float(passing.detach().float().square().mean().sqrt())
            self.value = torch.zeros_like(passing, requires_grad=True)
        return passing + self.value if self.value.shape == passing.shape else passing

    def after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Add the value to a module's output."""
        return self.add(output)

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add the value to a module's input."""
        return self.add(inputs[0]), *inputs[1:]

    def problem(self, scoring: ScoringTrial, slope: Tensor | None) -> str | None:
        """Return what is wrong with a gradient, or None."""
        exact = scoring.policy.model.dtype == torch.float32
        if slope is None or not float(slope.norm()):
            noise = torch.randn(self.value.shape, generator=torch.Generator().manual_seed(0)).to(self.value)
            return "is lost" if abs(self._change(scoring, noise, 1.0)) > (1e-2 if exact else 1.0) else None
        size = float(slope.norm())
        steps, share, slack = (STEP_SIZES, 0.1, 5e-4) if exact else ((1e-1,), 0.5, 0.5)
        effects = {step: 2 * step * self.scale * size * slope.numel() ** 0.5 for step in steps}
        expected = change = 0.0
        for step in [step for step in steps if effects[step] > 3 * slack] or [max(steps)]:
            expected, change = effects[step], self._change(scoring, slope, step)
            if abs(change - expected) <= share * expected + slack:
                return None
        return f"says {expected:.2g} where log-probabilities change by {change:.2g}"

    @torch.no_grad()
    def _change(self, scoring: ScoringTrial, direction: Tensor, step: float) -> float:
        """Return by how much more the texts are worth when the value moves forward in this direction than backward."""
        far = step * self.scale * direction.numel() ** 0.5 / float(direction.norm())
        before, values = self.value, []
        for sign in (1.0, -1.0):
            self.value = sign * far * direction
            values.append(float(scoring.short().double().sum()))
        self.value = before
        return values[0] - values[1]


@contextmanager
def nudged(model: "PreTrainedModel") -> Iterator[list[Nudge]]:
    """Add tensors behind the embedding and before the first linear layers."""
    behind = Nudge("behind the embedding")
    embedding: nn.Module = model.get_input_embeddings()
    hooks = [embedding.register_forward_hook(behind.after)]
    nudges = [behind]
    head = model.get_output_embeddings()
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not stays_in_inference(module)
    ]
    for name, module in linear[:LINEAR_LAYERS]:
        nudges.append(Nudge(f"before {name}"))
        hooks.append(module.register_forward_pre_hook(nudges[-1].before))
    try:
        yield nudges
    finally:
        for hook in hooks:
            hook.remove()


def dropout_applies(scoring: ScoringTrial) -> bool:
    """Whether dropout has an effect if it is asked for.

    Raises:
        SelfalignError: dropout is applied although it is set to 0.
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
            f"{type(model).__name__} applies dropout in training even if it is set to 0, so a policy would not start "
            "as its reference. Use another model."
        )
    return found[0.5]


def draw_tokens(policy: Policy, count: int, seed: int) -> list[int]:
    """Draw tokens that are not control tokens, by seed."""
    control = control_ids(policy.tokenizer)
    rows = cast(Any, policy.model.get_input_embeddings()).weight.shape[0]
    usable = [token for token in range(min(rows, len(policy.tokenizer))) if token not in control]
    places = torch.randint(len(usable), (count,), generator=torch.Generator().manual_seed(seed))
    return [usable[place] for place in places.tolist()]


def crossed_window(model: "PreTrainedModel", farthest: int) -> int:
    """Return the longest window that a layer sees by its config, if texts can be so long here, else 0."""
    settings = model.config.get_text_config().to_dict()
    names = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "index_topk")
    windows = [int(settings.get(name) or 0) for name in names]
    farthest = min(farthest, longest_sequence(model.config) - 32)
    return max((window for window in windows if 0 < window <= farthest), default=0)

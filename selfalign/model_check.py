"""One short check of a model when it is fetched, before anything is paid for: what it can do, and what it cannot.

Other people's models differ in ways that no list keeps up with. So what selfalign does with a model, packing texts,
writing with a cache, switching dropout, training through it, is tried on a few tokens and compared with the model's
own plain forward pass. What differs gets another way that is exact, or is refused in one line.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from selfalign.attention import enable_packing
from selfalign.batches import Group, make_batch
from selfalign.capabilities import Capabilities
from selfalign.chat_template import QUESTION, answer_shape, generation_prompt, render_prompt, unmarked_control_words
from selfalign.errors import SelfalignError, first_line
from selfalign.generation import Sampling, TransformersGenerator
from selfalign.logprobs import score_responses_only
from selfalign.models import Policy, PolicyFiles, default_device
from selfalign.scoring import set_dropout
from selfalign.store import Counts
from selfalign.tokenization import control_ids, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

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


def check_model(files: PolicyFiles, dtype: str) -> Counts:
    """Tries a model, writes down what it can do beside its weights, and says what is done about what it cannot.

    Args:
        files: the fetched model; gets capabilities.json.
        dtype: of its weights in the run; the check is in float32 where there is memory for it.

    Returns:
        What was found, for the manifest: the number of parameters, how it scores and writes, and notes.

    Raises:
        SelfalignError: the model cannot be used, with the reason.
    """
    checked_in, device = roomiest(files, dtype)
    policy = files.load(checked_in, device=device)
    policy.capabilities = Capabilities()
    check_vocabulary(policy)
    templated = bool(policy.tokenizer.chat_template)
    notes = check_template(policy.tokenizer) if templated else ["no chat template"]
    system_turns = templated and takes_system_turns(policy.tokenizer)
    notes += [] if system_turns or not templated else ["no system turns: the chat template does not take them"]
    found = Capabilities(writes=writing_of(policy), packs=False)
    scoring = Scoring(policy)
    scoring.settle()
    check_gradient(scoring)
    found = replace(found, packs=scoring.packs, dropout=dropout_applies(scoring))
    found.save(files.path)
    notes += scoring.notes + notes_on(found)
    for note in notes:
        logger.info("%s: %s", type(policy.model).__name__, note)
    return {
        "parameters": policy.model.num_parameters(),
        "context": policy.context,
        "checked_in": checked_in,
        "scores": "packed" if found.packs else "padded",
        "writes": found.writes,
        "dropout": found.dropout,
        "chat_template": templated,
        "system_turns": system_turns,
        "stops_at": [str(policy.tokenizer.convert_ids_to_tokens(token)) for token in stop_ids(policy.tokenizer)],
        "notes": notes,
    }


def roomiest(files: PolicyFiles, dtype: str) -> tuple[str, str]:
    """(dtype, device) of the check: float32 where there is memory for it, on the accelerator where it fits there."""
    if files.quantization:
        return dtype, default_device()
    needed = {"float32": 6 * count_parameters(files), "bfloat16": 3 * count_parameters(files)}
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        fitting = [one for one in ("float32", dtype) if needed[one] < free]
        if fitting:
            return fitting[0], "cuda"
    return ("float32" if needed["float32"] < psutil.virtual_memory().available else dtype), "cpu"


def count_parameters(files: PolicyFiles) -> int:
    """How many numbers the weight files hold, read from their headers."""
    total = 0
    for path in sorted((files.path / "weights").glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            total += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
    return total


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def check_vocabulary(policy: Policy) -> None:
    """Every token has a row of the embedding.

    Raises:
        SelfalignError: one has none; reading it would crash, on a GPU without a word.
    """
    rows = cast(Any, policy.model.get_input_embeddings()).weight.shape[0]
    largest = max(policy.tokenizer.get_vocab().values())
    if largest >= rows:
        word = policy.tokenizer.convert_ids_to_tokens(largest)
        raise SelfalignError(
            f"the tokenizer has a token {word!r} with id {largest}, and the model's embedding only {rows} rows: resize "
            "the embedding (model.resize_token_embeddings in transformers), or take the tokenizer that belongs to it"
        )


def check_template(tokenizer: "Tokenizer") -> list[str]:
    """Renders a few conversations with the chat template.

    Returns:
        Notes on what the template cannot do, and what is mended.

    Raises:
        SelfalignError: it loses what the user asks or the assistant answers.
    """
    notes: list[str] = []
    before = render_prompt(tokenizer, QUESTION)
    if QUESTION[0]["content"] not in before:
        raise SelfalignError(
            "the chat template leaves out what the user asks; give another with model.chat_template=FILE"
        )
    shape, asked = answer_shape(tokenizer), generation_prompt(tokenizer, QUESTION)
    if asked not in (before, before[: len(before) - len(shape.margin)]):
        start = next((at for at, (a, b) in enumerate(zip(before, asked, strict=False)) if a != b), None)
        start = min(len(before), len(asked)) if start is None else start
        notes.append(
            f"the chat template opens an answer with {before[start:]!r} in a conversation and with {asked[start:]!r} "
            "where it is asked for one: answers are written and trained behind the former"
        )
    if unmarked := unmarked_control_words(tokenizer):
        notes.append(f"control tokens that are not marked as special: {' '.join(sorted(unmarked))}")
    return notes


def takes_system_turns(tokenizer: "Tokenizer") -> bool:
    """Whether the chat template writes what a system turn says."""
    try:
        return "rule" in render_prompt(tokenizer, [{"role": "system", "content": "rule"}, *QUESTION])
    except SelfalignError:
        return False


# --- writing ---------------------------------------------------------------------------------------------------------


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


# --- scoring and training --------------------------------------------------------------------------------------------


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


# --- what they share -------------------------------------------------------------------------------------------------


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


def notes_on(found: Capabilities) -> list[str]:
    """What is done about what a model cannot do."""
    notes: list[str] = []
    if found.writes == "prompts":
        notes.append("its cache cannot drop rows: it writes the answers to one prompt at a time")
    if found.writes == "without_cache":
        notes.append("its cache is not exact: with generate=transformers it reads the whole text for every token")
    if not found.dropout:
        notes.append("has no dropout that could be set")
    return notes

"""The refinement function of quality-aware self-refinement: the augmented prompt p⊕x and Δ.

Yu et al. 2024, arXiv 2405.21040, eq. 11, and controls that separate the causes of its gain.
"""

import math
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed, text_or_file
from selfalign.core.placeholders import check_template
from selfalign.core.records import Prompt
from selfalign.losses.logps import PairLogps, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

AUGMENTATION_PROMPT = (
    "Answer the query below. On a scale from 1 to {scale}, where {scale} is the best, "
    "your answer should reach {scale} for usefulness, and it must do no harm.\n\n"
)
NEGATIVE_PROMPT = (
    "Answer the query below. On a scale from 1 to {scale}, where {scale} is the best, "
    "your answer should reach 1 for usefulness, and it may do harm.\n\n"
)
SCALE = 100
SOURCES = ("prompted", "naive", "shuffled", "constant", "random_prompt", "contrastive")
PLACES = ("dialogue", "last_turn", "system", "after")
NORMALISATIONS = ("none", "rms", "zscore")
SMALLEST_SPREAD = 1e-4
"""The least spread of h, in nats, that Δ is divided by: below it stands rounding, as at the first step."""


@dataclass(kw_only=True, slots=True)
class Refinement:
    """Where the Δ of the Sr losses comes from.

    Attributes:
        source: "prompted" is the paper's Δ_π. The others are controls: "naive" is β h, without p (its eq. 10);
            "shuffled" gives each pair the Δ_π of another pair of its step; "constant" gives every pair `constant`;
            "random_prompt" replaces p by random words of as many tokens. "contrastive" has no reference: it compares
            the policy given p⊕x with itself given p⁻⊕x (after Liu et al. 2024, arXiv 2402.11907). That Δ is not 0 at
            the first step. On held-out pairs Δ is measured with p and the reference all the same.
        prompt: p, the text before the query x, or "file:PATH". `{scale}` in it is replaced by `scale`. Our wording.
        place: the position of p if x is a dialogue. "dialogue", as in the paper's p⊕x, is the start of the first user
            turn, after a system message; "last_turn" is the start of the last user turn; "after" is behind x, at the
            end of the last user turn, a blank line between; "system" is the start of the system turn, which is added
            where there is none. The last two need prompts of turns.
        scale: the highest score of the scale in p: 100, or 10 as in the paper's ablation.
        constant: Δ of every pair if the source is "constant", in units of reward (of reward per token if
            `loss.reduction` is "mean").
        negative_prompt: p⁻, as `prompt`, if the source is "contrastive"; if it is empty, p⁻ asks for a useless answer.
        normalise: "none" weighs Δ by λ as it is. "rms" divides it by its root mean square over the pairs of the
            optimizer step, so that λ has the same weight whatever the scale of Δ; it is at most √pairs then. "zscore"
            takes off the step's mean and divides by the step's standard deviation, as α-DPO does. Metrics show Δ as it
            is. Until the policy leaves its reference, Δ is rounding, which `loss.lam_warmup` keeps out.
    """

    source: str = "prompted"
    prompt: str = AUGMENTATION_PROMPT
    place: str = "dialogue"
    scale: int = SCALE
    constant: float = 0.0
    negative_prompt: str = field(default="", metadata={"keyed": "if set"})
    normalise: str = field(default="none", metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise SelfalignError(f"loss.refinement.source must be one of {', '.join(SOURCES)}; got {self.source!r}")
        if self.place not in PLACES:
            raise SelfalignError(f"loss.refinement.place must be one of {', '.join(PLACES)}; got {self.place!r}")
        self.prompt = _text_of(self.prompt, "loss.refinement.prompt", "p")
        if self.negative_prompt and self.source != "contrastive":
            raise SelfalignError(
                f"loss.refinement.negative_prompt has no effect with loss.refinement.source={self.source}: set that to "
                "contrastive, or remove the setting"
            )
        if self.source == "contrastive":
            negative = self.negative_prompt or NEGATIVE_PROMPT
            self.negative_prompt = _text_of(negative, "loss.refinement.negative_prompt", "p⁻")
        if self.scale < 1:
            raise SelfalignError(f"loss.refinement.scale must be 1 or more, got {self.scale}")
        if self.scale != SCALE and "{scale}" not in self.prompt:
            raise SelfalignError(
                f"loss.refinement.scale={self.scale} has no effect, because loss.refinement.prompt has no {{scale}}: "
                "add {scale} to the prompt or remove the setting"
            )
        if bool(self.constant) != (self.source == "constant"):
            raise SelfalignError(
                "loss.refinement.constant must be non-zero if and only if loss.refinement.source=constant (got "
                f"constant={self.constant:g}, source={self.source})."
            )

        if self.normalise not in NORMALISATIONS:
            raise SelfalignError(
                f"loss.refinement.normalise must be one of {', '.join(NORMALISATIONS)}; got {self.normalise!r}"
            )
        if self.source == "constant" and self.normalise != "none":
            raise SelfalignError(
                f"loss.refinement.normalise={self.normalise} has no use with loss.refinement.source=constant, whose Δ "
                "are all alike: set it to none"
            )

    @property
    def has_reference(self) -> bool:
        """Whether Δ compares the policy with the reference, so that it is 0 while the two are equal."""
        return self.source not in ("constant", "contrastive")

    def augmentation(self) -> "Refinement | None":
        """Return the settings of the passes given p⊕x, and p⁻⊕x; None if the source has no such pass."""
        if self.source in ("naive", "constant"):
            return None
        return replace(self, source="prompted" if self.source == "shuffled" else self.source, normalise="none")

    def given_p(self) -> "Refinement":
        """Return the settings of the pass given p⊕x alone."""
        return replace(self, source="prompted", negative_prompt="") if self.source == "contrastive" else self

    def text(self, tokenizer: "Tokenizer") -> "Augmentation":
        """Return p: the prompt with its scale, or random words of the same length."""
        p = self.prompt.replace("{scale}", str(self.scale))
        return Augmentation(random_words(tokenizer, p) if self.source == "random_prompt" else p, self.place)

    def negative(self) -> "Augmentation | None":
        """Return p⁻ with its scale; None if the source has none."""
        if self.source != "contrastive":
            return None
        return Augmentation(self.negative_prompt.replace("{scale}", str(self.scale)), self.place)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """p: its text and its position in a dialogue."""

    text: str
    place: str


def augment(p: Augmentation, prompt: Prompt) -> Prompt:
    """Return p⊕x: p is put at the start of a plain text, or where its place says.

    Raises:
        SelfalignError: the prompt is a plain text, and the place is one among turns.
    """
    if isinstance(prompt, str):
        if p.place in ("system", "after"):
            raise SelfalignError(
                f"loss.refinement.place={p.place} needs a prompt of turns, but the prompt is a text: set it to dialogue"
            )
        return p.text + prompt
    if p.place == "system":
        own = prompt[0] if prompt[0]["role"] == "system" else {"role": "system", "content": ""}
        told = {**own, "content": p.text + own["content"] if own["content"] else p.text.strip()}
        return [told, *prompt[own is prompt[0] :]]
    users = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    at = users[0] if p.place == "dialogue" else users[-1]
    asked = prompt[at]["content"]
    text = f"{asked}\n\n{p.text.strip()}" if p.place == "after" else p.text + asked
    return [*prompt[:at], {**prompt[at], "content": text}, *prompt[at + 1 :]]


def random_words(tokenizer: "Tokenizer", text: str) -> str:
    """Return random words of the vocabulary with as many tokens as a text, and with the text's final white space."""
    end = text[len(text.rstrip()) :]
    length = _count_tokens(tokenizer, text)
    # Byte-level vocabularies mark the beginning of a word with Ġ, SentencePiece ones with ▁.
    begins = sorted(token[1:] for token in tokenizer.get_vocab() if token[:1] in ("Ġ", "▁"))
    words = [word for word in begins if word.isascii() and word.isalpha()] or ["word"]
    draw = random.Random(derive_seed("random prompt", length))
    chosen: list[str] = []
    while _count_tokens(tokenizer, " ".join(chosen) + end) < length:
        chosen.append(draw.choice(words))
    return " ".join(chosen) + end


def refinement(policy_p: PairLogps, reference_p: PairLogps, beta: float) -> Values:
    """Δ_π(y⁻, y⁺; x) = β{[log π(y⁺|p⊕x) - log π_ref(y⁺|p⊕x)] - [log π(y⁻|p⊕x) - log π_ref(y⁻|p⊕x)]} (eq. 11).

    With log-probabilities given x instead of p⊕x, it is Δ_naive = β h (eq. 10). With the policy's own given p⁻⊕x in
    place of the reference's, it compares contrastive prompts.

    Args:
        policy_p: log-probabilities under the *current* policy, given p⊕x; summed, as in the paper, or averaged.
        reference_p: log-probabilities under the reference, given p⊕x, or what takes their place; summed or averaged
            likewise.
        beta: β of the loss.

    Returns:
        Δ in units of reward (of reward per token for averages), shape (pairs,), without gradient. It is above 0 if the
        policy, told to answer well, has moved towards the chosen response.
    """
    chosen = policy_p.chosen - reference_p.chosen
    rejected = policy_p.rejected - reference_p.rejected
    return (beta * (chosen - rejected)).detach()


@dataclass(frozen=True, slots=True)
class Normalisation:
    """A linear map of Δ, the same for all pairs of an optimizer step: (Δ - centre) / spread."""

    centre: float = 0.0
    spread: float = 1.0

    @classmethod
    def of(cls, kind: str, mean: float, mean_square: float, beta: float) -> "Normalisation":
        """Return the normalisation of a step.

        Args:
            kind: "rms" or "zscore".
            mean: mean of Δ over the pairs of the step.
            mean_square: mean of Δ² over them.
            beta: β of the loss, by which Δ is in units of reward.
        """
        centre = mean if kind == "zscore" else 0.0
        return cls(centre, max(math.sqrt(max(0.0, mean_square - centre * centre)), beta * SMALLEST_SPREAD))

    def __call__(self, delta: Values) -> Values:
        return (delta - self.centre) / self.spread


def _text_of(setting: str, key: str, name: str) -> str:
    """Return the text of a setting, or of the file that it names, after a check of its placeholders."""
    text = text_or_file(setting, key)
    if not text.strip():
        raise SelfalignError(f"{key} is empty: give the text {name} that is put before the prompt")
    check_template(text, key, (), ("scale",))
    return text


def _count_tokens(tokenizer: "Tokenizer", text: str) -> int:
    return len(cast(Any, tokenizer)(text, add_special_tokens=False)["input_ids"])

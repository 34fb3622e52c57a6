"""Dummy records for the dry run: instructions, responses, pairs and demonstrations of the largest possible length."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import SelfalignError
from selfalign.core.records import (
    Demonstration,
    FinishReason,
    Instruction,
    LabelledResponse,
    PreferencePair,
    Prompt,
    Response,
)
from selfalign.data.labelled import sides_of
from selfalign.data.turns import as_prompt
from selfalign.engines.transformers import Transformers, TransformersGenerator
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHORTEST_PROMPT = 64
"""Tokens of the shortest prompt, with its template; the rest of the sequence is the response's."""

SHARES = 64
"""Steps in which texts that do not fit together are shortened."""


@dataclass(frozen=True, slots=True)
class WorstCaseRecords:
    """Makes records for one tokenizer.

    Attributes:
        tokenizer: counts the tokens.
        context: the model's context length in tokens.
        max_length: the longest sequence in training, in tokens.
    """

    tokenizer: "Tokenizer"
    context: int
    max_length: int

    def words(self, tokens: int, word: str = " the") -> str:
        """Return a word repeated to at most `tokens` tokens."""
        count = bisect_right(range(1, tokens + 1), tokens, key=lambda n: self.count((word * n).strip()))
        return (word * count).strip()

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(plain_ids(self.tokenizer, text))

    def fitting(self, ask: Callable[..., Prompt], tokens: list[int], limit: int) -> list[str]:
        """Return dummy texts of the given lengths in tokens.

        They are shortened by a common factor until the prompt built by `ask` fits into `limit` tokens.

        Raises:
            SelfalignError: the prompt is too long even without them.
        """

        def texts(share: int) -> list[str]:
            return [self.words(count * share // SHARES) for count in tokens]

        share = bisect_right(range(SHARES + 1), limit, key=lambda n: len(encode_prompt(self.tokenizer, ask(*texts(n)))))
        if not share:
            raise SelfalignError(
                f"a prompt without any text is longer than the {limit} tokens that are available for it"
            )
        return texts(share - 1)

    def prompt_tokens(self, written: int) -> int:
        """Return the most tokens of an instruction's prompt whose response has `written` tokens."""
        return min(max(SHORTEST_PROMPT, self.max_length - written), self.context - written)

    def instructions(self, count: int, written: int) -> list[Instruction]:
        """Return instructions whose prompt and a response of `written` tokens fill the longest sequence."""
        [text] = self.fitting(as_prompt, [limit := self.prompt_tokens(written)], limit)
        return [Instruction(id=f"i{n}", text=distinct(text, n), source="self") for n in range(count)]

    def responses(self, instruction: Instruction, count: int, text: str) -> list[Response]:
        """Return `count` responses to an instruction, all as long as the text."""
        tokens = self.count(text)
        return [
            Response(
                id=f"{instruction.id}-{n}",
                instruction_id=instruction.id,
                text=distinct(text, n),
                finish_reason=FinishReason.EOS,
                tokens=tokens,
                model="dry run",
            )
            for n in range(count)
        ]

    def pairs(self, count: int, written: int) -> list[PreferencePair]:
        """Return pairs whose responses have `written` tokens, or fewer where the prompt needs the room.

        The text p of the refinement is not counted.
        """
        answer = max(2, min(written, self.max_length - SHORTEST_PROMPT))  # The end-of-turn token is counted.
        [prompt] = self.fitting(as_prompt, [limit := max(SHORTEST_PROMPT, self.max_length - answer)], limit)
        chosen, rejected = self.words(answer - 1), self.words(answer - 1, " a")
        return [
            PreferencePair(
                id=f"p{n}",
                prompt=as_prompt(distinct(prompt, n)),
                chosen=chosen,
                rejected=rejected,
                chosen_score=1,
                rejected_score=0,
            )
            for n in range(count)
        ]

    def labelled(self, count: int, written: int) -> list[LabelledResponse]:
        """Return labelled responses as long as those of `pairs`, each to a prompt of its own."""
        return [sides_of(pair)[number % 2] for number, pair in enumerate(self.pairs(count, written))]

    def demonstrations(self, count: int, tokens: int, each: int) -> list[Demonstration]:
        """Return `count` prompts with so many demonstrations each, `tokens` tokens together for each prompt."""
        [prompt] = self.fitting(as_prompt, [SHORTEST_PROMPT], SHORTEST_PROMPT)
        target = self.words(min((tokens - SHORTEST_PROMPT) // each, self.max_length - SHORTEST_PROMPT) - 1)
        return [
            Demonstration(
                id=f"d{n}-{part}",
                prompt=as_prompt(distinct(prompt, n)),
                response=distinct(target, part),
                source="ift",
                question=f"d{n}",
            )
            for n in range(count)
            for part in range(each)
        ]


def distinct(text: str, number: int) -> str:
    """Return the text with a number for its first words, in as many tokens at most.

    Texts that begin alike would share the computation of their beginning.
    """
    digits = str(number)
    return " ".join([digits, *text.split(" ")[len(digits) :]])


class MaxLengthTransformers(Transformers):
    """The transformers engine without end-of-text tokens: every text reaches max_new_tokens."""

    def load(self, policy: PolicyCheckpoint) -> TransformersGenerator:
        """Return a generator whose set of stop tokens is empty."""
        generator = Transformers.load(self, policy)
        generator.stops = generator.stops[:0]
        return generator


def max_length_generation(engine: Any) -> Any:
    """Return the transformers engine so that it fills every text; return any other engine unchanged."""
    if not isinstance(engine, Transformers):
        return engine
    return MaxLengthTransformers(**{setting.name: getattr(engine, setting.name) for setting in fields(Transformers)})

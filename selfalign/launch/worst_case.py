"""Records, questions and texts that are as long as they may be, of words without sense, to rehearse a run with."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Demonstration, FinishReason, Instruction, PreferencePair, Prompt, Response
from selfalign.data.sources import as_prompt
from selfalign.engines.transformers import Transformers, TransformersGenerator
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHORTEST_PROMPT = 64
"""Tokens of a prompt, its template included, that leaves its response all the room there is."""

SHARES = 64
"""Texts that do not fit together are shortened by so many parts."""


@dataclass(frozen=True, slots=True)
class WorstCaseRecords:
    """Makes records for one tokenizer.

    Attributes:
        tokenizer: counts the tokens.
        context: the longest sequence the model takes.
        max_length: the longest sequence that is trained on.
    """

    tokenizer: "Tokenizer"
    context: int
    max_length: int

    def words(self, tokens: int, word: str = " the") -> str:
        """As many words as make so many tokens, or as few less as can be."""
        count = bisect_right(range(1, tokens + 1), tokens, key=lambda n: self.count((word * n).strip()))
        return (word * count).strip()

    def count(self, text: str) -> int:
        """The tokens of a text."""
        return len(plain_ids(self.tokenizer, text))

    def fitting(self, ask: Callable[..., Prompt], tokens: list[int], limit: int) -> list[str]:
        """Return dummy texts of the given lengths in tokens.

        They are shortened by a common factor until the prompt built by `ask` fits into `limit`.

        Raises:
            SelfalignError: the prompt is too long even without them.
        """

        def texts(share: int) -> list[str]:
            return [self.words(count * share // SHARES) for count in tokens]

        share = bisect_right(range(SHARES + 1), limit, key=lambda n: len(encode_prompt(self.tokenizer, ask(*texts(n)))))
        if not share:
            raise SelfalignError(f"a prompt without any text is longer than the {limit} tokens there is room for")
        return texts(share - 1)

    def prompt_tokens(self, written: int) -> int:
        """How long an instruction's prompt is, where the answer has so many tokens."""
        return min(max(SHORTEST_PROMPT, self.max_length - written), self.context - written)

    def instructions(self, count: int, written: int) -> list[Instruction]:
        """Their prompts fill the longest sequence up to an answer of so many tokens."""
        [text] = self.fitting(as_prompt, [limit := self.prompt_tokens(written)], limit)
        return [Instruction(id=f"i{n}", text=text, source="self") for n in range(count)]

    def responses(self, instruction: Instruction, count: int, text: str) -> list[Response]:
        """So many responses to an instruction, all of this text."""
        tokens = self.count(text)
        return [
            Response(
                id=f"{instruction.id}-{n}",
                instruction_id=instruction.id,
                text=text,
                finish_reason=FinishReason.EOS,
                tokens=tokens,
                model="rehearsed",
            )
            for n in range(count)
        ]

    def pairs(self, count: int, written: int) -> list[PreferencePair]:
        """Both responses have so many tokens, or less where the prompt needs the room; p comes on top."""
        answer = max(2, min(written, self.max_length - SHORTEST_PROMPT))  # its end of turn is one of these
        [prompt] = self.fitting(as_prompt, [limit := max(SHORTEST_PROMPT, self.max_length - answer)], limit)
        chosen, rejected = self.words(answer - 1), self.words(answer - 1, " a")
        return [
            PreferencePair(
                id=f"p{n}", prompt=as_prompt(prompt), chosen=chosen, rejected=rejected, chosen_score=1, rejected_score=0
            )
            for n in range(count)
        ]

    def demonstrations(self, count: int, tokens: int, family: int) -> list[Demonstration]:
        """Questions that are demonstrated `family` times, in so many tokens together."""
        [prompt] = self.fitting(as_prompt, [SHORTEST_PROMPT], SHORTEST_PROMPT)
        target = self.words(min((tokens - SHORTEST_PROMPT) // family, self.max_length - SHORTEST_PROMPT) - 1)
        return [
            Demonstration(id=f"d{n}-{part}", prompt=as_prompt(prompt), response=target, source="ift", question=f"d{n}")
            for n in range(count)
            for part in range(family)
        ]


class MaxLengthTransformers(Transformers):
    """Writes every text up to its last token."""

    def load(self, policy: PolicyCheckpoint) -> TransformersGenerator:
        """A generator that knows no token that ends a text."""
        generator = Transformers.load(self, policy)
        generator.stops = generator.stops[:0]
        return generator


def max_length_generation(engine: Any) -> Any:
    """The engine with texts as long as they may be, where it can be told so."""
    if not isinstance(engine, Transformers):
        return engine
    return MaxLengthTransformers(**{setting.name: getattr(engine, setting.name) for setting in fields(Transformers)})

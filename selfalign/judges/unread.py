"""Messages about judgements that could not be read."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from selfalign.core.records import JudgementStatus
from selfalign.data.thinking import answer_behind
from selfalign.judges.parsing import REFUSALS

SHOWN = 120
"""Characters of a text in a message."""

EXAMPLES = 3


@dataclass(slots=True)
class Unread:
    """Counts and examples of judgements without a verdict.

    Attributes:
        reasons: number of judgements by status.
        examples: excerpts of the first texts that differ.
        thinking: number of texts that were cut while the judge was still thinking.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    thinking: int = 0

    def add(self, judged: Iterable[tuple[JudgementStatus, str]]) -> None:
        """Count some in, by status and text."""
        for status, text in judged:
            self.reasons[status.value] += 1
            self.thinking += status is JudgementStatus.TRUNCATED and answer_behind(text) is None
            if len(self.examples) < EXAMPLES and (shown := excerpt(status, text)) not in self.examples:
                self.examples.append(shown)

    def describe(self, setting: str | None) -> str:
        """Say what the judge wrote, and which setting to raise where it was cut; None where nothing cuts it."""
        said = f"the judge wrote for example {'; '.join(self.examples)}. "
        cut = self.reasons[JudgementStatus.TRUNCATED.value]
        still = f", {self.thinking} of them while the judge was still thinking" if self.thinking else ""
        return f"{said}Raise {setting}, at which {cut} of its texts were cut{still}. " if cut and setting else said


def excerpt(status: JudgementStatus, text: str) -> str:
    """Return the end of a judge's text, where its verdict should stand, or the beginning of a server's refusal."""
    if len(text) <= SHOWN:
        return repr(text)
    return repr(f"{text[:SHOWN]}…" if status in REFUSALS.values() else f"…{text[-SHOWN:]}")

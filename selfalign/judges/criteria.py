"""Criteria of single instructions: where they come from, how a model is asked for them, and how its text is read."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import text_or_file
from selfalign.core.placeholders import check_template, fill
from selfalign.core.records import Criterion, Prompt
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import Sampling

WRITERS = ("judge", "self", "sft", "base")

IMPORTANCE = {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": -0.9}
"""{word before a written criterion: its weight}, after arXiv 2507.17746, whose pitfalls state what is avoided."""

LINE = re.compile(rf"[\W\d]*({'|'.join(IMPORTANCE)})\W*?[:–—-][\s*]*(\S.*)", re.IGNORECASE)
"""A line with a criterion, in any list and any bold."""

PROMPT = (
    "By what can one tell a good response to the instruction below from a poor one? List {count} statements about the "
    "response, one a line. Each must be true or false of a given response, name in words what the response has to say "
    "or do, and cover something that the others do not. Begin each line with one of these words and a colon:\n\n"
    "Essential: a response of which this is not true has failed.\n"
    "Important: this makes a response clearly better.\n"
    "Optional: this is welcome.\n"
    "Pitfall: a mistake that a response to this instruction may well make; state the mistake itself.\n\n"
    "<instruction>\n{instruction}\n</instruction>\n\n"
    "Write the {count} lines and nothing else."
)


class CriteriaSource(StrEnum):
    """Where criteria come from: the data, or a model."""

    given = "given"
    written = "written"


@dataclass(kw_only=True, slots=True)
class CriteriaConfig:
    """Where the criteria of an instruction come from, after arXiv 2507.17746 and 2509.25534.

    Attributes:
        source: "written": a model writes those of every instruction, also of one that has some. "given": they are read
            from the data, and every instruction needs some.
        model: who writes them: "judge" (whoever judges), "self" (M_t), "sft" (M1) or "base" (M0).
        count: how many are asked for, and kept at most.
        prompt: the question, a text or "file:PATH", with {instruction} and, where it belongs, {count}. It asks for
            lines that begin with Essential, Important, Optional or Pitfall, which weigh 1, 0.7, 0.3 and -0.9.
        retries: how often an instruction is asked about again, with another random stream, if no criterion could be
            read. One that has none in the end leaves its responses without a score.
        sampling: how they are sampled.
    """

    source: CriteriaSource = CriteriaSource.written
    model: str = "judge"
    count: int = 6
    prompt: str = PROMPT
    retries: int = 2
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=384))

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, "judge.criteria.prompt")
        check_template(self.prompt, "judge.criteria.prompt", ("instruction",), ("count",))
        if self.model not in WRITERS:
            raise SelfalignError(f"judge.criteria.model must be one of {', '.join(WRITERS)}; got {self.model!r}")
        if self.count < 1:
            raise SelfalignError(f"judge.criteria.count must be 1 or more, got {self.count}")
        if self.retries < 0:
            raise SelfalignError(f"judge.criteria.retries must be 0 or more, got {self.retries}")
        self.sampling.check("judge.criteria.sampling")

    @property
    def attempts(self) -> int:
        """How often an instruction is asked about at most. A greedy writer would repeat itself."""
        return 1 + (self.retries if self.sampling.temperature else 0)

    def ask(self, instruction: str) -> Prompt:
        """Return the question about one instruction."""
        values = {"instruction": instruction, "count": str(self.count)}
        return as_prompt(
            fill(self.prompt, {name: text for name, text in values.items() if f"{{{name}}}" in self.prompt})
        )

    def read(self, text: str) -> list[Criterion]:
        """Return the first `count` criteria of a written text, each statement once."""
        found: dict[str, Criterion] = {}
        for match in filter(None, map(LINE.fullmatch, text.splitlines())):
            statement = match[2].replace("**", "").strip()
            if not re.search(r"\w", statement):
                continue
            found.setdefault(statement.casefold(), Criterion(text=statement, weight=IMPORTANCE[match[1].casefold()]))
        return [*found.values()][: self.count]


def criteria_of(judge: Any) -> CriteriaConfig | None:
    """Return where a judge's criteria come from; None for one that judges all instructions alike."""
    return getattr(judge, "criteria", None)


def written_criteria(judge: Any) -> CriteriaConfig | None:
    """Return how the criteria of a judge are written; None where no model writes any."""
    config = criteria_of(judge)
    return config if config is not None and config.source == CriteriaSource.written else None

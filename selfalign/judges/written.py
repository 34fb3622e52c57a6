"""Judgements that are written: several of each response, and another try where one cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.records import FinishReason, Judgement, JudgementStatus
from selfalign.engines.protocol import Sampling
from selfalign.judges.parsing import PREFIX, REFUSALS, parse_score
from selfalign.judges.protocol import Rubric, Subject


@dataclass(frozen=True, slots=True)
class JudgeText:
    """What a judge wrote, or a server's message where it refused the request, and why it ended."""

    text: str
    finish_reason: FinishReason


@dataclass(kw_only=True, slots=True)
class WrittenScore(Rubric):
    """What judges share that write a justification and a last line `Score: n`; several judgements are averaged.

    Attributes:
        samples: judgements of each response; the mean of the valid ones counts.
        retries: how often a judgement without a score is written again, each time with another random stream; a
            policy that judges greedily (sampling.temperature=0) would only repeat itself and is not asked again.
        minimum_valid: a response with fewer valid judgements is unjudged.
        sampling: how judgements are drawn.
    """

    samples: int = 3
    retries: int = 2
    minimum_valid: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    opening: ClassVar[str] = ""
    token_setting: ClassVar[str] = "judge.sampling.max_new_tokens"

    def __post_init__(self) -> None:
        Rubric.__post_init__(self)
        if self.samples < 1:
            raise SelfalignError(f"judge.samples must be 1 or more, got {self.samples}")
        if self.retries < 0:
            raise SelfalignError(f"judge.retries must be 0 or more, got {self.retries}")
        if not 1 <= self.minimum_valid <= self.samples:
            raise SelfalignError(
                f"judge.minimum_valid must lie between 1 and judge.samples={self.samples}, got {self.minimum_valid}"
            )
        self.sampling.check("judge.sampling")

    def answer(self, score: int, justification: str) -> str:
        """What a judgement with this score looks like, for evaluation fine-tuning."""
        return f"{justification}\n{PREFIX}{score}".lstrip()

    def wanted(self, subjects: Sequence[Subject]) -> int:
        """How many judgements there should be."""
        return len(subjects) * self.samples


@dataclass(frozen=True, slots=True)
class Wish:
    """A judgement that is wanted: which one of its subject's, which try at it, and what draws it."""

    subject: Subject
    sample: int
    attempt: int
    seed: int

    @property
    def name(self) -> str:
        """The judgement's id."""
        tries = f"-try{self.attempt}" if self.attempt > 1 else ""
        return f"{self.subject.response.id}-{self.sample}{tries}"


def first_wishes(subjects: Sequence[Subject], samples: int, seed: int) -> list[Wish]:
    """`samples` judgements of every subject."""
    return [Wish(s, n, 1, derive_seed(seed, s.response.id, n - 1)) for s in subjects for n in range(1, samples + 1)]


def write_judgements(
    wishes: Sequence[Wish],
    write: Callable[[Sequence[Wish]], list[JudgeText]],
    *,
    low: int,
    high: int,
    retries: int,
    seed: int,
    model: str,
) -> list[Judgement]:
    """Has judgements written and read; those without a score are tried again, each time with a new random stream.

    Args:
        wishes: the first tries.
        write: the texts for so many wishes.
        low: the lowest score.
        high: the highest.
        retries: how often a judgement is tried again.
        seed: what the wishes' seeds were derived from.
        model: who writes.

    Returns:
        Every attempt, the failed ones included.
    """
    judgements: list[Judgement] = []
    while wishes:
        made = [_read(w, one, low, high, model) for w, one in zip(wishes, write(wishes), strict=True)]
        judgements += made
        wishes = [
            _again(wish, seed)
            for wish, judgement in zip(wishes, made, strict=True)
            if _may_get_better(judgement) and wish.attempt <= retries
        ]
    return judgements


def _may_get_better(judgement: Judgement) -> bool:
    return judgement.status not in (JudgementStatus.OK, *REFUSALS.values())


def _again(wish: Wish, seed: int) -> Wish:
    attempt = wish.attempt + 1
    return Wish(
        wish.subject,
        wish.sample,
        attempt,
        derive_seed(seed, wish.subject.response.id, wish.sample - 1, attempt),
    )


def _read(wish: Wish, written: JudgeText, low: int, high: int, model: str) -> Judgement:
    parsed = parse_score(written.text, low, high, written.finish_reason, wish.subject.response.text)
    return Judgement(
        id=wish.name,
        response_id=wish.subject.response.id,
        status=parsed.status,
        score=parsed.score,
        text=written.text,
        model=model,
        sample=wish.sample,
        attempt=wish.attempt,
        seed=wish.seed,
    )

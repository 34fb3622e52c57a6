"""Written judgements: several of each response, with retries of those that cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.records import FinishReason, Judgement, JudgementStatus
from selfalign.engines.protocol import Sampling
from selfalign.judges.parsing import PREFIX, REFUSALS, parse_score
from selfalign.judges.protocol import InstructionResponse, Rubric


@dataclass(frozen=True, slots=True)
class JudgeText:
    """A judge's text, its thought apart, and why it ended. If a server refused the request, the text is its message."""

    text: str
    finish_reason: FinishReason
    thought: str = ""

    @property
    def still_thinking(self) -> bool:
        """Whether the judge was still thinking at the end."""
        return self.finish_reason is FinishReason.TRUNCATED


@dataclass(kw_only=True, slots=True)
class WrittenScore(Rubric):
    """Settings of judges that write a justification and a last line `Score: n`. Several judgements are averaged.

    Attributes:
        num_samples: judgements of each response; the score is the mean of the valid ones.
        retries: how often a judgement without a score is written again, each time with another random stream. A
            policy that judges greedily (sampling.temperature=0) is not asked again: it would repeat itself.
        min_valid_samples: a response with fewer valid judgements is unjudged.
        sampling: how judgements are sampled.
    """

    num_samples: int = 3
    retries: int = 2
    min_valid_samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    opening: ClassVar[str] = ""
    token_setting: ClassVar[str] = "judge.sampling.max_new_tokens"

    def __post_init__(self) -> None:
        Rubric.__post_init__(self)
        if self.num_samples < 1:
            raise SelfalignError(f"judge.num_samples must be 1 or more, got {self.num_samples}")
        if self.retries < 0:
            raise SelfalignError(f"judge.retries must be 0 or more, got {self.retries}")
        if not 1 <= self.min_valid_samples <= self.num_samples:
            raise SelfalignError(
                f"judge.min_valid_samples must lie between 1 and judge.num_samples={self.num_samples}, got "
                f"{self.min_valid_samples}"
            )
        self.sampling.check("judge.sampling")

    def answer(self, score: int, justification: str) -> str:
        """Return a judgement with this score, for evaluation fine-tuning."""
        return f"{justification}\n{PREFIX}{score}".lstrip()

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of wanted judgements."""
        return len(subjects) * self.num_samples


@dataclass(frozen=True, slots=True)
class JudgementRequest:
    """A request for one judgement: response, sample index, attempt number and sampling seed."""

    subject: InstructionResponse
    sample: int
    attempt: int
    seed: int

    @property
    def name(self) -> str:
        """The judgement's id."""
        tries = f"-try{self.attempt}" if self.attempt > 1 else ""
        return f"{self.subject.response.id}-{self.sample}{tries}"


def initial_requests(subjects: Sequence[InstructionResponse], samples: int, seed: int) -> list[JudgementRequest]:
    """Return the first requests: `num_samples` judgements of every response."""
    return [
        JudgementRequest(s, n, 1, derive_seed(seed, s.response.id, n - 1))
        for s in subjects
        for n in range(1, samples + 1)
    ]


def write_judgements(
    wanted: Sequence[JudgementRequest],
    write: Callable[[Sequence[JudgementRequest]], list[JudgeText]],
    *,
    low: int,
    high: int,
    retries: int,
    seed: int,
    model: str,
) -> list[Judgement]:
    """Write and read judgements. Those without a score are tried again, each time with a new random stream.

    Args:
        wanted: the first requests.
        write: returns a text for each request.
        low: the lowest score.
        high: the highest score.
        retries: how often a judgement is tried again.
        seed: the seed that those of the requests are derived from.
        model: name of the judge in records.

    Returns:
        Every attempt, failed ones included.
    """
    judgements: list[Judgement] = []
    while wanted:
        made = [_read(w, one, low, high, model) for w, one in zip(wanted, write(wanted), strict=True)]
        judgements += made
        wanted = [
            _again(one, seed)
            for one, judgement in zip(wanted, made, strict=True)
            if _may_get_better(judgement) and one.attempt <= retries
        ]
    return judgements


def _may_get_better(judgement: Judgement) -> bool:
    return judgement.status not in (JudgementStatus.OK, *REFUSALS.values())


def _again(one: JudgementRequest, seed: int) -> JudgementRequest:
    attempt = one.attempt + 1
    return JudgementRequest(
        one.subject,
        one.sample,
        attempt,
        derive_seed(seed, one.subject.response.id, one.sample - 1, attempt),
    )


def _read(one: JudgementRequest, written: JudgeText, low: int, high: int, model: str) -> Judgement:
    parsed = parse_score(written.text, low, high, written.finish_reason, one.subject.response.text)
    return Judgement(
        id=one.name,
        response_id=one.subject.response.id,
        status=parsed.status,
        score=parsed.score,
        text=written.thought + written.text,
        model=model,
        sample=one.sample,
        attempt=one.attempt,
        seed=one.seed,
    )

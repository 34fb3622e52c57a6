"""A judge behind an OpenAI-compatible endpoint, asked as `SampledScore` asks a policy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from selfalign.data import as_prompt
from selfalign.endpoint import Endpoint, Reply
from selfalign.files import text_or_file
from selfalign.generation import Sampling
from selfalign.judges.attempts import Wish, Written, first_wishes, write_judgements
from selfalign.judges.bench import Alarm, Bench, Judged, Subject, check_counts, check_prompt, check_scale, check_share
from selfalign.judges.parsing import PREFIX
from selfalign.records import FinishReason, Prompt
from selfalign.tokenization import fill

FINISH = {"too_long": "", "length": FinishReason.LENGTH.value}
"""Why a text ended; everything else the server says counts as its own end."""


@dataclass(kw_only=True, slots=True)
class ExternalScore:
    """An external model writes a justification and a last line `Score: n`; several such judgements are averaged.

    Every answer is kept as soon as it is there: a killed run asks again only for the requests that were under way.
    Prices and the ways of asking (key, concurrency, patience) can be changed without judging again.

    Attributes:
        prompt: the rubric, a text or "file:PATH", with {instruction} and {response} where they belong.
        endpoint: where the judge is.
        low: the lowest score of the rubric.
        high: the highest.
        samples: judgements of each response; the mean of the valid ones counts.
        retries: how often a judgement without a score is written again, each time with another seed.
        minimum_valid: a response with fewer valid judgements is unjudged.
        max_failed_share: the run stops when more than this share of the wanted judgements (samples × responses, each
            with all its retries) carries no score.
        sampling: how judgements are drawn.
        alarm: when the judge says nearly the same of everything.
    """

    prompt: str
    endpoint: Endpoint = field(default_factory=Endpoint)
    low: int = 0
    high: int = 5
    samples: int = 3
    retries: int = 2
    minimum_valid: int = 1
    max_failed_share: float = 0.5
    sampling: Sampling = field(default_factory=Sampling)
    alarm: Alarm = field(default_factory=Alarm)
    opening: ClassVar[str] = ""
    model: ClassVar[str] = "external"

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, "judge.prompt")
        check_prompt(self.prompt, ("instruction", "response"))
        check_share(self.max_failed_share)
        check_scale(self.low, self.high)
        check_counts(self.samples, self.retries, self.minimum_valid)
        self.sampling.check("judge.sampling")
        self.endpoint.check("judge.endpoint")

    def ask(self, instruction: str, response: str) -> Prompt:
        """The judge's prompt about one response."""
        return as_prompt(fill(self.prompt, {"instruction": instruction, "response": response}))

    def answer(self, score: int, justification: str) -> str:
        """What a judgement with this score looks like, for evaluation fine-tuning."""
        return f"{justification}\n{PREFIX}{score}".lstrip()

    def wanted(self, subjects: Sequence[Subject]) -> int:
        """How many judgements there should be."""
        return len(subjects) * self.samples

    def judge(self, bench: Bench, subjects: Sequence[Subject]) -> Judged:
        """Asks for `samples` judgements of each response, and counts requests, tokens and cost."""
        replies: list[Reply] = []

        def write(wishes: Sequence[Wish]) -> list[Written]:
            requests = {wish.name: self._request(wish) for wish in wishes}
            answered = client.complete_all(requests, bench.journal, int(wishes[0].attempt == 1))
            replies.extend(answered.values())
            return [(r.text, FINISH.get(r.finish, FinishReason.EOS.value)) for r in answered.values()]

        with self.endpoint.open("judge.endpoint") as client:
            judgements = write_judgements(
                first_wishes(subjects, self.samples, bench.seed),
                write,
                low=self.low,
                high=self.high,
                retries=self.retries,
                seed=bench.seed,
                model=self.endpoint.name,
            )
        return Judged(judgements=judgements, counts=self.endpoint.usage(replies))

    def _request(self, wish: Wish) -> dict[str, Any]:
        return {
            "messages": self.ask(wish.subject.instruction.text, wish.subject.response.text),
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": wish.seed % 2**31,
        }

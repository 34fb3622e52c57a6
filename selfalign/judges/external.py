"""A judge behind an OpenAI-compatible endpoint, with the prompts of `SampledScore`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from selfalign.core.records import Instruction, given_response
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.replies import Reply
from selfalign.judges.protocol import Bench, Judged, Subject
from selfalign.judges.written import JudgeText, Wish, WrittenScore, first_wishes, write_judgements


@dataclass(kw_only=True, slots=True)
class ExternalScore(WrittenScore):
    """An external model writes the judgements.

    Every answer is saved when it arrives, so a resumed run repeats only the requests that were under way. Prices and
    connection settings (key, concurrency, timeouts) can be changed without judging again.

    Attributes:
        endpoint: the server of the judge.
    """

    endpoint: Endpoint = field(default_factory=Endpoint)
    model: ClassVar[str] = "external"

    def __post_init__(self) -> None:
        WrittenScore.__post_init__(self)
        self.endpoint.check("judge.endpoint")

    def judge(self, bench: Bench, subjects: Sequence[Subject]) -> Judged:
        """Ask for `samples` judgements of each response, and count requests, tokens and cost."""
        replies: list[Reply] = []

        def write(wishes: Sequence[Wish]) -> list[JudgeText]:
            requests = {wish.name: self._request(wish) for wish in wishes}
            answered = client.complete_all(requests, bench.journal, int(wishes[0].attempt == 1))
            replies.extend(answered.values())
            return [JudgeText(reply.text, reply.finish_reason) for reply in answered.values()]

        client = bench.client(self.endpoint, "judge.endpoint")
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

    def probe(self) -> dict[str, Any]:
        """Return a request like any other, about one word."""
        asked = Instruction(id="probe", text="Greet me.", source="given")
        return self._request(Wish(Subject(asked, given_response("probe-1", asked.id, "Hello.", "probe")), 1, 1, 0))

    def _request(self, wish: Wish) -> dict[str, Any]:
        return {
            "messages": self.ask(wish.subject.instruction.text, wish.subject.response.text),
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": wish.seed % 2**31,
        }

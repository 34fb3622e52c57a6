"""A judge behind an OpenAI-compatible endpoint, with the prompts of `SampledScore`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from selfalign.core.records import Instruction
from selfalign.data.thinking import given_response
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.replies import Reply
from selfalign.judges.protocol import InstructionResponse, JudgeContext, JudgeOutput
from selfalign.judges.written import JudgementRequest, JudgeText, WrittenScore, initial_requests, write_judgements


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

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Ask for `num_samples` judgements of each response, and count requests, tokens and cost."""
        replies: list[Reply] = []

        def write(wanted: Sequence[JudgementRequest]) -> list[JudgeText]:
            requests = {one.name: self._request(one) for one in wanted}
            answered = client.complete_all(requests, context.journal, int(wanted[0].attempt == 1))
            replies.extend(answered.values())
            return [JudgeText(reply.text, reply.finish_reason) for reply in answered.values()]

        client = context.client(self.endpoint, "judge.endpoint")
        judgements = write_judgements(
            initial_requests(subjects, self.num_samples, context.seed),
            write,
            low=self.min_score,
            high=self.max_score,
            retries=self.retries,
            seed=context.seed,
            model=self.endpoint.name,
        )
        return JudgeOutput(judgements=judgements, counts=self.endpoint.usage(replies))

    def probe(self) -> dict[str, Any]:
        """Return a request like any other, about one word."""
        asked = Instruction(id="probe", text="Greet me.", source="given")
        return self._request(
            JudgementRequest(
                InstructionResponse(asked, given_response("probe-1", asked.id, "Hello.", "probe")), 1, 1, 0
            )
        )

    def _request(self, one: JudgementRequest) -> dict[str, Any]:
        return {
            "messages": self.ask(one.subject.instruction.text, one.subject.response.text),
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.longest,
            "seed": one.seed % 2**31,
        }

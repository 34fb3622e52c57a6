"""A judge behind an OpenAI-compatible endpoint, asked as `SampledScore` asks a policy."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, ClassVar

from selfalign.data import as_prompt
from selfalign.endpoint import ChatClient, Endpoint
from selfalign.files import text_or_file
from selfalign.generation import Sampling
from selfalign.judges.attempts import Wish, Written, first_wishes, write_judgements
from selfalign.judges.bench import Alarm, Bench, Judged, Subject, check_counts, check_prompt, check_scale, check_share
from selfalign.judges.parsing import PREFIX
from selfalign.records import FinishReason, Prompt
from selfalign.store import Counts, Journal
from selfalign.tokenization import fill

TOKENS = ("judge/prompt_tokens", "judge/completion_tokens")

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
        used: Counts = dict.fromkeys(("judge/requests", "judge/requests_without_usage", *TOKENS), 0)
        with self.endpoint.open("judge.endpoint") as client:
            judgements = write_judgements(
                first_wishes(subjects, self.samples, bench.seed),
                lambda wishes: self._write(client, bench.journal, wishes, used),
                low=self.low,
                high=self.high,
                retries=self.retries,
                seed=bench.seed,
                model=f"{self.endpoint.model} at {self.endpoint.base_url}",
            )
        used["judge/cost"] = self.endpoint.cost(*(used[name] for name in TOKENS))
        return Judged(judgements=judgements, counts=used)

    def _write(self, client: ChatClient, journal: Journal, wishes: Sequence[Wish], used: Counts) -> list[Written]:
        """The texts of one round; each is journalled when it comes, in whatever order."""
        first = wishes[0].attempt == 1
        missing = [wish for wish in wishes if wish.name not in journal]
        journal.advance(len(wishes) - len(missing) if first else 0)
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            futures = {pool.submit(self._ask_server, client, wish): wish.name for wish in missing}
            try:
                for future in as_completed(futures):
                    journal.batch(futures[future], int(first), future.result)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                for future, name in futures.items():
                    if name not in journal and not future.cancelled() and future.exception() is None:
                        journal.batch(name, 0, future.result)
        written: list[Written] = []
        for wish in wishes:
            text, finish, prompt_tokens, completion_tokens = journal.batch(wish.name, 0, lambda: None)
            used["judge/requests"] += 1
            used["judge/requests_without_usage"] += prompt_tokens == 0
            used["judge/prompt_tokens"] += prompt_tokens
            used["judge/completion_tokens"] += completion_tokens
            written.append((text, FINISH.get(finish, FinishReason.EOS.value)))
        return written

    def _ask_server(self, client: ChatClient, wish: Wish) -> tuple[Any, ...]:
        reply = client.complete(
            {
                "messages": self.ask(wish.subject.instruction.text, wish.subject.response.text),
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "max_tokens": self.sampling.max_new_tokens,
                "seed": wish.seed % 2**31,
            }
        )
        return reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens

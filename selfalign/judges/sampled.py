"""The judge of arXiv 2401.10020: a written justification and a last line `Score: n`, several times."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.data import as_prompt
from selfalign.files import text_or_file
from selfalign.generation import Generator, Request, Sampling
from selfalign.judges.attempts import Wish, Written, first_wishes, write_judgements
from selfalign.judges.bench import (
    Alarm,
    Bench,
    Judged,
    Subject,
    check_counts,
    check_model,
    check_prompt,
    check_scale,
    check_share,
    too_long,
)
from selfalign.judges.parsing import PREFIX
from selfalign.records import Prompt
from selfalign.store import Journal
from selfalign.tokenization import encode_prompt, fill


@dataclass(kw_only=True, slots=True)
class SampledScore:
    """The judge writes a justification and a last line `Score: n`; several such judgements are averaged.

    Attributes:
        prompt: the rubric, a text or "file:PATH", with {instruction} and {response} where they belong.
        model: who judges: "self" (M_t, the paper), "sft" (M1), "base" (M0), or another model: a folder or hub id.
        low: the lowest score of the rubric.
        high: the highest.
        samples: judgements of each response; the mean of the valid ones counts.
        retries: how often a judgement without a score is written again, each time with another random stream; a
            greedy judge (sampling.temperature=0) would only repeat itself and is not asked again.
        minimum_valid: a response with fewer valid judgements is unjudged.
        max_failed_share: the run stops when more than this share of the wanted judgements (samples × responses, each
            with all its retries) carries no score.
        sampling: how judgements are drawn.
        alarm: when the judge says nearly the same of everything.
    """

    prompt: str
    model: str = "self"
    low: int = 0
    high: int = 5
    samples: int = 3
    retries: int = 2
    minimum_valid: int = 1
    max_failed_share: float = 0.5
    sampling: Sampling = field(default_factory=Sampling)
    alarm: Alarm = field(default_factory=Alarm)
    opening: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, "judge.prompt")
        check_prompt(self.prompt, ("instruction", "response"))
        check_model(self.model)
        check_share(self.max_failed_share)
        check_scale(self.low, self.high)
        check_counts(self.samples, self.retries, self.minimum_valid)
        self.sampling.check("judge.sampling")

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
        """Writes and reads `samples` judgements of each response."""
        generator = bench.generate.load(bench.judging_policy())
        limit = generator.context - self.sampling.max_new_tokens
        prompts: dict[str, list[int]] = {}
        refused: list[Subject] = []
        for subject in subjects:
            asked = self.ask(subject.instruction.text, subject.response.text)
            prompt = encode_prompt(generator.tokenizer, asked)
            if len(prompt) > limit:
                refused.append(subject)
            else:
                prompts[subject.response.id] = prompt
        fitting = [subject for subject in subjects if subject.response.id in prompts]
        written = write_judgements(
            first_wishes(fitting, self.samples, bench.seed),
            lambda wishes: self._write(generator, bench.journal, prompts, wishes),
            low=self.low,
            high=self.high,
            retries=self.retries if self.sampling.temperature else 0,
            seed=bench.seed,
            model=generator.digest,
        )
        return Judged(judgements=[*(too_long(subject, generator.digest) for subject in refused), *written])

    def _write(
        self, generator: Generator, journal: Journal, prompts: dict[str, list[int]], wishes: Sequence[Wish]
    ) -> list[Written]:
        """The texts of one round, in journalled batches; wishes about one response share its prompt."""
        by_response: dict[str, list[Wish]] = {}
        for wish in wishes:
            by_response.setdefault(wish.subject.response.id, []).append(wish)
        requests = [
            Request(prompt=prompts[response], seeds=[wish.seed for wish in mine])
            for response, mine in by_response.items()
        ]
        attempt, owners = wishes[0].attempt, list(by_response.values())
        lengths = [len(request.prompt) for request in requests]
        texts: dict[str, Written] = {}
        for number, batch in enumerate(generator.plan(lengths, self.samples, self.sampling.max_new_tokens)):
            chosen = [requests[index] for index in batch]
            rows = journal.batch(
                f"{attempt}-{number}",
                sum(len(request.seeds) for request in chosen) if attempt == 1 else 0,
                lambda chosen=chosen: [
                    [(completion.text, completion.finish_reason.value) for completion in completions]
                    for completions in generator.write(chosen, self.sampling)
                ],
            )
            for index, row in zip(batch, rows, strict=True):
                texts |= {wish.name: (t, r) for wish, (t, r) in zip(owners[index], row, strict=True)}
        return [texts[wish.name] for wish in wishes]

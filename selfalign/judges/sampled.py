"""The judge of arXiv 2401.10020: a written justification and a last line `Score: n`, several times."""

from collections.abc import Sequence
from dataclasses import dataclass

from selfalign.generation import Generator, Request
from selfalign.judges.attempts import Wish, Written, WrittenScore, first_wishes, write_judgements
from selfalign.judges.bench import Bench, Judged, Subject, check_model, too_long
from selfalign.store import Journal
from selfalign.tokenization import encode_prompt


@dataclass(kw_only=True, slots=True)
class SampledScore(WrittenScore):
    """A policy writes the judgements.

    Attributes:
        model: who judges: "self" (M_t, the paper), "sft" (M1), "base" (M0), or another model: a folder or hub id.
    """

    model: str = "self"

    def __post_init__(self) -> None:
        WrittenScore.__post_init__(self)
        check_model(self.model)

    def judge(self, bench: Bench, subjects: Sequence[Subject]) -> Judged:
        """Writes and reads `samples` judgements of each response."""
        with bench.generate.load(bench.judging_policy()) as generator:
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
            judgements = [*(too_long(subject, generator.digest) for subject in refused), *written]
        return Judged(judgements=judgements, counts=generator.counts)

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

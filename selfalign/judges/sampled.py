"""The judge of arXiv 2401.10020: several judgements, each a justification and a last line `Score: n`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.core.records import FinishReason
from selfalign.data.thinking import marks_thinking, thinks_on
from selfalign.engines.protocol import Completion, Generator, Request, write_all
from selfalign.judges.protocol import Bench, Judged, Subject, check_model, too_long
from selfalign.judges.written import JudgeText, Wish, WrittenScore, first_wishes, write_judgements
from selfalign.models.tokenizer import encode_prompt, prompt_end
from selfalign.store.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


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
        """Write and read `samples` judgements of each response."""
        generator = bench.writer()
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
    ) -> list[JudgeText]:
        """Return the texts of one round, in journalled batches. Judgements of one response share its prompt."""
        by_response: dict[str, list[Wish]] = {}
        for wish in wishes:
            by_response.setdefault(wish.subject.response.id, []).append(wish)
        requests = [
            Request(prompt=prompts[response], seeds=[wish.seed for wish in mine])
            for response, mine in by_response.items()
        ]
        name, attempt = wishes[0].name, wishes[0].attempt
        written = write_all(generator, requests, self.sampling, journal, name, int(attempt == 1))
        texts = {
            wish.name: judge_text(generator.tokenizer, request.prompt, made)
            for request, mine, completions in zip(requests, by_response.values(), written, strict=True)
            for wish, made in zip(mine, completions, strict=True)
        }
        return [texts[wish.name] for wish in wishes]


def spell_out(tokenizer: "Tokenizer", made: Completion) -> str:
    """Return the text of a completion, with the marks of thinking also where these are control tokens."""
    whole = str(tokenizer.decode(made.ids[: -1 if made.finish_reason is FinishReason.EOS else None]))
    return whole if marks_thinking(whole) and not marks_thinking(made.text) else made.text


def judge_text(tokenizer: "Tokenizer", prompt: list[int], made: Completion) -> JudgeText:
    """Return what a policy wrote about a prompt. A text that is still thinking at its end counts as cut."""
    text = spell_out(tokenizer, made)
    thinks = thinks_on(prompt_end(tokenizer, prompt), text)
    return JudgeText(text, FinishReason.LENGTH if thinks else made.finish_reason)

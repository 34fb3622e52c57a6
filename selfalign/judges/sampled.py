"""The judge of arXiv 2401.10020: several judgements, each a justification and a last line `Score: n`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfalign.core.records import FinishReason, Prompt
from selfalign.data.thinking import marks_thinking, thinks_on
from selfalign.engines.protocol import Completion, Generator, Request, Sampling, generate_batched
from selfalign.judges.protocol import InstructionResponse, JudgeContext, JudgeOutput, check_model, too_long
from selfalign.judges.written import JudgementRequest, JudgeText, WrittenScore, initial_requests, write_judgements
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

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Write and read `num_samples` judgements of each response."""
        generator = context.writer()
        limit = generator.context - self.sampling.longest
        prompts: dict[str, list[int]] = {}
        refused: list[InstructionResponse] = []
        for subject in subjects:
            asked = self.ask(subject.instruction.text, subject.response.text)
            prompt = encode_prompt(generator.tokenizer, asked)
            if len(prompt) > limit:
                refused.append(subject)
            else:
                prompts[subject.response.id] = prompt
        fitting = [subject for subject in subjects if subject.response.id in prompts]
        written = write_judgements(
            initial_requests(fitting, self.num_samples, context.seed),
            lambda wanted: self._write(generator, context.journal, prompts, wanted),
            low=self.min_score,
            high=self.max_score,
            retries=self.retries if self.sampling.temperature else 0,
            seed=context.seed,
            model=generator.digest,
        )
        return JudgeOutput(judgements=[*(too_long(subject, generator.digest) for subject in refused), *written])

    def _write(
        self, generator: Generator, journal: Journal, prompts: dict[str, list[int]], wanted: Sequence[JudgementRequest]
    ) -> list[JudgeText]:
        """Return the texts of one round, in journalled batches. Judgements of one response share its prompt."""
        by_response: dict[str, list[JudgementRequest]] = {}
        for one in wanted:
            by_response.setdefault(one.subject.response.id, []).append(one)
        requests = [
            Request(prompt=prompts[response], seeds=[one.seed for one in mine])
            for response, mine in by_response.items()
        ]
        name, attempt = wanted[0].name, wanted[0].attempt
        written = generate_batched(generator, requests, self.sampling, journal, name, int(attempt == 1))
        texts = {
            one.name: judge_text(generator.tokenizer, request.prompt, made)
            for request, mine, completions in zip(requests, by_response.values(), written, strict=True)
            for one, made in zip(mine, completions, strict=True)
        }
        return [texts[one.name] for one in wanted]


def write_thoughts(context: JudgeContext, asked: Sequence[Prompt], budget: int, name: str) -> list[JudgeText | None]:
    """Write a greedy thought about each prompt, whose answer is left out.

    Args:
        context: of the judge.
        asked: the prompts.
        budget: the most tokens of a thought.
        name: of these thoughts in the journal.

    Returns:
        The thoughts; None where a prompt leaves no room for one.
    """
    generator = context.writer()
    sampling = Sampling(temperature=0, max_new_tokens=1, thought_tokens=budget)
    prompts = [encode_prompt(generator.tokenizer, prompt) for prompt in asked]
    room = generator.context - sampling.longest
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= room]
    requests = [Request(prompt=prompts[index], seeds=[0]) for index in fitting]
    written = generate_batched(generator, requests, sampling, context.journal, f"thoughts-{name}", 0)
    thoughts = {
        index: replace(judge_text(generator.tokenizer, prompts[index], made), text="")
        for index, [made] in zip(fitting, written, strict=True)
    }
    return [thoughts.get(index) for index in range(len(prompts))]


def spell_out(tokenizer: "Tokenizer", made: Completion) -> str:
    """Return the text of a completion, with the marks of thinking also where these are control tokens."""
    whole = str(tokenizer.decode(made.ids[: -1 if made.finish_reason is FinishReason.EOS else None]))
    return whole if marks_thinking(whole) and not marks_thinking(made.text) else made.text


def judge_text(tokenizer: "Tokenizer", prompt: list[int], made: Completion) -> JudgeText:
    """Return what a policy wrote about a prompt. A text that is still thinking at its end is truncated.

    The thought is apart already where the policy's markers are known. Else any model's are looked for.
    """
    if made.thought or made.finish_reason is FinishReason.TRUNCATED:
        return JudgeText(made.text, made.finish_reason, made.thought)
    text = spell_out(tokenizer, made)
    thinks = thinks_on(prompt_end(tokenizer, prompt), text)
    return JudgeText(text, FinishReason.TRUNCATED if thinks else made.finish_reason)

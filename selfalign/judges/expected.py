"""Scores as the mean of the judge's score distribution, read in one forward pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.data.sources import as_prompt
from selfalign.data.thinking import thinks_on
from selfalign.engines.protocol import Request, Sampling, generate_batched, score_batched
from selfalign.judges.parsing import PREFIX, before_score
from selfalign.judges.protocol import (
    INSTRUCTIONS_PER_CALL,
    InstructionResponse,
    JudgeContext,
    JudgeOutput,
    Rubric,
    by_instruction,
    check_max_batch_tokens,
    check_model,
    too_long,
    unjudged,
)
from selfalign.judges.sampled import spell_out
from selfalign.models.batches import SharedPrompt, share_prompt
from selfalign.models.tokenizer import encode_prompt, prompt_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(kw_only=True, slots=True)
class ExpectedScore(Rubric):
    """The probability-weighted mean over the score tokens that may follow "Score: ", in one forward pass.

    `min_score` and `max_score` are single digits.

    Attributes:
        model: who judges: "self" (M_t, the paper), "sft" (M1), "base" (M0), or another model: a folder or hub id.
        rationale_tokens: the most tokens of a greedy justification that the judge writes first; 0 for none.
        max_batch_tokens: the most tokens of a forward pass.
    """

    model: str = "self"
    rationale_tokens: int = 0
    max_batch_tokens: int = 2048
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[str] = "judge.rationale_tokens"

    def __post_init__(self) -> None:
        Rubric.__post_init__(self)
        check_model(self.model)
        if not 0 <= self.min_score < self.max_score <= 9:
            raise SelfalignError(
                f"judge.min_score and judge.max_score must be one digit each for expected_score, got "
                f"{self.min_score} to {self.max_score}"
            )
        if self.rationale_tokens < 0:
            raise SelfalignError(f"judge.rationale_tokens must be 0 or more, got {self.rationale_tokens}")
        check_max_batch_tokens(self.max_batch_tokens)

    @property
    def instructions_per_call(self) -> int:
        """The number of instructions judged at a time; larger if the policy is loaded twice, to write and to score."""
        return (16 if self.rationale_tokens else 1) * INSTRUCTIONS_PER_CALL

    @property
    def opening(self) -> str:
        """The beginning of every judgement; empty for a judge that writes a justification first."""
        return "" if self.rationale_tokens else PREFIX

    def answer(self, score: int, justification: str) -> str:
        """Return the text behind the opening, for evaluation fine-tuning: the score, after a justification if any."""
        return f"{justification}\n{PREFIX}{score}".lstrip() if self.rationale_tokens else str(score)

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of wanted judgements; justifications count too."""
        return len(subjects) * (2 if self.rationale_tokens else 1)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Judge each response once, by the mean of the judge's score distribution.

        The prompts for one instruction share the rubric and the instruction, which are computed once. A judge that
        never stopped thinking has given no justification, so it is not asked for a score.
        """
        rationales, judgements = dict.fromkeys((subject.response.id for subject in subjects), ""), list[Judgement]()
        if self.rationale_tokens:
            rationales, judgements = self._justify(context, subjects)
        reader = context.reader(self.max_batch_tokens)
        digits = score_tokens(reader.tokenizer, self.min_score, self.max_score)
        groups: list[SharedPrompt] = []
        members: dict[str, list[InstructionResponse]] = {}
        for name, family in by_instruction([s for s in subjects if s.response.id in rationales]).items():
            prompts = [self._prompt(reader.tokenizer, s, rationales[s.response.id]) for s in family]
            fits = [len(prompt) < reader.context for prompt in prompts]
            judgements += [too_long(s, reader.digest) for s, fit in zip(family, fits, strict=True) if not fit]
            members[name] = [s for s, fit in zip(family, fits, strict=True) if fit]
            fitting = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
            if fitting:
                groups.append(share_prompt(name, fitting, [[] for _ in fitting]))
        for group, rows in zip(groups, score_batched(reader, groups, digits, context.journal, "scores"), strict=True):
            judgements += [
                expected(subject, row, self.min_score, rationales[subject.response.id], reader.digest)
                for subject, row in zip(members[group.id], rows, strict=True)
            ]
        return JudgeOutput(judgements=judgements)

    def _prompt(self, tokenizer: "Tokenizer", subject: InstructionResponse, rationale: str) -> list[int]:
        """Return the ids up to the score. A justification is text, whatever control tokens it spells."""
        asked = self.ask(subject.instruction.text, subject.response.text)
        return encode_prompt(tokenizer, asked, f"{rationale}\n{PREFIX}".lstrip())

    def _justify(
        self, context: JudgeContext, subjects: Sequence[InstructionResponse]
    ) -> tuple[dict[str, str], list[Judgement]]:
        """Return ({response id: greedy justification}, the failed judgements).

        A justification includes the judge's thinking and stops before a score. It fails if the prompt leaves no room
        for it, or if the judge was still thinking at the last token.
        """
        generator = context.writer()
        sampling = Sampling(temperature=0, max_new_tokens=self.rationale_tokens)
        prompts = {
            s.response.id: encode_prompt(generator.tokenizer, self.ask(s.instruction.text, s.response.text))
            for s in subjects
        }
        fitting = {name: p for name, p in prompts.items() if len(p) + self.rationale_tokens <= generator.context}
        requests = [Request(prompt=prompt, seeds=[0]) for prompt in fitting.values()]
        written = generate_batched(
            generator, requests, sampling, context.journal, f"justification-{subjects[0].response.id}"
        )
        made = {name: spell_out(generator.tokenizer, one) for name, [one] in zip(fitting, written, strict=True)}
        rationales: dict[str, str] = {}
        failed: list[Judgement] = []
        for subject in subjects:
            name = subject.response.id
            if name not in made:
                failed.append(too_long(subject, generator.digest))
                continue
            text = made[name]
            said = None if thinks_on(prompt_end(generator.tokenizer, prompts[name]), text) else before_score(text)
            if said is None:
                failed.append(unjudged(subject, generator.digest, JudgementStatus.TRUNCATED, text))
            else:
                rationales[name] = said
        return rationales, failed


def score_tokens(tokenizer: "Tokenizer", low: int, high: int) -> list[int]:
    """Return the token of each score behind "Score: ".

    Raises:
        SelfalignError: the tokenizer encodes a score as several tokens.
    """
    tokens = tokens_behind(tokenizer, PREFIX, [str(score) for score in range(low, high + 1)])
    if tokens is None:
        raise SelfalignError("judge.model: its tokenizer encodes a score as several tokens. Set judge=additive.")
    return tokens


def tokens_behind(tokenizer: "Tokenizer", opening: str, alternatives: Sequence[str]) -> list[int] | None:
    """Return the token of each alternative behind the opening of an answer; None if one is not a single token."""
    prompt = as_prompt("x")
    prefix = encode_prompt(tokenizer, prompt, opening)
    encoded = [encode_prompt(tokenizer, prompt, opening + alternative) for alternative in alternatives]
    if any(ids[:-1] != prefix for ids in encoded):
        return None
    return [ids[-1] for ids in encoded]


def distribution(logps: Sequence[float]) -> list[float]:
    """Normalise the log-probabilities of the alternatives to probabilities that sum to 1."""
    highest = max(logps)
    weights = [math.exp(logp - highest) for logp in logps]
    return [weight / sum(weights) for weight in weights]


def expected(subject: InstructionResponse, logps: Sequence[float], low: int, rationale: str, model: str) -> Judgement:
    """Return the judgement with mean and entropy of the distribution over the scores from `low` up."""
    shares = distribution(logps)
    score = math.fsum(share * value for value, share in enumerate(shares, start=low))
    return Judgement(
        id=f"{subject.response.id}-1",
        response_id=subject.response.id,
        status=JudgementStatus.OK,
        score=score,
        text=f"{rationale}\n{PREFIX}{score:.2f}".lstrip(),
        model=model,
        entropy=-sum(share * math.log(share) for share in shares if share > 0),
    )

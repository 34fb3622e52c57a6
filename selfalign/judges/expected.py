"""Scores as the mean of the judge's score distribution, read in one forward pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.data.turns import as_prompt
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
from selfalign.judges.sampled import judge_text
from selfalign.models.batches import SharedPrompt, share_prompt
from selfalign.models.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(kw_only=True, slots=True)
class ExpectedScore(Rubric):
    """The probability-weighted mean over the score tokens that may follow "Score: ", in one forward pass.

    `min_score` and `max_score` are single digits.

    Attributes:
        model: who judges: "self" (M_t, the paper), "sft" (M1), "base" (M0), or another model: a folder or hub id.
        rationale_tokens: the most tokens of a greedy justification that the judge writes first; 0 for none.
        thought_tokens: the most tokens of a greedy thought that a judge with markers of thoughts writes before all
            else; 0 reads the score behind an empty thought, and lets a justification share rationale_tokens with one.
        max_batch_tokens: the most tokens of a forward pass.
    """

    model: str = "self"
    rationale_tokens: int = 0
    thought_tokens: int = field(default=0, metadata={"keyed": "if set"})
    max_batch_tokens: int = 2048
    min_valid_samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        Rubric.__post_init__(self)
        check_model(self.model)
        if not 0 <= self.min_score < self.max_score <= 9:
            raise SelfalignError(
                f"judge.min_score and judge.max_score must be one digit each for expected_score, got "
                f"{self.min_score} to {self.max_score}: write the rubric for a scale within 0 to 9, or let the judge "
                "write its score (judge=additive or external)"
            )
        if self.rationale_tokens < 0:
            raise SelfalignError(f"judge.rationale_tokens must be 0 or more, got {self.rationale_tokens}")
        if self.thought_tokens < 0:
            raise SelfalignError(f"judge.thought_tokens must be 0 or more, got {self.thought_tokens}")
        check_max_batch_tokens(self.max_batch_tokens)

    @property
    def instructions_per_call(self) -> int:
        """The number of instructions judged at a time; larger if the policy is loaded twice, to write and to score."""
        return (16 if self.writes_first else 1) * INSTRUCTIONS_PER_CALL

    @property
    def token_setting(self) -> str:
        """The setting that limits the length of what the judge writes."""
        return "judge.thought_tokens" if self.thought_tokens else "judge.rationale_tokens"

    @property
    def writes_first(self) -> bool:
        """Whether the judge writes a thought or a justification before its score is read."""
        return bool(self.rationale_tokens or self.thought_tokens)

    @property
    def opening(self) -> str:
        """The beginning of every judgement; empty for a judge that writes a justification first."""
        return "" if self.rationale_tokens else PREFIX

    def answer(self, score: int, justification: str) -> str:
        """Return the text behind the opening, for evaluation fine-tuning: the score, after a justification if any."""
        return f"{justification}\n{PREFIX}{score}".lstrip() if self.rationale_tokens else str(score)

    def check_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """Check that each score is a single token."""
        score_tokens(tokenizer, self.min_score, self.max_score)

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of wanted judgements; justifications count too."""
        return len(subjects) * (2 if self.writes_first else 1)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Judge each response once, by the mean of the judge's score distribution.

        The prompts for one instruction share the rubric and the instruction, which are computed once. A judge that
        never stopped thinking has given no justification, so it is not asked for a score.
        """
        rationales, judgements = dict.fromkeys((s.response.id for s in subjects), Rationale()), list[Judgement]()
        if self.writes_first:
            rationales, judgements = self._justify(context, subjects)
        reader = context.reader(self.max_batch_tokens)
        digits = score_tokens(reader.tokenizer, self.min_score, self.max_score)
        groups: list[SharedPrompt] = []
        members: dict[str, list[InstructionResponse]] = {}
        for name, candidates in by_instruction([s for s in subjects if s.response.id in rationales]).items():
            prompts = [self._prompt(reader.tokenizer, s, rationales[s.response.id]) for s in candidates]
            fits = [len(prompt) < reader.context for prompt in prompts]
            judgements += [too_long(s, reader.digest) for s, fit in zip(candidates, fits, strict=True) if not fit]
            members[name] = [s for s, fit in zip(candidates, fits, strict=True) if fit]
            fitting = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
            if fitting:
                groups.append(share_prompt(name, fitting, [[] for _ in fitting]))
        for group, rows in zip(groups, score_batched(reader, groups, digits, context.journal, "scores"), strict=True):
            judgements += [
                expected(subject, row, self.min_score, rationales[subject.response.id], reader.digest)
                for subject, row in zip(members[group.id], rows, strict=True)
            ]
        return JudgeOutput(judgements=judgements)

    def _prompt(self, tokenizer: "Tokenizer", subject: InstructionResponse, rationale: "Rationale") -> list[int]:
        """Return the ids up to the score. A justification is text, whatever control tokens it spells."""
        asked = self.ask(subject.instruction.text, subject.response.text)
        return encode_prompt(tokenizer, asked, f"{rationale.said}\n{PREFIX}".lstrip(), rationale.thought)

    def _justify(
        self, context: JudgeContext, subjects: Sequence[InstructionResponse]
    ) -> tuple[dict[str, "Rationale"], list[Judgement]]:
        """Return ({response id: what the judge greedily wrote first}, the failed judgements).

        A justification stops before a score. It fails if the prompt leaves no room for it, or if the judge was still
        thinking at the last token. Where only a thought is wanted, the first token behind it is left out.
        """
        generator = context.writer()
        sampling = Sampling(
            temperature=0, max_new_tokens=max(1, self.rationale_tokens), thought_tokens=self.thought_tokens
        )
        prompts = {
            s.response.id: encode_prompt(generator.tokenizer, self.ask(s.instruction.text, s.response.text))
            for s in subjects
        }
        fitting = {name: p for name, p in prompts.items() if len(p) + sampling.longest <= generator.context}
        requests = [Request(prompt=prompt, seeds=[0]) for prompt in fitting.values()]
        written = generate_batched(
            generator, requests, sampling, context.journal, f"justification-{subjects[0].response.id}"
        )
        made = {
            name: judge_text(generator.tokenizer, prompt, one)
            for (name, prompt), [one] in zip(fitting.items(), written, strict=True)
        }
        rationales: dict[str, Rationale] = {}
        failed: list[Judgement] = []
        for subject in subjects:
            name = subject.response.id
            if name not in made:
                failed.append(too_long(subject, generator.digest))
                continue
            one = made[name]
            said = None if one.still_thinking else before_score(one.text)
            if said is None:
                failed.append(unjudged(subject, generator.digest, JudgementStatus.TRUNCATED, one.thought + one.text))
            else:
                rationales[name] = Rationale(one.thought, said if self.rationale_tokens else "")
        return rationales, failed


@dataclass(frozen=True, slots=True)
class Rationale:
    """What a judge writes before its score: its thought, where the model's markers are known, and a justification."""

    thought: str = ""
    said: str = ""


def score_tokens(tokenizer: "Tokenizer", low: int, high: int) -> list[int]:
    """Return the token of each score behind "Score: ".

    Raises:
        SelfalignError: the tokenizer encodes a score as several tokens.
    """
    tokens = tokens_behind(tokenizer, PREFIX, [str(score) for score in range(low, high + 1)])
    if tokens is None:
        raise SelfalignError(
            "judge.model: its tokenizer does not encode each digit behind 'Score: ' as one token of its own, as "
            "judge=expected_score needs. Choose a judge model whose tokenizer splits digits, or judge=additive, for "
            "which the model must be able to write a judgement."
        )
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


def expected(
    subject: InstructionResponse, logps: Sequence[float], low: int, rationale: Rationale, model: str
) -> Judgement:
    """Return the judgement with mean and entropy of the distribution over the scores from `low` up."""
    shares = distribution(logps)
    score = math.fsum(share * value for value, share in enumerate(shares, start=low))
    return Judgement(
        id=f"{subject.response.id}-1",
        response_id=subject.response.id,
        status=JudgementStatus.OK,
        score=score,
        text=rationale.thought + f"{rationale.said}\n{PREFIX}{score:.2f}".lstrip(),
        model=model,
        entropy=-sum(share * math.log(share) for share in shares if share > 0),
    )

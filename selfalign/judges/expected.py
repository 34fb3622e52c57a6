"""The mean of the judge's score distribution, read in one forward pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.data.sources import as_prompt
from selfalign.data.thinking import thinks_on
from selfalign.engines.protocol import Request, Sampling, read_all, write_all
from selfalign.judges.parsing import PREFIX, before_score
from selfalign.judges.protocol import (
    TOGETHER,
    Bench,
    Judged,
    Rubric,
    Subject,
    by_instruction,
    check_batch_tokens,
    check_model,
    too_long,
    unjudged,
)
from selfalign.judges.sampled import spell_out
from selfalign.models.batches import Group, share_prompt
from selfalign.models.tokenizer import encode_prompt, prompt_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(kw_only=True, slots=True)
class ExpectedScore(Rubric):
    """The probability-weighted mean over the score tokens that may follow "Score: ", in one forward pass.

    `low` and `high` are single digits.

    Attributes:
        model: who judges: "self" (M_t, the paper), "sft" (M1), "base" (M0), or another model: a folder or hub id.
        rationale_tokens: the judge first writes a greedy justification of at most so many tokens; 0 for none.
        batch_tokens: the most tokens of a forward pass.
    """

    model: str = "self"
    rationale_tokens: int = 0
    batch_tokens: int = 2048
    minimum_valid: ClassVar[int] = 1
    token_setting: ClassVar[str] = "judge.rationale_tokens"

    def __post_init__(self) -> None:
        Rubric.__post_init__(self)
        check_model(self.model)
        if not 0 <= self.low < self.high <= 9:
            raise SelfalignError(
                f"judge.low and judge.high must be one digit each for expected_score, got {self.low} to {self.high}"
            )
        if self.rationale_tokens < 0:
            raise SelfalignError(f"judge.rationale_tokens must be 0 or more, got {self.rationale_tokens}")
        check_batch_tokens(self.batch_tokens)

    @property
    def together(self) -> int:
        """More at a time where the policy is loaded twice for them: to write, and to be read."""
        return (16 if self.rationale_tokens else 1) * TOGETHER

    @property
    def opening(self) -> str:
        """How every answer begins; a judge that justifies itself first begins freely."""
        return "" if self.rationale_tokens else PREFIX

    def answer(self, score: int, justification: str) -> str:
        """What follows the opening, for evaluation fine-tuning: the score, behind a justification if it writes one."""
        return f"{justification}\n{PREFIX}{score}".lstrip() if self.rationale_tokens else str(score)

    def wanted(self, subjects: Sequence[Subject]) -> int:
        """How many judgements there should be; justifications count too."""
        return len(subjects) * (2 if self.rationale_tokens else 1)

    def judge(self, bench: Bench, subjects: Sequence[Subject]) -> Judged:
        """One judgement a response: the mean of the judge's score distribution.

        The responses to one instruction share the rubric and the instruction, which are computed once for all. A judge
        that never stopped thinking has not justified anything, and is not asked for a score.
        """
        rationales, judgements = dict.fromkeys((subject.response.id for subject in subjects), ""), list[Judgement]()
        if self.rationale_tokens:
            rationales, judgements = self._justify(bench, subjects)
        reader = bench.reader(self.batch_tokens)
        digits = score_tokens(reader.tokenizer, self.low, self.high)
        groups: list[Group] = []
        members: dict[str, list[Subject]] = {}
        for name, family in by_instruction([s for s in subjects if s.response.id in rationales]).items():
            prompts = [self._prompt(reader.tokenizer, s, rationales[s.response.id]) for s in family]
            fits = [len(prompt) < reader.context for prompt in prompts]
            judgements += [too_long(s, reader.digest) for s, fit in zip(family, fits, strict=True) if not fit]
            members[name] = [s for s, fit in zip(family, fits, strict=True) if fit]
            fitting = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
            if fitting:
                groups.append(share_prompt(name, fitting, [[] for _ in fitting]))
        for group, rows in zip(groups, read_all(reader, groups, digits, bench.journal, "scores"), strict=True):
            judgements += [
                expected(subject, row, self.low, rationales[subject.response.id], reader.digest)
                for subject, row in zip(members[group.id], rows, strict=True)
            ]
        return Judged(judgements=judgements)

    def _prompt(self, tokenizer: "Tokenizer", subject: Subject, rationale: str) -> list[int]:
        """The ids up to where the score stands; a justification is text, whatever control tokens it spells."""
        asked = self.ask(subject.instruction.text, subject.response.text)
        return encode_prompt(tokenizer, asked, f"{rationale}\n{PREFIX}".lstrip())

    def _justify(self, bench: Bench, subjects: Sequence[Subject]) -> tuple[dict[str, str], list[Judgement]]:
        """{response id: its greedy justification, thinking included and without a score}, and what has none.

        None has what leaves no room for it, or was thought about to the last token.
        """
        generator = bench.writer()
        sampling = Sampling(temperature=0, max_new_tokens=self.rationale_tokens)
        prompts = {
            s.response.id: encode_prompt(generator.tokenizer, self.ask(s.instruction.text, s.response.text))
            for s in subjects
        }
        fitting = {name: p for name, p in prompts.items() if len(p) + self.rationale_tokens <= generator.context}
        requests = [Request(prompt=prompt, seeds=[0]) for prompt in fitting.values()]
        written = write_all(generator, requests, sampling, bench.journal, f"justification-{subjects[0].response.id}")
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
    """The token of each score behind "Score: ".

    Raises:
        SelfalignError: this tokenizer does not write each score as one token there.
    """
    tokens = tokens_behind(tokenizer, PREFIX, [str(score) for score in range(low, high + 1)])
    if tokens is None:
        raise SelfalignError("this model's tokenizer does not write a score as one token; choose judge=additive")
    return tokens


def tokens_behind(tokenizer: "Tokenizer", opening: str, alternatives: Sequence[str]) -> list[int] | None:
    """The token of each alternative behind the beginning of an answer; None where one is not a token of its own."""
    prompt = as_prompt("x")
    prefix = encode_prompt(tokenizer, prompt, opening)
    encoded = [encode_prompt(tokenizer, prompt, opening + alternative) for alternative in alternatives]
    if any(ids[:-1] != prefix for ids in encoded):
        return None
    return [ids[-1] for ids in encoded]


def distribution(logps: Sequence[float]) -> list[float]:
    """Log-probabilities of alternatives as shares of what they have together."""
    highest = max(logps)
    weights = [math.exp(logp - highest) for logp in logps]
    return [weight / sum(weights) for weight in weights]


def expected(subject: Subject, logps: Sequence[float], low: int, rationale: str, model: str) -> Judgement:
    """Mean and entropy of the distribution over the scores from `low` up, given each one's log-probability."""
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

"""Scores by criteria of each instruction's own, each read as the probability of a yes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import text_or_file
from selfalign.core.placeholders import check_template, fill
from selfalign.core.records import Criterion, Judgement, JudgementStatus, Prompt
from selfalign.data.thinking import answer_given
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import score_batched
from selfalign.judges.criteria import CriteriaConfig
from selfalign.judges.expected import distribution, tokens_behind
from selfalign.judges.protocol import (
    INSTRUCTIONS_PER_CALL,
    DegeneracyThresholds,
    InstructionResponse,
    JudgeContext,
    JudgeOutput,
    check_max_batch_tokens,
    check_model,
    check_share,
    too_long,
    unjudged,
)
from selfalign.models.batches import SharedPrompt, share_prompt
from selfalign.models.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

OPENING = "Answer:"
"""Beginning of every answer; yes or no is the next token."""

ANSWERS = (" Yes", " No")

EXAMPLE = "The response says what the instruction asks for, in the form that it asks for, and leaves nothing of it out."
"""A criterion of common length, for checks of lengths."""


@dataclass(kw_only=True, slots=True)
class RubricScore:
    """The share of an instruction's own criteria that a response meets, by weight, between 0 and 1.

    `Σ_j |w_j| m_j / Σ_j |w_j|` with `m_j = P(yes)` for a criterion of positive weight, and `1 - P(yes)` for one of
    negative weight, which states a mistake. Equation 1 of arXiv 2507.17746, whose pitfalls state what is avoided, with
    probabilities for its verdicts of 0 or 1. Among responses to one instruction the order is that of
    `Σ_j w_j P(yes) / Σ_{w_j > 0} w_j`, the points of HealthBench that arXiv 2509.25534 rewards.

    P(yes) is the probability of " Yes" against " No" behind "Answer:". All criteria of all responses are read in one
    pass, in which instruction and response are computed once.

    Attributes:
        prompt: the question, a text or "file:PATH", with {instruction}, {response} and, best at its end, {criterion}.
        criteria: where the criteria come from.
        model: who judges: "self" (M_t), "sft" (M1), "base" (M0), or another model: a folder or hub id.
        max_batch_tokens: the most tokens of a forward pass.
        max_failure_rate: the run stops when more than this share of the responses gets no score.
        degeneracy: thresholds below which scores count as nearly constant.
    """

    prompt: str
    criteria: CriteriaConfig = field(default_factory=CriteriaConfig)
    model: str = "self"
    max_batch_tokens: int = 2048
    max_failure_rate: float = 0.5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    min_score: ClassVar[int] = 0
    max_score: ClassVar[int] = 1
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[str] = "judge.criteria.sampling.max_new_tokens"
    instructions_per_call: ClassVar[int] = INSTRUCTIONS_PER_CALL

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, "judge.prompt")
        check_template(self.prompt, "judge.prompt", ("instruction", "response", "criterion"))
        check_model(self.model)
        check_max_batch_tokens(self.max_batch_tokens)
        check_share(self.max_failure_rate)

    def ask(self, instruction: str, response: str, criterion: str = EXAMPLE) -> Prompt:
        """Return the question about one criterion and one response, of which the judge sees the answer alone."""
        shown = {"instruction": instruction, "response": answer_given(response), "criterion": criterion}
        return as_prompt(fill(self.prompt, shown))

    def check_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """Check that yes and no are single tokens."""
        answer_tokens(tokenizer)

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of scores."""
        return len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Judge each response once, by all criteria of its instruction; one that does not fit leaves no score."""
        reader = context.reader(self.max_batch_tokens)
        answers = answer_tokens(reader.tokenizer)
        groups: list[SharedPrompt] = []
        asked: dict[str, InstructionResponse] = {}
        judgements: list[Judgement] = []
        for subject in subjects:
            criteria = subject.instruction.criteria or []
            prompts = [self._encode(reader.tokenizer, subject, criterion) for criterion in criteria]
            if not criteria:
                status, reason = JudgementStatus.NO_SCORE, "the instruction has no criteria"
                judgements.append(unjudged(subject, reader.digest, status, reason))
            elif max(map(len, prompts)) >= reader.context:
                judgements.append(too_long(subject, reader.digest))
            else:
                asked[subject.response.id] = subject
                groups.append(share_prompt(subject.response.id, prompts, [[] for _ in prompts]))
        read = score_batched(reader, groups, answers, context.journal, "criteria", lambda group: 1)
        for group, rows in zip(groups, read, strict=True):
            judgements.append(by_criteria(asked[group.id], [distribution(row)[0] for row in rows], reader.digest))
        return JudgeOutput(judgements=judgements)

    def _encode(self, tokenizer: "Tokenizer", subject: InstructionResponse, criterion: Criterion) -> list[int]:
        """Return the ids up to yes or no."""
        return encode_prompt(
            tokenizer, self.ask(subject.instruction.text, subject.response.text, criterion.text), OPENING
        )


def answer_tokens(tokenizer: "Tokenizer") -> list[int]:
    """Return the tokens of yes and no behind "Answer:".

    Raises:
        SelfalignError: the tokenizer encodes one of them as several tokens.
    """
    tokens = tokens_behind(tokenizer, OPENING, ANSWERS)
    if tokens is None:
        raise SelfalignError(
            "judge.model: its tokenizer does not encode ' Yes' and ' No' behind 'Answer:' as one token each, as "
            "judge=rubric needs. Choose another judge model, or judge=expected_score"
        )
    return tokens


def by_criteria(subject: InstructionResponse, shares: Sequence[float], model: str) -> Judgement:
    """Return the judgement of a response. Its text has a line for each criterion: P(yes), weight, statement.

    Args:
        subject: the response, whose instruction has the criteria.
        shares: P(yes) of each criterion.
        model: the judge.
    """
    criteria = subject.instruction.criteria or []
    weighed = [
        abs(one.weight) * (share if one.weight > 0 else 1 - share) for one, share in zip(criteria, shares, strict=True)
    ]
    lines = [f"{share:.3f} (weight {one.weight:g}) {one.text}" for one, share in zip(criteria, shares, strict=True)]
    return Judgement(
        id=f"{subject.response.id}-1",
        response_id=subject.response.id,
        status=JudgementStatus.OK,
        score=math.fsum(weighed) / math.fsum(abs(one.weight) for one in criteria),
        text="\n".join(lines),
        model=model,
    )

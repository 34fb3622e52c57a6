"""Scores of a reward model: a checkpoint with a head that was trained on human or other preferences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.data.thinking import answer_given
from selfalign.judges.protocol import (
    INSTRUCTIONS_PER_CALL,
    OWN_MODELS,
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
from selfalign.models.batches import of_record
from selfalign.models.config import DTYPES
from selfalign.models.reward_model import RewardHead, encode_conversation, weigh
from selfalign.store.journal import Task


@dataclass(kw_only=True, slots=True)
class RewardModel:
    """The reward of a sequence classification checkpoint for the conversation with its answer. There is no rubric.

    One logit is the reward of Bradley and Terry (1952), as most reward models are trained; several are attributes,
    whose weighted sum is taken (arXiv 2406.12845). The scale is the model's own. The model reads the conversation in
    its own chat template, without the thought before the answer.

    Attributes:
        model: the checkpoint, a folder or hub id.
        weights: {attribute, as `id2label` of the checkpoint names it, or its index: its weight}; needed for a model of
            several attributes, of which the others have no weight.
        dtype: of the weights, "float32", or "bfloat16", whose scores have no more than three digits.
        max_batch_tokens: the most tokens of a forward pass.
        max_failure_rate: the run stops when more than this share of the responses gets no score.
        degeneracy: thresholds below which scores count as nearly constant.
    """

    model: str
    weights: dict[Any, float] = field(default_factory=dict)
    dtype: str = "float32"
    max_batch_tokens: int = 8192
    max_failure_rate: float = 0.5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[None] = None
    instructions_per_call: ClassVar[int] = INSTRUCTIONS_PER_CALL

    def __post_init__(self) -> None:
        if self.model in OWN_MODELS:
            raise SelfalignError(
                f"judge.model={self.model} is no reward model: give a checkpoint for sequence classification, a folder "
                "or hub id"
            )
        check_model(self.model)
        self.weights = {str(name): weight for name, weight in self.weights.items()}
        if not all(map(math.isfinite, self.weights.values())) or (self.weights and not any(self.weights.values())):
            raise SelfalignError(f"judge.weights must be finite numbers, not all 0, got {self.weights}")
        if self.dtype not in DTYPES:
            raise SelfalignError(f"judge.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        check_max_batch_tokens(self.max_batch_tokens)
        check_share(self.max_failure_rate)

    @property
    def head(self) -> RewardHead:
        """How the model's logits are summed; a judge that has it is a reward model from outside the run."""
        return RewardHead(weights=self.weights)

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of scores."""
        return len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Judge each response once. Equal conversations have equal scores."""
        scorer = context.reward_model(self.dtype, self.max_batch_tokens)
        weights = self.head.resolve(scorer.labels)
        texts: dict[tuple[int, ...], list[InstructionResponse]] = {}
        judgements: list[Judgement] = []
        for subject in subjects:
            with of_record(subject.instruction.id):
                answer = answer_given(subject.response.text)
                ids = encode_conversation(scorer.tokenizer, subject.instruction.prompt, answer)
            if len(ids) > scorer.context:
                judgements.append(too_long(subject, scorer.digest))
            else:
                texts.setdefault(tuple(ids), []).append(subject)
        distinct = list(texts)
        batches = [[distinct[index] for index in batch] for batch in scorer.plan([*map(len, distinct)])]

        def task(batch: list[tuple[int, ...]]) -> Task:
            # Named by what is in it, because `max_batch_tokens` may be another when a killed stage is resumed.
            name = f"rewards-{texts[batch[0]][0].response.id}-{len(batch)}"
            return name, sum(len(texts[ids]) for ids in batch), partial(scorer.logits, batch)

        for batch, rows in zip(batches, context.journal.batches(map(task, batches)), strict=True):
            judgements += [
                rewarded(subject, logits, weights, scorer.labels, scorer.digest)
                for ids, logits in zip(batch, rows, strict=True)
                for subject in texts[ids]
            ]
        return JudgeOutput(judgements=judgements)


def rewarded(
    subject: InstructionResponse, logits: Sequence[float], weights: Sequence[float], labels: Sequence[str], model: str
) -> Judgement:
    """Return the judgement with the weighted sum of the logits; without a score where it is not finite."""
    score = weigh(logits, weights)
    if not math.isfinite(score):
        return unjudged(subject, model, JudgementStatus.NO_SCORE, f"the reward is {score}")
    named = ", ".join(f"{label} {logit:.3f}" for label, logit in zip(labels, logits, strict=True))
    return Judgement(
        id=f"{subject.response.id}-1",
        response_id=subject.response.id,
        status=JudgementStatus.OK,
        score=score,
        text=named if len(labels) > 1 else f"reward {score:.3f}",
        model=model,
    )

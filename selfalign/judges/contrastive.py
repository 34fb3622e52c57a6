"""A policy's preference for a response when it is told to answer well rather than badly."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import text_or_file
from selfalign.core.placeholders import check_template
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.judges.implicit import score_answers
from selfalign.judges.protocol import (
    INSTRUCTIONS_PER_CALL,
    DegeneracyThresholds,
    InstructionResponse,
    JudgeContext,
    JudgeOutput,
    by_instruction,
    check_max_batch_tokens,
    check_model,
    check_share,
    too_long,
)
from selfalign.losses.refinement import AUGMENTATION_PROMPT, NEGATIVE_PROMPT, PLACES, SCALE, Augmentation, augment


@dataclass(kw_only=True, slots=True)
class ContrastiveReward:
    """`log π(y|p⁺⊕x) - log π(y|p⁻⊕x)`, summed over the answer's tokens. There is no rubric and no reference.

    Liu et al. 2024, arXiv 2402.11907 (DLMA). It is the Δ of `loss.refinement.source=contrastive` without β, as a judge.
    An answer is scored behind its thought, which itself is not. Weights are float32, because the reward is a small
    difference of large sums.

    Attributes:
        model: who judges: "self" (M_t), "sft" (M1), "base" (M0), "previous" (M_{t-1}), or another model.
        prompt: p⁺, a text or "file:PATH", which asks for a good answer. `{scale}` in it is replaced by 100. The wording
            is ours.
        negative_prompt: p⁻, likewise, which asks for a bad one.
        place: the position of both, as `loss.refinement.place`.
        max_batch_tokens: the most tokens of a forward pass.
        max_failure_rate: the run stops when more than this share of the responses gets no score.
        degeneracy: thresholds below which scores count as nearly constant.
    """

    model: str = "self"
    prompt: str = AUGMENTATION_PROMPT
    negative_prompt: str = NEGATIVE_PROMPT
    place: str = "dialogue"
    max_batch_tokens: int = 2048
    max_failure_rate: float = 0.5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[None] = None
    instructions_per_call: ClassVar[int] = INSTRUCTIONS_PER_CALL

    def __post_init__(self) -> None:
        check_model(self.model)
        check_share(self.max_failure_rate)
        check_max_batch_tokens(self.max_batch_tokens)
        if self.place not in PLACES:
            raise SelfalignError(f"judge.place must be one of {', '.join(PLACES)}; got {self.place!r}")
        for name in ("prompt", "negative_prompt"):
            text = text_or_file(getattr(self, name), f"judge.{name}")
            if not text.strip():
                raise SelfalignError(f"judge.{name} is empty: give the text that is put before the instruction")
            check_template(text, f"judge.{name}", (), ("scale",))
            setattr(self, name, text)
        if self.prompt == self.negative_prompt:
            raise SelfalignError("judge.prompt and judge.negative_prompt are the same text, so every reward would be 0")

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of scores: each response is scored behind p⁺ and behind p⁻."""
        return 2 * len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Judge each response once, by how much likelier it is behind p⁺ than behind p⁻."""
        files = context.judging_policy()
        policy, candidate_lists = files.load("float32"), by_instruction(subjects)
        first, size = subjects[0].response.id, self.max_batch_tokens

        def behind(p: str, who: str) -> dict[str, float]:
            change = partial(augment, Augmentation(p.replace("{scale}", str(SCALE)), self.place))
            return score_answers(policy, candidate_lists, context.journal, f"{who}-{first}", size, change)[0]

        good, bad = behind(self.prompt, "positive"), behind(self.negative_prompt, "negative")
        return JudgeOutput(
            judgements=[
                _judgement(subject, good[subject.response.id], bad[subject.response.id], files.digest)
                if subject.response.id in good and subject.response.id in bad
                else too_long(subject, files.digest)
                for subject in subjects
            ]
        )


def _judgement(subject: InstructionResponse, good: float, bad: float, model: str) -> Judgement:
    return Judgement(
        id=f"{subject.response.id}-1",
        response_id=subject.response.id,
        status=JudgementStatus.OK,
        score=good - bad,
        text=f"log-probability {good:.3f} told to answer well, {bad:.3f} told to answer badly",
        model=model,
    )

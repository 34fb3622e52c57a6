"""The reward that a policy's training implies: its log-ratio to its reference policy."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus, Prompt
from selfalign.judges.protocol import (
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
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean
from selfalign.models.batches import SharedPrompt, answer_read_by, encode_group
from selfalign.models.checkpoint import Policy
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import answer_prompt
from selfalign.store.journal import Journal


@dataclass(kw_only=True, slots=True)
class ImplicitReward:
    """`β [log π(y|x) - log π_ref(y|x)] - α |y|`, summed over the answer's tokens. There is no rubric.

    arXiv 2406.09760 (DICE). π is the judging policy, π_ref the reference it was trained against: M0 for
    M1, and for M_t what `train.reference_policy` names, by default M_{t-1}. `|y|` counts tokens, the end of turn
    included. An answer is scored behind its thought, which itself is not. Weights are float32, because the reward is a
    small difference of large sums. α is chosen over all responses, so they are judged together and lie in memory all at
    once.

    Attributes:
        model: who judges: "self" (M_t) or "sft" (M1); M0 has no reference, and neither has a model from elsewhere.
        beta: β of the reward; the order of responses does not depend on it while α is chosen by itself.
        alpha: α, taken off for each token; null chooses it as the paper does, so that over the instructions with
            several responses the best one is on average as long as the worst, or 0 where no instruction has several.
        max_batch_tokens: the most tokens of a forward pass.
        max_failure_rate: the run stops when more than this share of the responses gets no score.
        degeneracy: thresholds below which scores count as nearly constant.
    """

    model: str = "self"
    beta: float = 0.1
    alpha: float | None = None
    max_batch_tokens: int = 2048
    max_failure_rate: float = 0.5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[None] = None
    instructions_per_call: ClassVar[int] = sys.maxsize

    def __post_init__(self) -> None:
        check_model(self.model)
        check_share(self.max_failure_rate)
        if self.model not in ("self", "sft"):
            raise SelfalignError(
                f"judge.model={self.model} has no reference policy, which judge=implicit needs. Set judge.model=self "
                "or judge.model=sft."
            )
        if self.beta <= 0:
            raise SelfalignError(f"judge.beta must be above 0, got {self.beta}")
        if self.alpha is not None and self.alpha < 0:
            raise SelfalignError(f"judge.alpha must be 0 or more, or null, got {self.alpha}")
        check_max_batch_tokens(self.max_batch_tokens)

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of scores: each response is scored by the policy and by its reference."""
        return 2 * len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Judge each response once, by its implicit reward.

        Raises:
            SelfalignError: there is no reference, or it is the policy itself.
        """
        policy, reference = context.judging_policy(), context.reference
        if reference is None or reference.digest == policy.digest:
            raise SelfalignError(
                "judge=implicit: the judging policy has no reference policy or equals it, so every reward would be 0. "
                "It needs a policy that was trained: set data.seed_data, or judge in a later iteration."
            )
        candidate_lists = by_instruction(subjects)
        size = self.max_batch_tokens
        own, lengths = score_answers(policy.load("float32"), candidate_lists, context.journal, "policy", size)
        others, _ = score_answers(reference.load("float32"), candidate_lists, context.journal, "reference", size)
        rewards = {name: self.beta * (own[name] - others[name]) for name in own if name in others}
        measured = [
            [(rewards[s.response.id], lengths[s.response.id]) for s in candidates if s.response.id in rewards]
            for candidates in candidate_lists.values()
        ]
        alpha = balancing_alpha(measured) if self.alpha is None else self.alpha
        judgements = [
            _judgement(subject, rewards[subject.response.id], alpha * lengths[subject.response.id], policy.digest)
            if subject.response.id in rewards
            else too_long(subject, policy.digest)
            for subject in subjects
        ]
        return JudgeOutput(judgements=judgements, means={catalog.JUDGE_ALPHA.name: Mean(alpha, 1.0)})


def score_answers(
    policy: Policy,
    candidate_lists: Mapping[str, Sequence[InstructionResponse]],
    journal: Journal,
    who: str,
    max_batch_tokens: int,
    change: Callable[[Prompt], Prompt] = lambda prompt: prompt,
) -> tuple[dict[str, float], dict[str, int]]:
    """Compute the log-probabilities of responses, of which thoughts are read without being scored.

    Args:
        policy: the policy, loaded.
        candidate_lists: {instruction id: its responses}.
        journal: keeps finished batches through a kill.
        who: tells these batches from those of another policy or prompt.
        max_batch_tokens: the most tokens of a forward pass.
        change: makes the prompt that is scored from the instruction's.

    Returns:
        {response id: summed log-probability in nats} of those that fit into the context, and {response id: tokens}.
    """
    groups: list[SharedPrompt] = []
    members: dict[str, list[str]] = {}
    lengths: dict[str, int] = {}
    for name, candidates in candidate_lists.items():
        answers = [answer_read_by(policy.tokenizer, subject.response) for subject in candidates]
        prompt = answer_prompt(policy.tokenizer, change(candidates[0].instruction.prompt))
        group = encode_group(policy.tokenizer, name, prompt, answers, mask_thought=True)
        room = policy.context - len(group.prompt)
        kept = [i for i, ids in enumerate(group.responses) if 0 < len(ids) <= room]
        members[name] = [candidates[i].response.id for i in kept]
        scored = group.scored()
        lengths |= {candidates[i].response.id: scored[i] for i in kept}
        if kept:
            responses, masked = [group.responses[i] for i in kept], [group.num_context_tokens[i] for i in kept]
            groups.append(SharedPrompt(id=name, prompt=group.prompt, responses=responses, num_context_tokens=masked))
    scorer = LogProbScorer(policy, max_batch_tokens)
    scores: dict[str, float] = {}
    for group, values in zip(groups, scorer.score_all(groups, journal, who), strict=True):
        scores |= dict(zip(members[group.id], values, strict=True))
    return scores, lengths


def balancing_alpha(candidate_lists: Sequence[Sequence[tuple[float, int]]]) -> float:
    """Return the α ≥ 0 at which the best response is on average as long as the worst one, or nearly.

    `candidate_lists` has (reward, tokens) of each response, by instruction.

    The difference never rises with α and changes only where two responses of an instruction swap places, so the
    intervals between these points are searched by bisection; 0, or the middle of the best one, is taken.
    """
    several = [candidates for candidates in candidate_lists if len(candidates) > 1]
    points = sorted(
        {
            (one[0] - other[0]) / (one[1] - other[1])
            for candidates in several
            for one, other in combinations(candidates, 2)
            if one[1] != other[1]
        }
    )
    edges = [0.0, *(point for point in points if point > 0)]
    if len(edges) == 1:
        return 0.0
    tried = [0.0, *((a + b) / 2 for a, b in pairwise(edges[1:])), edges[-1] * 1.01]
    at = bisect_left(tried, True, key=lambda alpha: _longer(several, alpha) <= 0)
    nearest = tried[max(0, at - 1) : at + 1]
    return min(nearest, key=lambda alpha: abs(_longer(several, alpha)))


def _longer(candidate_lists: Sequence[Sequence[tuple[float, int]]], alpha: float) -> float:
    """Return the mean number of tokens by which the best response is longer than the worst."""

    def net(response: tuple[float, int]) -> float:
        return response[0] - alpha * response[1]

    return sum(max(candidates, key=net)[1] - min(candidates, key=net)[1] for candidates in candidate_lists) / len(
        candidate_lists
    )


def _judgement(subject: InstructionResponse, reward: float, penalty: float, model: str) -> Judgement:
    return Judgement(
        id=f"{subject.response.id}-1",
        response_id=subject.response.id,
        status=JudgementStatus.OK,
        score=reward - penalty,
        text=f"implicit reward {reward:.3f}, less {penalty:.3f} for its length",
        model=model,
    )

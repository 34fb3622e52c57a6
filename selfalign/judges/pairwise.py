"""Candidates compared two by two in both orders; their win rates are their scores."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.records import Comparison, Demonstration, Judgement, JudgementStatus, RankedAnswers, Verdict
from selfalign.judges.comparator import OPENING, PairwiseComparator
from selfalign.judges.comparisons import ResponsePair, expected_win_rates, win_shares
from selfalign.judges.protocol import (
    INSTRUCTIONS_PER_CALL,
    DegeneracyThresholds,
    InstructionResponse,
    JudgeContext,
    JudgeOutput,
    by_instruction,
    check_scale,
)
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Sums


@dataclass(kw_only=True, slots=True)
class Pairwise(PairwiseComparator):
    """Compare each response with others to the same instruction, in both orders; its wins are its score.

    Attributes:
        pairs: comparisons of each instruction, drawn so that every response has a turn; 0 takes all.
        scores: "wins", the share of comparisons won, a tie counting half; "elo", the share a response should win
            against an average one by Bradley and Terry's model, which is fairer where `pairs` are drawn.
        min_score: the score of a response that loses all.
        max_score: of one that wins all.
        degeneracy: thresholds below which scores count as nearly constant.
    """

    pairs: int = 0
    scores: str = "wins"
    min_score: int = 0
    max_score: int = 5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    min_valid_samples: ClassVar[int] = 1
    instructions_per_call: ClassVar[int] = INSTRUCTIONS_PER_CALL
    only_compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        PairwiseComparator.__post_init__(self)
        check_scale(self.min_score, self.max_score)
        if self.pairs < 0:
            raise SelfalignError(f"judge.pairs must be 0 (all) or more, got {self.pairs}")
        if self.scores not in ("wins", "elo"):
            raise SelfalignError(f"judge.scores must be wins or elo; got {self.scores!r}")

    def demonstrate(self, question: RankedAnswers) -> list[Demonstration]:
        """Return EFT demonstrations: each two ranked answers in both orders, so that A is right as often as B."""
        return [
            Demonstration(
                id=f"eft-{question.id}-{one + 1}-{other + 1}",
                prompt=self.ask(question.instruction, question.texts[one], question.texts[other]),
                response=f"{Verdict.A if question.ranks[one] < question.ranks[other] else Verdict.B}]]",
                source="eft",
                question=question.id,
                prefill=OPENING,
            )
            for one, other in permutations(range(len(question.texts)), 2)
        ]

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of wanted verdicts."""
        return 2 * sum(self.pairs_of(len(candidates)) for candidates in by_instruction(subjects).values())

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Judge each response once, by its comparisons."""
        candidate_lists = by_instruction(subjects)
        pairs = [pair for candidates in candidate_lists.values() for pair in self._draw(candidates, context.seed)]
        comparisons, counts = self.compare(context, pairs)
        compared_of: dict[str, list[Comparison]] = {name: [] for name in candidate_lists}
        for comparison in comparisons:
            compared_of[comparison.instruction_id].append(comparison)
        judgements: list[Judgement] = []
        for name, candidates in candidate_lists.items():
            judgements += self._judgements(candidates, compared_of[name], self.name(context))
        counts[catalog.COMPARISONS.name] = len(comparisons)
        preference = counts.pop(place := catalog.JUDGE_PLACE_PREFERENCE.name, None)
        means: Sums = {} if preference is None else {place: Mean(preference * len(pairs), float(len(pairs)))}
        return JudgeOutput(judgements=judgements, comparisons=comparisons, counts=counts, means=means)

    def pairs_of(self, responses: int) -> int:
        """Return the number of comparisons of an instruction with so many responses."""
        every = responses * (responses - 1) // 2
        return min(self.pairs or every, every)

    def _draw(self, candidates: Sequence[InstructionResponse], seed: int) -> list[ResponsePair]:
        """Return the comparisons of one instruction: all, or a sample in which every response takes part."""
        rest = [
            ResponsePair(one.instruction, one.response, other.response) for one, other in combinations(candidates, 2)
        ]
        if len(rest) <= (count := self.pairs_of(len(candidates))):
            return rest
        random.Random(derive_seed(seed, candidates[0].instruction.id)).shuffle(rest)
        turns: Counter[str] = Counter()
        drawn: list[ResponsePair] = []
        for _ in range(count):
            pair = min(rest, key=lambda pair: turns[pair.first.id] + turns[pair.second.id])
            rest.remove(pair)
            turns.update((pair.first.id, pair.second.id))
            drawn.append(pair)
        return drawn

    def _judgements(
        self, candidates: Sequence[InstructionResponse], comparisons: list[Comparison], model: str
    ) -> list[Judgement]:
        """Return a judgement of each response from the comparisons of its instruction."""
        outcomes = [(c.first_id, c.second_id, c.outcome) for c in comparisons if c.outcome is not None]
        shares = win_shares(outcomes) if self.scores == "wins" else expected_win_rates(outcomes)
        judgements: list[Judgement] = []
        for name in (subject.response.id for subject in candidates):
            own = [c for c in comparisons if name in (c.first_id, c.second_id)]
            known = name in shares
            failed = own[0].status if own else JudgementStatus.NO_SCORE
            judgements.append(
                Judgement(
                    id=f"{name}-1",
                    response_id=name,
                    status=JudgementStatus.OK if known else failed,
                    score=self.min_score + shares[name] * (self.max_score - self.min_score) if known else None,
                    text=describe(name, own),
                    model=model,
                )
            )
        return judgements


def describe(name: str, comparisons: Sequence[Comparison]) -> str:
    """Return a response's comparisons in one line."""
    outcomes = Counter(c.outcome if c.outcome is None or c.first_id == name else 1 - c.outcome for c in comparisons)
    unread = f", {outcomes[None]} unread" if outcomes[None] else ""
    return f"won {outcomes[1.0]}, tied {outcomes[0.5]}, lost {outcomes[0.0]} of {len(comparisons)} comparisons{unread}"

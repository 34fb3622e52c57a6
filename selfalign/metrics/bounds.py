"""Whether a policy drifts or collapses: what its answers, its training and its judge are like, against bounds."""

import logging
from dataclasses import dataclass

from selfalign.core.errors import SelfalignError
from selfalign.metrics import catalog
from selfalign.store.artifacts import Counts

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class MetricBounds:
    """Bounds for every model and its training; crossing one is a warning, or ends the run. Null sets none.

    An alignment lowers log π of both responses, which is what preference losses do ("likelihood displacement",
    arXiv 2410.08847) and no harm in itself; by default it is told of where a token of the chosen responses has become
    less than e^-0.5 = 0.6 times as likely, or one of the rejected less than e^-2 = 0.14 times. A correlation of 0.7
    with length means that length explains half of the variance of the scores' ranks, or of the rewards.

    Attributes:
        max_length_growth: the most times the mean length of M1's answers.
        min_finished_share: the least share of answers that end by themselves.
        min_distinct_2: the least share of different pairs of adjoining words.
        max_repetition_4: the most share of runs of four words that stood before in the same answer.
        max_kl_to_m1: the most nats an answer by which the policy has moved away from M1.
        min_chosen_logp_change: the least change of log π of the chosen training responses in an alignment, nats a
            token; below 0, since a bound of 0 would forbid any fall.
        min_rejected_logp_change: the least change of that of the rejected ones.
        max_score_length_correlation: the highest correlation of score and length of the candidates that were trained
            on.
        max_answer_score_length_correlation: the highest correlation of score and length of the answers.
        max_reward_length_correlation: the highest correlation of implicit reward and length of the training responses.
        stop: ends the run at the first model that crosses one.
    """

    max_length_growth: float | None = 2.0
    min_finished_share: float | None = 0.2
    min_distinct_2: float | None = 0.2
    max_repetition_4: float | None = 0.3
    max_kl_to_m1: float | None = 50.0
    min_chosen_logp_change: float | None = -0.5
    min_rejected_logp_change: float | None = -2.0
    max_score_length_correlation: float | None = 0.7
    max_answer_score_length_correlation: float | None = 0.7
    max_reward_length_correlation: float | None = 0.7
    stop: bool = False

    def __post_init__(self) -> None:
        for name, _, bound, _ in self.bounds():
            change = name.endswith("_change")
            if bound is not None and not (bound <= 0 if change else bound >= 0):
                side = "less" if change else "more"
                raise SelfalignError(f"evaluate.bounds.{name} must be 0 or {side}, or null; got {bound}")

    def bounds(self) -> list[tuple[str, str, float | None, int]]:
        """(setting, metric, bound, 1 for the highest value allowed and -1 for the lowest)."""
        return [
            ("max_length_growth", catalog.EVAL_LENGTH_GROWTH.name, self.max_length_growth, 1),
            ("min_finished_share", catalog.EVAL_FINISHED_SHARE.name, self.min_finished_share, -1),
            ("min_distinct_2", catalog.EVAL_DISTINCT_2.name, self.min_distinct_2, -1),
            ("max_repetition_4", catalog.EVAL_REPEATED_4.name, self.max_repetition_4, 1),
            ("max_kl_to_m1", catalog.EVAL_KL_TO_M1.name, self.max_kl_to_m1, 1),
            ("min_chosen_logp_change", catalog.LOGPS_CHOSEN_CHANGE_PER_TOKEN.name, self.min_chosen_logp_change, -1),
            (
                "min_rejected_logp_change",
                catalog.LOGPS_REJECTED_CHANGE_PER_TOKEN.name,
                self.min_rejected_logp_change,
                -1,
            ),
            (
                "max_score_length_correlation",
                catalog.SCORE_LENGTH_CORRELATION.name,
                self.max_score_length_correlation,
                1,
            ),
            (
                "max_answer_score_length_correlation",
                catalog.EVAL_SCORE_LENGTH_CORRELATION.name,
                self.max_answer_score_length_correlation,
                1,
            ),
            (
                "max_reward_length_correlation",
                catalog.REWARDS_LENGTH_CORRELATION.name,
                self.max_reward_length_correlation,
                1,
            ),
        ]

    def among(self, *counts: Counts) -> dict[str, float]:
        """Those of several stages' counts that bounds are set for."""
        return {metric: found[metric] for _, metric, _, _ in self.bounds() for found in counts if metric in found}

    def check(self, label: str, numbers: dict[str, float]) -> dict[str, float]:
        """The numbers that are beyond their bounds, by the bound's name; each is logged as a warning.

        Args:
            label: whose numbers, for messages.
            numbers: metrics; what is missing crosses nothing.

        Raises:
            SelfalignError: there is one, and `stop` is set.
        """
        crossed: dict[str, float] = {}
        for name, metric, bound, side in self.bounds():
            value = numbers.get(metric)
            if bound is None or value is None or side * value <= side * bound:
                continue
            crossed[name] = value
            where = "above" if side > 0 else "below"
            told = f"{label}: {metric} is {value:.3g}, {where} evaluate.bounds.{name}={bound:g}"
            if self.stop:
                raise SelfalignError(f"{told}, and evaluate.bounds.stop=true ends the run there")
            logger.warning("%s", told)
        return crossed

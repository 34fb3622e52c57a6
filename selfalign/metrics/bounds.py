"""Detection of drift and collapse: metrics of responses, training and judge are compared with bounds."""

import logging
from dataclasses import dataclass

from selfalign.core.errors import SelfalignError
from selfalign.metrics import catalog
from selfalign.store.artifacts import Counts

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class MetricBounds:
    """Bounds for every model and its training. Violating one is a warning, or stops the run. null sets no bound.

    Preference losses lower log π of both responses ("likelihood displacement", arXiv 2410.08847), which is harmless by
    itself. The default warns if a token of the chosen responses becomes less than e^-0.5 = 0.6 times as likely, or one
    of the rejected responses less than e^-2 = 0.14 times. A correlation of 0.7 with length means that length explains
    half of the variance of the scores' ranks, or of the rewards.

    Attributes:
        max_length_growth: the highest mean length of responses, as a multiple of M1's.
        min_finished_share: the lowest share of responses that end by themselves.
        min_distinct_2: the lowest share of distinct word bigrams.
        max_repetition_4: the highest share of word 4-grams that occur earlier in the same response.
        max_kl_to_m1: the highest estimate of KL(π ‖ M1), in nats per response.
        min_chosen_logp_change: the lowest change of log π of the chosen training responses in an alignment, in nats per
            token. It is 0 or less; 0 forbids any fall.
        min_rejected_logp_change: the lowest such change for the rejected responses.
        max_score_length_correlation: the highest correlation of score and length of the candidates trained on.
        max_answer_score_length_correlation: the highest correlation of score and length of the evaluation responses.
        max_reward_length_correlation: the highest correlation of implicit reward and length of the training responses.
        stop: whether the run stops at the first model that violates a bound.
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
        """Return (setting, metric, bound, side); the side is 1 for an upper bound and -1 for a lower one."""
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
        """Return the counts of several stages that have a bound."""
        return {metric: found[metric] for _, metric, _, _ in self.bounds() for found in counts if metric in found}

    def check(self, label: str, numbers: dict[str, float]) -> dict[str, float]:
        """Return {bound: value} of the violated bounds. Each is logged as a warning.

        Args:
            label: the label of the model's evaluation, for messages.
            numbers: {metric: value}; a missing metric violates no bound.

        Raises:
            SelfalignError: a bound is violated, and `stop` is set.
        """
        violated: dict[str, float] = {}
        for name, metric, bound, side in self.bounds():
            value = numbers.get(metric)
            if bound is None or value is None or side * value <= side * bound:
                continue
            violated[name] = value
            where = "above" if side > 0 else "below"
            problem = f"{label}: {metric} is {value:.3g}, {where} evaluate.bounds.{name}={bound:g}"
            if self.stop:
                raise SelfalignError(f"{problem}, and evaluate.bounds.stop=true stops the run")
            logger.warning("%s", problem)
        return violated

"""Whether a policy drifts or collapses: what its answers are like, against bounds."""

import logging
from dataclasses import dataclass

from selfalign.errors import SelfalignError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Limits:
    """Bounds for the answers of every model; crossing one is a warning, or ends the run. Null sets none.

    Attributes:
        length_growth: the most times the mean length of M1's answers.
        finished_share: the least share of answers that end by themselves.
        distinct_2: the least share of different pairs of adjoining words.
        repeated_4: the most share of runs of four words that stood before in the same answer.
        kl_to_m1: the most nats an answer by which the policy has moved away from M1.
        stop: ends the run at the first model that crosses one.
    """

    length_growth: float | None = 2.0
    finished_share: float | None = 0.2
    distinct_2: float | None = 0.2
    repeated_4: float | None = 0.3
    kl_to_m1: float | None = 50.0
    stop: bool = False

    def __post_init__(self) -> None:
        for name, _, bound, _ in self.bounds():
            if bound is not None and not bound >= 0:
                raise SelfalignError(f"evaluate.limits.{name} must be 0 or more, or null; got {bound}")

    def bounds(self) -> list[tuple[str, str, float | None, int]]:
        """(setting, metric, bound, 1 for the highest value allowed and -1 for the lowest)."""
        return [
            ("length_growth", "eval/length_growth", self.length_growth, 1),
            ("finished_share", "eval/finished_share", self.finished_share, -1),
            ("distinct_2", "eval/distinct_2", self.distinct_2, -1),
            ("repeated_4", "eval/repeated_4", self.repeated_4, 1),
            ("kl_to_m1", "eval/kl_to_m1", self.kl_to_m1, 1),
        ]

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
            told = f"{label}: {metric} is {value:.3g}, {where} evaluate.limits.{name}={bound:g}"
            if self.stop:
                raise SelfalignError(f"{told}, and evaluate.limits.stop=true ends the run there")
            logger.warning("%s", told)
        return crossed

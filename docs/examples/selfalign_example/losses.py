"""A loss of one's own: robust DPO."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from selfalign.core.errors import SelfalignError
from selfalign.losses.logps import PairLogps, Values
from selfalign.losses.preference import check_beta, log_ratio_margin
from selfalign.losses.protocol import Offset


@dataclass(kw_only=True, slots=True)
class RobustDPO:
    """DPO that is unbiased under flipped pairs: [(1-ε) l(h) - ε l(-h)] / (1-2ε), where l(h) = -log σ(β h).

    Chowdhury et al. 2024, arXiv 2403.00409, eq. 8. With ε = 0 it is DPO.

    Attributes:
        beta: strength of the pull towards the reference, per nat.
        epsilon: ε, the share of pairs that are in the wrong order.
    """

    title: ClassVar[str] = "robust DPO"
    formula: ClassVar[str] = "((1−ε) l(h) − ε l(−h)) / (1−2ε), l(h) = −log σ(β h)"
    pairwise: ClassVar[bool] = True
    offset: ClassVar[Offset] = Offset.none

    beta: float = 0.1
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if not 0 <= self.epsilon < 0.5:
            raise SelfalignError(f"loss.epsilon must be at least 0 and below 0.5, got {self.epsilon}")

    def __call__(self, policy: PairLogps, reference: PairLogps, offset: Values | None = None) -> Values:
        z = self.beta * log_ratio_margin(policy, reference)
        right, wrong = -F.logsigmoid(z), -F.logsigmoid(-z)
        return ((1 - self.epsilon) * right - self.epsilon * wrong) / (1 - 2 * self.epsilon)

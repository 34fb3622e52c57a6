"""Log-probabilities of the two responses of each pair."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, "pairs"]


@dataclass(kw_only=True, slots=True)
class PairLogps:
    """Log-probabilities of both responses of each pair: nats, summed over response tokens, shape (pairs,).

    `chosen_tokens` and `rejected_tokens` count those tokens; the reduction "mean" and the term `nll_weight` need them.
    """

    chosen: Values
    rejected: Values
    chosen_tokens: Values | None = None
    rejected_tokens: Values | None = None

    def detach(self) -> "PairLogps":
        """The same numbers, without gradient."""
        return PairLogps(
            chosen=self.chosen.detach(),
            rejected=self.rejected.detach(),
            chosen_tokens=self.chosen_tokens,
            rejected_tokens=self.rejected_tokens,
        )

    def per_token(self) -> "PairLogps":
        """Each response's average log-probability a token instead of the sum.

        Raises:
            ValueError: the token counts are not there.
        """
        if self.chosen_tokens is None or self.rejected_tokens is None:
            raise ValueError("averaged log-probabilities need chosen_tokens and rejected_tokens")
        return PairLogps(chosen=self.chosen / self.chosen_tokens, rejected=self.rejected / self.rejected_tokens)

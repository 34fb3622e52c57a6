"""Log-probabilities of the two responses of each pair, and the shapes that losses take."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

Values = Float[Tensor, "pairs"]
Shares = Float[Tensor, "pairs 2"]
Labels = Bool[Tensor, "responses"]
Responses = Float[Tensor, "responses"]


@dataclass(kw_only=True, slots=True)
class PairLogps:
    """Log-probabilities of both responses of each pair.

    Attributes:
        chosen: nats, summed over the tokens of the chosen response, shape (pairs,).
        rejected: nats, summed over the tokens of the rejected response, shape (pairs,).
        chosen_tokens: numbers of these tokens, shape (pairs,). `reduction="mean"` and `nll_weight` need them.
        rejected_tokens: numbers of tokens of the rejected responses, shape (pairs,).
    """

    chosen: Values
    rejected: Values
    chosen_tokens: Values | None = None
    rejected_tokens: Values | None = None

    def detach(self) -> "PairLogps":
        """Return a copy without gradient."""
        return PairLogps(
            chosen=self.chosen.detach(),
            rejected=self.rejected.detach(),
            chosen_tokens=self.chosen_tokens,
            rejected_tokens=self.rejected_tokens,
        )

    def per_token(self) -> "PairLogps":
        """Return log-probabilities averaged over each response's tokens, in nats per token.

        Raises:
            ValueError: the token counts are missing.
        """
        if self.chosen_tokens is None or self.rejected_tokens is None:
            raise ValueError("averaged log-probabilities need chosen_tokens and rejected_tokens")
        return PairLogps(chosen=self.chosen / self.chosen_tokens, rejected=self.rejected / self.rejected_tokens)

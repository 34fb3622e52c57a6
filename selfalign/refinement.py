"""The refinement function of quality-aware self-refinement: the augmented prompt p⊕x and Δ.

Yu et al. 2024, arXiv 2405.21040, eq. 11.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from selfalign.errors import SelfalignError
from selfalign.records import Prompt

if TYPE_CHECKING:
    from selfalign.losses import PairLogps

AUGMENTATION_PROMPT = (
    "Answer the query below. On a scale from 1 to {scale}, where {scale} is the best, "
    "your answer should reach {scale} for usefulness, and it must do no harm.\n\n"
)


@dataclass(kw_only=True, slots=True)
class Refinement:
    """How the Sr losses condition the second pass.

    Attributes:
        prompt: p, put before the query x; `{scale}` in it is replaced by `scale`. Our own wording.
        scale: the top of the scale that p speaks of: 100, or 10 as the paper's ablation.
    """

    prompt: str = AUGMENTATION_PROMPT
    scale: int = 100

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise SelfalignError("loss.refinement.prompt is empty; p is what the refinement asks the policy")
        if self.scale < 1:
            raise SelfalignError(f"loss.refinement.scale must be 1 or more, got {self.scale}")

    def augment(self, prompt: Prompt) -> Prompt:
        """p⊕x: p at the start of the last user turn, or of a plain text."""
        p = self.prompt.replace("{scale}", str(self.scale))
        if isinstance(prompt, str):
            return p + prompt
        last = max(index for index, message in enumerate(prompt) if message["role"] == "user")
        turn = {**prompt[last], "content": p + prompt[last]["content"]}
        return [*prompt[:last], turn, *prompt[last + 1 :]]


def refinement(policy_p: "PairLogps", reference_p: "PairLogps", beta: float) -> Float[Tensor, "pairs"]:
    """Δ_π(y⁻, y⁺; x) = β{[log π(y⁺|p⊕x) - log π_ref(y⁺|p⊕x)] - [log π(y⁻|p⊕x) - log π_ref(y⁻|p⊕x)]} (eq. 11).

    Args:
        policy_p: summed log-probabilities under the *current* policy, given p⊕x.
        reference_p: the same under the reference.
        beta: β of the loss.

    Returns:
        Δ in units of reward, shape (pairs,), without gradient; above 0 where the policy, told to answer well,
        has moved towards the chosen response.
    """
    chosen = policy_p.chosen - reference_p.chosen
    rejected = policy_p.rejected - reference_p.rejected
    return (beta * (chosen - rejected)).detach()

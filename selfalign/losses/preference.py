"""The preference losses: pure functions of log-probabilities, one value for each pair, not reduced over pairs.

For a pair (y⁺, y⁻) of one prompt x,

    h = [log π(y⁺|x) - log π_ref(y⁺|x)] - [log π(y⁻|x) - log π_ref(y⁻|x)]        in nats, summed over tokens

and Δ is the refinement of `selfalign.losses.refinement`, without gradient. A loss declares with `offset` which other
values it needs. KTO alone takes labelled responses one by one.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfalign.core.errors import SelfalignError
from selfalign.core.iterations import check_iterations, value_at
from selfalign.losses.logps import Labels, PairLogps, Responses, Shares, Values
from selfalign.losses.protocol import Offset
from selfalign.losses.refinement import Refinement, refinement


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> Values:
    """Return h: the policy's preference for the chosen response beyond the reference's, in nats, shape (pairs,)."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def rewards(beta: float, policy: PairLogps, reference: PairLogps) -> tuple[Values, Values]:
    """Return the rewards β[log π - log π_ref] of the chosen and of the rejected responses, each of shape (pairs,)."""
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


@dataclass(kw_only=True, slots=True)
class DPO:
    """Direct preference optimisation: -log σ(β h). Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    Attributes:
        beta: strength of the pull towards the reference, per nat.
        label_smoothing: ε, the assumed share of pairs in the wrong order (conservative DPO); 0 trusts every pair. Pairs
            that have a `label_smoothing` of their own keep it.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
        reduction: "sum" takes log-probabilities of whole responses, as in the paper. "mean" averages them over tokens:
            the length-normalised DPO of Tülu 3 (arXiv 2411.15124) and OLMo, whose β is 5 per nat *per token*.
    """

    title = "DPO"
    formula = "−log σ(β h)"
    pairwise = True
    offset = Offset.none

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    reduction: str = field(default="sum", metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)
        check_nll_weight(self.nll_weight)
        check_reduction(self.reduction)

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps,
        offset: Values | None = None,
        label_smoothing: Values | None = None,
    ) -> Values:
        smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        losses = logistic(*reduced(policy, reference, self.reduction), self.beta, 0.0, smoothing)
        return losses + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class IPO:
    """Identity preference optimisation: (h - 1/(2β))². Azar et al. 2023, arXiv 2310.12036, eq. 17 with τ = β.

    Attributes:
        beta: the target margin is 1/(2β) nats.
        reduction: "sum" takes log-probabilities of whole responses, as in the paper. "mean" averages them over tokens,
            as some libraries do; the target margin is then 1/(2β) nats *per token*.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
    """

    title = "IPO"
    formula = "(h − 1/(2β))²"
    pairwise = True
    offset = Offset.none

    beta: float = 0.1
    reduction: str = "sum"
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_reduction(self.reduction)
        check_nll_weight(self.nll_weight)

    def __call__(self, policy: PairLogps, reference: PairLogps, offset: Values | None = None) -> Values:
        h = log_ratio_margin(*reduced(policy, reference, self.reduction))
        return (h - 1 / (2 * self.beta)).square() + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class SrDPO:
    """Self-refined DPO: -log σ(β h - λ ⊥[Δ]). Yu et al. 2024, arXiv 2405.21040.

    The offset raises the margin of the pairs whose chosen response the policy itself prefers if it is told to answer
    well.

    Attributes:
        beta: strength of the pull towards the reference, per nat.
        lam: λ, the weight of the refinement; 0 is DPO. A list has one λ for each iteration.
        refinement: where Δ comes from.
        label_smoothing: ε, the assumed share of pairs in the wrong order; 0 trusts every pair. Pairs that have a
            `label_smoothing` of their own keep it.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
        reduction: "sum" or "mean" of log-probabilities over a response's tokens, in h and in Δ, as in Sr-IPO.
        lam_warmup: share of an alignment's steps over which λ rises linearly from 0 at the first one; 0 has no rise.
    """

    title = "Sr-DPO"
    formula = "−log σ(β h − λ ⊥Δ)"
    pairwise = True
    offset = Offset.refinement

    beta: float = 0.1
    lam: Any = 0.5
    refinement: Refinement = field(default_factory=Refinement)
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    reduction: str = field(default="sum", metadata={"keyed": "if set"})
    lam_warmup: float = field(default=0.0, metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        check_beta(self.beta)
        self.lam = checked_lam(self.lam)
        check_warmup(self.lam_warmup)
        check_label_smoothing(self.label_smoothing)
        check_nll_weight(self.nll_weight)
        check_reduction(self.reduction)

    def check_iterations(self, iterations: int) -> None:
        """Check that every iteration has its λ."""
        check_iterations("loss.lam", self.lam, iterations)

    def at(self, iteration: int) -> "SrDPO":
        """Return the loss of one iteration, counted from 1."""
        return replace(self, lam=value_at(self.lam, iteration))

    def during(self, share: float) -> "SrDPO":
        """Return the loss of a step, before which this share of the alignment's steps was done."""
        return replace(self, lam=self.lam * min(1.0, share / self.lam_warmup)) if self.lam_warmup else self

    def delta(self, policy_p: PairLogps, reference_p: PairLogps) -> Values:
        """Return Δ, shape (pairs,), with the reduction of h: eq. 11 for arguments given p⊕x, eq. 10 for those given x.

        It is in units of reward, of reward per token if the reduction is "mean".
        """
        return refinement(*reduced(policy_p, reference_p, self.reduction), self.beta)

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps,
        refinement: Values | None = None,
        label_smoothing: Values | None = None,
    ) -> Values:
        offset = self.lam * required(refinement).detach()
        smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        losses = logistic(*reduced(policy, reference, self.reduction), self.beta, offset, smoothing)
        return losses + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class SrIPO:
    """Self-refined IPO: (h - λ ⊥[Δ] - 1/(2β))². Yu et al. 2024, arXiv 2405.21040.

    Differs from the paper: `lambda_scale="derived"` divides the refinement by β. This follows from maximising the
    paper's objective (its eq. 13). "paper" is the formula that the paper prints.

    Attributes:
        beta: the target margin is 1/(2β) nats plus the refinement.
        lam: λ, the weight of the refinement; 0 is IPO. A list has one λ for each iteration.
        reduction: "sum" or "mean" of log-probabilities over a response's tokens, in h and in Δ. With "mean", Δ is in
            units of reward per token, and the target does not depend on length.
        lambda_scale: "paper" (λΔ) or "derived" (λΔ/β).
        refinement: where Δ comes from.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
        lam_warmup: share of an alignment's steps over which λ rises linearly from 0 at the first one; 0 has no rise.
    """

    title = "Sr-IPO"
    pairwise = True
    offset = Offset.refinement

    beta: float = 0.1
    lam: Any = 0.5
    reduction: str = "sum"
    lambda_scale: str = "paper"
    refinement: Refinement = field(default_factory=Refinement)
    nll_weight: float = 0.0
    lam_warmup: float = field(default=0.0, metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        check_beta(self.beta)
        self.lam = checked_lam(self.lam)
        check_warmup(self.lam_warmup)
        check_reduction(self.reduction)
        check_choice("loss.lambda_scale", self.lambda_scale, ("paper", "derived"))
        check_nll_weight(self.nll_weight)

    @property
    def formula(self) -> str:
        """The formula, with the weight of Δ by `lambda_scale`."""
        return "(h − (λ/β) ⊥Δ − 1/(2β))²" if self.lambda_scale == "derived" else "(h − λ ⊥Δ − 1/(2β))²"

    def check_iterations(self, iterations: int) -> None:
        """Check that every iteration has its λ."""
        check_iterations("loss.lam", self.lam, iterations)

    def at(self, iteration: int) -> "SrIPO":
        """Return the loss of one iteration, counted from 1."""
        return replace(self, lam=value_at(self.lam, iteration))

    def during(self, share: float) -> "SrIPO":
        """Return the loss of a step, before which this share of the alignment's steps was done."""
        return replace(self, lam=self.lam * min(1.0, share / self.lam_warmup)) if self.lam_warmup else self

    def delta(self, policy_p: PairLogps, reference_p: PairLogps) -> Values:
        """Return Δ, shape (pairs,), with the reduction of h. The arguments are given p⊕x, or x for Δ_naive."""
        return refinement(*reduced(policy_p, reference_p, self.reduction), self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps, refinement: Values | None = None) -> Values:
        h = log_ratio_margin(*reduced(policy, reference, self.reduction))
        weight = self.lam / self.beta if self.lambda_scale == "derived" else self.lam
        target = weight * required(refinement).detach() + 1 / (2 * self.beta)
        return (h - target).square() + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class ODPO:
    """DPO with an offset from the judge: -log σ(β h - α log(s⁺ - s⁻)). Amini et al. 2024, arXiv 2402.10571.

    s are the judge's mean scores of the two responses. Sr-DPO is ODPO with the offset λ ⊥[Δ].

    Attributes:
        beta: strength of the pull towards the reference, per nat.
        alpha: α, the weight of the offset; 0 is DPO.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
    """

    title = "ODPO"
    formula = "−log σ(β h − α log(s⁺ − s⁻))"
    pairwise = True
    offset = Offset.score_gap

    beta: float = 0.1
    alpha: float = 1.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_alpha(self.alpha)
        check_nll_weight(self.nll_weight)

    def __call__(self, policy: PairLogps, reference: PairLogps, score_gap: Values | None = None) -> Values:
        offset = self.alpha * required(score_gap).log()
        return logistic(policy, reference, self.beta, offset) + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class SimPO:
    """Simple preference optimisation: -log σ(β log π(y⁺|x) / n⁺ - β log π(y⁻|x) / n⁻ - γ), n being numbers of tokens.

    Meng et al. 2024, arXiv 2405.14734, eq. 6. It is length-normalised DPO with a constant offset, against a reference
    that gives all responses the same probability. The run's reference policy takes no part in the loss; rewards, their
    metrics and the check of the first step are those of the other losses, so it is still asked for its
    log-probabilities.

    Attributes:
        beta: scale of the log-probability per token, per nat.
        gamma: γ, the margin that the chosen response is to be ahead by; the paper's γ/β is 0.1 to 0.8.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
    """

    title = "SimPO"
    formula = "−log σ(β log π(y⁺|x)/|y⁺| − β log π(y⁻|x)/|y⁻| − γ)"
    pairwise = True
    offset = Offset.none

    beta: float = 2.0
    gamma: float = 1.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_gamma(self.gamma)
        check_nll_weight(self.nll_weight)

    def __call__(self, policy: PairLogps, reference: PairLogps, offset: Values | None = None) -> Values:
        losses = logistic(policy.per_token(), uniform(policy), self.beta, self.gamma)
        return losses + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class AlphaDPO:
    """SimPO with a margin for each pair: -log σ(β log π(y⁺|x) / n⁺ - β log π(y⁻|x) / n⁻ - ⊥[γ + α z]).

    Wu et al. 2024, arXiv 2410.10148. z is the z-score of Δ_naive = β h, averaged over tokens, among the pairs of the
    optimizer step: pairs that the policy already tells apart more clearly than its reference are to be told apart
    still more. Sr-DPO with `refinement.source=naive` and `refinement.normalise=zscore` has the same offset, under the
    margin of DPO.

    Differs from the paper: mean and deviation are those of the step, not running ones, so that a continued training
    needs no more than its weights. The authors' program multiplies α z and γ by β, too.

    Attributes:
        beta: scale of the log-probability per token, per nat.
        gamma: γ, the margin that a chosen response is to be ahead by on average.
        alpha: α, the weight of the z-score; 0 is SimPO.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
    """

    title = "α-DPO"
    formula = "−log σ(β log π(y⁺|x)/|y⁺| − β log π(y⁻|x)/|y⁻| − ⊥[γ + α z(β h)])"
    pairwise = True
    offset = Offset.refinement

    beta: float = 2.5
    gamma: float = 1.5
    alpha: float = 0.2
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_gamma(self.gamma)
        check_alpha(self.alpha)
        check_nll_weight(self.nll_weight)

    @property
    def refinement(self) -> Refinement:
        """Δ_naive, as its z-score in a step."""
        return Refinement(source="naive", normalise="zscore")

    def delta(self, policy_p: PairLogps, reference_p: PairLogps) -> Values:
        """Return Δ_naive in units of reward per token, shape (pairs,), for arguments given x."""
        return refinement(*reduced(policy_p, reference_p, "mean"), self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps, z: Values | None = None) -> Values:
        offset = self.gamma + self.alpha * required(z).detach()
        return logistic(policy.per_token(), uniform(policy), self.beta, offset) + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class SPPO:
    """Self-play preference optimisation: (r⁺ - η(P̂⁺ - ½))² + (r⁻ - η(P̂⁻ - ½))² with r = log π(y|x)/π_ref(y|x).

    Wu et al. 2024, arXiv 2405.00675, Algorithm 1, summed over the two responses of a pair. P̂ is the estimated
    probability that a response wins against one of the policy that wrote it: the judge's score, which must be a share
    of wins from 0 to 1, such as that of `judge=pairwise judge.max_score=1`.

    Attributes:
        beta: 1/η, by which rewards are measured; the paper's η is 1000.
        nll_weight: weight of the chosen response's negative log-likelihood per token, which is added to the loss.
    """

    title = "SPPO"
    formula = "(log π/π_ref(y⁺|x) − (P̂⁺ − ½)/β)² + (log π/π_ref(y⁻|x) − (P̂⁻ − ½)/β)²"
    pairwise = True
    offset = Offset.win_shares

    beta: float = 0.001
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_nll_weight(self.nll_weight)

    def __call__(self, policy: PairLogps, reference: PairLogps, win_shares: Shares | None = None) -> Values:
        chosen, rejected = ((required(win_shares) - 0.5) / self.beta).unbind(1)
        losses = (policy.chosen - reference.chosen - chosen).square()
        losses = losses + (policy.rejected - reference.rejected - rejected).square()
        return losses + weighted_nll(policy, self.nll_weight)


@dataclass(kw_only=True, slots=True)
class KTO:
    """Kahneman-Tversky optimisation of single responses, desirable or not: λ_D σ(-β(r - z₀)) or λ_U σ(-β(z₀ - r)).

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8: λ_y - v with v = λ_D σ(β(r - z₀)) for desirable responses and
    λ_U σ(β(z₀ - r)) for undesirable ones. r is log π(y|x)/π_ref(y|x) of the whole response. z₀ estimates the KL
    divergence of the policy from its reference, in nats: the mean of r over responses to other prompts in an optimizer
    step, or 0 if that is below 0.

    Attributes:
        beta: strength of the pull towards the reference, per nat.
        desirable_weight: λ_D, the weight of desirable responses.
        undesirable_weight: λ_U, the weight of undesirable responses.
    """

    title = "KTO"
    formula = "λ_D σ(−β(r − z₀)) if y is desirable, λ_U σ(−β(z₀ − r)) if not, r = log π/π_ref(y|x)"
    pairwise = False
    offset = Offset.none

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_weight("loss.desirable_weight", self.desirable_weight)
        check_weight("loss.undesirable_weight", self.undesirable_weight)

    def __call__(self, policy: Responses, reference: Responses, desirable: Labels, baseline: float) -> Responses:
        gain = self.beta * (policy - reference - baseline)
        return torch.where(
            desirable,
            self.desirable_weight * torch.sigmoid(-gain),
            self.undesirable_weight * torch.sigmoid(gain),
        )


@dataclass(kw_only=True, slots=True)
class PositiveSFT:
    """No preference loss: SFT on the good responses alone (arXiv 2401.10020, "positives only" variant).

    The loss is the negative log-likelihood per token of the responses that `pair=positives` keeps, or of the chosen
    responses of given pairs.

    Attributes:
        init: "previous" trains the current model on them. "base", as in the paper, trains M0 on M1's demonstrations and
            them.
    """

    title = "Positives"
    formula = "−log π(y⁺|x) a token, no rejected responses"
    pairwise = False
    offset = Offset.none

    init: str = "previous"

    def __post_init__(self) -> None:
        if self.init not in ("previous", "base"):
            raise SelfalignError(f"loss.init must be previous or base; got {self.init!r}")


def logistic(
    policy: PairLogps, reference: PairLogps, beta: float, offset: Values | float, label_smoothing: Values | float = 0.0
) -> Values:
    """Return -log σ(z) with z = β h - offset, shape (pairs,). DPO has offset 0; others have their own.

    With smoothing ε, one for all pairs or one for each, it is the expectation over right and wrong labels,
    -(1-ε) log σ(z) - ε log σ(-z): Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    """
    logits = beta * log_ratio_margin(policy, reference) - offset
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def weighted_nll(policy: PairLogps, weight: float) -> Values | float:
    """Return -log π(y⁺|x) per token of y⁺, times a weight (iterative RPO: Pang et al. 2024, arXiv 2404.19733)."""
    return -weight * policy.per_token().chosen if weight else 0.0


def reduced(policy: PairLogps, reference: PairLogps, reduction: str) -> tuple[PairLogps, PairLogps]:
    """Return both models' log-probabilities: unchanged for "sum", averaged over each response's tokens for "mean"."""
    if reduction == "sum":
        return policy, reference
    averaged = PairLogps(
        chosen=reference.chosen,
        rejected=reference.rejected,
        chosen_tokens=policy.chosen_tokens,
        rejected_tokens=policy.rejected_tokens,
    )
    return policy.per_token(), averaged.per_token()


def uniform(policy: PairLogps) -> PairLogps:
    """Return the log-probabilities, 0, of a reference that prefers no response: h is then log π(y⁺|x) - log π(y⁻|x)."""
    return PairLogps(chosen=torch.zeros_like(policy.chosen), rejected=torch.zeros_like(policy.rejected))


def required(offset: Tensor | None) -> Tensor:
    """Return the offset.

    Raises:
        ValueError: it is None, although the loss declares one.
    """
    if offset is None:
        raise ValueError(
            "Sr-DPO, Sr-IPO and α-DPO need the refinement Δ, ODPO the score gap, shape (pairs,); SPPO the win shares"
        )
    return offset


def check_beta(beta: float) -> None:
    """Check that β is positive and finite, because the losses divide by it."""
    if not 0 < beta < math.inf:
        raise SelfalignError(f"loss.beta must be above 0 and finite, got {beta}")


def checked_lam(lam: Any) -> Any:
    """Return λ as a float, or the λs of the iterations as floats.

    Raises:
        SelfalignError: one is no number, below 0 or not finite. 0 switches the offset off; a negative λ would reverse
            the method.
    """
    if isinstance(lam, list) and lam and not any(isinstance(one, list) for one in lam):
        return list(map(checked_lam, lam))
    if isinstance(lam, bool) or not isinstance(lam, int | float) or not 0 <= lam < math.inf:
        raise SelfalignError(f"loss.lam must be 0 or more and finite, got {lam!r}: a number, or one for each iteration")
    return float(lam)


def check_warmup(share: float) -> None:
    """Check that the warm-up of λ is a share of the steps."""
    if not 0 <= share <= 1:
        raise SelfalignError(f"loss.lam_warmup must be a share of the steps from 0 to 1, got {share}")


def check_gamma(gamma: float) -> None:
    """Check that the target margin γ is 0 or more and finite."""
    if not 0 <= gamma < math.inf:
        raise SelfalignError(f"loss.gamma must be 0 or more and finite, got {gamma}")


def check_alpha(alpha: float) -> None:
    """Check that the weight α of an offset is 0 or more and finite."""
    if not 0 <= alpha < math.inf:
        raise SelfalignError(f"loss.alpha must be 0 or more and finite, got {alpha}")


def check_weight(key: str, weight: float) -> None:
    """Check that the weight of one kind of responses is above 0 and finite."""
    if not 0 < weight < math.inf:
        raise SelfalignError(f"{key} must be above 0 and finite, got {weight}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Check that ε, a share of wrong labels, is below one half, where labels would mean nothing."""
    if not 0 <= label_smoothing < 0.5:
        raise SelfalignError(f"loss.label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")


def check_nll_weight(weight: float) -> None:
    """Check that the weight is 0 or more. A negative weight would lower the chosen response's probability."""
    if not 0 <= weight < math.inf:
        raise SelfalignError(f"loss.nll_weight must be 0 or more and finite, got {weight}")


def check_reduction(reduction: str) -> None:
    """Check that log-probabilities are summed or averaged."""
    check_choice("loss.reduction", reduction, ("sum", "mean"))


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a setting has one of its choices."""
    if value not in choices:
        raise SelfalignError(f"{key} must be one of {', '.join(choices)}; got {value!r}")

"""The losses against arithmetic done by hand, an independent float64 formulation, symmetries and limits.

The checks in `CHECKS` take the modules they check, so that `test_loss_mutants.py` can hand them broken ones.

One case runs through all of them, with β = 0.2 and λ = 0.5:

    pair   log π(y⁺)  log π_ref(y⁺)  log π(y⁻)  log π_ref(y⁻)   h                            Δ
    1      -10        -11            -12        -11.5           (1) - (-0.5)   =  1.5         0.4
    2      -20        -18.5          -18        -18.5           (-1.5) - (0.5) = -2          -0.6
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from selfalign.core.errors import SelfalignError
from selfalign.losses import preference, refinement
from selfalign.losses.logps import PairLogps
from selfalign.losses.protocol import Offset
from selfalign.store.key import to_key_json

BETA, LAM = 0.2, 0.5
SR = {"beta": BETA, "lam": LAM}


def case(module: Any) -> tuple[Any, Any]:
    """Policy, as leaves of the graph, and reference of the case above."""
    policy = module.PairLogps(
        chosen=torch.tensor([-10.0, -20.0], requires_grad=True),
        rejected=torch.tensor([-12.0, -18.0], requires_grad=True),
        chosen_tokens=torch.tensor([2.0, 5.0]),
        rejected_tokens=torch.tensor([4.0, 1.0]),
    )
    reference = module.PairLogps(chosen=torch.tensor([-11.0, -18.5]), rejected=torch.tensor([-11.5, -18.5]))
    return policy, reference


def expect(actual: Tensor | None, expected: list[float]) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def check_loss(
    module: Any, loss: Any, values: list[float], chosen: list[float], rejected: list[float], delta: Tensor | None = None
) -> None:
    """Compares the values and the gradients of both responses' log-probabilities with numbers worked by hand."""
    policy, reference = case(module)
    result = loss(policy, reference, delta)
    expect(result, values)
    assert result.requires_grad, "the loss has no gradient"
    result.sum().backward()
    expect(policy.chosen.grad, chosen)
    expect(policy.rejected.grad, rejected)


def check_dpo(module: Any, _: Any) -> None:
    # β h = 0.3 and -0.4; loss = ln(1 + e^-βh) = ln 1.740818 and ln 2.491825.
    # d loss / d log π(y⁺) = -β σ(-βh) = -0.2 · 0.425557 and -0.2 · 0.598688; the opposite for y⁻.
    gradient = [0.0851115, 0.1197375]
    check_loss(module, module.DPO(beta=BETA), [0.5543552, 0.9130153], [-g for g in gradient], gradient)


def check_dpo_mean(module: Any, _: Any) -> None:
    # h a token is 0.625 and -0.8 (see below), so β h = 0.125 and -0.16; loss = ln(1 + e^-βh).
    # Slopes -0.2 · 0.468791 and -0.2 · 0.539915, divided by the tokens: y⁺ 2 and 5, y⁻ 4 and 1.
    loss = module.DPO(beta=BETA, reduction="mean")
    check_loss(module, loss, [0.6325992, 0.7763439], [-0.0468791, -0.0215966], [0.0234395, 0.1079829])


def check_ipo(module: Any, _: Any) -> None:
    # 1/(2β) = 2.5: (1.5 - 2.5)² = 1 and (-2 - 2.5)² = 20.25; slopes 2(h - 2.5) = -2 and -9.
    check_loss(module, module.IPO(beta=BETA), [1.0, 20.25], [-2.0, -9.0], [2.0, 9.0])


def check_ipo_mean(module: Any, _: Any) -> None:
    # A token: y⁺ -5 and -4 against -5.5 and -3.7; y⁻ -3 and -18 against -2.875 and -18.5.
    # h = 0.5 + 0.125 = 0.625 and -0.3 - 0.5 = -0.8; losses (-1.875)² and (-3.3)².
    # Slopes -3.75 and -6.6, divided by the tokens: y⁺ 2 and 5, y⁻ 4 and 1.
    loss = module.IPO(beta=BETA, reduction="mean")
    check_loss(module, loss, [3.515625, 10.89], [-1.875, -1.32], [0.9375, 6.6])


def check_sr_dpo(module: Any, _: Any) -> None:
    # βh - λΔ = 0.3 - 0.2 = 0.1 and -0.4 + 0.3 = -0.1; loss = ln(1 + e^-0.1) and ln(1 + e^0.1).
    # Slopes -β σ(-0.1) = -0.2 · 0.475021 and -β σ(0.1) = -0.2 · 0.524979.
    delta = torch.tensor([0.4, -0.6], requires_grad=True)
    gradient = [0.0950042, 0.1049958]
    check_loss(module, module.SrDPO(**SR), [0.6443967, 0.7443967], [-g for g in gradient], gradient, delta)
    assert delta.grad is None, "Δ has a gradient"


def check_sr_dpo_mean(module: Any, _: Any) -> None:
    # β h - λΔ = 0.125 - 0.2 and -0.16 + 0.3, with h a token a token; loss = ln(1 + e^0.075), ln(1 + e^-0.14).
    # Slopes -0.2 · 0.518741 and -0.2 · 0.465057, divided by the tokens.
    loss = module.SrDPO(reduction="mean", **SR)
    delta = torch.tensor([0.4, -0.6])
    check_loss(module, loss, [0.7313502, 0.6255952], [-0.0518741, -0.0186023], [0.0259371, 0.0930114], delta)


def check_sr_ipo_printed(module: Any, _: Any) -> None:
    # h - λΔ - 2.5 = 1.5 - 0.2 - 2.5 = -1.2 and -2 + 0.3 - 2.5 = -4.2; squares 1.44 and 17.64.
    delta = torch.tensor([0.4, -0.6], requires_grad=True)
    check_loss(module, module.SrIPO(**SR), [1.44, 17.64], [-2.4, -8.4], [2.4, 8.4], delta)
    assert delta.grad is None, "Δ has a gradient"


def check_sr_ipo_exact(module: Any, _: Any) -> None:
    # λ/β = 2.5: 1.5 - 1 - 2.5 = -2 and -2 + 1.5 - 2.5 = -3; squares 4 and 9.
    delta = torch.tensor([0.4, -0.6], requires_grad=True)
    check_loss(module, module.SrIPO(lambda_scale="derived", **SR), [4.0, 9.0], [-4.0, -6.0], [4.0, 6.0], delta)
    assert delta.grad is None, "Δ has a gradient"


def check_sr_ipo_mean(module: Any, _: Any) -> None:
    # h and Δ a token: 0.625 - 0.2 - 2.5 = -2.075 and -0.8 + 0.3 - 2.5 = -3.
    # Slopes -4.15 and -6, divided by the tokens: y⁺ 2 and 5, y⁻ 4 and 1.
    loss = module.SrIPO(reduction="mean", **SR)
    delta = torch.tensor([0.4, -0.6])
    check_loss(module, loss, [4.305625, 9.0], [-2.075, -1.2], [1.0375, 6.0], delta)


def check_odpo(module: Any, _: Any) -> None:
    # As Sr-DPO with α for λ and log(s⁺ - s⁻) for Δ: s⁺ - s⁻ is e^0.4 and e^-0.6.
    gaps = torch.tensor([1.4918247, 0.5488116])
    gradient = [0.0950042, 0.1049958]
    loss = module.ODPO(beta=BETA, alpha=LAM)
    check_loss(module, loss, [0.6443967, 0.7443967], [-g for g in gradient], gradient, gaps)


def check_simpo(module: Any, _: Any) -> None:
    # A token: y⁺ -10/2 = -5 and -20/5 = -4; y⁻ -12/4 = -3 and -18. z = β(-2) - 0.3 = -0.7 and β(14) - 0.3 = 2.5.
    # loss = ln(1 + e^0.7) and ln(1 + e^-2.5); slopes -0.2 · 0.668188 and -0.2 · 0.075858, divided by the tokens.
    # The reference is not in it.
    loss = module.SimPO(beta=BETA, gamma=0.3)
    check_loss(module, loss, [1.1031861, 0.0788889], [-0.0668188, -0.0030343], [0.0334094, 0.0151716])


def check_alpha_dpo(module: Any, _: Any) -> None:
    # z-scores of 0.4 and -0.6: γ + α z = 0.5 and 0. β(-2) - 0.5 = -0.9 and β(14) - 0 = 2.8, as in SimPO.
    # loss = ln(1 + e^0.9) and ln(1 + e^-2.8); slopes -0.2 · 0.710950 and -0.2 · 0.057324, divided by the tokens.
    z = torch.tensor([0.4, -0.6], requires_grad=True)
    loss = module.AlphaDPO(beta=BETA, gamma=0.3, alpha=LAM)
    check_loss(module, loss, [1.2411539, 0.0590330], [-0.0710950, -0.0022930], [0.0355475, 0.0114648], z)
    assert z.grad is None, "z has a gradient"


def check_sppo(module: Any, _: Any) -> None:
    # P̂ = ¾ and ½ in pair 1, 1 and ¼ in pair 2; over β = 0.2, targets 1.25 and 0, 2.5 and -1.25.
    # r⁺ = 1 and -1.5, r⁻ = -0.5 and 0.5: (-0.25)² + (-0.5)² and (-4)² + (1.75)²; slopes twice what is squared.
    shares = torch.tensor([[0.75, 0.5], [1.0, 0.25]])
    loss = module.SPPO(beta=BETA)
    check_loss(module, loss, [0.3125, 19.0625], [-0.5, -8.0], [-1.0, 3.5], shares)


def check_kto(module: Any, _: Any) -> None:
    # r = 1, desirable, and -1.5, undesirable; z₀ = 0.5. β(r - z₀) = 0.1 and -0.4.
    # loss = 2 σ(-0.1) and 1.5 σ(-0.4); slopes -2 β σ(0.1) σ(-0.1) and 1.5 β σ(0.4) σ(-0.4).
    policy, reference = case(module)
    loss = module.KTO(beta=BETA, desirable_weight=2.0, undesirable_weight=1.5)
    result = loss(policy.chosen, reference.chosen, torch.tensor([True, False]), 0.5)
    expect(result, [0.9500416, 0.6019685])
    assert result.requires_grad, "the loss has no gradient"
    result.sum().backward()
    expect(policy.chosen.grad, [-0.0997504, 0.0720782])


def check_label_smoothing(module: Any, _: Any) -> None:
    # -(1-ε) log σ(z) - ε log σ(-z) = -log σ(z) + ε z, with slope -σ(-z) + ε.
    # DPO: z = 0.3 and -0.4; 0.554355 + 0.03 and 0.913015 - 0.04; slopes -0.325557 and -0.498688, times β.
    dpo = [0.0651114, 0.0997376]
    loss = module.DPO(beta=BETA, label_smoothing=0.1)
    check_loss(module, loss, [0.5843552, 0.8730153], [-g for g in dpo], dpo)
    # Sr-DPO: z = 0.1 and -0.1; 0.644397 + 0.01 and 0.744397 - 0.01; slopes -0.375021 and -0.424979.
    sr_dpo = [0.0750042, 0.0849958]
    loss = module.SrDPO(label_smoothing=0.1, **SR)
    check_loss(module, loss, [0.6543967, 0.7343967], [-g for g in sr_dpo], sr_dpo, torch.tensor([0.4, -0.6]))


def check_label_smoothing_of_each_pair(module: Any, _: Any) -> None:
    # ε = 0 and 0.9 in place of the loss's 0.1: -log σ(z) + ε z, with slope -σ(-z) + ε, times β.
    # DPO: z = 0.3 and -0.4: 0.554355 and 0.913015 - 0.36; slopes -0.425557 and 0.301312.
    each = torch.tensor([0.0, 0.9])
    dpo = [-0.0851115, 0.0602625]
    loss = module.DPO(beta=BETA, label_smoothing=0.1)
    check_loss(module, partial(loss, label_smoothing=each), [0.5543552, 0.5530153], dpo, [-g for g in dpo])
    # Sr-DPO: z = 0.1 and -0.1: 0.644397 and 0.744397 - 0.09; slopes -0.475021 and 0.375021.
    sr_dpo = [-0.0950042, 0.0750042]
    loss = partial(module.SrDPO(label_smoothing=0.1, **SR), label_smoothing=each)
    check_loss(module, loss, [0.6443967, 0.6543967], sr_dpo, [-g for g in sr_dpo], torch.tensor([0.4, -0.6]))


def check_nll(module: Any, _: Any) -> None:
    # A token of y⁺: 10/2 = 5 and 20/5 = 4 nats; times 0.3 they add 1.5 and 1.2, with slopes -0.3/2 and -0.3/5.
    rejected = [0.0851115, 0.1197375]
    loss = module.DPO(beta=BETA, nll_weight=0.3)
    check_loss(module, loss, [2.0543552, 2.1130153], [-0.2351115, -0.1797375], rejected)


def check_missing_delta(module: Any, _: Any) -> None:
    for loss in (module.SrDPO(), module.SrIPO(), module.AlphaDPO(), module.ODPO(), module.SPPO()):
        with pytest.raises(ValueError, match="need the refinement Δ"):
            loss(*case(module))


def check_refinement(module: Any, refinement_module: Any) -> None:
    # Pair 1: (-9 + 10) - (-13 + 12) = 2; pair 2: (-21 + 20) - (-19 + 21) = -3; times β: the Δ of the case.
    policy_p = module.PairLogps(
        chosen=torch.tensor([-9.0, -21.0], requires_grad=True), rejected=torch.tensor([-13.0, -19.0])
    )
    reference_p = module.PairLogps(chosen=torch.tensor([-10.0, -20.0]), rejected=torch.tensor([-12.0, -21.0]))
    delta = refinement_module.refinement(policy_p, reference_p, BETA)
    expect(delta, [0.4, -0.6])
    assert not delta.requires_grad, "Δ has a gradient"


def check_reduction_of_delta(module: Any, _: Any) -> None:
    # Given p⊕x, tokens as in the case. Summed: 1 + 1 = 2 and -1 - 2 = -3, times β. A token: y⁺ 1/2 and -1/5, y⁻ -1/4
    # and 2/1, so 0.75 and -2.2, times β.
    policy_p = module.PairLogps(
        chosen=torch.tensor([-9.0, -21.0], requires_grad=True),
        rejected=torch.tensor([-13.0, -19.0]),
        chosen_tokens=torch.tensor([2.0, 5.0]),
        rejected_tokens=torch.tensor([4.0, 1.0]),
    )
    reference_p = module.PairLogps(chosen=torch.tensor([-10.0, -20.0]), rejected=torch.tensor([-12.0, -21.0]))
    for loss in (module.SrDPO(**SR), module.SrIPO(**SR), module.SrIPO(lambda_scale="derived", **SR)):
        expect(loss.delta(policy_p, reference_p), [0.4, -0.6])
    averaged = (
        module.SrDPO(reduction="mean", **SR),
        module.AlphaDPO(beta=BETA),
        *(module.SrIPO(reduction="mean", lambda_scale=target, **SR) for target in ("paper", "derived")),
    )
    for loss in averaged:
        delta = loss.delta(policy_p, reference_p)
        expect(delta, [0.15, -0.44])
        assert not delta.requires_grad, "Δ has a gradient"


def check_augmented_prompt(_: Any, refinement_module: Any) -> None:
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")]
    expected = {
        "dialogue": ["S", "Reach 10. A", "B", "C", "D"],
        "last_turn": ["S", "A", "B", "Reach 10. C", "D"],
        "after": ["S", "A", "B", "C\n\nReach 10.", "D"],
        "system": ["Reach 10. S", "A", "B", "C", "D"],
    }
    for place, contents in expected.items():
        p = refinement_module.Refinement(prompt="Reach {scale}. ", scale=10, place=place).text(None)
        augmented = refinement_module.augment(p, [{"role": role, "content": content} for role, content in turns])
        assert [turn["content"] for turn in augmented] == contents
        assert [turn["role"] for turn in augmented] == [role for role, _ in turns]
        if place in ("dialogue", "last_turn"):
            assert refinement_module.augment(p, "Why?") == "Reach 10. Why?"
        contrast = refinement_module.Refinement(
            prompt="Reach {scale}. ", negative_prompt="Miss {scale}.", scale=10, place=place, source="contrastive"
        )
        assert contrast.negative() == refinement_module.Augmentation("Miss 10.", place)


Check = Callable[[Any, Any], None]
CHECKS: list[Check] = [
    check_dpo,
    check_dpo_mean,
    check_ipo,
    check_ipo_mean,
    check_sr_dpo,
    check_sr_dpo_mean,
    check_sr_ipo_printed,
    check_sr_ipo_exact,
    check_sr_ipo_mean,
    check_odpo,
    check_simpo,
    check_alpha_dpo,
    check_sppo,
    check_kto,
    check_label_smoothing,
    check_label_smoothing_of_each_pair,
    check_nll,
    check_missing_delta,
    check_refinement,
    check_reduction_of_delta,
    check_augmented_prompt,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_worked_by_hand(check: Check) -> None:
    check(preference, refinement)


# Independent formulations in float64: the log-ratio is grouped by model, not by response, σ is written out, and the
# square is multiplied out.


def dpo_64(policy: list[Tensor], reference: list[Tensor], delta: Tensor, tokens: list[Tensor]) -> Tensor:
    advantage = (policy[0] - policy[1]) - (reference[0] - reference[1])
    return torch.log1p(torch.exp(-0.3 * advantage))


def sr_dpo_64(policy: list[Tensor], reference: list[Tensor], delta: Tensor, tokens: list[Tensor]) -> Tensor:
    advantage = (policy[0] - policy[1]) - (reference[0] - reference[1])
    return torch.log1p(torch.exp(0.7 * delta - 0.3 * advantage))


def squared_64(advantage: Tensor, target: Tensor | float) -> Tensor:
    return advantage * advantage - 2 * advantage * target + target * target


def ipo_64(policy: list[Tensor], reference: list[Tensor], delta: Tensor, tokens: list[Tensor]) -> Tensor:
    return squared_64((policy[0] - policy[1]) - (reference[0] - reference[1]), 0.5 / 0.3)


def ipo_mean_64(policy: list[Tensor], reference: list[Tensor], delta: Tensor, tokens: list[Tensor]) -> Tensor:
    (chosen, rejected), (ref_chosen, ref_rejected) = policy, reference
    return squared_64((chosen - ref_chosen) / tokens[0] - (rejected - ref_rejected) / tokens[1], 0.5 / 0.3)


def sr_ipo_64(policy: list[Tensor], reference: list[Tensor], delta: Tensor, tokens: list[Tensor]) -> Tensor:
    return squared_64((policy[0] - policy[1]) - (reference[0] - reference[1]), 0.5 / 0.3 + 0.7 * delta)


def sr_ipo_exact_64(policy: list[Tensor], reference: list[Tensor], delta: Tensor, tokens: list[Tensor]) -> Tensor:
    return squared_64((policy[0] - policy[1]) - (reference[0] - reference[1]), (0.5 + 0.7 * delta) / 0.3)


GRADCHECKED = [
    preference.DPO(),
    preference.DPO(reduction="mean", label_smoothing=0.1, nll_weight=0.3),
    preference.SrDPO(reduction="mean"),
    preference.SimPO(nll_weight=0.3),
    preference.AlphaDPO(),
    preference.SPPO(beta=0.2),
]


@pytest.mark.parametrize("loss", GRADCHECKED, ids=repr)
def test_gradients_are_those_of_finite_differences(loss: Any) -> None:
    """In float64, at the case above; the offset takes no gradient."""
    given, reference = case(preference)
    counts = {"chosen_tokens": given.chosen_tokens.double(), "rejected_tokens": given.rejected_tokens.double()}
    reference = PairLogps(chosen=reference.chosen.double(), rejected=reference.rejected.double())
    offset = torch.tensor([0.4, 0.6], dtype=torch.float64)
    if loss.offset is Offset.win_shares:
        offset = torch.tensor([[0.75, 0.5], [1.0, 0.25]], dtype=torch.float64)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(PairLogps(chosen=chosen, rejected=rejected, **counts), reference, offset)

    leaves = tuple(side.detach().double().requires_grad_() for side in (given.chosen, given.rejected))
    assert torch.autograd.gradcheck(losses, leaves)


def test_gradients_of_kto_are_those_of_finite_differences() -> None:
    """In float64; a response that is far from the baseline on its own side has nearly none."""
    loss = preference.KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    reference = torch.tensor([-11.0, -18.5, -9.0, -30.0], dtype=torch.float64)
    desirable = torch.tensor([True, False, False, True])
    policy = torch.tensor([-10.0, -20.0, -8.0, -31.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda policy: loss(policy, reference, desirable, 0.8), (policy,))
    far = (reference + torch.where(desirable, 200.0, -200.0)).requires_grad_()
    loss(far, reference, desirable, 0.8).sum().backward()
    assert float(far.grad.abs().max()) < 1e-20


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss", "independent"),
    [
        (preference.DPO(beta=0.3), dpo_64),
        (preference.IPO(beta=0.3), ipo_64),
        (preference.IPO(beta=0.3, reduction="mean"), ipo_mean_64),
        (preference.SrDPO(beta=0.3, lam=0.7), sr_dpo_64),
        (preference.SrIPO(beta=0.3, lam=0.7), sr_ipo_64),
        (preference.SrIPO(beta=0.3, lam=0.7, lambda_scale="derived"), sr_ipo_exact_64),
    ],
    ids=["dpo", "ipo", "ipo_mean", "sr_dpo", "sr_ipo", "sr_ipo_exact"],
)
def test_values_and_gradients_equal_an_independent_float64_formulation(loss: Any, independent: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/64 are exact in float32, so only the formulas can differ.
    draw = [(torch.randn(5, generator=generator).mul(64 * 3).round() / 64 - 40).double() for _ in range(4)]
    delta = torch.randn(5, generator=generator).mul(64).round().div(64).double()
    tokens = [torch.randint(1, 30, (5,), generator=generator).double() for _ in range(2)]

    wide = [t.clone().requires_grad_() for t in draw[:2]]
    expected = independent(wide, draw[2:], delta, tokens)
    expected.sum().backward()

    narrow = [t.float().requires_grad_() for t in draw[:2]]
    counts = {"chosen_tokens": tokens[0].float(), "rejected_tokens": tokens[1].float()}
    policy = PairLogps(chosen=narrow[0], rejected=narrow[1], **counts)
    reference = PairLogps(chosen=draw[2].float(), rejected=draw[3].float())
    actual = loss(policy, reference, delta.float())
    actual.sum().backward()

    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    for leaf, reference_leaf in zip(narrow, wide, strict=True):
        assert leaf.grad is not None
        assert reference_leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), reference_leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("refined", "plain"),
    [
        (preference.SrDPO(beta=0.2, lam=0.0), preference.DPO(beta=0.2)),
        (preference.SrDPO(beta=0.2, lam=0.0, reduction="mean"), preference.DPO(beta=0.2, reduction="mean")),
        (preference.SrIPO(beta=0.2, lam=0.0), preference.IPO(beta=0.2)),
        (preference.SrIPO(beta=0.2, lam=0.0, lambda_scale="derived"), preference.IPO(beta=0.2)),
        (preference.SrIPO(beta=0.2, lam=0.0, reduction="mean"), preference.IPO(beta=0.2, reduction="mean")),
        (
            preference.SrIPO(beta=0.2, lam=0.0, reduction="mean", lambda_scale="derived"),
            preference.IPO(beta=0.2, reduction="mean"),
        ),
    ],
    ids=["sr_dpo", "sr_dpo_mean", "sr_ipo", "sr_ipo_exact", "sr_ipo_mean", "sr_ipo_mean_exact"],
)
def test_lambda_zero_is_the_plain_loss_bit_for_bit_gradients_included(refined: Any, plain: Any) -> None:
    results = []
    for loss in (refined, plain):
        policy, reference = case(preference)
        values = loss(policy, reference, torch.tensor([3.7, -91.3]))
        values.sum().backward()
        results.append((values.detach(), policy.chosen.grad, policy.rejected.grad))
    for refined_result, plain_result in zip(*results, strict=True):
        assert torch.equal(refined_result, plain_result)


REFINED = [
    preference.SrDPO(),
    preference.SrDPO(reduction="mean"),
    preference.SrIPO(),
    preference.SrIPO(lambda_scale="derived"),
    preference.SrIPO(reduction="mean"),
    preference.SrIPO(reduction="mean", lambda_scale="derived"),
]


@pytest.mark.parametrize("loss", REFINED, ids=repr)
def test_permuted_refinement_changes_the_loss_of_each_pair_and_their_mean(loss: Any) -> None:
    delta = torch.tensor([0.4, -0.6])
    values = loss(*case(preference), delta)
    permuted = loss(*case(preference), delta.flip(0))
    assert ((values - permuted).abs() > 1e-2).all()
    assert abs(float((values - permuted).mean().detach())) > 1e-3


@pytest.mark.parametrize("loss", [preference.DPO(), preference.IPO(), preference.SrDPO(), preference.SrIPO()], ids=repr)
def test_swapping_chosen_and_rejected_with_the_refinement_negates_the_margin(loss: Any) -> None:
    """The loss of the swapped pair at Δ is the loss at -h and -Δ, which swapping the responses gives."""
    policy, reference = case(preference)
    swapped_policy = PairLogps(chosen=policy.rejected, rejected=policy.chosen)
    swapped_reference = PairLogps(chosen=reference.rejected, rejected=reference.chosen)
    h = preference.log_ratio_margin(policy, reference)
    assert torch.equal(preference.log_ratio_margin(swapped_policy, swapped_reference), -h)

    values = loss(policy, reference, delta := torch.tensor([0.4, -0.6]))
    swapped = loss(swapped_policy, swapped_reference, -delta)
    if isinstance(loss, preference.DPO | preference.SrDPO):
        # -log σ(z) - (-log σ(-z)) = -z
        z = loss.beta * h - (loss.lam * delta if isinstance(loss, preference.SrDPO) else 0.0)
        torch.testing.assert_close(values - swapped, -z)
    else:
        # (m - t)² - (-m - t)² = -4mt with t = 1/(2β)
        m = h - (loss.lam * delta if isinstance(loss, preference.SrIPO) else 0.0)
        torch.testing.assert_close(values - swapped, -4 * m / (2 * loss.beta))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_a_policy_that_is_its_reference_starts_at_ln_2_and_at_one_over_four_beta_squared(beta: float) -> None:
    same = PairLogps(
        chosen=torch.tensor([-3.0, -400.0]),
        rejected=torch.tensor([-90.0, -1.5]),
        chosen_tokens=torch.tensor([1.0, 70.0]),
        rejected_tokens=torch.tensor([20.0, 2.0]),
    )
    zero = torch.zeros(2)
    for loss in (
        preference.DPO(beta=beta),
        preference.DPO(beta=beta, reduction="mean"),
        preference.SrDPO(beta=beta),
        preference.SrDPO(beta=beta, reduction="mean"),
    ):
        expect(loss(same, same, zero), [math.log(2)] * 2)
    for loss in (
        preference.IPO(beta=beta),
        preference.IPO(beta=beta, reduction="mean"),
        preference.SrIPO(beta=beta),
        preference.SrIPO(beta=beta, lambda_scale="derived"),
        preference.SrIPO(beta=beta, reduction="mean"),
        preference.SrIPO(beta=beta, reduction="mean", lambda_scale="derived"),
    ):
        expect(loss(same, same, zero), [1 / (4 * beta * beta)] * 2)
        if isinstance(loss, preference.SrIPO):
            assert loss.delta(same, same).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("target", "expected"), [("paper", 5.005), ("derived", 5.05)])
def test_averaged_target_does_not_grow_with_length(target: str, expected: float) -> None:
    """Every token of y⁺ is 0.05 nats likelier than under the reference, of y⁻ as much less, with and without p.

    h = 0.1 and Δ = β · 0.1 = 0.01, both a token; the target is 1/(2β) + λΔ = 5 + 0.005, or with λ/β 5 + 0.05.
    """
    tokens = torch.tensor([100.0, 400.0])
    moved = PairLogps(chosen=-2.95 * tokens, rejected=-3.05 * tokens, chosen_tokens=tokens, rejected_tokens=tokens)
    start = PairLogps(chosen=-3 * tokens, rejected=-3 * tokens)
    loss = preference.SrIPO(beta=0.1, lam=0.5, reduction="mean", lambda_scale=target)
    delta = loss.delta(moved, start)
    torch.testing.assert_close(delta, torch.tensor([0.01, 0.01]), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss(moved, start, delta).sqrt() + 0.1, torch.full((2,), expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", REFINED, ids=repr)
def test_swapping_chosen_and_rejected_negates_the_refinement_of_every_loss(loss: Any) -> None:
    policy, reference = case(preference)
    swapped = PairLogps(
        chosen=policy.rejected,
        rejected=policy.chosen,
        chosen_tokens=policy.rejected_tokens,
        rejected_tokens=policy.chosen_tokens,
    )
    other = PairLogps(chosen=reference.rejected, rejected=reference.chosen)
    assert torch.equal(loss.delta(swapped, other), -loss.delta(policy, reference))


def test_a_larger_refinement_asks_for_a_larger_margin() -> None:
    """Sr-DPO: the pull σ(λΔ - βh) grows with Δ. Sr-IPO: the h of least loss, 1/(2β) + λΔ, grows with Δ."""
    pulls = []
    for delta in (-1.0, 0.0, 1.0):
        policy, reference = case(preference)
        preference.SrDPO(**SR)(policy, reference, torch.full((2,), delta)).sum().backward()
        assert policy.chosen.grad is not None
        pulls.append(-policy.chosen.grad)
    assert bool((pulls[0] < pulls[1]).all())
    assert bool((pulls[1] < pulls[2]).all())

    zero = PairLogps(chosen=torch.zeros(1), rejected=torch.zeros(1))
    for target, expected in (("paper", 2.5 + 0.5 * 0.8), ("derived", 2.5 + 2.5 * 0.8)):
        for reduction, tokens in (("sum", 1), ("mean", 7)):
            counts = {"chosen_tokens": torch.tensor([float(tokens)]), "rejected_tokens": torch.tensor([3.0])}
            best = PairLogps(chosen=torch.tensor([expected * tokens]), rejected=torch.zeros(1), **counts)
            value = preference.SrIPO(lambda_scale=target, reduction=reduction, **SR)(best, zero, torch.tensor([0.8]))
            assert float(value) == pytest.approx(0, abs=1e-10)


def test_doubling_a_response_leaves_the_averaged_loss_and_changes_the_summed_one() -> None:
    def loss_of(reduction: str, factor: float) -> float:
        policy = PairLogps(
            chosen=torch.tensor([-10.0 * factor]),
            rejected=torch.tensor([-12.0]),
            chosen_tokens=torch.tensor([2.0 * factor]),
            rejected_tokens=torch.tensor([4.0]),
        )
        reference = PairLogps(chosen=torch.tensor([-11.0 * factor]), rejected=torch.tensor([-11.5]))
        return float(preference.IPO(beta=0.2, reduction=reduction)(policy, reference))

    assert loss_of("mean", 2.0) == pytest.approx(loss_of("mean", 1.0), rel=1e-6)
    # h = 2 + 0.5 instead of 1 + 0.5: (2.5 - 2.5)² = 0 instead of 1.
    assert loss_of("sum", 1.0) == pytest.approx(1.0, rel=1e-6)
    assert loss_of("sum", 2.0) == pytest.approx(0.0, abs=1e-9)


def test_averaging_without_token_counts_is_an_error() -> None:
    logps = PairLogps(chosen=torch.zeros(1), rejected=torch.zeros(1))
    with pytest.raises(ValueError, match="need chosen_tokens and rejected_tokens"):
        preference.IPO(reduction="mean")(logps, logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "loss",
    [
        preference.DPO(),
        preference.IPO(),
        preference.SrDPO(),
        preference.SrIPO(),
        preference.SrIPO(lambda_scale="derived"),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{getattr(loss, 'target', '')}",
)
def test_extreme_log_probabilities_give_finite_losses_and_gradients(loss: Any, dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, -1e-30, -1e6, -1e9], dtype=dtype)
    policy = PairLogps(chosen=extremes.clone().requires_grad_(), rejected=extremes.flip(0).requires_grad_())
    reference = PairLogps(chosen=extremes.flip(0), rejected=extremes)
    values = loss(policy, reference, torch.tensor([1e6, -1e6, 0.0, 1e-30], dtype=dtype))
    assert values.dtype == dtype
    assert torch.isfinite(values).all()
    values.sum().backward()
    for leaf in (policy.chosen, policy.rejected):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


def test_dpo_of_a_hopeless_pair_grows_linearly_and_of_a_won_pair_vanishes() -> None:
    zero = PairLogps(chosen=torch.zeros(2), rejected=torch.zeros(2))
    policy = PairLogps(chosen=torch.tensor([-1e6, 0.0]), rejected=torch.tensor([0.0, -1e6]))
    expect(preference.DPO(beta=0.1)(policy, zero), [1e5, 0.0])


@pytest.mark.parametrize("name", ["DPO", "IPO", "SrDPO", "SrIPO"])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_that_is_not_above_zero_is_refused_by_name(name: str, beta: float) -> None:
    with pytest.raises(SelfalignError, match=r"loss\.beta must be above 0 and finite, got"):
        getattr(preference, name)(beta=beta)


@pytest.mark.parametrize("name", ["SrDPO", "SrIPO"])
@pytest.mark.parametrize("lam", [-0.5, math.nan, math.inf])
def test_lambda_below_zero_is_refused_by_name(name: str, lam: float) -> None:
    with pytest.raises(SelfalignError, match=r"loss\.lam must be 0 or more and finite, got"):
        getattr(preference, name)(lam=lam)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"reduction": "average"}, r"loss\.reduction must be one of sum, mean; got 'average'"),
        ("IPO", {"reduction": "avg"}, r"loss\.reduction must be one of sum, mean; got 'avg'"),
        ("SrIPO", {"reduction": "Sum"}, r"loss\.reduction must be one of sum, mean; got 'Sum'"),
        ("SrIPO", {"lambda_scale": "printed"}, r"loss\.lambda_scale must be one of paper, derived; got 'printed'"),
    ],
)
def test_unknown_words_are_refused_with_key_and_choices(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        getattr(preference, name)(**options)


@pytest.mark.parametrize("name", ["DPO", "IPO", "SrDPO", "SrIPO"])
def test_losses_take_no_unknown_option(name: str) -> None:
    with pytest.raises(TypeError, match="betta"):
        getattr(preference, name)(betta=0.1)


def test_defaults_are_the_papers() -> None:
    assert preference.DPO().beta == preference.SrDPO().beta == preference.IPO().beta == preference.SrIPO().beta == 0.1
    assert (preference.SrIPO().reduction, preference.SrIPO().lambda_scale, preference.IPO().reduction) == (
        "sum",
        "paper",
        "sum",
    )


def test_detached_log_probabilities_keep_numbers_and_counts() -> None:
    policy, _ = case(preference)
    detached = policy.detach()
    assert not detached.chosen.requires_grad
    assert not detached.rejected.requires_grad
    assert torch.equal(detached.chosen, policy.chosen)
    assert torch.equal(detached.rejected, policy.rejected)
    assert detached.chosen_tokens is policy.chosen_tokens
    assert detached.rejected_tokens is policy.rejected_tokens


@pytest.mark.parametrize("name", ["DPO", "IPO", "SrDPO", "SrIPO", "ODPO", "SimPO", "AlphaDPO"])
def test_nll_term_adds_the_same_to_every_loss_and_zero_adds_nothing(name: str) -> None:
    policy, reference = case(preference)
    delta = torch.tensor([0.4, 0.6])
    plain = getattr(preference, name)()(policy, reference, delta)
    weighted = getattr(preference, name)(nll_weight=0.3)(policy, reference, delta)
    expect(weighted - plain, [1.5, 1.2])
    if name in ("SimPO", "AlphaDPO"):
        return  # They need the tokens themselves.
    policy.chosen_tokens = None
    assert torch.equal(getattr(preference, name)(nll_weight=0.0)(policy, reference, delta), plain)
    with pytest.raises(ValueError, match="need chosen_tokens"):
        getattr(preference, name)(nll_weight=0.3)(policy, reference, delta)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ("SrDPO", {"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 0.5, got -0.1"),
        ("IPO", {"nll_weight": -1.0}, "nll_weight must be 0 or more and finite, got -1.0"),
        ("SrIPO", {"nll_weight": math.inf}, "nll_weight must be 0 or more and finite, got inf"),
        ("KTO", {"desirable_weight": 0.0}, "desirable_weight must be above 0 and finite, got 0.0"),
        ("KTO", {"undesirable_weight": math.inf}, "undesirable_weight must be above 0 and finite, got inf"),
        ("SimPO", {"gamma": -0.5}, "gamma must be 0 or more and finite, got -0.5"),
        ("AlphaDPO", {"alpha": math.inf}, "alpha must be 0 or more and finite, got inf"),
        ("SrDPO", {"lam_warmup": 1.5}, "lam_warmup must be a share of the steps from 0 to 1, got 1.5"),
        ("SrIPO", {"lam": [0.5, -1]}, "lam must be 0 or more and finite, got -1"),
        ("SrDPO", {"lam": [[0.5]]}, r"lam must be 0 or more and finite, got \[\[0.5\]\]"),
        ("SrDPO", {"lam": []}, r"lam must be 0 or more and finite, got \[\]"),
        ("SrIPO", {"lam": "high"}, "lam must be 0 or more and finite, got 'high'"),
        ("ODPO", {"alpha": -1.0}, "alpha must be 0 or more and finite, got -1.0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(SelfalignError, match=f"^loss.{message}"):
        getattr(preference, name)(**options)


@pytest.mark.parametrize("name", ["IPO", "SrIPO", "ODPO"])
def test_label_smoothing_is_unknown_to_losses_it_has_no_meaning_for(name: str) -> None:
    with pytest.raises(TypeError, match="label_smoothing"):
        getattr(preference, name)(label_smoothing=0.1)


@pytest.mark.parametrize("kind", [preference.SrDPO, preference.SrIPO])
def test_lambda_follows_the_iterations_and_rises_over_the_steps(kind: Any) -> None:
    loss = kind(lam=[0, 0.4], lam_warmup=0.25)
    assert [loss.at(iteration).lam for iteration in (1, 2)] == [0.0, 0.4]
    assert [loss.at(2).during(share).lam for share in (0.0, 0.125, 0.25, 0.9)] == [0.0, 0.2, 0.4, 0.4]
    assert kind(lam=1).at(7).during(0.0) == kind(lam=1.0)
    with pytest.raises(SelfalignError, match=r"^loss\.lam has 2 values for iterations=3: give one for each"):
        loss.check_iterations(3)
    loss.check_iterations(2)
    kind(lam=0.3).check_iterations(3)


def test_keys_know_a_lambda_by_its_value_and_nothing_of_settings_that_are_off() -> None:
    """The keys of artifacts of older runs, whose λ was a float and who had no such settings."""
    key = to_key_json(preference.SrDPO(lam=1))
    assert key == to_key_json(preference.SrDPO(lam=1.0))
    assert key.keys() == {"class", "beta", "lam", "refinement", "label_smoothing", "nll_weight"}
    assert key["refinement"].keys() == {"class", "source", "prompt", "place", "scale", "constant"}
    assert to_key_json(preference.SrIPO()).keys() == {
        "class", "beta", "lam", "reduction", "lambda_scale", "refinement", "nll_weight",
    }  # fmt: skip

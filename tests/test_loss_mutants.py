"""Losses broken on purpose: every mutant of `selfalign.losses` must be caught by a hand-worked check."""

from types import ModuleType

import pytest
from mutation import mutated
from test_losses import CHECKS

from selfalign.losses import logps, preference, refinement

MARGIN = "(policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)"
LOGITS = "logits = beta * log_ratio_margin(policy, reference) - offset\n"
DPO = "losses = logistic(*reduced(policy, reference, self.reduction), self.beta, 0.0, smoothing)"
IPO = "return (h - 1 / (2 * self.beta)).square()"
SR_DPO_OFFSET = "offset = self.lam * required(refinement).detach()\n"
SR_DPO = "losses = logistic(*reduced(policy, reference, self.reduction), self.beta, offset, smoothing)"
SR_IPO_TARGET = "target = weight * required(refinement).detach() + 1 / (2 * self.beta)"
SR_IPO = "return (h - target).square()"
DELTA_OF = "return refinement(*reduced(policy_p, reference_p, self.reduction), self.beta)\n\n"
CALL = "    def __call__("
SR_DPO_DELTA = f"{DELTA_OF}{CALL}\n"
SR_IPO_DELTA = f"{DELTA_OF}{CALL}self, policy"
SUMMED = ("*reduced(policy_p, reference_p, self.reduction)", "policy_p, reference_p")
ODPO_OFFSET = "offset = self.alpha * required(score_gap).log()\n"
ODPO = "return logistic(policy, reference, self.beta, offset)"
SIMPO = "losses = logistic(policy.per_token(), uniform(policy), self.beta, self.gamma)"
ALPHA_OFFSET = "offset = self.gamma + self.alpha * required(z).detach()\n"
ALPHA_DPO = "return logistic(policy.per_token(), uniform(policy), self.beta, offset)"
ALPHA_DELTA = 'return refinement(*reduced(policy_p, reference_p, "mean"), self.beta)'
SPPO_SHARES = "chosen, rejected = ((required(win_shares) - 0.5) / self.beta).unbind(1)"
SPPO_CHOSEN = "losses = (policy.chosen - reference.chosen - chosen).square()"
SPPO_REJECTED = "losses = losses + (policy.rejected - reference.rejected - rejected).square()"
KTO_GAIN = "gain = self.beta * (policy - reference - baseline)"
KTO_DESIRABLE = "self.desirable_weight * torch.sigmoid(-gain)"
KTO_UNDESIRABLE = "self.undesirable_weight * torch.sigmoid(gain)"
EACH = "smoothing = self.label_smoothing if label_smoothing is None else label_smoothing\n"
DPO_EACH = f"{EACH}        {DPO}"
SR_DPO_EACH = f"{EACH}        {SR_DPO}"
ALWAYS_ALL = ("if label_smoothing is None", "if True")
SMOOTHED = "-(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)"
NLL = "return -weight * policy.per_token().chosen"
DELTA = "return (beta * (chosen - rejected)).detach()"
TURN = "else p.text + asked"
AFTER = 'text = f"{asked}\\n\\n{p.text.strip()}" if p.place == "after"'
SYSTEM = 'p.text + own["content"] if own["content"]'
NEGATIVE = 'self.negative_prompt.replace("{scale}", str(self.scale)), self.place)'
SCALED = 'p = self.prompt.replace("{scale}", str(self.scale))'
PLACE = 'at = users[0] if p.place == "dialogue" else users[-1]'

EXACT = "weight = self.lam / self.beta if"
AVERAGED = "return policy.per_token(), averaged.per_token()"
REJECTED = "rejected=self.rejected / self.rejected_tokens"
TOKENS = "chosen_tokens=policy.chosen_tokens"
MISSING = "    if offset is None:\n"
CHOSEN_P = "policy_p.chosen - reference_p.chosen"
REJECTED_P = "policy_p.rejected - reference_p.rejected"

# (name, old text, new text)
LOSSES = [
    ("margin without the reference", MARGIN, "policy.chosen - policy.rejected"),
    ("margin with swapped rewards", MARGIN, f"-({MARGIN})"),
    ("margin with rewards added", MARGIN, MARGIN.replace(") - (", ") + (")),
    ("margin with the reference added", MARGIN, MARGIN.replace("chosen - ref", "chosen + ref")),
    ("margin in log base 2", MARGIN, f"({MARGIN}) / 0.6931472"),
    ("logits without β", LOGITS, LOGITS.replace("beta * ", "")),
    ("logits with the margin's sign flipped", LOGITS, LOGITS.replace("beta", "-beta")),
    ("logits averaged over the batch", LOGITS, LOGITS.rstrip() + "\n    logits = logits.mean().expand(2)\n"),
    ("logits without gradient", LOGITS, LOGITS.replace("margin(policy,", "margin(policy.detach(),")),
    ("logits with the offset added", LOGITS, LOGITS.replace("- offset", "+ offset")),
    ("logits with the offset under β", LOGITS, LOGITS.replace("- offset", "- beta * offset")),
    ("dpo without β", DPO, DPO.replace("self.beta", "1.0")),
    ("dpo with the margin's sign flipped", DPO, DPO.replace("self.beta", "-self.beta")),
    ("dpo with an offset", DPO, DPO.replace("0.0", "0.1")),
    ("dpo always summed", DPO, DPO.replace("*reduced(policy, reference, self.reduction)", "policy, reference")),
    ("dpo always averaged", DPO, DPO.replace("self.reduction", '"mean"')),
    ("dpo without smoothing", DPO, DPO.replace(", smoothing", "")),
    ("logistic losses with their sign flipped", SMOOTHED, f"-({SMOOTHED})"),
    ("logistic losses with sigmoid for logsigmoid", SMOOTHED, SMOOTHED.replace("logsigmoid", "sigmoid")),
    ("dpo without the smoothing of each pair", DPO_EACH, DPO_EACH.replace(*ALWAYS_ALL)),
    ("sr-dpo without the smoothing of each pair", SR_DPO_EACH, SR_DPO_EACH.replace(*ALWAYS_ALL)),
    ("smoothing with right and wrong swapped", SMOOTHED, SMOOTHED.replace("(logits)", "(-logits)")),
    ("smoothing that forgets to take from the right label", SMOOTHED, SMOOTHED.replace("(1 - label_smoothing) * ", "")),
    ("nll with its sign flipped", NLL, NLL.replace("-weight", "weight")),
    ("nll of the rejected response", NLL, NLL.replace("chosen", "rejected")),
    ("nll not averaged over tokens", NLL, NLL.replace(".per_token()", "")),
    ("nll without its weight", NLL, NLL.replace("-weight *", "-")),
    ("odpo with the offset added", ODPO, ODPO.replace("offset", "-offset")),
    ("odpo without α", ODPO_OFFSET, ODPO_OFFSET.replace("self.alpha * ", "")),
    ("odpo without the logarithm", ODPO_OFFSET, ODPO_OFFSET.replace(".log()", "")),
    ("odpo with the offset under β", ODPO, ODPO.replace("offset", "self.beta * offset")),
    ("kto without the reference", KTO_GAIN, KTO_GAIN.replace("- reference ", "")),
    ("kto without z₀", KTO_GAIN, KTO_GAIN.replace(" - baseline", "")),
    ("kto with z₀ added", KTO_GAIN, KTO_GAIN.replace("- baseline", "+ baseline")),
    ("kto with z₀ in units of reward", KTO_GAIN, KTO_GAIN.replace(" - baseline)", ") - baseline")),
    ("kto without β", KTO_GAIN, KTO_GAIN.replace("self.beta * ", "")),
    ("kto without gradient", KTO_GAIN, KTO_GAIN.replace("(policy ", "(policy.detach() ")),
    ("kto that lowers desirable responses", KTO_DESIRABLE, KTO_DESIRABLE.replace("-gain", "gain")),
    ("kto that raises undesirable responses", KTO_UNDESIRABLE, KTO_UNDESIRABLE.replace("gain", "-gain")),
    ("kto without λ_D", KTO_DESIRABLE, KTO_DESIRABLE.replace("self.desirable_weight * ", "")),
    ("kto with λ_D for λ_U", KTO_UNDESIRABLE, KTO_UNDESIRABLE.replace("undesirable_weight", "desirable_weight")),
    ("kto with the labels swapped", "            desirable,\n", "            ~desirable,\n"),
    ("kto with the logarithm of σ", KTO_DESIRABLE, KTO_DESIRABLE.replace("torch.sigmoid", "-F.logsigmoid")),
    ("ipo with 1/β as target", IPO, IPO.replace("(2 * self.beta)", "self.beta")),
    ("ipo with β/2 as target", IPO, IPO.replace("1 / (2 * self.beta)", "self.beta / 2")),
    ("ipo with a negative target", IPO, IPO.replace("h - 1", "h + 1")),
    ("ipo without the square", IPO, IPO.replace("square", "abs")),
    ("ipo with a factor of one half", IPO, IPO + " / 2"),
    ("ipo on β h", IPO, IPO.replace("(h", "(self.beta * h")),
    ("sr-dpo with the offset added", SR_DPO, SR_DPO.replace("offset", "-offset")),
    ("sr-dpo without the offset", SR_DPO, SR_DPO.replace("offset", "0.0")),
    ("sr-dpo with the offset under β", SR_DPO, SR_DPO.replace("offset", "self.beta * offset")),
    ("sr-dpo with λ on the margin", SR_DPO, SR_DPO.replace("self.beta", "self.lam * self.beta")),
    ("sr-dpo with Δ averaged", SR_DPO, SR_DPO.replace("offset", "offset.mean()")),
    ("sr-dpo without smoothing", SR_DPO, SR_DPO.replace(", smoothing", "")),
    ("sr-dpo with a gradient through Δ", SR_DPO_OFFSET, SR_DPO_OFFSET.replace(".detach()", "")),
    ("sr-dpo without λ", SR_DPO_OFFSET, SR_DPO_OFFSET.replace("self.lam * ", "")),
    ("sr-ipo with Δ taken off the target", SR_IPO_TARGET, SR_IPO_TARGET.replace("weight", "-weight")),
    ("sr-ipo with a gradient through Δ", SR_IPO_TARGET, SR_IPO_TARGET.replace(".detach()", "")),
    ("sr-ipo without its target", SR_IPO_TARGET, SR_IPO_TARGET.replace(" + 1 / (2 * self.beta)", "")),
    ("sr-ipo with Δ averaged", SR_IPO_TARGET, SR_IPO_TARGET.replace(".detach()", ".detach().mean()")),
    ("sr-ipo with the target added", SR_IPO, SR_IPO.replace("h - target", "h + target")),
    ("sr-ipo with λ on the margin", SR_IPO, SR_IPO.replace("(h", "(self.lam * h")),
    (
        "sr-ipo with printed and exact swapped",
        f'{EXACT} self.lambda_scale == "derived"',
        f'{EXACT} self.lambda_scale == "paper"',
    ),
    ("sr-ipo with λβ for λ/β", EXACT, EXACT.replace("/", "*")),
    ("sr-ipo with λ/(2β) for λ/β", EXACT, EXACT.replace("self.beta", "self.beta / 2")),
    ("sr-ipo with Δ always summed", SR_IPO_DELTA, SR_IPO_DELTA.replace(*SUMMED)),
    ("sr-ipo with Δ always averaged", SR_IPO_DELTA, SR_IPO_DELTA.replace("self.reduction", '"mean"')),
    ("sr-ipo with Δ divided by β", SR_IPO_DELTA, SR_IPO_DELTA.replace("self.beta", "1 / self.beta")),
    (
        "sr-ipo with Δ of swapped models",
        SR_IPO_DELTA,
        SR_IPO_DELTA.replace("policy_p, reference", "reference_p, policy"),
    ),
    ("sr-dpo with Δ always summed", SR_DPO_DELTA, SR_DPO_DELTA.replace(*SUMMED)),
    ("sr-dpo with Δ always averaged", SR_DPO_DELTA, SR_DPO_DELTA.replace("self.reduction", '"mean"')),
    (
        "sr-dpo always summed",
        SR_DPO,
        SR_DPO.replace("*reduced(policy, reference, self.reduction)", "policy, reference"),
    ),
    ("sr-dpo with Δ without β", SR_DPO_DELTA, SR_DPO_DELTA.replace("self.beta", "1.0")),
    ("simpo on whole responses", SIMPO, SIMPO.replace(".per_token()", "")),
    ("simpo with the run's reference", SIMPO, SIMPO.replace("uniform(policy)", "reference")),
    ("simpo without β", SIMPO, SIMPO.replace("self.beta", "1.0")),
    ("simpo without γ", SIMPO, SIMPO.replace("self.gamma", "0.0")),
    ("simpo with γ taken from the rejected response", SIMPO, SIMPO.replace("self.gamma", "-self.gamma")),
    ("simpo with γ under β", SIMPO, SIMPO.replace("self.gamma", "self.beta * self.gamma")),
    ("α-dpo with a gradient through z", ALPHA_OFFSET, ALPHA_OFFSET.replace(".detach()", "")),
    ("α-dpo without γ", ALPHA_OFFSET, ALPHA_OFFSET.replace("self.gamma + ", "")),
    ("α-dpo without α", ALPHA_OFFSET, ALPHA_OFFSET.replace("self.alpha * ", "")),
    ("α-dpo with z taken off", ALPHA_OFFSET, ALPHA_OFFSET.replace("+ self.alpha", "- self.alpha")),
    ("α-dpo with the offset under β", ALPHA_DPO, ALPHA_DPO.replace("offset", "self.beta * offset")),
    ("α-dpo with the run's reference in its margin", ALPHA_DPO, ALPHA_DPO.replace("uniform(policy)", "reference")),
    ("α-dpo with a summed gap", ALPHA_DELTA, ALPHA_DELTA.replace('"mean"', '"sum"')),
    ("sppo without ½", SPPO_SHARES, SPPO_SHARES.replace(" - 0.5", "")),
    ("sppo with β for 1/β", SPPO_SHARES, SPPO_SHARES.replace("/ self.beta", "* self.beta")),
    ("sppo with swapped shares", SPPO_SHARES, SPPO_SHARES.replace("chosen, rejected", "rejected, chosen")),
    ("sppo without the reference", SPPO_CHOSEN, SPPO_CHOSEN.replace(" - reference.chosen", "")),
    ("sppo with the target added", SPPO_REJECTED, SPPO_REJECTED.replace("- rejected)", "+ rejected)")),
    ("sppo of the chosen response alone", SPPO_REJECTED, "losses = losses"),
    ("sppo without the square", SPPO_CHOSEN, SPPO_CHOSEN.replace("square", "abs")),
    ("sum and mean swapped", 'if reduction == "sum"', 'if reduction == "mean"'),
    ("reference left as a sum", AVERAGED, "return policy.per_token(), reference"),
    ("token counts of the reference swapped", TOKENS, TOKENS.replace("policy.chosen", "policy.rejected")),
    ("missing Δ taken as nothing", MISSING, MISSING + "        return __import__('torch').zeros(2)\n"),
]
LOGPS = [
    ("rejected response averaged over the chosen one's tokens", REJECTED, REJECTED.replace("rejected_t", "chosen_t")),
]
REFINEMENT = [
    ("Δ without β", DELTA, DELTA.replace("beta * ", "")),
    ("Δ with its sign flipped", DELTA, DELTA.replace("beta * ", "-beta * ")),
    ("Δ with a gradient", DELTA, DELTA.replace(".detach()", "")),
    ("Δ divided by β", DELTA, DELTA.replace("beta * (chosen - rejected)", "(chosen - rejected) / beta")),
    ("Δ without the reference", CHOSEN_P, "policy_p.chosen"),
    ("Δ with the wrong response's reference", REJECTED_P, "policy_p.rejected - reference_p.chosen"),
    ("Δ with rewards added", DELTA, DELTA.replace("chosen - rejected", "chosen + rejected")),
    ("p behind the query", TURN, "else asked + p.text"),
    ("p before the query though it should be behind", AFTER, AFTER.replace('"after"', '"never"')),
    ("p right behind the query", AFTER, AFTER.replace("\\n\\n", "")),
    ("p behind the system turn", SYSTEM, SYSTEM.replace('p.text + own["content"]', 'own["content"] + p.text')),
    ("p in place of the system turn", SYSTEM, SYSTEM.replace(' + own["content"]', "")),
    ("p⁻ without its scale", NEGATIVE, NEGATIVE.replace('.replace("{scale}", str(self.scale))', "")),
    ("p⁻ always before the dialogue", NEGATIVE, NEGATIVE.replace("self.place", '"dialogue"')),
    ("p for p⁻", NEGATIVE, NEGATIVE.replace("negative_prompt", "prompt")),
    ("p always before the first user turn", PLACE, "at = users[0]"),
    ("p always before the last user turn", PLACE, "at = users[-1]"),
    ("p before the system turn", PLACE, PLACE.replace("users[0]", "0")),
    ("p behind a plain text", "return p.text + prompt", "return prompt + p.text"),
    ("p's place forgotten", "else p, self.place)", 'else p, "dialogue")'),
    ("p without its scale", SCALED, "p = self.prompt"),
    ("p with the default scale", SCALED, SCALED.replace("self.scale", "100")),
]
HOMES = {logps: LOGPS, preference: LOSSES, refinement: REFINEMENT}
MUTANTS = [(home, *mutant) for home, mutants in HOMES.items() for mutant in mutants]


def caught(losses_module: ModuleType, refinement_module: ModuleType) -> list[str]:
    """The checks whose comparison fails with these modules; any other error is the mutant's own, and is raised."""
    failures: list[str] = []
    for check in CHECKS:
        try:
            check(losses_module, refinement_module)
        except (AssertionError, pytest.fail.Exception):
            failures.append(check.__name__)
    return failures


def test_unchanged_copies_pass_every_check() -> None:
    """Otherwise the copying itself, not the mutation, could be what the checks catch."""
    with mutated(preference, MARGIN, MARGIN) as copy:
        assert caught(copy, refinement) == []
    with mutated(refinement, DELTA, DELTA) as copy:
        assert caught(preference, copy) == []


@pytest.mark.parametrize(
    ("module", "old", "new"), [(m, old, new) for m, _, old, new in MUTANTS], ids=[mutant[1] for mutant in MUTANTS]
)
def test_mutant_is_caught(module: ModuleType, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert old != new
    with mutated(module, old, new) as copy:
        if module is logps:
            monkeypatch.setattr(logps.PairLogps, "per_token", copy.PairLogps.per_token)
            vars(copy)["PairLogps"] = logps.PairLogps  # Other modules check for this class.
        failures = caught(copy if module is preference else preference, copy if module is refinement else refinement)
    assert failures, "no hand-worked check noticed this mutation"

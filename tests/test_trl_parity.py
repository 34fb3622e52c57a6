"""The same pairs, model and reference values through TRL's DPOTrainer and KTOTrainer, and through ours."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from mutation import assert_caught
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer

from selfalign.losses.logps import PairLogps
from selfalign.losses.preference import DPO, IPO, KTO, SPPO, SimPO
from selfalign.losses.protocol import Offset, PreferenceLoss
from selfalign.models.batches import PairExample, SharedPrompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import make_scoring
from selfalign.training import unpaired
from selfalign.training.objective import frozen_logps
from selfalign.training.parallelism import Microbatch
from selfalign.training.reference import StoredReferences
from selfalign.training.unpaired import Unpaired

PAIRS = [
    {"prompt": "Name a bird. ", "chosen": "A wren.", "rejected": "A stone, I think, or a bird of stone."},
    {"prompt": "Why is the sky blue? ", "chosen": "Air scatters blue light most of all.", "rejected": "No."},
    {"prompt": "How is tea made? ", "chosen": "Pour hot water over the leaves.", "rejected": "Tea tea tea tea."},
]
REFERENCE = torch.tensor([[-31.0, -120.0], [-95.0, -25.0], [-68.0, -81.0]])
"""Chosen and rejected, some nats away from the policy's own values, in either direction."""


@dataclass
class Peer:
    """TRL's value of one pair's loss, the token ids it scored, and the log-probabilities it found."""

    loss: float
    group: SharedPrompt
    logps: PairLogps


def ask_trl(policy: PolicyCheckpoint, folder: Path, loss_type: str, beta: float) -> list[Peer]:
    loaded = policy.load("float32", device="cpu")
    config = DPOConfig(
        output_dir=str(folder),
        beta=beta,
        loss_type=[loss_type],
        precompute_ref_log_probs=False,
        activation_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
    )
    trainer = DPOTrainer(
        model=loaded.model, args=config, train_dataset=Dataset.from_list(PAIRS), processing_class=loaded.tokenizer
    )
    trainer.precompute_ref_logps = True
    found: list[Tensor] = []
    loaded.model.register_forward_hook(lambda _, args, output: found.append(output.log_probs.detach()))
    peers = []
    for row, (chosen, rejected) in zip(trainer.train_dataset, REFERENCE, strict=True):
        inputs = trainer.data_collator([{**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}])
        loss = trainer.compute_loss(trainer.model, inputs).detach()
        sums = found.pop().sum(1)
        tokens = inputs["completion_mask"].sum(1).float()
        logps = PairLogps(chosen=sums[:1], rejected=sums[1:], chosen_tokens=tokens[:1], rejected_tokens=tokens[1:])
        responses = [row["chosen_ids"], row["rejected_ids"]]
        peers.append(
            Peer(
                float(loss),
                SharedPrompt(id="", prompt=row["prompt_ids"], responses=responses, num_context_tokens=[0, 0]),
                logps,
            )
        )
    return peers


@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [
        ("sigmoid", DPO(beta=0.1)),
        ("sigmoid_norm", DPO(beta=5.0, reduction="mean")),
        ("ipo", IPO(beta=0.1, reduction="mean")),
        ("sppo_hard", SPPO(beta=0.02)),  # TRL's chosen responses always win, and its rejected ones never.
    ],
    ids=["dpo", "dpo_mean", "ipo_mean", "sppo_hard"],
)
def test_losses_equal_those_of_trl(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, loss_type: str, loss: PreferenceLoss
) -> None:
    peers = ask_trl(tiny_policy, tmp_path, loss_type, loss.beta)
    for peer, (chosen, rejected) in zip(peers, REFERENCE, strict=True):
        reference = PairLogps(chosen=chosen[None], rejected=rejected[None])
        shares = torch.tensor([[1.0, 0.0]]) if loss.offset is Offset.win_shares else None
        assert float(loss(peer.logps, reference, shares)) == pytest.approx(peer.loss, rel=1e-6, abs=1e-6)
    assert len({round(peer.loss, 3) for peer in peers}) == len(peers)

    ours = tiny_policy.load("float32", device="cpu")
    make_scoring(ours)
    logps = frozen_logps(ours.model, [peer.group for peer in peers])
    torch.testing.assert_close(logps.chosen, torch.cat([peer.logps.chosen for peer in peers]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps.rejected, torch.cat([peer.logps.rejected for peer in peers]), rtol=1e-5, atol=1e-5)


def test_simpo_equals_that_of_trl() -> None:
    """TRL's formula, on log-probabilities that are averaged before."""
    policy = PairLogps(
        chosen=torch.tensor([-31.0, -95.0, -68.0]),
        rejected=torch.tensor([-120.0, -25.0, -81.0]),
        chosen_tokens=torch.tensor([7.0, 30.0, 25.0]),
        rejected_tokens=torch.tensor([36.0, 4.0, 20.0]),
    )
    averaged = policy.per_token()
    settings = {"alpha": 0.0, "loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4, "label_smoothing": 0.0}
    trainer: Any = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, averaged.chosen, averaged.rejected)
    ours = SimPO(beta=2.5, gamma=1.4)(policy, policy)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert len({round(float(value), 3) for value in ours}) == 3


def test_ipo_with_summed_log_probabilities_is_another_loss_than_trls(
    tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    """TRL averages over tokens, so its β asks for a margin a token; ours does so by choice alone."""
    for peer, (chosen, rejected) in zip(ask_trl(tiny_policy, tmp_path, "ipo", 0.1), REFERENCE, strict=True):
        reference: Any = PairLogps(chosen=chosen[None], rejected=rejected[None])
        assert float(IPO(beta=0.1)(peer.logps, reference)) != pytest.approx(peer.loss, rel=0.1)


@pytest.mark.parametrize("shift", [0.0, 40.0], ids=["z_above_0", "z_raised_to_0"])
def test_kto_equals_that_of_trl(tiny_policy: PolicyCheckpoint, tmp_path: Path, shift: float) -> None:
    """TRL's loss of a batch, with its own mismatched responses and the same weights, and our objective on its ids."""
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(PAIRS, ("chosen", "rejected", "chosen"), strict=True)
    ]
    loaded = tiny_policy.load("float32", device="cpu")
    config = KTOConfig(
        output_dir=str(tmp_path),
        beta=0.05,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        per_device_train_batch_size=len(rows),
        activation_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
    )
    trainer = KTOTrainer(
        model=loaded.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=loaded.tokenizer
    )
    trainer.precompute_ref_logps = True
    found: list[Tensor] = []
    loaded.model.register_forward_hook(lambda _, args, output: found.append(output.log_probs.detach().sum(1)))
    own, others = torch.tensor([-34.0, -22.0, -90.0]), torch.tensor([-104.0, -50.0, -40.0]) + shift
    encoded = list(trainer.train_dataset)
    given = zip(encoded, own.tolist(), others.tolist(), strict=True)
    inputs = trainer.data_collator([{**row, "ref_logps": one, "ref_KL_logps": other} for row, one, other in given])
    theirs = float(trainer.compute_loss(trainer.model, inputs).detach())
    mismatched, policy = found
    baseline = max(0.0, float((mismatched - others).mean()))
    assert (baseline > 1) == (shift == 0)

    loss = KTO(beta=0.05, desirable_weight=1.3, undesirable_weight=0.8)
    desirable = torch.tensor([row["label"] for row in rows])
    assert float(loss(policy, own, desirable, baseline).mean()) == pytest.approx(theirs, rel=1e-6, abs=1e-6)

    ours = tiny_policy.load("float32", device="cpu")
    make_scoring(ours)
    examples = [
        PairExample(
            plain=SharedPrompt(
                id=str(n),
                prompt=row["prompt_ids"],
                responses=[row["completion_ids"], row["KL_completion_ids"]],
                num_context_tokens=[0, 0],
            ),
            desirable=row["label"],
            reference=[float(own[n]), float(others[n])],
        )
        for n, row in enumerate(encoded)
    ]
    objective = Unpaired(loss, StoredReferences(), starts_as_reference=False, dtype="float32")
    objective.begin_step(ours.model, [Microbatch(examples[:2]), Microbatch(examples[2:])], 0.0)
    total = sum(float(objective(ours.model, part).loss.detach()) for part in (examples[:1], examples[1:]))
    assert total / len(rows) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "shift"),
    [
        ("max(0.0, self.divergence)", "self.divergence", 40.0),
        ("max(0.0, self.divergence)", "0.0", 0.0),
        ("slice(1, 2)", "slice(0, 1)", 0.0),
        ("policy - reference.rejected", "policy - reference.chosen", 0.0),
        ("float(len(examples)))\n        self.div", "1.0)\n        self.div", 0.0),
    ],
    ids=["z below 0", "no z", "z of own responses", "z against the wrong reference", "z summed over the step"],
)
def test_wrong_estimates_of_the_divergence_are_caught(
    old: str, new: str, shift: float, tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    check = partial(test_kto_equals_that_of_trl, shift=shift)
    given = {"tiny_policy": tiny_policy, "tmp_path": tmp_path}
    assert_caught(unpaired, sys.modules[__name__], old, new, check, given)

"""Mixtures of experts: the routers' loss, adapters on experts, and parts of a model that no text passes through."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, as_policy
from builders import logits_of, optimization, weights, workspace
from test_model_check import GROUPS
from training_jobs import demonstrations, task

from selfalign.core.errors import SelfalignError
from selfalign.models.batches import SharedPrompt, make_batch
from selfalign.models.capabilities import Capabilities
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.config import LoRA
from selfalign.models.prompt_states import PromptStates
from selfalign.models.scorer import make_scoring
from selfalign.training.config import TrainableWeights
from selfalign.training.objective import Likelihood
from selfalign.training.prepare import add_adapter, prepare
from selfalign.training.train import train
from selfalign.training.trainer import StepTrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Of other people's models.

ROUTED = [name for name, one in ARCHITECTURES.items() if one.routes]
EXPERTS = "experts.gate_up_proj,experts.down_proj"


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")


def scoring(files: PolicyCheckpoint, packs: bool) -> Policy:
    policy = files.load("float32", device="cpu")
    policy.capabilities = type(policy.capabilities)(packs=packs)
    make_scoring(policy)
    return policy


@pytest.mark.parametrize("name", ROUTED)
def test_router_loss_is_the_models_own_over_all_tokens_but_padding(name: str, tmp_path: Path) -> None:
    one = ARCHITECTURES[name]
    files = as_policy(one.build(), tmp_path)
    groups = [SharedPrompt(id="one", prompt=list(range(30, 45)), responses=[[7, 8, 9]], num_context_tokens=[0])]
    groups += [] if one.packs else [GROUPS[1]]
    policy = scoring(files, one.packs)
    batch = make_batch(policy.model, groups)
    given: dict[str, Any] = {"logit_positions": batch.logit_positions, "targets": batch.targets, **batch.inputs}
    found = policy.model(training_pass=True, **given).router_loss
    own = files.load("float32", device="cpu").model.train(False)
    inputs = {key: value for key, value in batch.inputs.items() if key in ("input_ids", "attention_mask")}
    expected = own(use_cache=False, output_router_logits=True, **inputs).aux_loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    router = next(key for key, weight in own.named_parameters() if weight.shape[0] == own.num_experts)
    gradients = [
        torch.autograd.grad(loss, dict(model.named_parameters())[router])[0]
        for loss, model in ((found, policy.model), (expected, own))
    ]
    assert float(gradients[1].norm()) > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_router_loss_counts_a_shared_prompt_once(tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES["Granite 4"].build(), tmp_path)
    policy = files.load("float32", device="cpu")
    policy.capabilities = Capabilities(packs=False, shares_states=True)
    make_scoring(policy)
    batch = make_batch(policy.model, GROUPS[:1])
    assert isinstance(batch.inputs["layout"], PromptStates)
    given: dict[str, Any] = {"logit_positions": batch.logit_positions, "targets": batch.targets, **batch.inputs}
    found = policy.model(training_pass=True, **given).router_loss
    own: Any = files.load("float32", device="cpu").model.train(False)
    prompt, (first, second) = GROUPS[0].prompt, GROUPS[0].responses
    passes = [
        own(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False, output_router_logits=True).router_logits
        for response in (first, second)
    ]
    layers = tuple(torch.cat([one, two[len(prompt) :]]) for one, two in zip(*passes, strict=True))
    balance = sys.modules[type(own).__module__].load_balancing_loss_func
    torch.testing.assert_close(found, balance(layers, own.num_experts, own.num_experts_per_tok, None))


def step(files: PolicyCheckpoint, folder: Path, kind: str, **options: Any) -> tuple[dict[str, Any], StepTrainer]:
    """Gradients of a step of two passes, and the trainer that made them."""
    loaded = files.load("float32", trainable=True)
    prepare(loaded, files, weights(), 0.0)
    examples, objective = task(kind, loaded.tokenizer)
    settings = optimization(batch_size=4, microbatch_tokens=150, **options)
    trainer = StepTrainer(loaded, examples[:4], objective, settings, workspace(folder), weights())
    trainer.training_step(loaded.model, examples[:4])
    return {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}, trainer


@pytest.mark.parametrize("kind", ["sft", "sr_dpo"])
def test_step_minimises_the_router_loss_with_the_models_coefficient_or_the_one_asked_for(
    kind: str, tmp_path: Path
) -> None:
    files = as_policy(ARCHITECTURES["Mixtral"].build(), tmp_path / "M0")
    (without, trainer), (own, _), (more, _) = (
        step(files, tmp_path / name, kind, router_loss_coefficient=coefficient)
        for name, coefficient in (("without", 0.0), ("own", None), ("more", 0.1))
    )
    assert trainer.step_metrics["router_loss"] > 1  # 2, if all four experts are used alike by two at a time.
    assert files.config.router_aux_loss_coef == 0.001
    router = "model.layers.0.mlp.gate.weight"
    added = {name: more[name] - without[name] for name in more}
    assert float(added[router].norm()) > 1e-3
    for name, gradient in added.items():
        torch.testing.assert_close(own[name] - without[name], 0.01 * gradient, rtol=0.05, atol=2e-6)


def test_loss_that_is_shown_is_without_the_router_loss(tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES["Mixtral"].build(), tmp_path / "M0")
    losses = []
    for coefficient in (0.0, 5.0):
        rows: list[dict[str, Any]] = []
        settings = optimization(epochs=1, batch_size=9, router_loss_coefficient=coefficient)
        train(
            workspace(tmp_path / str(coefficient), rows),
            policy=files,
            base=files,
            examples=demonstrations(files.load_tokenizer()),
            objective=Likelihood("tokens"),
            optimization=settings,
            weights=weights(),
        )
        losses.append(rows[0]["loss"])
        assert rows[0]["router_loss"] > 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_negative_coefficient_is_refused() -> None:
    with pytest.raises(SelfalignError, match=r"train\.sft\.router_loss_coefficient must be 0 or more, got -1"):
        optimization(router_loss_coefficient=-1.0).check("train.sft")


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "Qwen3-MoE"])
@pytest.mark.parametrize("targets", [EXPERTS, f"all-linear,{EXPERTS}", "down_proj"])
def test_adapter_on_experts_is_trained_saved_and_merged(name: str, targets: str, tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES[name].build(), tmp_path / "M0")
    adapter = TrainableWeights(dtype="float32", lora=LoRA(rank=2, targets=targets), seed=0)
    out = workspace(tmp_path / "M1")
    settings = optimization(epochs=1, batch_size=3, learning_rate=0.01)
    trained = train(
        out,
        policy=files,
        base=files,
        examples=demonstrations(files.load_tokenizer())[:3],
        objective=Likelihood("tokens"),
        optimization=settings,
        weights=adapter,
    )
    moved = {key for key, weight in trained.model.named_parameters() if "lora_B" in key and float(weight.norm())}
    on_experts = {key for key in moved if ".experts." in key}
    layers = 2 * (1 if targets == "down_proj" else 2)
    assert len(on_experts) == layers
    assert (len(moved) > len(on_experts)) == targets.startswith("all-linear")
    apart = PolicyCheckpoint(out.path).load("float32", trainable=True)
    merged = PolicyCheckpoint(out.path).load("float32")
    assert not hasattr(merged.model, "peft_config")
    torch.testing.assert_close(logits_of(merged), logits_of(apart), rtol=1e-4, atol=1e-4)
    assert float((logits_of(merged) - logits_of(files.load("float32"))).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("Granite-MoE", "all-linear", "experts.down_proj, experts.gate_up_proj"),
        ("Granite-MoE", "all-linear,experts.down_proj", "experts.gate_up_proj"),
        ("Granite-MoE", f"all-linear,{EXPERTS}", ""),
        ("LFM2", "all-linear", ""),
    ],
)
def test_experts_that_no_adapter_reaches_are_named_with_what_would_adapt_them(
    name: str, targets: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    add_adapter(ARCHITECTURES[name].build(), LoRA(rank=2, targets=targets))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("selfalign")]
    assert told == (
        [
            f"model.lora.targets={targets} does not include {said}: these weights are not trained. To adapt them too, "
            f"set model.lora.targets='{targets},{said.replace(', ', ',')}'"
        ]
        if said
        else []
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_part_of_a_model_for_images_is_not_trained(rank: int, tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES["Gemma 3, 4B and up"].build(), tmp_path)
    loaded = files.load("float32", trainable=True)
    prepare(loaded, files, weights(rank=rank), 0.0)
    batch = make_batch(loaded.model, GROUPS)
    loaded.model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs).sum().backward()
    asked = {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    assert asked == {name for name, weight in loaded.model.named_parameters() if weight.grad is not None}
    assert not any("vision" in name or "multi_modal" in name for name in asked)

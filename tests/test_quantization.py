"""A base in 4 bits with an adapter beside it: one policy wherever it is loaded, and never merged."""

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from builders import (
    TINY_RUN,
    composed,
    demonstration,
    metrics,
    optimization,
    policy_artifact,
    records_artifact,
    run,
    workspace,
    write_tiny_data,
)
from mutation import mutated
from torch import Tensor, nn

from selfalign.core.errors import SelfalignError
from selfalign.engines.model_check import check_model
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.server import export
from selfalign.engines.transformers import Transformers
from selfalign.engines.vllm_engine import VLLM
from selfalign.models import checkpoint
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.config import LoRA, ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.quantization import quantise_on_load
from selfalign.stages.sft import sft
from selfalign.training.config import TrainableWeights

bitsandbytes: ModuleType = pytest.importorskip("bitsandbytes", reason="needs the extra qlora")

IDS = torch.tensor([[5, 77, 300, 41, 8, 9]])
QUANTISED = {"path": "random:tiny", "quantization": "nf4", "lora": LoRA(rank=4)}


def logits_of(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.model(input_ids=IDS).logits


def quantised_layers(policy: Policy) -> list[str]:
    return [name for name, module in policy.model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    return fetch_pretrained(ModelConfig(**QUANTISED), tmp_path_factory.mktemp("nf4"))


def train(base: PolicyCheckpoint, folder: Path) -> PolicyCheckpoint:
    """A policy after two steps of SFT on an adapter, loud enough to be told from its base."""
    taught = [demonstration(f"t{n}", f"Say one thing about {word}.") for n, word in enumerate(["bees", "rivers"])]
    given, policy = records_artifact(folder / "given", demonstrations=taught), policy_artifact(base)
    out = workspace(folder / "M1")
    adapter = TrainableWeights(dtype="float32", lora=LoRA(rank=4), seed=0)
    settings = optimization(learning_rate=0.05, epochs=2)
    sft(out, policy=policy, base=policy, demonstrations=given, optimization=settings, weights=adapter)
    return PolicyCheckpoint(out.path)


def test_linear_layers_are_in_four_bits_and_the_output_layer_embeddings_and_norms_are_not(
    quantised: PolicyCheckpoint, tiny_policy: PolicyCheckpoint
) -> None:
    policy, plain = quantised.load("float32"), tiny_policy.load("float32")
    assert len(quantised_layers(policy)) == 2 * 7
    assert type(policy.model.get_output_embeddings()) is nn.Linear
    kept = {name: p.dtype for name, p in policy.model.named_parameters() if p.dtype != torch.uint8}
    assert set(kept.values()) == {torch.float32}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"} <= kept.keys()
    assert policy.model.num_parameters() == plain.model.num_parameters()
    distance = float((logits_of(policy) - logits_of(plain)).abs().max())
    assert 0 < distance < 0.2


def test_quantisation_is_part_of_what_identifies_a_policy_and_those_trained_from_it(
    quantised: PolicyCheckpoint, tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    assert quantised.digest != tiny_policy.digest
    trained = train(quantised, tmp_path)
    assert trained.quantization == {"quantization": "nf4"}
    unquantised = {name: digest for name, digest in trained.weights.items() if name != "quantization"}
    assert unquantised["base"] == quantised.digest
    assert trained.digest != checkpoint.digest_json(unquantised)


def test_adapter_stays_beside_its_quantised_base_and_scores_as_it_was_trained(tmp_path: Path) -> None:
    base_folder = tmp_path / "M0"
    base_folder.mkdir()
    base = fetch_pretrained(ModelConfig(**QUANTISED), base_folder)
    trained = train(base, tmp_path)
    in_training, scoring = trained.load("float32", trainable=True), trained.load("float32")
    assert torch.equal(logits_of(scoring), logits_of(in_training))
    assert hasattr(scoring.model, "peft_config")
    assert len(quantised_layers(scoring)) == 2 * 7
    assert not any(p.requires_grad for p in scoring.model.parameters())
    assert float((logits_of(scoring) - logits_of(base.load("float32"))).abs().max()) > 0.01
    trainable = {name for name, p in in_training.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def dequantised(policy: Policy) -> nn.Module:
    """A copy of the model whose 4-bit layers are plain ones with the values that they stand for."""
    plain = copy.deepcopy(policy.model)
    for name, layer in policy.model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = values.float()
            plain.set_submodule(name, linear)
    return plain


def test_gradients_are_those_of_the_dequantised_weights_after_an_inference_too(quantised: PolicyCheckpoint) -> None:
    policy = quantised.load("float32")
    plain = dequantised(policy)
    logits_of(policy)  # Where bitsandbytes repacks layers for inference, it does so here.
    gradients: list[Tensor] = []
    for model in (policy.model, plain):
        model.train()
        inputs = policy.model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        loss = logits.log_softmax(-1)[0, torch.arange(5), IDS[0, 1:]].sum()
        gradients += torch.autograd.grad(loss, inputs)
    assert torch.allclose(logits_of(policy), plain(input_ids=IDS).logits, rtol=0, atol=1e-5)
    assert float(gradients[1].abs().max()) > 0.1
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("not (trainable or keep_adapter or self.quantization)", "not (trainable or keep_adapter)"),
        ('"base": base.digest, **base.quantization, ', '"base": base.digest, '),
        ('if self.weights.get("quantization") == "nf4" else {}', "if not self.weights else {}"),
    ],
    ids=["merged", "forgotten by the adapter", "not quantised"],
)
def test_other_ways_to_load_a_quantised_policy_are_caught(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mutated(checkpoint, old, new) as copy:
        for name in ("load", "save"):
            monkeypatch.setattr(PolicyCheckpoint, name, getattr(copy.PolicyCheckpoint, name))
        with pytest.raises((AssertionError, UserWarning)):  # peft warns of merging, which is an error here
            test_adapter_stays_beside_its_quantised_base_and_scores_as_it_was_trained(tmp_path)


def test_policy_writes_what_it_finds_likeliest(quantised: PolicyCheckpoint, tmp_path: Path) -> None:
    trained = train(quantised, tmp_path)
    generator = Transformers(dtype="float32").load(trained)
    [[written]] = generator.generate(
        [Request(prompt=IDS[0].tolist(), seeds=[0])], Sampling(temperature=0, max_new_tokens=1)
    )
    best = logits_of(trained.load("float32"))[0, -1].argmax()
    assert written.text == generator.tokenizer.decode(best, skip_special_tokens=True).strip()


def test_whole_run_trains_and_scores_one_quantised_policy(tmp_path: Path) -> None:
    """Every alignment checks that its policy starts where the stored reference was scored."""
    told = ["model.quantization=nf4", "model.lora.rank=4", "loss=sr_dpo", "iterations=1"]
    told += ["train.sft.epochs=1", "data.respond.candidates=2", "evaluate.sampling.max_new_tokens=4"]
    folder = run(tmp_path, *TINY_RUN, *write_tiny_data(tmp_path / "data"), *told)
    first = next(row for row in metrics(folder) if row["label"] == "M2" and row.get("align/step") == 1)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    policies = [PolicyCheckpoint(folder / "artifacts" / name) for name in ("M0", "M1", "M2")]
    assert len({files.digest for files in policies}) == 3
    assert all(files.quantization for files in policies)


def test_missing_package_is_named_with_what_to_install(
    quantised: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SelfalignError, match=r"model\.quantization=nf4 needs bitsandbytes: pip install 'selfalign\[qlora\]'"
    ):
        quantised.load("float32")


def test_full_training_of_quantised_weights_is_refused() -> None:
    with pytest.raises(SelfalignError, match=r"model\.quantization=nf4 freezes the weights, .* Set model\.lora\.rank"):
        ModelConfig(path="random:tiny", quantization="nf4")


@pytest.mark.parametrize("engine", ["vllm", "server"])
def test_engine_that_would_run_the_unquantised_base_is_refused(
    engine: str, quantised: PolicyCheckpoint, tmp_path: Path
) -> None:
    told = ["model.quantization=nf4", "model.lora.rank=4", f"engine={engine}"]
    command = ["engine.command='run {weights} {port}'"] if engine == "server" else []
    with pytest.raises(SelfalignError, match=f"engine={engine} cannot run a policy in 4 bits: set engine="):
        composed("experiment=smoke", *told, *command)
    with pytest.raises(SelfalignError, match=f"engine={engine} cannot run a policy in 4 bits"):
        VLLM().arguments(quantised) if engine == "vllm" else export(quantised, tmp_path, "float32")


def test_quantised_layers_go_to_the_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate refuses to train what was put on "cuda" where it takes "cuda:0" itself."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert quantise_on_load(torch.float32, "cuda")["device_map"] == {"": 3}
    assert quantise_on_load(torch.float32, "cpu")["device_map"] == {"": "cpu"}


@pytest.mark.filterwarnings("ignore:bitsandbytes:UserWarning")
def test_layers_that_were_repacked_for_inference_are_noticed_when_the_model_is_fetched(
    quantised: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks layers only on a CPU with AVX-512 BF16")
    assert check_model(quantised, "float32")["scores"] == "packed"
    monkeypatch.setattr(checkpoint, "keep_layers_differentiable", lambda model: None)
    with pytest.raises(SelfalignError, match=r"the gradient before model\.layers\.0\.self_attn\.\w_proj is lost"):
        check_model(quantised, "float32")

"""Selected log-probabilities against log_softmax in float64, and the models that must be refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from selfalign.core.errors import SelfalignError
from selfalign.models import logprobs
from selfalign.models.logprobs import logit_shape, score_responses_only, selected_logps

ROWS, HIDDEN, VOCABULARY = 11, 8, 37


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output embedding, targets (two of them the same), and a weight for each token's gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[3] = targets[4]
    return hidden, weight, targets, torch.randn(ROWS, generator=generator)


def expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, slopes: Tensor, scale: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and both gradients through full logits and log_softmax, in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = scale * torch.einsum("th,vh->tv", hidden, weight)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    values = logits.log_softmax(1)[torch.arange(len(targets)), targets]
    (values * slopes.double()).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return values.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 2.0), (3.0, 5.0)])
@pytest.mark.parametrize("tile_elements", [1, 3 * VOCABULARY, 1 << 24], ids=["row_by_row", "tiles_of_3", "one_tile"])
@pytest.mark.parametrize("kept_elements", [0, 7 * VOCABULARY, 1 << 24], ids=["keep_none", "keep_two_tiles", "keep_all"])
def test_values_and_gradients_equal_log_softmax_in_float64(
    monkeypatch: pytest.MonkeyPatch, tile_elements: int, kept_elements: int, scale: float, softcap: float
) -> None:
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", tile_elements)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept_elements)
    hidden, weight, targets, slopes = inputs()
    values, hidden_gradient, weight_gradient = expected(hidden, weight, targets, slopes, scale, softcap)

    hidden.requires_grad_()
    weight.requires_grad_()
    logps, _ = selected_logps(hidden, weight, targets, scale=scale, softcap=softcap)
    (logps * slopes).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(logps.double(), values, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden_gradient, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(weight.grad.double(), weight_gradient, rtol=1e-5, atol=2e-5)


def test_bias_of_the_output_layer_is_in_the_values_and_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 3 * VOCABULARY)
    hidden, weight, targets, slopes = inputs()
    bias = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))
    # The bias is the weight of one more hidden value, which is always 1.
    wider = torch.cat((hidden, torch.ones(len(hidden), 1)), dim=1), torch.cat((weight, bias[:, None]), dim=1)
    values, hidden_gradient, weight_gradient = expected(*wider, targets, slopes, 0.5, 4.0)
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    logps, _ = selected_logps(hidden, weight, targets, bias=bias, scale=0.5, softcap=4.0)
    gradients = torch.autograd.grad((logps * slopes).sum(), tensors)
    torch.testing.assert_close(logps.double(), values, rtol=1e-5, atol=2e-5)
    for found, right in zip(
        gradients, (hidden_gradient[:, :-1], weight_gradient[:, :-1], weight_gradient[:, -1]), strict=True
    ):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=2e-5)


def test_one_token_worked_by_hand() -> None:
    # Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. d log p₁ / d logits = onehot(1) - p.
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], requires_grad=True)
    logp, _ = selected_logps(hidden, weight, torch.tensor([1]))
    assert float(logp.detach()) == pytest.approx(math.log(2 / 8), rel=1e-6)
    logp.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[-1 / 8], [6 / 8], [-5 / 8]]))
    assert hidden.grad is not None
    # Σ slope·weight = 6/8 ln 2 - 5/8 ln 5
    assert float(hidden.grad) == pytest.approx(0.75 * math.log(2) - 0.625 * math.log(5), rel=1e-5)


@pytest.mark.parametrize("tile_elements", [1, 1 << 24], ids=["row_by_row", "one_tile"])
def test_hits_are_the_targets_with_the_highest_logit(monkeypatch: pytest.MonkeyPatch, tile_elements: int) -> None:
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", tile_elements)
    hidden, weight, targets, _ = inputs()
    likeliest = (hidden @ weight.T).argmax(1)
    targets[::2] = likeliest[::2]
    _, hits = selected_logps(hidden.requires_grad_(), weight, targets)
    assert hits.tolist() == (likeliest == targets).tolist()
    assert hits[::2].all()
    assert not hits.all()
    assert not hits.requires_grad


@pytest.mark.parametrize(
    ("kept_elements", "gradient", "made"),
    [
        (1 << 24, True, [(3, True), (3, True), (3, True), (2, True)]),
        (7 * VOCABULARY, True, [(3, True), (3, True), (3, False), (2, False), (3, True), (2, True)]),
        (1 << 24, False, [(3, False), (3, False), (3, False), (2, False)]),
    ],
    ids=["all_kept", "two_kept", "no_gradient"],
)
def test_logits_are_made_in_tiles_whose_slopes_are_kept_up_to_a_size(
    monkeypatch: pytest.MonkeyPatch, kept_elements: int, gradient: bool, made: list[tuple[int, bool]]
) -> None:
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 3 * VOCABULARY)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept_elements)
    tiles: list[tuple[int, bool]] = []
    original = logprobs._score_tile

    def watched(hidden: Tensor, *rest: Any) -> Any:
        tiles.append((len(hidden), rest[-1]))
        return original(hidden, *rest)

    monkeypatch.setattr(logprobs, "_score_tile", watched)
    hidden, weight, targets, _ = inputs()
    with torch.set_grad_enabled(gradient):
        logps, _ = selected_logps(hidden.requires_grad_(), weight, targets)
    if gradient:
        logps.sum().backward()
    assert tiles == made


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bfloat16_stays_within_its_rounding_of_float64(weight_dtype: torch.dtype) -> None:
    hidden, weight, targets, slopes = inputs()
    hidden, weight = hidden.bfloat16(), weight.to(weight_dtype)
    values, hidden_gradient, weight_gradient = expected(hidden, weight.bfloat16(), targets, slopes)
    hidden.requires_grad_()
    weight.requires_grad_()
    logps, _ = selected_logps(hidden, weight, targets)
    (logps * slopes).sum().backward()
    assert logps.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, weight_dtype)
    # A logit of 8 has a spacing of 2^-5 in bfloat16.
    torch.testing.assert_close(logps.double(), values, rtol=0, atol=2**-5)
    torch.testing.assert_close(hidden.grad.double(), hidden_gradient, rtol=2**-5, atol=2**-5)
    torch.testing.assert_close(weight.grad.double(), weight_gradient, rtol=2**-5, atol=2**-5)


def test_normalisation_is_done_in_float32_even_for_bfloat16() -> None:
    """-ln 1000 = -6.907755 would be -6.90625 in bfloat16; 500 such tokens would be off by 0.75 nats."""
    hidden = torch.zeros(500, HIDDEN, dtype=torch.bfloat16)
    logps, _ = selected_logps(hidden, torch.ones(1000, HIDDEN, dtype=torch.bfloat16), torch.arange(500))
    torch.testing.assert_close(logps, torch.full((500,), -math.log(1000)), rtol=1e-6, atol=0)


def test_weight_gradients_of_many_tokens_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, 1/2 is added 600 times: a bfloat16 sum stands still at 128, where its spacing is 1."""
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 1)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(600, dtype=torch.long)
    selected_logps(torch.ones(600, 1, dtype=torch.bfloat16), weight, targets)[0].sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float().flatten(), torch.tensor([300.0, -300.0]))


def test_frozen_embedding_gets_no_gradient_and_hidden_states_the_same_as_before() -> None:
    hidden, weight, targets, slopes = inputs()
    _, hidden_gradient, _ = expected(hidden, weight, targets, slopes)
    (selected_logps(hidden.requires_grad_(), weight, targets)[0] * slopes).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), hidden_gradient, rtol=1e-5, atol=1e-5)


def test_large_logits_neither_overflow_nor_lose_the_target() -> None:
    hidden = torch.tensor([[1e4], [1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logps, _ = selected_logps(hidden, weight, torch.tensor([0, 1]))
    assert logps.tolist() == [0.0, -2e4]
    logps.sum().backward()
    assert hidden.grad is not None
    # Certain of token 0: slope 0 there; for token 1, weight₁ - weight₀ = -2.
    assert hidden.grad.tolist() == [[0.0], [-2.0]]


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({}, (1.0, 0.0)),
        ({"logit_scale": 0.0625}, (0.0625, 0.0)),
        ({"logits_scaling": 8.0}, (0.125, 0.0)),
        ({"lm_head_multiplier": 0.25}, (0.25, 0.0)),
        ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ({"final_logit_softcapping": None}, (1.0, 0.0)),
    ],
    ids=["llama", "cohere", "granite", "falcon_h1", "gemma2", "gemma3"],
)
def test_logit_shape_is_read_off_the_config(attributes: dict[str, Any], shape: tuple[float, float]) -> None:
    assert logit_shape(type("Config", (), attributes)) == shape


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    return LlamaForCausalLM(config)


def test_scoring_model_returns_only_what_is_asked_for() -> None:
    model = tiny_llama().eval()
    ids = torch.tensor([[5, 9, 3, 7], [4, 4, 8, 0]])
    with torch.no_grad():
        full = model(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
        score_responses_only(model)
        logps = model(input_ids=ids, logit_positions=torch.tensor([6, 1]), targets=torch.tensor([8, 3]))
    torch.testing.assert_close(logps, torch.stack([full[6, 8], full[1, 3]]), rtol=1e-5, atol=1e-5)


def test_scoring_model_can_be_asked_to_score_again() -> None:
    model = tiny_llama().eval()
    inputs = {"input_ids": torch.tensor([[5, 9]]), "logit_positions": torch.tensor([0]), "targets": torch.tensor([9])}
    with torch.no_grad():
        score_responses_only(model)
        first = model(**inputs)
        score_responses_only(model)
        torch.testing.assert_close(model(**inputs), first, rtol=0, atol=0)


def test_model_that_is_training_with_dropout_can_be_made_to_score_and_goes_on_training() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    score_responses_only(model)
    assert model.training


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_output_layer_with_an_adapter_is_refused(option: str) -> None:
    from peft import LoraConfig, get_peft_model

    targets = {"target_modules": ["q_proj"], option: ["lm_head"]}
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    with pytest.raises(SelfalignError, match=r"its output layer is a .*, not a plain linear one"):
        score_responses_only(adapted)


def test_output_layer_of_a_special_kind_is_refused() -> None:
    """A quantised layer is a Linear whose `weight` is not what it multiplies with."""

    class Quantised(nn.Linear):
        pass

    model = tiny_llama()
    model.set_output_embeddings(Quantised(16, 32, bias=False))
    with pytest.raises(SelfalignError, match="its output layer is a Quantised, not a plain linear one"):
        score_responses_only(model)


def test_adapter_elsewhere_scores_like_the_adapted_model() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad(), adapted.disable_adapter():
        base = adapted(input_ids=ids).logits.log_softmax(-1)[0, 2, 7]
    with torch.no_grad():
        full = adapted(input_ids=ids).logits.log_softmax(-1)[0, 2, 7]
        score_responses_only(adapted)
        logps = adapted(input_ids=ids, logit_positions=torch.tensor([2]), targets=torch.tensor([7]))
    assert abs(float(full - base)) > 1e-3, "the adapter does nothing, so the comparison says nothing"
    torch.testing.assert_close(logps, full[None], rtol=1e-5, atol=1e-5)

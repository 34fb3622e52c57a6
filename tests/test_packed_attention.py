"""Packed and padded batches against one plain forward pass a response, for every architecture family we name."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from selfalign.core.errors import SelfalignError
from selfalign.models import packed_attention
from selfalign.models.batches import Before, SharedPrompt, make_batch, pack, share_prompt
from selfalign.models.checkpoint import autocast
from selfalign.models.logprobs import score_responses_only
from selfalign.models.packed_attention import PackedLayout, enable_packing, is_packing
from selfalign.models.prefix_tree import PrefixTree
from selfalign.training.objective import forward, frozen_logps

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
UNGROUPED = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
WINDOW = 5
"""Shorter than every sequence below, so that a window that is ignored shows."""

ARCHITECTURES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2_window": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12),
    "mistral_window": transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma": transformers.GemmaConfig(**SIZES, head_dim=12),
    "gemma3_window": transformers.Gemma3TextConfig(**SIZES, head_dim=12, sliding_window=WINDOW),
    "gemma2_cap_window": transformers.Gemma2Config(
        **SIZES, head_dim=12, sliding_window=WINDOW, attn_logit_softcapping=2.0
    ),
    "gpt_oss_sink_window": transformers.GptOssConfig(
        **SIZES,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "phi_head_bias": transformers.PhiConfig(**SIZES),
    "gpt_neox": transformers.GPTNeoXConfig(**UNGROUPED, use_parallel_residual=False),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None
    ),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.3),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=3.0, attention_multiplier=0.7),
}


def build(config: Any) -> Any:
    """A model with weights large enough that every part of it matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Each architecture's model, unchanged: copy before switching anything."""
    return {name: build(config) for name, config in ARCHITECTURES.items()}


def scoring(model: Any, *, packed: bool) -> Any:
    model = copy.deepcopy(model)
    if packed:
        assert enable_packing(model)
    score_responses_only(model)
    return model


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def groups() -> list[SharedPrompt]:
    """A pair, an SFT example, a pair with one response of a single token, and responses with given tokens."""
    return [
        SharedPrompt(id="pair", prompt=draw(9, 1), responses=[draw(7, 2), draw(12, 3)], num_context_tokens=[0, 0]),
        SharedPrompt(id="single", prompt=draw(3, 4), responses=[draw(8, 5)], num_context_tokens=[0]),
        SharedPrompt(id="short", prompt=draw(6, 6), responses=[draw(1, 7), draw(4, 8)], num_context_tokens=[0, 0]),
        SharedPrompt(id="given", prompt=draw(5, 9), responses=[draw(6, 10), draw(9, 11)], num_context_tokens=[2, 8]),
    ]


def tree() -> list[SharedPrompt]:
    """Judgements that begin with one rubric, a response in two pairs, and a text that begins another."""
    rubric, asked = draw(6, 20), draw(4, 21)
    judged = [[*rubric, *asked, *draw(5, seed)] for seed in (22, 23)]
    pairs = [[draw(5, 30), draw(6, 31)], [draw(5, 30), draw(1, 32)]]
    return [
        SharedPrompt(id="judged", prompt=judged[0], responses=[draw(3, 24)], num_context_tokens=[0]),
        SharedPrompt(id="other", prompt=[*rubric, *draw(7, 25)], responses=[draw(4, 26)], num_context_tokens=[1]),
        SharedPrompt(id="again", prompt=judged[1], responses=[draw(2, 27)], num_context_tokens=[0]),
        *(SharedPrompt(id="pair", prompt=asked, responses=both, num_context_tokens=[0, 0]) for both in pairs),
        SharedPrompt(id="begun", prompt=rubric, responses=[[*asked, *draw(5, 22)[:2]]], num_context_tokens=[3]),
    ]


def plain_logps(model: Any, some: Sequence[SharedPrompt]) -> Tensor:
    """Summed log-probabilities by one forward pass over full logits for each response."""
    sums = []
    for group in some:
        for response, given in zip(group.responses, group.num_context_tokens, strict=True):
            ids = torch.tensor([[*group.prompt, *response]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scored = logps.gather(1, ids[0, 1:, None])[len(group.prompt) + given - 1 :]
            assert len(scored) == len(response) - given
            sums.append(scored.sum())
    return torch.stack(sums)


def batch_logps(model: Any, some: Sequence[SharedPrompt]) -> Tensor:
    batch = make_batch(model, some)
    return batch.sum_by_response(model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs))


def gradients(model: Any, sums: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum, so that no response stands for another."""
    (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("some", [groups(), tree()], ids=["groups", "tree"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_and_padded_batches_equal_plain_passes_in_values_and_gradients(
    models: Any, name: str, some: list[SharedPrompt]
) -> None:
    model = copy.deepcopy(models[name])
    expected = plain_logps(model, some)
    expected_gradients = gradients(model, expected)
    assert len(expected_gradients) == len(list(model.parameters()))
    for packed in (True, False):
        other = scoring(models[name], packed=packed)
        assert is_packing(other) == packed
        sums = batch_logps(other, some)
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
        found = gradients(other, sums)
        assert found.keys() == expected_gradients.keys()
        for parameter, gradient in expected_gradients.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5 * max(1.0, scale))


def behind_x() -> tuple[list[SharedPrompt], list[SharedPrompt]]:
    """Pairs behind x, two of which begin alike, and behind x with p after it; and one whose p stands before x."""
    begun = draw(4, 40)
    asked = [[*begun, *draw(17, 41)], [*begun, *draw(21, 42)], draw(9, 43)]
    both = [[draw(7, 50 + i), draw(5, 60 + i)] for i in range(3)]
    p, ends = draw(6, 44), draw(2, 45)
    given = [[*asked[0], *p, *ends], [*asked[1], *p, *ends], [*p, *asked[2]]]

    def pairs(prompts: list[list[int]]) -> list[SharedPrompt]:
        return [
            SharedPrompt(id=str(i), prompt=prompt, responses=responses, num_context_tokens=[0, i])
            for i, (prompt, responses) in enumerate(zip(prompts, both, strict=True))
        ]

    return pairs([[*x, *ends] for x in asked[:2]] + asked[2:]), pairs(given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pass_goes_on_from_the_prompts_of_the_pass_before(models: Any, name: str, dtype: str) -> None:
    plain, given = behind_x()
    model = scoring(models[name], packed=True)
    with autocast(model.device, dtype):
        batch, _ = forward(model, plain, keep=True, training_pass=True)
        before = Before.of(batch, plain)
        assert before
        assert sum(pack(given, before).inputs["layout"].lengths) < sum(pack(given).inputs["layout"].lengths)
        found = frozen_logps(model, given, before)
        expected = frozen_logps(model, given)
    within = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.3}
    torch.testing.assert_close(found.chosen, expected.chosen, **within)
    torch.testing.assert_close(found.rejected, expected.rejected, **within)
    assert not found.chosen.requires_grad


def test_only_what_is_not_known_is_computed_again() -> None:
    plain, given = behind_x()
    before = Before(plain, pack(plain).inputs["layout"])
    alone, batch = pack(given[:2]), pack(given[:2], before)
    x = len({(at, *prompt[: at + 1]) for prompt in (plain[0].prompt, plain[1].prompt) for at in range(len(prompt) - 2)})
    assert batch.inputs["input_ids"].numel() == alone.inputs["input_ids"].numel() - x
    assert batch.targets.tolist() == alone.targets.tolist()
    # Of p before x nothing is known.
    assert pack(given[2:], before).inputs["input_ids"].tolist() == pack(given[2:]).inputs["input_ids"].tolist()


def test_nothing_is_kept_of_a_model_that_passes_a_layer_twice() -> None:
    plain, _ = behind_x()
    batch, layer = pack(plain), torch.nn.Identity()
    batch.inputs["layout"].kept = {}
    tensors = [torch.randn(1, 2, batch.inputs["input_ids"].numel(), 16) for _ in range(3)]
    for _ in range(2):
        packed_attention.packed_attention(layer, *tensors, None, layout=batch.inputs["layout"])
    assert Before.of(batch, plain) is None


def test_prompt_that_another_begins_with_is_computed_where_it_predicts_a_target() -> None:
    """The first prompt's last token is known from the second's, but its hidden state, which is needed, is not."""
    x = draw(12, 1)
    groups = [
        SharedPrompt(id=str(i), prompt=prompt, responses=[draw(3, 2 + i)], num_context_tokens=[0])
        for i, prompt in enumerate((x, [*x, 5, 6]))
    ]
    before = Before(groups, pack(groups).inputs["layout"])
    assert pack(groups, before).inputs["input_ids"].tolist() == pack(groups).inputs["input_ids"].tolist()


def test_the_window_matters_in_these_sequences() -> None:
    """Otherwise a window that packing ignores would go unnoticed above."""
    config = transformers.MistralConfig(**SIZES, sliding_window=WINDOW)
    wide = transformers.MistralConfig(**SIZES, sliding_window=None)
    with torch.no_grad():
        difference = plain_logps(build(config), groups()) - plain_logps(build(wide), groups())
    assert float(difference.abs().max()) > 0.01


def test_attention_that_does_more_than_packing_knows_is_an_error_that_names_it() -> None:
    tensors = [torch.ones(1, heads, 5, 8) for heads in (4, 2, 2)]
    with pytest.raises(SelfalignError, match="Identity uses 'score_bias' in its attention, which packing"):
        packed_attention.packed_attention(
            torch.nn.Identity(), *tensors, None, layout=PackedLayout(PrefixTree([[1] * 5])), score_bias=torch.ones(1)
        )


@pytest.mark.parametrize(
    "config",
    [
        transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
        transformers.RecurrentGemmaConfig(
            **{**SIZES, "num_hidden_layers": 3}, lru_width=32, attention_window_size=WINDOW, logits_soft_cap=1e4
        ),
    ],
    ids=["lfm2", "recurrent_gemma"],
)
def test_tokens_mixed_outside_attention_do_not_leak_between_responses(config: Any) -> None:
    """A convolution or recurrence runs over a packed row as if it were one text: pad, or refuse."""
    model = build(config)
    scored = copy.deepcopy(model)
    try:
        enable_packing(scored)
        score_responses_only(scored)
        sums = batch_logps(scored, groups())
    except SelfalignError:
        return
    with torch.no_grad():
        torch.testing.assert_close(sums, plain_logps(model, groups()), rtol=1e-4, atol=1e-4)


# Softcap, factor and divisor go by other names here than where `logit_shape` looks for them.
SHAPED_LOGITS: dict[str, dict[str, Any]] = {
    "RecurrentGemmaConfig": {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 3.0},
    "HyperCLOVAXConfig": {"logits_scaling": 3.0},
    "FalconH1Config": {
        "lm_head_multiplier": 0.3,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_d_ssm": 64,
    },
}


@pytest.mark.parametrize("name", SHAPED_LOGITS)
def test_logits_that_are_shaped_in_an_unknown_way_are_refused_or_shaped_right(name: str) -> None:
    model = build(getattr(transformers, name)(**SIZES | SHAPED_LOGITS[name]))
    scored = copy.deepcopy(model)
    try:
        score_responses_only(scored)
    except SelfalignError:
        return
    with torch.no_grad():
        torch.testing.assert_close(batch_logps(scored, groups()), plain_logps(model, groups()), rtol=1e-4, atol=1e-4)


def test_architecture_without_switchable_attention_is_padded_and_right(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    model = build(config)
    expected = plain_logps(model, groups())
    with caplog.at_level("INFO", logger="selfalign.models.packed_attention"):
        assert not enable_packing(model)
    assert "BloomForCausalLM cannot be packed; batches are padded instead" in caplog.text
    score_responses_only(model)
    assert "attention_mask" in make_batch(model, groups()).inputs
    torch.testing.assert_close(batch_logps(model, groups()), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "padded"])
def scorer(request: pytest.FixtureRequest, models: Any) -> Any:
    return scoring(models["llama"], packed=request.param)


@torch.no_grad()
def test_a_response_does_not_depend_on_what_else_is_in_the_batch(scorer: Any) -> None:
    together = batch_logps(scorer, groups()).tolist()
    alone = [value for group in groups() for value in batch_logps(scorer, [group]).tolist()]
    assert together == pytest.approx(alone, abs=1e-5)
    backwards = batch_logps(scorer, groups()[::-1]).tolist()
    by_group = {"given": backwards[:2], "short": backwards[2:4], "single": backwards[4:5], "pair": backwards[5:]}
    assert [value for group in groups() for value in by_group[group.id]] == pytest.approx(together, abs=1e-5)


@torch.no_grad()
def test_a_response_does_not_see_its_neighbour_within_the_group(scorer: Any) -> None:
    pair = groups()[0]
    before = batch_logps(scorer, [pair]).tolist()
    other = SharedPrompt(
        id="pair", prompt=pair.prompt, responses=[draw(4, 50), pair.responses[1]], num_context_tokens=[0, 0]
    )
    after = batch_logps(scorer, [other]).tolist()
    assert after[1] == pytest.approx(before[1], abs=1e-5)
    assert abs(after[0] - before[0]) > 0.1


@torch.no_grad()
def test_changing_the_first_prompt_token_changes_every_response(scorer: Any) -> None:
    for group in groups():
        changed = [group.prompt[0] % (VOCABULARY - 1) + 1, *group.prompt[1:]]
        other = SharedPrompt(
            id=group.id, prompt=changed, responses=group.responses, num_context_tokens=group.num_context_tokens
        )
        difference = batch_logps(scorer, [group]) - batch_logps(scorer, [other])
        assert float(difference.abs().min()) > 1e-4


@torch.no_grad()
def test_sharing_the_beginning_of_prompts_equals_separate_prompts(scorer: Any) -> None:
    prompts = [[*draw(6, 20), *draw(3, 21)], [*draw(6, 20), *draw(5, 22)], [*draw(6, 20), *draw(3, 21), 7, 8]]
    responses = [draw(4, 23), draw(1, 24), draw(6, 25)]
    shared = share_prompt("q", prompts, responses)
    assert shared.prompt == draw(6, 20)
    assert shared.num_context_tokens == [3, 5, 5]
    assert [[*shared.prompt, *tail] for tail in shared.responses] == [
        [*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)
    ]
    separate = [
        SharedPrompt(id=str(i), prompt=prompt, responses=[response], num_context_tokens=[0])
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    torch.testing.assert_close(
        batch_logps(scorer, [*groups(), shared])[-3:], batch_logps(scorer, separate), rtol=1e-5, atol=1e-5
    )


def test_prompts_with_nothing_in_common_are_scored_right(scorer: Any) -> None:
    prompts, responses = [[5, 6, 7], [9, 6, 7]], [draw(4, 30), draw(2, 31)]
    shared = share_prompt("q", prompts, responses)
    separate = [
        SharedPrompt(id=str(i), prompt=prompt, responses=[response], num_context_tokens=[0])
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            batch_logps(scorer, [groups()[0], shared])[-2:], batch_logps(scorer, separate), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("window", [None, WINDOW])
def test_attention_over_the_whole_row_is_that_of_each_branch(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    # Uncompiled: the compiled kernel, and gradients, are for the GPU.
    monkeypatch.setattr(packed_attention, "_compiled_flex", lambda: flex_attention)
    layout = PackedLayout(PrefixTree([sequence for group in [*groups(), *tree()] for sequence in group.sequences()]))
    tensors = [torch.randn(1, heads, sum(layout.lengths), 16) for heads in (4, 2, 2)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That it is not compiled.
        found = packed_attention.whole_row(*tensors, layout, 0.3, window)
    torch.testing.assert_close(
        found, packed_attention.branch_by_branch(*tensors, layout, 0.3, window), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("window", [None, WINDOW])
def test_attention_over_a_row_that_goes_on_is_that_of_each_branch(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(packed_attention, "_compiled_flex", lambda: flex_attention)
    plain, given = behind_x()
    layout = pack(given, Before(plain, pack(plain).inputs["layout"])).inputs["layout"]
    own, seen = sum(layout.lengths), len(layout.tree.ids)
    assert own < seen
    tensors = [torch.randn(1, heads, tokens, 16) for heads, tokens in ((4, own), (2, seen), (2, seen))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That it is not compiled.
        found = packed_attention.whole_row(*tensors, layout, 0.3, window)
    torch.testing.assert_close(
        found, packed_attention.branch_by_branch(*tensors, layout, 0.3, window), rtol=1e-5, atol=1e-5
    )


def test_flex_attention_that_fails_or_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any) -> Tensor:
        raise RuntimeError("no compiler\nlong story")

    def wrong(*args: Any) -> Tensor:
        return packed_attention.branch_by_branch(*args) * 1.1

    found = []
    with caplog.at_level("INFO", logger="selfalign.models.packed_attention"):
        for other in (fails, wrong, packed_attention.branch_by_branch):
            monkeypatch.setattr(packed_attention, "whole_row", other)
            found.append(packed_attention.flex_works.__wrapped__(torch.device("cpu")))
    assert found == [False, False, True]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "(RuntimeError: no compiler); attention goes branch by branch" in caplog.records[0].message
    assert "off" in caplog.records[1].message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_batches_equal_plain_passes_on_a_gpu() -> None:
    # FlexAttention takes heads of 16 and more.
    plain = build(transformers.LlamaConfig(**SIZES, head_dim=16))
    model = copy.deepcopy(plain).cuda()
    with torch.no_grad():
        expected = torch.cat([plain_logps(plain, [group]) for group in groups()])
    enable_packing(model)
    score_responses_only(model)
    batch = make_batch(model, groups()).to(model.device)
    sums = batch.sum_by_response(model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs))
    torch.testing.assert_close(sums.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert packed_attention.flex_works(model.device)
    sums.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

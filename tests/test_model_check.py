"""The check of a fetched model: what is packed, padded, written one by one or refused, and that it is right."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LONGROPE, REFUSED, SIZES, Architecture, as_policy, matrix
from builders import ROOT, logits_of
from safetensors.torch import load_file, save_file
from thinking_families import FAMILIES, thinking_tokenizer
from tool_templates import TEMPLATES, tokenizer_of
from torch import Tensor, nn
from transformers import PretrainedConfig

from selfalign.core.errors import SelfalignError
from selfalign.engines import model_trials
from selfalign.engines.model_check import check_model, check_vocabulary
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.transformers import TransformersGenerator
from selfalign.models.batches import SharedPrompt, make_batch
from selfalign.models.capabilities import Capabilities
from selfalign.models.chat_template import ASKED, RULE, markers_of, writes_all
from selfalign.models.checkpoint import CONTEXT_NAMES, Policy, PolicyCheckpoint, longest_sequence
from selfalign.models.prompt_states import PromptStates
from selfalign.models.scorer import LogProbScorer, make_scoring, set_dropout

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Of other people's models.


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")


def greedy(policy: Policy, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What a loop without a cache writes, of tokens that the tokenizer has."""
    known = len(policy.tokenizer)
    texts: list[list[int]] = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(count):
                logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                ids.append(int(logits[:known].argmax()))
            texts.append(ids[len(prompt) :])
    return texts


def plain_logps(model: Any, groups: list[SharedPrompt]) -> Tensor:
    """Summed log-probabilities by a plain forward pass for each response."""
    sums: list[Tensor] = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            sums.append(logps.gather(1, ids[0, 1:, None])[len(group.prompt) - 1 :].sum())
    return torch.stack(sums)


def plain_sums(policy: Policy, groups: list[SharedPrompt]) -> Tensor:
    """`plain_logps` without gradient."""
    with torch.no_grad():
        return plain_logps(policy.model, groups)


def gradients(model: Any, sums: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum, so that no response stands for another."""
    (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


GROUPS = [
    SharedPrompt(
        id="long", prompt=list(range(40, 70)), responses=[[7, 8, 9, 10, 11, 12, 13], [21, 5]], num_context_tokens=[0, 0]
    ),
    SharedPrompt(id="short", prompt=[3, 4, 5], responses=[[30, 31, 32], [33]], num_context_tokens=[0, 0]),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_used_in_the_way_that_is_right_for_it(name: str, tmp_path: Path) -> None:
    one = ARCHITECTURES[name]
    files = as_policy(one.build(), tmp_path)
    counts = check_model(files, "float32")
    can = Capabilities.load(tmp_path)
    assert (can.packs, can.writes, can.dropout) == (one.packs, one.writes, one.dropout)
    assert (counts["scores"], counts["has_router_loss"]) == (one.scores, one.routes)
    assert any("cannot be packed" in note for note in counts["notes"]) != one.packs
    assert any("batches are padded instead" in note for note in counts["notes"]) == (one.scores == "padded")

    policy = files.load("float32", device="cpu")
    own = plain_sums(policy, GROUPS)
    begun = GROUPS[0].prompt
    prompts, count = [begun, GROUPS[1].prompt, [*begun[:8], 9, 10], begun[:12]], 8
    written = greedy(policy, prompts, count)
    generator = TransformersGenerator(policy, max_batch_tokens=1 << 20)
    generator.stops = torch.tensor([written[1][3]])
    requests = [Request(prompt=prompt, seeds=[0, 1]) for prompt in prompts]
    made = generator.generate(requests, Sampling(temperature=0, max_new_tokens=count))
    for text, completions in zip(written, made, strict=True):
        stop = text.index(written[1][3]) + 1 if written[1][3] in text else count
        assert [completion.ids for completion in completions] == [text[:stop]] * 2

    expected = gradients(policy.model, plain_logps(policy.model, GROUPS))
    trained = files.load("float32", device="cpu")
    make_scoring(trained)
    batch = make_batch(trained.model, GROUPS)
    scores = trained.model(
        logit_positions=batch.logit_positions, targets=batch.targets, training_pass=True, **batch.inputs
    )
    assert (scores.router_loss is not None) == counts["has_router_loss"]
    sums = batch.sum_by_response(scores.logps)
    torch.testing.assert_close(sums, own, rtol=1e-5, atol=0)
    found = gradients(trained.model, sums)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # A gradient that is 0 but for rounding, such as that of a bias on all keys, has no relative error.
        distance, size = float((found[parameter] - gradient).norm()), float(gradient.norm())
        assert distance <= 1e-5 * size + 1e-5, parameter


def test_responses_go_on_from_their_prompts_states_only_where_it_saves_enough(tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES["LFM2"].build(), tmp_path)
    Capabilities(packs=False, shares_states=True).save(tmp_path)
    policy = files.load("float32", device="cpu", trainable=True)
    make_scoring(policy)

    def layout(prompt: int, responses: int) -> bool:
        group = SharedPrompt(
            id="a", prompt=[5] * prompt, responses=[[7, 8]] * responses, num_context_tokens=[0] * responses
        )
        return "layout" in make_batch(policy.model, [group]).inputs

    assert (layout(40, 1), layout(2, 2), layout(40, 2), layout(4, 8)) == (False, False, True, True)
    assert not PromptStates([(40, [2, 2]), (0, [2, 2])]).saves
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not layout(40, 2)  # Activations that are computed again have no cache.


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RWKV", "RwkvForCausalLM: an inference pass spoils the gradient of the pass before it"),
        ("CPM-Ant", "CpmAntForCausalLM gives other probabilities when it writes than when it reads the whole text"),
    ],
)
def test_model_that_could_not_be_scored_is_refused_when_it_is_fetched(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=said):
        check_model(as_policy(REFUSED[name].build(), tmp_path), "float32")


def test_page_of_models_has_the_matrix_of_the_tests() -> None:
    assert matrix() in (ROOT / "docs/models.md").read_text(encoding="utf-8")


def template_matrix(plain: Any) -> str:
    """The table of chat templates that the tests rebuild; tools are tested with some of them."""
    rows = [["family", "thinks between", "system turn", "tools"], ["---"] * 4]
    for name in sorted({*FAMILIES, *TEMPLATES}):
        thinking = thinking_tokenizer(plain, name) if name in FAMILIES else None
        tokenizer = thinking or tokenizer_of(plain, name)
        markers = markers_of(thinking) if thinking else None
        between = " … ".join(f"`{word.strip()}`" for word in (markers.open, markers.end)) if markers else "–"
        between = between.replace("|", r"\|")
        system = "yes" if writes_all(tokenizer, [RULE, *ASKED]) else "refused"
        rows.append([f"`{name}`", between, system, "yes" if name in TEMPLATES else "–"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_page_of_models_has_the_templates_of_the_tests(tiny_tokenizer: Any) -> None:
    assert template_matrix(tiny_tokenizer) in (ROOT / "docs/models.md").read_text(encoding="utf-8")


# --- dropout -----------------------------------------------------------------------------------------------------


def logits_in_training(model: Any, rate: float) -> tuple[Tensor, Tensor]:
    """Two passes in training mode."""
    ids = torch.arange(3, 20)[None]
    set_dropout(model, rate)
    model.train()
    with torch.no_grad():
        return model(input_ids=ids).logits, model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("LlamaConfig", {"attention_dropout": 0}),
        ("LlamaConfig", {"attention_dropout": 0.3}),
        ("FalconConfig", {"new_decoder_architecture": True, "hidden_dropout": 0.3, "attention_dropout": 0.3}),
        ("FalconConfig", {"new_decoder_architecture": True}),
        ("PersimmonConfig", {"attention_dropout": 0.3}),
        ("GPTJConfig", {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}),
        ("PhimoeConfig", {"num_local_experts": 4}),
    ],
    ids=["integer_rate", "llama", "falcon", "falcon_default", "persimmon", "gptj", "router_noise"],
)
def test_dropout_is_what_is_asked_for_and_the_saved_config_is_the_models_own(
    config: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4} if "GPTJ" in config else SIZES
    model = Architecture(config, {**sizes, **settings}).build()
    before = model.config.to_dict()
    for rate, differs in ((0.0, False), (0.5, True), (0.0, False)):
        one, other = logits_in_training(model, rate)
        assert torch.equal(one, other) != differs
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).to_dict().get("attention_dropout") == before.get(
        "attention_dropout"
    )


def test_no_layer_is_left_out_in_training(tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": None}
    model = Architecture("OPTConfig", {**sizes, **heads, "dropout": 0.0, "layerdrop": 0.5}).build()
    files = as_policy(model, tmp_path)
    check_model(files, "float32")
    policy = files.load("float32")
    plain = plain_sums(policy, GROUPS)
    make_scoring(policy)
    policy.model.train()
    batch = make_batch(policy.model, GROUPS)
    for _ in range(8):
        logps = policy.model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs)
        torch.testing.assert_close(batch.sum_by_response(logps), plain, rtol=1e-4, atol=1e-4)


def test_noise_that_cannot_be_switched_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = as_policy(ARCHITECTURES["Llama"].build(), tmp_path)
    rates = iter([0.0, 0.3, 0.3])  # The first is that of the gradient's check.
    monkeypatch.setattr(model_trials, "set_dropout", lambda model, rate: set_dropout(model, next(rates)))
    with pytest.raises(SelfalignError, match="LlamaForCausalLM applies dropout in training even if it is set to 0"):
        check_model(files, "float32")


# --- gradient ----------------------------------------------------------------------------------------------------


class Deaf(nn.Module):
    """A layer that computes but lets no gradient back, as a kernel for inference."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *rest: Any, **more: Any) -> Any:
        return self.layer(hidden.detach(), *rest, **more)


class Wrong(torch.autograd.Function):
    """A backward that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: Deaf(model.model.norm), "LlamaForCausalLM: the gradient behind the embedding is lost"),
        (
            lambda model: _doubling(model.model.norm),
            r"the gradient behind the embedding says \S+ where log-probabilities change by",
        ),
    ],
    ids=["none", "twice"],
)
def test_model_whose_gradient_is_lost_or_wrong_is_refused(
    spoil: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, load = as_policy(ARCHITECTURES["Llama"].build(), tmp_path), PolicyCheckpoint.load

    def spoilt(self: PolicyCheckpoint, *args: Any, **options: Any) -> Policy:
        policy = load(self, *args, **options)
        policy.model.model.norm = spoil(policy.model)
        return policy

    monkeypatch.setattr(PolicyCheckpoint, "load", spoilt)
    with pytest.raises(SelfalignError, match=said):
        check_model(files, "float32")


def _doubling(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, inputs, output: Wrong.apply(output))
    return norm


def test_experts_of_a_first_pass_are_those_of_the_next_ones() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [6.0, 4.0, 5.0]], requires_grad=True)
    with model_trials.HeldSelections() as selections:
        first = scores.topk(2)
        selections.first = False
        values, indices = torch.topk(-scores, 2, dim=-1)
    assert torch.equal(indices, first.indices)
    assert values.tolist() == [[-3.0, -2.0], [-6.0, -5.0]]
    assert (-scores).topk(2).indices.tolist() == [[0, 1], [1, 2]]
    values.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.0, -1.0, -1.0], [-1.0, 0.0, -1.0]]


# --- lengths and vocabulary --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, 32),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, 256),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                              "original_max_position_embeddings": 64}}, 256),
        ({}, 256),
    ],
    ids=["longrope", "dynamic", "yarn", "plain"],
)  # fmt: skip
def test_sequences_end_where_rotations_would_depend_on_the_longest_of_a_batch(
    settings: dict[str, Any], context: int, tmp_path: Path
) -> None:
    model = Architecture("Phi3Config" if context == 32 else "LlamaConfig", {**SIZES, **settings}).build()
    files = as_policy(model, tmp_path)
    assert files.context == check_model(files, "float32")["context"] == context


def test_a_short_text_beside_a_long_one_is_worth_something_else_beyond_that_length(tmp_path: Path) -> None:
    """What the limit is for."""
    settings = {**SIZES, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    policy = Policy(Architecture("Phi3Config", settings).build(), None, "")  # pyright: ignore[reportArgumentType]
    make_scoring(policy)
    short = GROUPS[1]
    long = SharedPrompt(id="l", prompt=list(range(60)), responses=[[1, 2]], num_context_tokens=[0])

    def value(groups: list[SharedPrompt]) -> float:
        batch = make_batch(policy.model, groups)
        with torch.no_grad():
            return float(
                policy.model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs)[:3].sum()
            )

    assert abs(value([short]) - value([short, long])) > 0.01


@pytest.mark.parametrize("name", [*CONTEXT_NAMES, "max_position_embeddings"])
def test_context_is_known_by_whatever_name_a_config_has_for_it(name: str) -> None:
    settings = {**SIZES, "max_position_embeddings": None, name: 48}
    assert longest_sequence(PretrainedConfig(**settings)) == 48


def test_architecture_with_a_name_of_its_own_for_the_context_takes_no_longer_text(tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 48}
    files = as_policy(Architecture("MptConfig", sizes).build(), tmp_path)
    assert files.context == check_model(files, "float32")["context"] == 48
    with pytest.raises(RuntimeError):
        files.load("float32").model(input_ids=torch.arange(49)[None])


@pytest.mark.parametrize("writes", ["tree", "batches", "prompts", "without_cache"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_only_pad_the_embedding_are_never_written_and_scored_as_they_are(
    writes: str, temperature: float, tmp_path: Path
) -> None:
    model = Architecture("LlamaConfig", {**SIZES, "tie_word_embeddings": False}).build()
    known = len(as_policy(model, tmp_path).load_tokenizer())
    with torch.no_grad():
        model.lm_head.weight[known:] *= 20  # Without a rule, most that is drawn would be of these.
    files = as_policy(model, tmp_path)
    policy = replace(files.load("float32", device="cpu"), capabilities=Capabilities(writes=writes))
    requests = [Request(prompt=prompt, seeds=[1, 2]) for prompt in (GROUPS[0].prompt, GROUPS[1].prompt)]
    made = TransformersGenerator(policy, max_batch_tokens=1 << 20).generate(
        requests, Sampling(temperature=temperature, top_p=1.0, max_new_tokens=24)
    )
    drawn = {token for completions in made for completion in completions for token in completion.ids}
    assert max(drawn) < known < SIZES["vocab_size"]
    scored = torch.tensor(LogProbScorer(files.load("float32", device="cpu"), 1 << 20).score(GROUPS)).flatten()
    torch.testing.assert_close(scored, plain_sums(policy, GROUPS), rtol=1e-4, atol=2e-3)


def test_output_layer_beside_an_embedding_that_is_said_to_be_it_is_refused(tmp_path: Path) -> None:
    model = Architecture("LlamaConfig", {**SIZES, "tie_word_embeddings": True}).build()
    files = as_policy(model, tmp_path)
    [path] = (tmp_path / "weights").glob("*.safetensors")
    weights = load_file(path)
    own = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": own.clone()}, path, metadata={"format": "pt"})
    assert logits_of(files.load("float32")).isfinite().all()  # Two that are the same are one.
    save_file({**weights, "lm_head.weight": 2 * own}, path, metadata={"format": "pt"})
    with pytest.raises(
        SelfalignError, match=r"the output layer is the embedding \(tie_word_embeddings\), and the files"
    ):
        files.load("float32")


def test_token_without_a_row_in_the_embedding_is_named(tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES["Llama"].build(), tmp_path)
    tokenizer = files.load_tokenizer()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(60)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SelfalignError, match=r"token '<extra59>' has id 343, but .* only 320 rows"):
        check_model(files, "float32")


@pytest.mark.parametrize("character", ["\n", "1"])
def test_control_token_that_texts_are_made_of_is_refused(tmp_path: Path, character: str) -> None:
    policy = as_policy(ARCHITECTURES["Llama"].build(), tmp_path).load("float32")
    policy.tokenizer.eos_token = character
    with pytest.raises(
        SelfalignError, match=rf"control token {character!r} is a single character".replace("\\", "\\\\")
    ):
        check_vocabulary(policy)


def test_capabilities_go_on_to_what_is_trained_from_the_model(tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES["Qwen3.5"].build(), tmp_path / "M0")
    check_model(files, "float32")
    policy = files.load("float32")
    (tmp_path / "M1").mkdir()
    PolicyCheckpoint(tmp_path / "M1").save(policy, files)
    assert Capabilities.load(tmp_path / "M1") == Capabilities.load(tmp_path / "M0") != Capabilities()
    assert replace(policy, digest="").capabilities.writes == "prompts"

"""conf/model: every model composes, and its architecture, made tiny and random, trains with the config's settings."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    ROOT,
    composed,
    demonstration,
    optimization,
    policy_artifact,
    preference,
    records_artifact,
    workspace,
)
from test_tokenizer import WITH_BOS, WITHOUT_BOS, build_tokenizer, control_tokens
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from selfalign.core.errors import SelfalignError
from selfalign.losses.preference import SrDPO
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.packed_attention import is_packing
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.scorer import make_scoring
from selfalign.models.tokenizer import Answer, encode_answers, encode_prompt, end_of_turn_id
from selfalign.stages.align import align
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.stages.sft import sft
from selfalign.store.key import to_key_json
from selfalign.training.config import TrainableWeights

BUILT_IN = {"tiny", "smollm2_135m", "pretrained"}
NAMES = sorted({path.stem for path in (ROOT / "conf/model").glob("*.yaml")} - BUILT_IN)
SIZED = [name for name in NAMES if composed(f"model={name}")[0].model.sizes]
"""Families, whose size is a key."""

ONE_SIZE = [name for name in NAMES if name not in SIZED]
OF_THIS_YEAR = {
    ("qwen3", "0.6B"): "Qwen/Qwen3-0.6B",
    ("qwen3", "32B"): "Qwen/Qwen3-32B",
    ("qwen3", "30B-A3B"): "Qwen/Qwen3-30B-A3B",
    ("qwen3_5", "9B"): "Qwen/Qwen3.5-9B",
    ("gemma3", "27b"): "google/gemma-3-27b-it",
    ("llama3_2", "1B"): "meta-llama/Llama-3.2-1B-Instruct",
    ("llama3_3", "70B"): "meta-llama/Llama-3.3-70B-Instruct",
    ("smollm3", "3B"): "HuggingFaceTB/SmolLM3-3B",
    ("olmo3", "7B"): "allenai/Olmo-3-7B-Instruct-SFT",
    ("gpt_oss", "20b"): "openai/gpt-oss-20b",
    ("lfm2", "1.2B"): "LiquidAI/LFM2-1.2B",
}
WITHOUT_TEMPLATE = {"pythia_2_8b", "llama2_70b", "llama3_1_8b"}
"""Base models whose tokenizers have no chat template."""

ZEPHYR = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A template that ends turns with EOS and writes no BOS, as Zephyr's."""

SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
GROUPED = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """An architecture in tiny, and what is to be expected of it.

    Attributes:
        build: makes the model.
        adds_bos: whether its tokenizer puts a BOS before a text.
        template: that comes with the tokenizer.
        end: the token that ends a turn.
        layers: how many linear layers a decoder layer has.
    """

    build: Callable[[], Any]
    adds_bos: bool
    template: str | None
    end: str
    layers: int


FAMILIES = {
    "pythia_2_8b": Family(
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, num_attention_heads=4)), False, None, "</s>", 4
    ),
    "zephyr_7b_sft_full": Family(
        lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=16)), True, ZEPHYR, "</s>", 7
    ),
    "llama2_70b": Family(lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), True, None, "</s>", 7),
    "llama3_1_8b_instruct": Family(lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), True, WITH_BOS, "<|end|>", 7),
    "qwen2_5": Family(lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)), False, WITHOUT_BOS, "<|end|>", 7),
    "smollm2": Family(
        lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)), False, WITHOUT_BOS, "<|end|>", 7
    ),
}


def checkpoint(family: Family, folder: Path) -> Path:
    """The family's tiny model as a user's folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family.build().save_pretrained(folder)
    build_tokenizer(adds_bos=family.adds_bos, template=family.template).save_pretrained(folder)
    return folder


def fetch(name: str, folder: Path) -> tuple[ModelConfig, PolicyCheckpoint]:
    """M0 of the family, with the settings of its config but for the place, and an adapter asked for."""
    config = composed(f"model={name}", "model.lora.rank=4", "model.dtype=float32")[0].model
    config = replace(config, path=str(checkpoint(FAMILIES[name], folder / "checkpoint")), size="", sizes=[])
    (folder / "M0").mkdir()
    return config, fetch_pretrained(config, folder / "M0")


@pytest.mark.parametrize("name", ONE_SIZE)
def test_model_has_its_hub_id_a_template_if_its_own_has_none_and_a_dtype_that_fits_its_size(name: str) -> None:
    config = composed(f"model={name}")[0].model
    size = re.search(r"_(\d+(?:_\d+)?)(b|m)(?:_|$)", name.replace("llama3_1", "llama"))
    assert size is not None
    number = size[1].replace("_", ".")
    assert re.fullmatch(rf"[\w-]+/[\w.-]+-{number}{size[2]}(-.*)?", config.path, re.IGNORECASE)
    assert config.chat_template == ("shipped:dialogue" if name in WITHOUT_TEMPLATE else "")
    assert config.dtype == ("bfloat16" if size[2] == "b" and float(number) > 3 else "float32")


@pytest.mark.parametrize("name", SIZED)
def test_family_has_a_hub_id_for_each_size_and_the_page_names_them(name: str) -> None:
    default = composed(f"model={name}")[0].model
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    [row] = [line.split("|") for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    assert set(re.findall(r"`([^`]+)`", row[3])) == set(default.sizes)
    assert f"`{default.size}`" == row[3].split()[0]
    assert (row[4].strip(), row[5].strip()) == ("its own", default.dtype)
    before, after = default.path.split(default.size)
    assert f"{before}…{after}" == row[2].removesuffix("(base) ").strip()
    check_sizes(default, name, default.sizes[-1:])
    assert default.dtype == ("float32" if name == "smollm2" else "bfloat16")
    assert default.chat_template == ""


@pytest.mark.nightly
@pytest.mark.parametrize("name", SIZED)
def test_family_has_a_hub_id_for_each_size(name: str) -> None:
    default = composed(f"model={name}")[0].model
    check_sizes(default, name, default.sizes)


def check_sizes(default: ModelConfig, name: str, sizes: Iterable[str]) -> None:
    before, after = default.path.split(default.size)
    for size in sizes:
        model = composed(f"model={name}", f"model.size={size}")[0].model
        assert model == replace(default, path=f"{before}{size}{after}", size=size)


@pytest.mark.parametrize(("name", "size"), OF_THIS_YEAR)
def test_models_of_this_year_compose(name: str, size: str) -> None:
    assert composed(f"model={name}", f"model.size={size}")[0].model.path == OF_THIS_YEAR[name, size]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (["model=qwen3", "model.size=7B"], "model.size must be one of 0.6B, 1.7B, 4B, 8B, 14B, 32B, 30B-A3B; got '7B'"),
        (["model.size=7B"], "model.size must be left out, because model.path names one model; got '7B'"),
    ],
)
def test_size_that_there_is_not_is_refused_with_those_there_are(told: list[str], said: str) -> None:
    with pytest.raises(SelfalignError, match=re.escape(said)):
        composed(*told)


def test_size_is_another_model_and_not_another_key_of_the_same() -> None:
    """The path says which model it is, so that a family's key is that of the path alone."""
    family = composed("model=qwen3")[0].model
    plain = ModelConfig(path="Qwen/Qwen3-8B", dtype="bfloat16")
    assert to_key_json(family) == to_key_json(plain)
    assert to_key_json(family) != to_key_json(composed("model=qwen3", "model.size=4B")[0].model)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_have_one_bos_at_most_and_responses_end_with_one_end_of_turn(name: str, tmp_path: Path) -> None:
    family, (_, files) = FAMILIES[name], fetch(name, tmp_path)
    tokenizer = files.load_tokenizer()
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Why so?"}])
    assert ids[0] == tokenizer.bos_token_id or not family.adds_bos
    assert ids.count(tokenizer.bos_token_id) == family.adds_bos
    [answer] = encode_answers(tokenizer, [{"role": "user", "content": "Why so?"}], [Answer(text="Because.")])
    assert control_tokens(tokenizer, answer) == [family.end]
    assert answer[-1] == end_of_turn_id(tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_packs_and_trains_its_adapter_by_sft_and_sr_dpo(name: str, tmp_path: Path) -> None:
    family, (config, base) = FAMILIES[name], fetch(name, tmp_path)
    m0, weights = policy_artifact(base), TrainableWeights(dtype=config.dtype, lora=config.lora, seed=0)
    taught = [demonstration(f"t{n}", f"Why so {n}?", "Because it is so.") for n in range(2)]
    given = records_artifact(tmp_path / "given", demonstrations=taught)
    settings = optimization(learning_rate=0.005, epochs=2, microbatch_tokens=512)
    rows: list[dict[str, Any]] = []
    out = workspace(tmp_path / "M1", rows)
    sft(out, policy=m0, base=m0, demonstrations=given, optimization=settings, weights=weights)
    m1 = policy_artifact(PolicyCheckpoint(out.path))

    pairs = [preference(f"p{n}", f"Why so {n}?", "Because it is so.", "Ignore it.") for n in range(2)]
    given, loss = records_artifact(tmp_path / "pairs", pairs=pairs), SrDPO()
    out = workspace(tmp_path / "reference")
    scored = {"policy": m1, "pairs": given, "precision": settings.logprob_settings(config.dtype)}
    reference_logprobs(out, augmentation=loss.refinement.augmentation(), **scored)
    references = records_artifact(out.path)
    out = workspace(tmp_path / "M2", rows)
    more = {
        "loss": loss,
        "start": None,
        "held_out": 0,
        "trained_on": [],
        "selection": None,
        "optimization": settings,
        "weights": weights,
    }
    align(out, policy=m1, base=m0, pairs=given, reference=references, **more)

    assert [row["step"] for row in rows] == [1, 2, 1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[2]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[3]["rewards/margins"] > 0.01 > abs(rows[2]["rewards/margins"])
    assert rows[3]["refinement/mean"] != 0
    aligned = PolicyCheckpoint(out.path).load("float32", trainable=True)
    adapted = {n.split(".lora_A")[0] for n, p in aligned.model.named_parameters() if "lora_A" in n and p.requires_grad}
    assert len(adapted) == family.layers * 2
    assert not any("embed" in layer or "lm_head" in layer for layer in adapted)


@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_takes_packed_rows(name: str, tmp_path: Path) -> None:
    policy = fetch(name, tmp_path)[1].load("float32")
    make_scoring(policy)
    assert is_packing(policy.model)

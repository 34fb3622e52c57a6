"""Models as other people have them: quantised files, adapters, odd tokenizers, code of their own, hybrids."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, as_policy
from builders import TINY_RUN, composed, logits_of, policy_artifact, run, workspace, write_tiny_data
from test_prompt_boundary import CHATML, NO_SYSTEM
from thinking_families import family

from selfalign.core.errors import SelfalignError
from selfalign.engines.model_check import check_model
from selfalign.engines.server import export
from selfalign.engines.vllm_engine import VLLM
from selfalign.models.checkpoint import PolicyCheckpoint, open_tokenizer
from selfalign.models.config import LoRA, ModelConfig
from selfalign.models.pretrained import fetch_pretrained, source_digest
from selfalign.models.tokenizer import encode_prompt, stop_ids
from selfalign.stages.load_model import load_model
from selfalign.training.prepare import add_adapter

ASIDE = ["data.seed_data.eft_source=none", "data.seed_data.ranked=''", "evaluate=none", "iterations=1"]
GIVEN_PAIRS = [*(one for one in TINY_RUN if not one.startswith(("data.instruct", "data.respond"))), "data=pairs"]


@pytest.fixture
def mine(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> Path:
    """A model as a user has it: weights and tokenizer in one folder."""
    folder = tmp_path / "mine"
    policy = tiny_policy.load("float32")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def write_pairs(folder: Path, turns: Sequence[dict[str, str]] = ()) -> str:
    """Preference pairs as a user has them, with turns before each question; the override that names them."""
    rows = [
        {
            "prompt": [*turns, {"role": "user", "content": f"Name a {thing}."}],
            "chosen": [{"role": "assistant", "content": f"A good {thing}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for thing in ("river", "lake", "city", "sea")
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.path={folder / 'pairs.jsonl'}"


def adapter_of(mine: Path, folder: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """A LoRA adapter on the model, in a folder of its own, and what the two say together."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    options = {"target_modules": "all-linear", **options}
    settings = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(mine), settings)
    model.peft_config["default"].base_model_name_or_path = str(mine)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(input_ids=torch.arange(5, 25)[None]).logits


# --- adapters ----------------------------------------------------------------------------------------------------


def test_adapter_as_a_model_is_its_base_and_itself_together(mine: Path, tmp_path: Path) -> None:
    folder, expected = adapter_of(mine, tmp_path / "adapter")
    config = ModelConfig(path=str(folder))
    (tmp_path / "M0").mkdir()
    policy = fetch_pretrained(config, tmp_path / "M0").load("float32")
    with torch.no_grad():
        found = policy.model(input_ids=torch.arange(5, 25)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(policy.model, "peft_config")
    assert policy.tokenizer.chat_template


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning", "ignore:.*save_embedding_layers:UserWarning")
def test_adapter_that_changes_when_it_is_merged_is_refused(mine: Path, tmp_path: Path) -> None:
    folder, _ = adapter_of(mine, tmp_path / "adapter", target_modules=["embed_tokens"])
    (tmp_path / "M0").mkdir()
    with pytest.raises(SelfalignError, match="is an adapter that changes when it is merged into"):
        fetch_pretrained(ModelConfig(path=str(folder)), tmp_path / "M0")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(
    ("old", "new"),
    [("base_model.model.", "base_model.model._orig_mod."), ("model.layers.1", "model.language_model.layers.1")],
    ids=["saved_compiled", "renamed_layers"],
)
def test_adapter_whose_weights_reach_no_layer_of_its_base_is_refused(
    old: str, new: str, mine: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = adapter_of(mine, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    (tmp_path / "M0").mkdir()
    with pytest.raises(SelfalignError, match=rf"weights do not match the layers .*{re.escape(new)}"):
        fetch_pretrained(ModelConfig(path=str(folder)), tmp_path / "M0")


def test_adapter_that_is_no_change_of_weights_is_refused_by_its_kind(mine: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(mine), settings)
    model.peft_config["default"].base_model_name_or_path = str(mine)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "M0").mkdir()
    with pytest.raises(SelfalignError, match="is an adapter of type PROMPT_TUNING, which cannot be merged"):
        fetch_pretrained(ModelConfig(path=str(tmp_path / "adapter")), tmp_path / "M0")


def test_another_base_under_the_same_path_is_another_model(mine: Path, tmp_path: Path) -> None:
    folder, _ = adapter_of(mine, tmp_path / "adapter")
    before = source_digest(ModelConfig(path=str(folder)))
    from safetensors.torch import load_file, save_file

    changed = {name: value + 0.01 for name, value in load_file(mine / "model.safetensors").items()}
    save_file(changed, mine / "model.safetensors", metadata={"format": "pt"})
    assert source_digest(ModelConfig(path=str(folder))) != before


@pytest.mark.parametrize(
    ("spoil", "settings", "said"),
    [
        (
            lambda mine, adapter: shutil.rmtree(mine),
            {},
            "its base cannot be used: model.path: no folder",
        ),
        (lambda mine, adapter: None, {"dtype": "bfloat16"}, "model.dtype=bfloat16 would round it away"),
        (lambda mine, adapter: quantise(mine), {}, r"its base is quantised \(bitsandbytes\)"),
    ],
    ids=["base_gone", "bfloat16", "quantised_base"],
)
def test_adapter_whose_sum_cannot_be_made_is_refused_in_one_line(
    spoil: Any, settings: dict[str, str], said: str, mine: Path, tmp_path: Path
) -> None:
    folder, _ = adapter_of(mine, tmp_path / "adapter")
    spoil(mine, folder)
    (tmp_path / "M0").mkdir()
    with pytest.raises(SelfalignError, match=said) as refused:
        fetch_pretrained(ModelConfig(path=str(folder), **settings), tmp_path / "M0")
    assert "\n" not in str(refused.value)


# --- tokenizers and what stands beside them ----------------------------------------------------------------------


def edit_json(path: Path, change: Any) -> None:
    """Rewrites a file of settings."""
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def test_text_ends_where_the_models_generation_config_ends_it(mine: Path, tmp_path: Path) -> None:
    ends = {"eos_token_id": [0, 2, 77]}
    edit_json(mine / "generation_config.json", lambda settings: settings.update(ends))
    files = fetch_pretrained(ModelConfig(path=str(mine)), tmp_path)
    tokenizer = files.load_tokenizer()
    assert tokenizer.convert_ids_to_tokens([0, 2]) == ["<|endoftext|>", "<|im_end|>"]
    assert stop_ids(tokenizer) == [0, 2]  # 77 is text
    tokenizer.save_pretrained(tmp_path / "M1" / "tokenizer")
    assert stop_ids(PolicyCheckpoint(tmp_path / "M1").load_tokenizer()) == [0, 2]


def test_model_that_a_run_links_to_is_refused_once_it_has_changed(mine: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "M0").mkdir()
    base = fetch_pretrained(ModelConfig(path=str(mine)), tmp_path / "M0")
    trained, aligned = PolicyCheckpoint(tmp_path / "M1"), base.load("float32")
    aligned.model = add_adapter(aligned.model, LoRA(rank=4))
    trained.path.mkdir()
    trained.save(aligned, base)
    weights = mine / "model.safetensors"
    os.utime(weights)  # Touched, and the same.
    before = logits_of(trained.load("float32"))
    assert torch.equal(before, logits_of(PolicyCheckpoint(base.path).load("float32")))
    changed = {name: value + 0.01 for name, value in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    for files in (base.path, trained.path):
        with pytest.raises(SelfalignError, match=f"{re.escape(str(mine))}: its weights or configuration have changed"):
            PolicyCheckpoint(files).load("float32")
        with pytest.raises(SelfalignError, match="have changed since a run linked to them"):
            VLLM().arguments(PolicyCheckpoint(files))
    (tmp_path / "served").mkdir()
    with pytest.raises(SelfalignError, match="have changed since a run linked to them"):
        export(base, tmp_path / "served", "float32")


def test_folder_with_old_weights_beside_new_ones_is_refused(mine: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mine)
    model.lm_head.weight.data += 1
    model.save_pretrained(mine, max_shard_size="300KB")
    first = sorted(mine.glob("model-*"))[0].name
    with pytest.raises(SelfalignError, match=rf"holds weights twice, as model.safetensors and in \d shards .*{first}"):
        fetch_pretrained(ModelConfig(path=str(mine)), tmp_path / "M0")
    (mine / "model.safetensors").unlink()
    (tmp_path / "M0").mkdir()
    new = fetch_pretrained(ModelConfig(path=str(mine)), tmp_path / "M0").load("float32")
    assert torch.equal(logits_of(new), logits_of(replace(new, model=model)))


def test_checkpoint_ends_a_text_where_the_run_ends_it(mine: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit_json(mine / "generation_config.json", lambda settings: settings.update(eos_token_id=0))
    (tmp_path / "M0").mkdir()
    base = fetch_pretrained(ModelConfig(path=str(mine)), tmp_path / "M0")
    loaded, trained = base.load("float32"), PolicyCheckpoint(tmp_path / "M1")
    assert stop_ids(loaded.tokenizer) == [0, 2]
    trained.path.mkdir()
    trained.save(loaded, base)
    own: Any = AutoModelForCausalLM.from_pretrained(trained.path / "weights")
    assert own.generation_config.eos_token_id == [0, 2]


def test_text_ends_where_config_json_ends_it_if_there_is_nothing_else(mine: Path, tmp_path: Path) -> None:
    (mine / "generation_config.json").unlink()
    edit_json(mine / "config.json", lambda settings: settings.update(eos_token_id=[0, 2]))
    assert stop_ids(fetch_pretrained(ModelConfig(path=str(mine)), tmp_path).load_tokenizer()) == [0, 2]


def test_settings_of_the_model_that_change_what_is_drawn_are_said_not_to_be_applied(mine: Path, tmp_path: Path) -> None:
    asked = {"repetition_penalty": 1.3, "suppress_tokens": [5], "no_repeat_ngram_size": 0, "typical_p": 1.0}
    edit_json(mine / "generation_config.json", lambda settings: settings.update(asked))
    [note] = check_model(fetch_pretrained(ModelConfig(path=str(mine)), tmp_path), "float32")["notes"]
    assert (
        note == "repetition_penalty, suppress_tokens in its generation_config.json: not applied to what is written here"
    )


def test_tokenizer_that_was_saved_to_split_control_tokens_reads_them_whole(
    mine: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    edit_json(mine / "tokenizer_config.json", lambda settings: settings.update(split_special_tokens=True))
    tokenizer = fetch_pretrained(ModelConfig(path=str(mine)), tmp_path).load_tokenizer()
    asked = [{"role": "user", "content": "Hi."}]
    assert encode_prompt(tokenizer, asked) == encode_prompt(tiny_tokenizer, asked)


def test_tokenizer_that_leaves_out_merges_at_random_always_gives_the_same_ids(mine: Path, tmp_path: Path) -> None:
    whole = open_tokenizer(mine)("What is interesting about the rivers?")["input_ids"]
    edit_json(mine / "tokenizer.json", lambda settings: settings["model"].update(dropout=0.9))
    assert open_tokenizer(mine)("What is interesting about the rivers?")["input_ids"] != whole
    tokenizer = fetch_pretrained(ModelConfig(path=str(mine)), tmp_path).load_tokenizer()
    assert [tokenizer("What is interesting about the rivers?")["input_ids"] for _ in range(5)] == [whole] * 5


def test_model_whose_tokenizer_cannot_pad_writes_several_texts_at_a_time(mine: Path, tmp_path: Path) -> None:
    def take_names(settings: dict[str, Any]) -> None:
        del settings["pad_token"], settings["eos_token"]

    edit_json(mine / "tokenizer_config.json", take_names)
    files = fetch_pretrained(ModelConfig(path=str(mine)), tmp_path)
    assert files.load_tokenizer().pad_token_id is None
    assert check_model(files, "float32")["writes"] == "tree"


# --- quantised files ---------------------------------------------------------------------------------------------


def quantise(folder: Path) -> Path:
    """The model's files in 4 bits, as many a hub has them."""
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def test_files_in_four_bits_are_never_merged_into_and_say_so_in_the_identity(mine: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(quantise(mine)), lora=LoRA(rank=4))
    out = workspace(tmp_path / "M0")
    counts = load_model(out, model=config, source="x")
    files = PolicyCheckpoint(out.path)
    assert files.quantization == {"quantization": "bitsandbytes"}
    assert counts["scores"] == "packed"
    from selfalign.training.config import TrainableWeights
    from selfalign.training.prepare import prepare

    trained = files.load("float32", trainable=True)
    prepare(trained, files, TrainableWeights(dtype="float32", lora=LoRA(rank=4), seed=0), 0.0)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05
    (tmp_path / "M1").mkdir()
    PolicyCheckpoint(tmp_path / "M1").save(trained, files)
    apart, together = (PolicyCheckpoint(tmp_path / "M1").load("float32", trainable=one) for one in (True, False))
    assert hasattr(together.model, "peft_config")
    assert torch.equal(logits_of(apart), logits_of(together))
    assert not torch.equal(logits_of(together), logits_of(files.load("float32")))


@pytest.mark.parametrize("rank", [0, 4])
def test_run_on_files_in_four_bits_needs_an_adapter_and_says_so_before_training(
    rank: int, mine: Path, tmp_path: Path
) -> None:
    model = ["model=pretrained", f"model.path={quantise(mine)}", f"model.lora.rank={rank}"]
    told = [
        *TINY_RUN,
        *write_tiny_data(tmp_path / "data"),
        *ASIDE,
        *model,
        "data=pairs",
        write_pairs(tmp_path / "data"),
    ]
    told = [one for one in told if not one.startswith(("data.instruct", "data.respond"))]
    if rank:
        run(tmp_path / "out", *told)
        return
    with pytest.raises(SelfalignError, match=r"its weights are quantised \(bitsandbytes\).* set model\.lora\.rank"):
        run(tmp_path / "out", *told)
    assert not list((tmp_path / "out" / "store").glob("sft/*"))


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
"""The values of the 16 codes of MXFP4 (OCP Microscaling Formats, version 1.0)."""


def test_experts_stored_in_mxfp4_are_trained_as_the_plain_weights_they_stand_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sizes = {**ARCHITECTURES["gpt-oss"].settings, "intermediate_size": 32}
    files = as_policy(replace(ARCHITECTURES["gpt-oss"], settings=sizes).build(), tmp_path / "given")
    folder, draw = files.path / "weights", torch.Generator().manual_seed(0)
    weights, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, into, out = weights.pop(name).shape
        pairs = torch.randint(256, (experts, out, into // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(122, 125, (experts, out, into // 32), generator=draw, dtype=torch.uint8)
        weights |= {f"{name}_blocks": pairs, f"{name}_scales": scales}
        values = torch.tensor(FP4)[torch.stack((pairs & 15, pairs >> 4), dim=-1).long()].flatten(-2)
        expected[name] = (values * 2.0 ** (scales.float() - 127)[..., None]).flatten(2).transpose(1, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda given: given.update(quantization_config={"quant_method": "mxfp4"}))
    shutil.copytree(files.path / "tokenizer", folder, dirs_exist_ok=True)

    (tmp_path / "M0").mkdir()
    fetched = fetch_pretrained(ModelConfig(path=str(folder)), tmp_path / "M0")
    assert fetched.quantization == {}
    policy = fetched.load("float32", trainable=True)
    found = dict(policy.model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=0, atol=0)
        assert found[name].requires_grad
    (tmp_path / "M1").mkdir()
    PolicyCheckpoint(tmp_path / "M1").save(policy, fetched)
    assert torch.equal(logits_of(PolicyCheckpoint(tmp_path / "M1").load("float32")), logits_of(policy))


# --- what cannot be a policy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, r"is not a causal language model \(t5\)"),
        ({"model_type": "vit"}, r"is not a causal language model \(vit\)"),
        ({"model_type": "brand_new"}, r"transformers [\d.]+ does not know the architecture 'brand_new'"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}},
         r"comes with the code of its architecture, 'mine': read that code, then set model\.trust_remote_code=true"),
    ],
    ids=["encoder_decoder", "no_language_model", "unknown", "custom_code"],
)  # fmt: skip
def test_folder_that_is_no_policy_is_refused_by_its_kind(
    settings: dict[str, Any], said: str, mine: Path, tmp_path: Path
) -> None:
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(SelfalignError, match=said):
        fetch_pretrained(ModelConfig(path=str(mine)), tmp_path)


def test_weights_in_a_form_whose_library_is_missing_name_it(mine: Path, tmp_path: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(SelfalignError, match=r"loading its weights needs another package: .*GPTQ"):
        fetch_pretrained(ModelConfig(path=str(mine)), tmp_path)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weight_that_is_not_finite_is_refused_by_its_name(value: str, mine: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(mine / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float(value)
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SelfalignError, match=r"weights 'model\.layers\.1\.mlp\.up_proj\.weight' are not all finite"):
        check_model(fetch_pretrained(ModelConfig(path=str(mine)), tmp_path), "float32")


# --- what is asked of M0, before training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "told", "said"),
    [
        (
            lambda mine: None,
            ["train.sft.max_length=4096"],
            "max_length=4096 is above the model's context of 2048",
        ),
        (
            lambda mine: (mine / "chat_template.jinja").unlink(),
            [],
            "the run has conversations, and .* no chat template",
        ),
        (
            lambda mine: None,
            ["loss=odpo"],
            "the loss ODPO needs chosen_score above rejected_score in every pair, but it is not in 4 pairs, such as ",
        ),
        (
            lambda mine: None,
            ["loss=sppo"],
            "the loss SPPO needs chosen_score and rejected_score, shares of wins .* they are not in 4 pairs, such as ",
        ),
    ],
    ids=["too_long", "no_template", "no_scores", "no_shares"],
)
def test_what_cannot_be_trained_with_model_or_data_is_known_before_anything_is_trained(
    spoil: Any, told: list[str], said: str, mine: Path, tmp_path: Path
) -> None:
    spoil(mine)
    data = [*write_tiny_data(tmp_path / "data"), *ASIDE, write_pairs(tmp_path / "data")]
    with pytest.raises(SelfalignError, match=said):
        run(tmp_path / "out", *GIVEN_PAIRS, *data, "model=pretrained", f"model.path={mine}", *told)
    assert not list((tmp_path / "out" / "store").glob("sft/*"))


ONE_QUESTION = (
    "<|im_start|>user\n{{ (messages|selectattr('role', 'equalto', 'user')|list)[-1]['content'] }}<|im_end|>\n"
    "<|im_start|>assistant\n{% if messages[-1]['role'] == 'assistant' %}"
    "{{ messages[-1]['content'] }}<|im_end|>\n{% endif %}"
)
"""A template of a model that was trained on single questions."""


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (NO_SYSTEM + CHATML, [{"role": "system", "content": "Be brief."}], "a system turn"),
        (ONE_QUESTION, [{"role": "system", "content": "Be brief."}], "a system turn"),
        (CHATML.replace("m['content']", "messages[0]['content'] if m['role'] == 'user' else m['content']"),
         [{"role": "system", "content": "Be brief."}], "a system turn"),
        (ONE_QUESTION, [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}],
         "turns before its question"),
    ],
    ids=["system_refused", "system_dropped", "system_in_place_of_the_question", "earlier_turns_dropped"],
)  # fmt: skip
def test_turns_in_the_data_that_the_template_does_not_take_name_the_record(
    template: str, turns: list[dict[str, str]], said: str, mine: Path, tmp_path: Path
) -> None:
    (mine / "chat_template.jinja").write_text(template)
    data = [*write_tiny_data(tmp_path / "data"), *ASIDE, write_pairs(tmp_path / "data", turns)]
    with pytest.raises(SelfalignError, match=rf"record \w+ has {said}, which .* does not accept"):
        run(tmp_path / "out", *GIVEN_PAIRS, *data, "model=pretrained", f"model.path={mine}")
    assert not list((tmp_path / "out" / "store").glob("sft/*"))


def test_answers_that_think_are_refused_where_the_template_has_closed_the_thought(mine: Path, tmp_path: Path) -> None:
    (mine / "chat_template.jinja").write_text(family("qwen3").template)
    data = [*write_tiny_data(tmp_path / "data"), *ASIDE, write_pairs(tmp_path / "data")]
    pairs = tmp_path / "data" / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("A good", "<think>A river.</think>A good"))
    model = ["model=pretrained", f"model.path={mine}", "+model.chat_template_arguments.enable_thinking=false"]
    with pytest.raises(SelfalignError, match=r"record \w+ has a response that begins with <think>, but the model's"):
        run(tmp_path / "out", *GIVEN_PAIRS, *data, *model)
    assert not list((tmp_path / "out" / "store").glob("sft/*"))


def test_dropout_that_the_model_lacks_is_refused_before_training(tmp_path: Path) -> None:
    files = as_policy(ARCHITECTURES["LFM2"].build(), tmp_path / "M0")
    folder = tmp_path / "mine"
    shutil.copytree(files.path / "weights", folder)
    shutil.copytree(files.path / "tokenizer", folder, dirs_exist_ok=True)
    told = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), "model=pretrained", f"model.path={folder}"]
    lengths = ["train.sft.max_length=200", "train.align.max_length=200", "train.align.dropout=0.1"]
    with pytest.raises(SelfalignError, match=r"align\.dropout=0\.1, but this model has no dropout layers: set it to 0"):
        run(tmp_path / "out", *told, *lengths)
    assert composed(*told)[0].train.align.dropout == 0
    assert policy_artifact(files).path == files.path

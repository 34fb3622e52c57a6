from pathlib import Path

import pytest
import torch
from builders import loaded, workspace
from safetensors.torch import load_file, save_file

from selfalign.core.errors import SelfalignError
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import source_digest
from selfalign.stages.load_model import load_model


@pytest.fixture
def folder(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> Path:
    """A model as a user has it: weights and tokenizer in one folder."""
    policy = tiny_policy.load("float32")
    policy.model.save_pretrained(tmp_path / "mine")
    policy.tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def fetch(out: Path, **settings: object) -> tuple[dict, PolicyCheckpoint]:
    config = ModelConfig(**settings)
    counts = load_model(workspace(out), model=config, source=source_digest(config))
    return counts, PolicyCheckpoint(out)


def test_random_model_is_the_same_each_time_it_is_built(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts, policy = fetch(tmp_path, path="random:tiny")
    assert policy.digest == tiny_policy.digest
    assert counts == {
        "parameters": sum(p.numel() for p in loaded(tiny_policy.path).model.parameters()),
        "context": 2048,
        "checked_in": "float32",
        "scores": "packed",
        "writes": "tree",
        "dropout": True,
        "has_router_loss": False,
        "chat_template": True,
        "system_turns": True,
        "earlier_turns": True,
        "stops_at": ["<|im_end|>"],
        "notes": [],
    }


def test_folder_is_taken_as_it_is(tmp_path: Path, tiny_policy: PolicyCheckpoint, folder: Path) -> None:
    _, policy = fetch(tmp_path / "M0", path=str(folder))
    assert (tmp_path / "M0/weights").resolve() == folder
    given = load_file(folder / "model.safetensors")
    taken = load_file(tmp_path / "M0/weights/model.safetensors")
    assert given.keys() == taken.keys()
    assert all(torch.equal(given[name], taken[name]) for name in given)
    text = "How do 12 bees find home?<|im_end|>"
    assert policy.load_tokenizer()(text)["input_ids"] == loaded(tiny_policy.path).tokenizer(text)["input_ids"]


def test_chat_template_of_the_user_is_the_one_that_counts(tmp_path: Path, folder: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    plain, given = ModelConfig(path=str(folder)), ModelConfig(path=str(folder), chat_template=str(template))
    assert source_digest(plain) != source_digest(given)
    _, policy = fetch(tmp_path / "M0", path=str(folder), chat_template=str(template))
    assert policy.load_tokenizer().chat_template == template.read_text()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_changed_file_of_the_model_makes_it_another_model(folder: Path, name: str) -> None:
    config = ModelConfig(path=str(folder))
    before = source_digest(config)
    path = folder / name
    path.write_text(path.read_text() + "\n")
    assert source_digest(config) != before


def test_changed_weights_make_it_another_model(folder: Path) -> None:
    config = ModelConfig(path=str(folder))
    before = source_digest(config)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert source_digest(config) != before


def test_truncated_weights_are_an_error_that_names_the_folder(tmp_path: Path, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SelfalignError, match=r"mine: the model cannot be loaded.*damaged"):
        fetch(tmp_path / "M0", path=str(folder))


def test_weights_of_another_architecture_are_an_error_that_names_a_tensor(tmp_path: Path, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SelfalignError, match=r"mine: .*model\.norm\.weight"):
        fetch(tmp_path / "M0", path=str(folder))


def test_missing_folder_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"model\.path: no folder '.*/nowhere'"):
        fetch(tmp_path / "M0", path=str(tmp_path / "nowhere"))


def test_missing_model_of_another_setting_names_that_one() -> None:
    with pytest.raises(SelfalignError, match=r"^data\.instruct\.model: no folder '\./nowhere'"):
        source_digest(ModelConfig(path="./nowhere"), "data.instruct.model")


def test_folder_without_safetensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SelfalignError, match=r"model\.path: .*empty holds no \.safetensors"):
        fetch(tmp_path / "M0", path=str(tmp_path / "empty"))


def test_folder_without_tokenizer_is_an_error(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    tiny_policy.load("float32").model.save_pretrained(tmp_path / "bare")
    with pytest.raises(SelfalignError, match="bare: no tokenizer"):
        fetch(tmp_path / "M0", path=str(tmp_path / "bare"))


def test_stored_weights_have_the_configured_dtype(tmp_path: Path) -> None:
    fetch(tmp_path, path="random:tiny", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "weights/model.safetensors").values()} == {torch.bfloat16}

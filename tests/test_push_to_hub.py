import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import TINY_RUN, composed, run, write_tiny_data
from hub_server import TOKEN, Hub, hub_server
from huggingface_hub import ModelCard, constants
from mutation import Check, assert_caught

from selfalign.config.checks import check_repository
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.launch import push_to_hub as module
from selfalign.launch.push_to_hub import check_login, publish, publish_data, repository_files
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.report.data_set import write_data_set
from selfalign.runs.folder import run_folder
from selfalign.runs.reader import Finished

TINY = [*TINY_RUN, "iterations=1", "evaluate=none", "data.seed_data.ranked=''", "data.seed_data.eft_source=none"]
CHECKPOINT = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*TINY, write_tiny_data(tmp_path_factory.mktemp("data"))[0]]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def full(output: Path, overrides: list[str]) -> Path:
    """A run that trains all weights."""
    return run(output, *overrides)


@pytest.fixture(scope="module")
def adapter(output: Path, overrides: list[str]) -> Path:
    """A run that trains adapters."""
    return run(output, *overrides, "model.lora.rank=2")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the user is logged in at."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def refusal(call: Callable[[], object]) -> str:
    """The one line in which it fails, without the token."""
    with pytest.raises(SelfalignError) as raised:
        call()
    said = str(raised.value)
    assert "\n" not in said
    assert TOKEN not in said
    return said


# --- what is sent ------------------------------------------------------------------------------------------------


def test_push_sends_the_last_model_and_its_card_and_nothing_else(hub: Hub, full: Path) -> None:
    address = publish(full, "me/tiny", private=True)
    sent = hub.files["me/tiny"]
    assert sent.keys() == {*CHECKPOINT, *TOKENIZER, "README.md"}
    weights = full / "artifacts/M2/weights"
    assert all(sent[name] == (weights / name).read_bytes() for name in CHECKPOINT)
    assert address.startswith(f"{hub.url}/me/tiny/commit/")
    assert (hub.private, hub.commits) == ({"me/tiny": True}, [f"M2 of {full.name}"])
    card = ModelCard(sent["README.md"].decode())
    assert "AutoModelForCausalLM.from_pretrained('me/tiny')" in card.text
    assert read_json(full / "provenance.json")["weights"]["M2"] in card.text


def test_adapter_is_sent_without_its_base(hub: Hub, adapter: Path) -> None:
    publish(adapter, "me/tiny", private=False)
    sent = hub.files["me/tiny"]
    assert sent.keys() == {"adapter_config.json", "adapter_model.safetensors", *TOKENIZER, "README.md"}
    assert hub.private == {"me/tiny": False}
    assert "M0 is not on the hub" in ModelCard(sent["README.md"].decode()).text


def test_neither_pickles_nor_code_are_sent_unless_the_code_is_trusted(full: Path, tmp_path: Path) -> None:
    shutil.copytree(full, tmp_path / "run")
    policy = tmp_path / "run/artifacts/M2"
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.pkl", "modeling.py", "README.md"):
        (policy / "weights" / name).write_bytes(b"not to be sent")
    files = repository_files(Finished.load(tmp_path / "run"), "me/tiny")
    assert files.keys() == {*CHECKPOINT, *TOKENIZER, "README.md"}
    assert b"not to be sent" not in files["README.md"]
    (policy / "trusted").touch()
    assert repository_files(Finished.load(tmp_path / "run"), "me/tiny").keys() == {*files, "modeling.py"}


def test_what_was_sent_loads_as_the_model_it_is(hub: Hub, full: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    publish(full, "me/tiny", private=True)
    for name, content in hub.files["me/tiny"].items():
        (tmp_path / name).write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path)("Tell me about bees.", return_tensors="pt").input_ids
    expected = PolicyCheckpoint(full / "artifacts/M2").load("float32", device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_push_removes_the_weights_of_an_earlier_one_and_leaves_other_files(hub: Hub, full: Path, adapter: Path) -> None:
    publish(full, "me/tiny", private=True)
    hub.files["me/tiny"]["notes.txt"] = b"mine"
    publish(adapter, "me/tiny", private=True)
    there = hub.files["me/tiny"].keys()
    assert "model.safetensors" not in there
    assert {"adapter_model.safetensors", "notes.txt"} <= there
    publish(full, "me/tiny", private=True)
    assert not {name for name in hub.files["me/tiny"] if name.startswith("adapter")}


def test_data_are_sent_privately_without_the_tables_of_an_earlier_push(hub: Hub, full: Path, tmp_path: Path) -> None:
    write_data_set(Finished.load(full), tmp_path, "me/tiny")
    wanted = {
        path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    hub.files["datasets/me/tiny"] = {"pairs/iteration_7.parquet": b"old", "notes.txt": b"mine"}
    assert publish_data(full, "me/tiny", private=True).startswith(f"{hub.url}/datasets/me/tiny/commit/")
    assert hub.files == {"datasets/me/tiny": {**wanted, "notes.txt": b"mine"}}
    assert {"README.md", "judgements/iteration_1.parquet"} <= wanted.keys()
    publish_data(full, "me/other", private=True)
    assert hub.private == {"datasets/me/other": True}


# --- a run that pushes -------------------------------------------------------------------------------------------


def test_run_with_push_is_the_same_run_and_keeps_no_token(
    hub: Hub,
    output: Path,
    overrides: list[str],
    full: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    assert run(output, *overrides, "hub.push=true", "hub.repo_id=me/tiny") == full
    assert "README.md" in hub.files["me/tiny"]
    said = capsys.readouterr()
    assert f"published {hub.url}/me/tiny/commit/" in said.out
    assert f"published {hub.url}/datasets/me/tiny/commit/" in said.out
    assert hub.private == {"me/tiny": True, "datasets/me/tiny": True}
    assert TOKEN not in said.out + said.err + caplog.text
    files = [path for path in output.rglob("*") if path.is_file()]
    assert full / "model_card.md" in files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [name for made in hub.files.values() for name, content in made.items() if TOKEN.encode() in content]


def test_failed_push_leaves_the_run_finished(hub: Hub, output: Path, overrides: list[str]) -> None:
    hub.refuses = {"/api/repos/create": (500, "down")}
    pushed = [*overrides, "seed=1", "hub.push=true", "hub.repo_id=me/tiny"]
    said = refusal(lambda: run(output, *pushed))
    config, *_ = composed(*pushed)
    folder, _ = run_folder(output, config.name, config, fresh=False)
    assert f"The run in {folder} is finished" in said
    assert {path.name for path in folder.iterdir()} >= {"summary.json", "report.html", "model_card.md"}
    assert "stopped" not in (folder / "run.log").read_text()
    hub.refuses = {}
    assert run(output, *pushed, "hub.data=false") == folder
    assert hub.files.keys() == {"me/tiny"}


def test_nothing_is_sent_unless_asked_for(hub: Hub, output: Path, overrides: list[str], full: Path) -> None:
    assert composed(*overrides)[0].hub.push is False
    run(output, *overrides, "hub.repo_id=me/tiny")
    assert not hub.files


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "tiny", "me/", "/tiny", "me/tiny/more", "https://h/me/tiny", "me/t y", "-me/x"])
def test_repository_needs_an_owner_and_a_name(name: str) -> None:
    assert "hub.repo_id=owner/name" in refusal(lambda: check_repository(name))


def test_push_needs_a_repository_before_anything_is_made() -> None:
    assert "hub.repo_id=owner/name" in refusal(lambda: composed("experiment=smoke", "hub.push=true"))
    config, *_ = composed("experiment=smoke", "hub.push=true", "hub.repo_id=me/lam-${loss.lam}", "loss.lam=0.3")
    assert (config.hub.push, config.hub.repo_id, config.hub.private) == (True, "me/lam-0.3", True)


def test_push_without_a_login_is_refused_before_anything_is_made(
    hub: Hub, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    said = refusal(lambda: run(tmp_path / "new", *overrides, "hub.push=true", "hub.repo_id=me/tiny"))
    assert "hf auth login" in said
    assert not (tmp_path / "new").exists()


def test_push_offline_is_refused_before_anything_is_made(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(check_login)


def test_wrong_login_is_said_to_be_one(hub: Hub, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    said = refusal(lambda: publish(full, "me/tiny", private=True))
    assert said.startswith("hub.repo_id=me/tiny: the hub does not accept the login (401")
    assert "hf_another" not in said


def test_missing_permission_is_said_with_the_hub_s_words(hub: Hub, full: Path) -> None:
    hub.refuses = {"/api/": (403, "You don't have the rights\nto create a model under the namespace 'them'")}
    said = refusal(lambda: publish(full, "them/tiny", private=True))
    assert said.startswith("hub.repo_id=them/tiny: this login may not write to the repository (403")
    assert "under the namespace 'them'" in said


def test_hub_that_cannot_be_reached_is_said_to_be(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server() as gone:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the hub cannot be reached (ConnectError)" in refusal(lambda: publish(full, "me/tiny", private=True))


# --- mutants -----------------------------------------------------------------------------------------------------

SENT = test_push_sends_the_last_model_and_its_card_and_nothing_else
ADAPTER = test_adapter_is_sent_without_its_base
PICKLES = test_neither_pickles_nor_code_are_sent_unless_the_code_is_trusted
DATA = test_data_are_sent_privately_without_the_tables_of_an_earlier_push
STALE = test_push_removes_the_weights_of_an_earlier_one_and_leaves_other_files
MUTANTS = [
    ("every file", "else MODEL_FILES", 'else ["*"]', PICKLES),
    ("the first model", "last_model(run).link_in(run.folder)", 'run.folder / "artifacts" / "M1"', SENT),
    ("always public", "private=private, exist_ok", "private=False, exist_ok", SENT),
    ("no card", '{**files, "README.md": model_card(run, repository).encode()}', "files", SENT),
    ("the run folder's card", "model_card(run, repository)", "model_card(run)", SENT),
    (
        "base instead of adapter",
        '"adapter" if (policy.path / "adapter")',
        '"weights" if (policy.path / "adapter")',
        ADAPTER,
    ),
    ("old weights stay", "changes = [CommitOperationDelete(name) for name in stale]", "changes = []", STALE),
    ("old tables stay", '"dataset": ("*/iteration_*.parquet",)', '"dataset": ()', DATA),
    ("data in the model's place", 'kind="dataset"', 'kind="model"', DATA),
    ("everything else goes", "any(fnmatch(name, pattern) for pattern in STALE[kind])", "True", STALE),
    ("offline unnoticed", "if is_offline_mode():", "if False:", test_push_offline_is_refused_before_anything_is_made),
]


@pytest.mark.parametrize(("old", "new", "check"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(
    old: str,
    new: str,
    check: Check,
    hub: Hub,
    full: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"tmp_path": tmp_path, "hub": hub, "full": full, "adapter": adapter, "monkeypatch": monkeypatch}
    assert_caught(module, sys.modules[__name__], old, new, check, given)

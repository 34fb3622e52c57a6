"""Push the last policy of a finished run to a hub, and the pairs and judgements that it made.

The user's login is used and never stored.
"""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from selfalign.config.experiment import HubConfig
from selfalign.core.errors import SelfalignError, one_line
from selfalign.core.files import read_json
from selfalign.models.pretrained import MODEL_FILES, TRUSTED, PolicyCheckpoint
from selfalign.report.data_set import write_data_set
from selfalign.report.model_card import base_on_hub, last_model, model_card
from selfalign.runs.reader import Finished

ADAPTER_CONFIG = "adapter_config.json"

STALE = {
    "model": ("*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG),
    "dataset": ("*/iteration_*.parquet",),
}
"""{type of repository: files of an earlier push that must not be loaded with these; they are deleted}."""

REASONS = {
    401: "the hub does not accept the login",
    403: "this login may not write to the repository",
    404: "the repository does not exist",
}


def check_login() -> None:
    """Check before a run that its model can be pushed, as far as that can be known.

    Raises:
        SelfalignError: the user is not logged in, or the hub is switched off by an environment variable.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise SelfalignError(
            "hub.push=true, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it, or set hub.push=false"
        )
    if get_token() is None:
        raise SelfalignError("hub.push=true needs a login to the hub: run `hf auth login`, or set HF_TOKEN")


def publish_run(folder: Path, hub: HubConfig) -> Iterator[str]:
    """Push a finished run as it is asked for, and yield the commits' URLs.

    Raises:
        SelfalignError: as `publish`.
    """
    yield publish(folder, hub.repo_id, private=hub.private)
    if hub.data and (address := publish_data(folder, hub.repo_id, private=hub.private)):
        yield address


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Push the last policy of a finished run and its card as one commit, and return the commit's URL.

    Args:
        folder: the run folder.
        repository: owner/name; created if it does not exist.
        private: whether a created repository is private.

    Raises:
        SelfalignError: the hub cannot be reached or refuses; the run stays as it is.
    """
    run = Finished.load(folder)
    message = f"{last_model(run)} of {folder.name}"
    return _commit(folder, repository, repository_files(run, repository), message, kind="model", private=private)


def publish_data(folder: Path, repository: str, *, private: bool) -> str:
    """Push the pairs and judgements that a finished run made, and return the commit's URL.

    The data set has the model's name. A run that made none, as one on given pairs, pushes none: "" is returned.

    Args:
        folder: the run folder.
        repository: owner/name; created if it does not exist.
        private: whether a created repository is private.

    Raises:
        SelfalignError: as `publish`.
    """
    run = Finished.load(folder)
    with TemporaryDirectory() as made:
        if not write_data_set(run, Path(made), repository):
            return ""
        paths = sorted(path for path in Path(made).rglob("*") if path.is_file())
        files = {path.relative_to(made).as_posix(): str(path) for path in paths}
        return _commit(folder, repository, files, f"Data of {folder.name}", kind="dataset", private=private)


def _commit(
    folder: Path, repository: str, files: Mapping[str, str | bytes], message: str, *, kind: str, private: bool
) -> str:
    """Push files as one commit, and return its URL. `kind` is one of `STALE`.

    Raises:
        SelfalignError: the hub cannot be reached or refuses; the run stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True, repo_type=kind)
        present = hub.list_repo_files(repository, repo_type=kind)
        stale = [
            name for name in present if name not in files and any(fnmatch(name, pattern) for pattern in STALE[kind])
        ]
        changes = [CommitOperationDelete(name) for name in stale]
        changes += [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = hub.create_commit(repository, changes, commit_message=message, repo_type=kind)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: hf_xet's transfers
        raise SelfalignError(
            f"hub.repo_id={repository}: {explain_refusal(error)}. The run in {folder} is finished; repeat the command "
            "to try the push again"
        ) from error
    return str(commit.commit_url)


def repository_files(run: Finished, repository: str) -> dict[str, str | bytes]:
    """Return {name in the repository: a file's path, or content} of the weights or adapter, tokenizer and card."""
    policy = PolicyCheckpoint(last_model(run).link_in(run.folder))
    part = "adapter" if (policy.path / "adapter").exists() else "weights"
    patterns = [*MODEL_FILES, "*.py"] if (policy.path / TRUSTED).exists() else MODEL_FILES
    files: dict[str, str | bytes] = {
        path.name: str(path)
        for source in (policy.path / part, policy.path / "tokenizer")
        for pattern in patterns
        for path in sorted(source.glob(pattern))
    }
    base, _ = base_on_hub(run)
    if base and part == "adapter":
        settings = read_json(policy.path / "adapter" / ADAPTER_CONFIG)
        files[ADAPTER_CONFIG] = json.dumps({**settings, "base_model_name_or_path": base}, indent=2).encode()
    return {**files, "README.md": model_card(run, repository).encode()}


def explain_refusal(error: Exception) -> str:
    """Return why a push failed, in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        detail = one_line(error.server_message or "", 200)
        return f"{REASONS.get(status, 'the hub refused')} ({status}{f': {detail}' if detail else ''})"
    if isinstance(error, ValueError):
        return one_line(error, 200)
    return f"the hub cannot be reached ({type(error).__name__})"

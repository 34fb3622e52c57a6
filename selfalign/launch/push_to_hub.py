"""A finished run's last policy on a model hub, sent with the user's own login, of which nothing is kept."""

import json
from fnmatch import fnmatch
from pathlib import Path

from selfalign.core.errors import SelfalignError, one_line
from selfalign.core.files import read_json
from selfalign.models.pretrained import MODEL_FILES, TRUSTED, PolicyCheckpoint
from selfalign.report.model_card import base_on_hub, last_model, model_card
from selfalign.runs.reader import Finished

ADAPTER_CONFIG = "adapter_config.json"

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG)
"""What an earlier push of another model may have left in the repository, and must not be loaded with this one."""

REASONS = {
    401: "the hub does not accept the login",
    403: "the login may not write there",
    404: "there is no such place",
}


def check_login() -> None:
    """What can be known before a run whose model is to be pushed.

    Raises:
        SelfalignError: nobody is logged in, or the hub must not be asked.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise SelfalignError(
            "hub.push=true, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it, or set hub.push=false"
        )
    if get_token() is None:
        raise SelfalignError("hub.push=true needs a login at the hub: run `hf auth login`, or set HF_TOKEN")


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Sends the last policy of a finished run and its card, as one commit, and returns the commit's address.

    Args:
        folder: of the run.
        repository: owner/name; made where there is none.
        private: of a repository that is made.

    Raises:
        SelfalignError: the hub cannot be reached or refuses; the run stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    run, hub = Finished.load(folder), HfApi()
    files = repository_files(run, repository)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        there = hub.list_repo_files(repository)
        stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
        changes = [CommitOperationDelete(name) for name in stale]
        changes += [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = hub.create_commit(repository, changes, commit_message=f"{last_model(run)} of {folder.name}")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: hf_xet's transfers
        raise SelfalignError(
            f"hub.repo_id={repository}: {explain_refusal(error)}; the run is finished, in {folder}, and the same "
            f"command "
            "tries the push again"
        ) from error
    return str(commit.commit_url)


def repository_files(run: Finished, repository: str) -> dict[str, str | bytes]:
    """{name in the repository: a file's path, or content}: weights or adapter, tokenizer, and the card."""
    policy = PolicyCheckpoint(last_model(run).link_in(run.folder))
    part = "adapter" if (policy.path / "adapter").exists() else "weights"
    patterns = [*MODEL_FILES, "*.py"] if (policy.path / TRUSTED).exists() else MODEL_FILES
    files: dict[str, str | bytes] = {
        path.name: str(path)
        for place in (policy.path / part, policy.path / "tokenizer")
        for pattern in patterns
        for path in sorted(place.glob(pattern))
    }
    base, _ = base_on_hub(run)
    if base and part == "adapter":
        settings = read_json(policy.path / "adapter" / ADAPTER_CONFIG)
        files[ADAPTER_CONFIG] = json.dumps({**settings, "base_model_name_or_path": base}, indent=2).encode()
    return {**files, "README.md": model_card(run, repository).encode()}


def explain_refusal(error: Exception) -> str:
    """Why a push failed, in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        told = one_line(error.server_message or "", 200)
        return f"{REASONS.get(status, 'the hub refused')} ({status}{f': {told}' if told else ''})"
    if isinstance(error, ValueError):
        return one_line(error, 200)
    return f"the hub cannot be reached ({type(error).__name__})"

"""The provenance of a run's results: code, packages, machine and weights."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from selfalign.core.files import PACKAGE, read_json, write_json
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.runs.labels import Kind, Label
from selfalign.runs.ledger import Ledger
from selfalign.store.artifacts import MANIFEST
from selfalign.store.source_code import packages_in, version_of

PACKAGES = (
    "selfalign",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "hydra-core",
    "omegaconf",
    "wandb",
)


OUTSIDE_MODELS = {Label.input("writer"), Label.input("judge"), Label.input("comparator")}
"""Models from outside the run whose weights are recorded, besides the run's own."""


def write_provenance(ledger: Ledger, seed: int, code: dict[str, str]) -> None:
    """Write provenance.json: code, packages, machine, seed and the digests of all weights.

    Args:
        ledger: of the run.
        seed: of the run.
        code: `code_state()` at the start of the run, whose code is the one that runs.
    """
    policies = {
        str(label): PolicyCheckpoint(artifact.path).digest
        for label, artifact in ledger.artifacts.items()
        if label.kind is Kind.MODEL or label in OUTSIDE_MODELS
    }
    write_json(
        ledger.folder / "provenance.json",
        {
            **code,
            "packages": {name: version for name in PACKAGES if (version := installed_version(name))}
            | packages_of_components(ledger),
            "python": platform.python_version(),
            "machine": {
                "system": platform.platform(),
                "processor": platform.processor(),
                "cores": os.cpu_count(),
            },
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "seed": seed,
            "weights": policies,
            "artifacts": {str(label): f"{a.stage}/{a.key}" for label, a in ledger.artifacts.items()},
        },
    )


def installed_version(distribution: str) -> str:
    """Return the version of a distribution, or "" if it is not installed, as in a checkout that is only on the path."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def packages_of_components(ledger: Ledger) -> dict[str, str]:
    """Return {package: version and digest of its code} of the components that are not selfalign's own."""
    manifests = [artifact.path / MANIFEST for artifact in ledger.artifacts.values()]
    found = packages_in([read_json(manifest)["inputs"] for manifest in manifests if manifest.is_file()])
    return {name: f"{version_of(name)} (source code {digest})".strip() for name, digest in sorted(found.items())}


def code_state() -> dict[str, str]:
    """Return commit and uncommitted changes of the checkout; both are empty for an installed package."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return {"commit": "", "diff": ""}
    git = ["git", "-C", str(root)]
    try:
        commit, diff = (
            subprocess.run([*git, *arguments], capture_output=True, check=True).stdout.decode("utf-8", errors="replace")
            for arguments in (["rev-parse", "HEAD"], ["diff", "HEAD"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "", "diff": ""}
    return {"commit": commit.strip(), "diff": diff}

"""Runners: they make the pipeline's artifacts, or look them up in the store."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger
from selfalign.store.artifacts import Artifact, Store
from selfalign.store.stage import StageFunction, declared


class StageRunner(Protocol):
    """A runner of the pipeline: it returns the artifact of each stage."""

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact: ...


@dataclass(frozen=True, slots=True)
class Runner:
    """Makes the artifacts of one configuration.

    Attributes:
        store: holds the artifacts.
        namespace: the name of a run that shares no artifacts (`fresh=true`), or else empty.
        ledger: records the artifacts; None in every process but the main one.
    """

    store: Store
    namespace: str = ""
    ledger: Ledger | None = None

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return the artifact of a stage, which is made if the store does not have it.

        Args:
            label: the artifact's name in this run, and its link below artifacts/.
            stage: the stage function, called as `stage(out, **inputs)`.
            inputs: artifacts, settings and seeds; the artifact's key is their digest.
        """
        name, keyed, ledger = stage.__name__, keyed_inputs(inputs, self.namespace), self.ledger
        make = partial(
            self.store.make,
            name,
            keyed,
            lambda out: stage(out, **inputs),
            label=str(label),
            all_ranks=declared(stage).all_ranks,
        )
        if ledger is None:
            return make()
        ledger.link(label, self.store.path_of(name, keyed))
        later_seconds = None
        if self.store.find(name, keyed) is None:
            later_seconds = ledger.begin(label, name)
        else:
            ledger.reused.add(label)
        artifact = make(on_row=partial(ledger.log, label, name), later_seconds=later_seconds)
        ledger.enter(label, artifact)
        return artifact


class NotMadeYet(Exception):
    """The store does not have an artifact of the run."""


@dataclass(slots=True)
class CacheLookup:
    """Looks the artifacts of a pipeline up in the store, up to the first missing one. It makes nothing.

    Attributes:
        store: the store.
        namespace: the namespace of the run.
        found: {label: key} of the artifacts found.
        asked: the same, with the missing one.
    """

    store: Store
    namespace: str = ""
    found: dict[Label, str] = field(default_factory=dict)
    asked: dict[Label, str] = field(default_factory=dict)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return the artifact from the store.

        Raises:
            NotMadeYet: the store does not have it.
        """
        keyed = keyed_inputs(inputs, self.namespace)
        self.asked[label] = self.store.path_of(stage.__name__, keyed).name
        artifact = self.store.find(stage.__name__, keyed)
        if artifact is None:
            raise NotMadeYet(str(label))
        self.found[label] = artifact.key
        return artifact


def keyed_inputs(inputs: dict[str, Any], namespace: str) -> dict[str, Any]:
    """Return a stage's inputs with the namespace, so that a fresh run does not find artifacts of other runs."""
    return inputs | ({"attempt": namespace} if namespace else {})

"""What makes the artifacts that the pipeline asks for, or looks for them."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger
from selfalign.store.artifacts import Artifact, Store
from selfalign.store.stage import StageFunction, declared

logger = logging.getLogger(__name__)


class Maker(Protocol):
    """What the pipeline asks for: the artifact of a stage, whether found or made."""

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact: ...


@dataclass(frozen=True, slots=True)
class Runner:
    """Makes the artifacts of one configuration.

    Attributes:
        store: where artifacts lie.
        namespace: empty, or the name of a run that shares nothing with others (`fresh=true`).
        ledger: keeps account of them; None in a process that only works with the main one.
    """

    store: Store
    namespace: str = ""
    ledger: Ledger | None = None

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return the artifact of a stage: found in the store, or made now.

        Args:
            label: its name in this run; also its link below artifacts/.
            stage: the function that makes it, called as `stage(out, **inputs)`.
            inputs: artifacts, settings and seeds; together they are its key.
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
        if self.store.find(name, keyed) is None:
            logger.info("%s: %s", label, name)
        else:
            ledger.reused.add(label)
        artifact = make(on_row=partial(ledger.log, label, name))
        ledger.enter(label, artifact)
        return artifact


class NotMadeYet(Exception):
    """The first artifact of a run that is not in the store."""


@dataclass(slots=True)
class Look:
    """Runner that makes nothing and collects finished artifacts, up to the first missing one.

    Attributes:
        store: the artifact store.
        namespace: as for `Runner`.
        keys: {label: key} of the artifacts found.
    """

    store: Store
    namespace: str = ""
    keys: dict[Label, str] = field(default_factory=dict)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return the artifact, if it is in the store.

        Raises:
            NotMadeYet: it is not.
        """
        artifact = self.store.find(stage.__name__, keyed_inputs(inputs, self.namespace))
        if artifact is None:
            raise NotMadeYet(str(label))
        self.keys[label] = artifact.key
        return artifact


def keyed_inputs(inputs: dict[str, Any], namespace: str) -> dict[str, Any]:
    """A stage's inputs, with the name of a run that must not find what others made."""
    return inputs | ({"attempt": namespace} if namespace else {})

"""What makes the artefacts that the pipeline asks for, or looks for them."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger
from selfalign.store.artifacts import Artefact, Store
from selfalign.store.stage import StageFunction, declared

logger = logging.getLogger(__name__)


class Maker(Protocol):
    """What the pipeline asks for: the artefact of a stage, whether found or made."""

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artefact: ...


@dataclass(frozen=True, slots=True)
class Runner:
    """Makes the artefacts of one configuration.

    Attributes:
        store: where artefacts lie.
        namespace: empty, or the name of a run that shares nothing with others (`fresh=true`).
        ledger: keeps account of them; None in a process that only works with the main one.
    """

    store: Store
    namespace: str = ""
    ledger: Ledger | None = None

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artefact:
        """Return the artefact of a stage: found in the store, or made now.

        Args:
            label: its name in this run; also its link below artefacts/.
            stage: the function that makes it, called as `stage(out, **inputs)`.
            inputs: artefacts, settings and seeds; together they are its key.
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
        ledger.link(label, self.store.place(name, keyed))
        if self.store.find(name, keyed) is None:
            logger.info("%s: %s", label, name)
        else:
            ledger.reused.add(label)
        artefact = make(on_row=partial(ledger.log, label, name))
        ledger.enter(label, artefact)
        return artefact


class NotMadeYet(Exception):
    """The first artefact of a run that is not in the store."""


@dataclass(slots=True)
class Look:
    """Walks a pipeline without making anything, up to the first artefact that is not there.

    Attributes:
        store: where it looks.
        namespace: as of the run.
        there: {label: key} of what it found.
    """

    store: Store
    namespace: str = ""
    there: dict[Label, str] = field(default_factory=dict)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artefact:
        """The artefact, if it is in the store.

        Raises:
            NotMadeYet: it is not.
        """
        artefact = self.store.find(stage.__name__, keyed_inputs(inputs, self.namespace))
        if artefact is None:
            raise NotMadeYet(str(label))
        self.there[label] = artefact.key
        return artefact


def keyed_inputs(inputs: dict[str, Any], namespace: str) -> dict[str, Any]:
    """A stage's inputs, with the name of a run that must not find what others made."""
    return inputs | ({"attempt": namespace} if namespace else {})

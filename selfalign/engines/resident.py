"""Workers that stay from stage to stage of a run and take the weights of the next policy (`engine.resident`)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.engines.worker_process import SHUTDOWN_TIMEOUT, Worker, ask_each, stop

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ResidentWorkers:
    """Workers that rest between two stages. The next stage takes them if it would start its own with the same.

    Attributes:
        workers: those that rest.
        started_with: what they were started with.
    """

    workers: list[Worker] = field(default_factory=list)
    started_with: Any = None

    def take(self, started_with: Any, question: Any) -> tuple[list[Worker], list[Any]]:
        """Return the workers with their answers to a question, and rest none. Both are empty if there are none.

        Workers that were started with something else are stopped, as are all if one has failed.
        """
        answers = self._asked(question) if started_with == self.started_with else []
        if not answers:
            self.stop()
        workers, self.workers = self.workers, []
        return workers, answers

    def keep(self, workers: list[Worker], started_with: Any, question: Any) -> None:
        """Rest workers after they have answered a question. Those that do not are stopped."""
        self.stop()
        self.workers, self.started_with = workers, started_with
        if not self._asked(question):
            self.stop()

    def stop(self) -> None:
        """End the workers that rest."""
        workers, self.workers = self.workers, []
        stop(workers, SHUTDOWN_TIMEOUT if all(worker.idle for worker in workers) else 0)

    def _asked(self, question: Any) -> list[Any]:
        """Return the answers of all workers, none if one is busy or has failed."""
        if not all(worker.idle for worker in self.workers):
            return []
        try:
            return ask_each(self.workers, [question] * len(self.workers))
        except SelfalignError as error:
            logger.warning("%s. Whoever needs it next starts it anew", error)
            return []


_places: list[ResidentWorkers] = []
"""Where workers rest: for each run in progress in this process a place, the innermost one's last."""


@contextmanager
def workers_may_stay() -> Iterator[None]:
    """Let workers rest inside the block, and end those that do when it ends."""
    _places.append(place := ResidentWorkers())
    try:
        yield
    finally:
        _places.remove(place)
        place.stop()


def resident_workers() -> ResidentWorkers | None:
    """Return where workers can rest; None outside a run."""
    return _places[-1] if _places else None

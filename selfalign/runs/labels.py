"""Labels of a run's artefacts: which iteration each belongs to."""

import re


def iteration_of(label: str) -> int:
    """The iteration a label belongs to: M1 and what comes before it is 0, M2 and its making 1, …"""
    model = re.match(r"(?:evaluation_)?M(\d+)", label)
    if model:
        return max(0, int(model[1]) - 1)
    iteration = re.match(r"iteration_(\d+)", label)
    return int(iteration[1]) if iteration else 0

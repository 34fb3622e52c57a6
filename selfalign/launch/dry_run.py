"""dry_run=true: what a run needs in memory, time and money, known before it is begun."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from selfalign.config.experiment import ExperimentConfig
from selfalign.core import distributed
from selfalign.core.formatting import duration, table
from selfalign.engines.transformers import Transformers
from selfalign.launch.dry_run_stages import StageEstimator
from selfalign.launch.preflight import preflight
from selfalign.launch.profiler import StageEstimate
from selfalign.pipeline.loop import run_pipeline

BOUND = (
    "An upper bound: every prompt with its response fills max_length, every text max_new_tokens, and new instructions\n"
    "take all their batches. Not in it: judgements that are tried again."
)
ELSEWHERE = "The engine of engine=vllm or engine=server ends texts where it likes; its memory is not in it either."


def dry_run(config: ExperimentConfig) -> list[StageEstimate]:
    """Rehearses a run, in as many processes as it will have, and says what it needs; nothing of it stays.

    Raises:
        SelfalignError: something is missing that the run will need, or a stage does not fit into memory, or into the
            model's context.
    """
    preflight(config, ())
    with _common_folder(Path(config.output_dir).absolute()) as folder:
        rehearsal = StageEstimator(config, folder)
        with distributed.translate_peer_errors():
            run_pipeline(config, rehearsal)
        distributed.wait_for_all()
    elsewhere = not isinstance(config.engine, Transformers)
    text = estimate_text(rehearsal.estimates, config.price_per_hour, elsewhere=elsewhere)
    if rehearsal.unmeasured:
        text += f"\nNot measured: {', '.join(rehearsal.unmeasured)}"
    distributed.on_main(lambda: print(text, flush=True))
    return rehearsal.estimates


@contextmanager
def _common_folder(output: Path) -> Iterator[Path]:
    """A folder of all processes that is gone in the end; there, because the run will write its models there too."""
    with ExitStack() as stack:

        def begin() -> Path:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_told_to_stop_as_an_exit())
            return Path(stack.enter_context(TemporaryDirectory(prefix=".dry-run-", dir=output)))

        yield distributed.on_main(begin)


@contextmanager
def _told_to_stop_as_an_exit() -> Iterator[None]:
    """On SIGTERM, too, whatever lies open is closed and cleared away."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def estimate_text(estimates: Sequence[StageEstimate], price_per_hour: float, *, elsewhere: bool = False) -> str:
    """A row a stage, and what all need together; `elsewhere` tells that another program writes."""
    rows = [
        [
            one.label,
            f"{one.count} {one.unit}",
            f"{one.each:.2f}" if one.seconds else "–",
            f"{one.peak / 2**30:.2f}" if one.peak else "–",
            duration(one.seconds) if one.seconds else "–",
        ]
        for one in estimates
    ]
    seconds, servers = sum(one.seconds for one in estimates), sum(one.cost for one in estimates)
    highest = max(estimates, key=lambda one: one.peak)
    lines = ["", *table(["stage", "work", "seconds each", "peak GiB", "time"], rows), ""]
    lines.append(f"time    at most {duration(seconds)}")
    many = distributed.count()
    each = f" in each of {many} processes" if many > 1 else ""
    lines.append(f"memory  at most {highest.peak / 2**30:.2f} GiB{each}, in {highest.label}")
    if price_per_hour or servers:
        machine = seconds / 3600 * price_per_hour
        lines.append(f"cost    at most {machine + servers:.2f}: the machine {machine:.2f}, servers {servers:.2f}")
    return "\n".join([*lines, "", BOUND, *[ELSEWHERE] * elsewhere])

"""dry_run=true: measure the memory, time and money that a run needs, without making anything that stays."""

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
from selfalign.launch.experiment import sight
from selfalign.launch.preflight import preflight
from selfalign.launch.profiler import StageEstimate
from selfalign.pipeline.loop import run_pipeline

BOUND = (
    "This is an upper bound. It assumes that every prompt with its response fills max_length, that every generated\n"
    "text has max_new_tokens, and that new instructions take all their batches. It leaves out repeated judgements."
)
ELSEWHERE = "With engine=vllm or engine=server it also leaves out the engine's memory, and texts may end early."


def dry_run(config: ExperimentConfig) -> list[StageEstimate]:
    """Measure what a run needs, in as many processes as the run will have, and print it. Nothing is kept.

    Returns:
        An estimate for each stage.

    Raises:
        SelfalignError: something that the run needs is missing, or a stage does not fit into memory or into the model's
            context.
    """
    preflight(config, ())
    with _common_folder(Path(config.output_dir).absolute()) as folder:
        estimator = StageEstimator(config, folder)
        with distributed.translate_peer_errors():
            run_pipeline(config, estimator)
        distributed.wait_for_all()
    elsewhere = not isinstance(config.engine, Transformers)
    text = estimate_text(estimator.estimates, config.price_per_hour, elsewhere=elsewhere)
    text = "\n".join([text, "", *sight(config, estimator.instructions)[:1]])
    if estimator.unmeasured:
        text += f"\nNot measured: {', '.join(estimator.unmeasured)}"
    distributed.on_main(lambda: print(text, flush=True))
    return estimator.estimates


@contextmanager
def _common_folder(output: Path) -> Iterator[Path]:
    """Make a temporary folder for all processes below the output folder, where the run will write its models too."""
    with ExitStack() as stack:

        def begin() -> Path:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_exit_on_sigterm())
            return Path(stack.enter_context(TemporaryDirectory(prefix=".dry-run-", dir=output)))

        yield distributed.on_main(begin)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit, so that open files are closed and the folder is removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def estimate_text(estimates: Sequence[StageEstimate], price_per_hour: float, *, elsewhere: bool = False) -> str:
    """Return the estimates as a table with a row for each stage, and the totals of time, memory and cost.

    Args:
        estimates: of all stages.
        price_per_hour: of the machine.
        elsewhere: whether another program than this one generates the texts.
    """
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
    largest = max(estimates, key=lambda one: one.peak)
    lines = ["", *table(["stage", "work", "seconds each", "peak GiB", "time"], rows), ""]
    lines.append(f"time    at most {duration(seconds)}")
    processes = distributed.count()
    each = f" in each of {processes} processes" if processes > 1 else ""
    lines.append(f"memory  at most {largest.peak / 2**30:.2f} GiB{each}, in {largest.label}")
    if price_per_hour or servers:
        machine = seconds / 3600 * price_per_hour
        lines.append(f"cost    at most {machine + servers:.2f}: the machine {machine:.2f}, servers {servers:.2f}")
    return "\n".join([*lines, "", BOUND, *[ELSEWHERE] * elsewhere])

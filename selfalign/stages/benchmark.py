"""benchmark: a policy + a published benchmark → its responses, judgements and metrics."""

from selfalign.benchmarks.protocol import Benchmark, BenchmarkContext
from selfalign.engines.protocol import Engine
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import Size, stage


def size(*, benchmark: Benchmark, **others: object) -> Size:
    """Return the size that the benchmark declares."""
    return Size(benchmark.size, {})


@stage(size=size, all_ranks=True)
def benchmark(
    out: StageOutput,
    *,
    name: str,
    benchmark: Benchmark,
    contents: Content | dict[str, str],
    model: str,
    policy: Artifact,
    judge: Artifact | None,
    engine: Engine,
    seed: int,
) -> Counts:
    """Run a benchmark on one model. The counts are named `<name>/<metric>`.

    Args:
        out: receives the benchmark's files, in the formats of its own tools.
        name: the benchmark's name in the configuration.
        benchmark: the benchmark and its settings.
        contents: digests of the files that the benchmark reads.
        model: the model's label in the run.
        policy: the model's checkpoint.
        judge: the policy that judges the responses; None if no policy of the run does.
        engine: generates the responses.
        seed: seeds all sampling.
    """
    context = BenchmarkContext(
        key=f"benchmark.{name}",
        label=model,
        policy=PolicyCheckpoint(policy.path),
        judge=PolicyCheckpoint(judge.path) if judge else None,
        engine=engine,
        seed=seed,
    )
    measured = benchmark.measure(context, out)
    dropped = {"dropped": measured.pop("dropped")} if "dropped" in measured else {}
    return {f"{name}/{metric}": value for metric, value in measured.items()} | dropped

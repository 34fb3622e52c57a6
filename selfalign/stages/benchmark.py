"""benchmark: a policy + a published benchmark → its answers, judgements and numbers."""

from selfalign.benchmarks.protocol import Benchmark, BenchmarkContext
from selfalign.engines.protocol import Engine
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import Size, stage


def size(*, benchmark: Benchmark, **others: object) -> Size:
    """As the benchmark says."""
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
    """Measures one model; the counts are named `<name>/<metric>`.

    Args:
        out: gets what the benchmark writes, in the layouts that its own tools read.
        name: of the benchmark in the configuration.
        benchmark: what is measured, and how.
        contents: of the files that the benchmark reads.
        model: its label in the run.
        policy: its files.
        judge: the policy that judges its answers, if one does.
        engine: the engine that writes.
        seed: draws whatever is drawn.
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

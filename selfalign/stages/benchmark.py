"""benchmark: a policy + a published benchmark → its responses, judgements and metrics."""

import logging
from collections.abc import Sequence

from selfalign.benchmarks.protocol import Benchmark, BenchmarkContext, TellsQuestions
from selfalign.data.turns import compared
from selfalign.engines.protocol import Engine
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import PlannedArtifact, Size, stage
from selfalign.training.splits import prompts_of

logger = logging.getLogger(__name__)


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
    trained_on: Sequence[Artifact] = (),
    reference: Artifact | None = None,
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
        trained_on: training data of the run that ask questions of the benchmark. All questions are measured, as a
            published benchmark wants, but a warning says how many there are.
        reference: the policy that the judge was trained from, if the judge compares itself with it.
    """
    if trained_on:
        questions = asked_by(benchmark, name)
        known = {text for artifact in trained_on for text in prompts_of(artifact)}
        logger.warning(
            "%s: %d of %d questions are prompts of the run's training data too, and the numbers count them",
            *(out.label, len(questions & known), len(questions)),
        )
    context = BenchmarkContext(
        key=f"benchmark.{name}",
        label=model,
        policy=PolicyCheckpoint(policy.path),
        judge=PolicyCheckpoint(judge.path) if judge else None,
        engine=engine,
        seed=seed,
        reference=PolicyCheckpoint(reference.path) if reference else None,
    )
    measured = benchmark.measure(context, out)
    dropped = {"dropped": measured.pop("dropped")} if "dropped" in measured else {}
    return {f"{name}/{metric}": value for metric, value in measured.items()} | dropped


def asked_by(benchmark: Benchmark, name: str) -> set[str]:
    """Return the texts of a benchmark's questions as they are compared; none if it does not tell them."""
    return set(map(compared, benchmark.asked(f"benchmark.{name}"))) if isinstance(benchmark, TellsQuestions) else set()


def overlapping(benchmark: Benchmark, name: str, trained_on: Sequence[Artifact]) -> list[Artifact]:
    """Return the training data that ask a question of a benchmark."""
    made = [artifact for artifact in trained_on if not isinstance(artifact, PlannedArtifact)]
    questions = asked_by(benchmark, name) if made else set()
    return [artifact for artifact in made if any(text in questions for text in prompts_of(artifact))]

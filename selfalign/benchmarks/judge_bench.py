"""JudgeBench: tell the right response from the wrong one, where style does not help (arXiv 2410.12784)."""

from collections.abc import Sequence
from dataclasses import dataclass

from selfalign.benchmarks.fastchat import write_lines
from selfalign.benchmarks.judge_test import JudgeTest, LabelledResponses, named, result_row
from selfalign.benchmarks.protocol import BenchmarkContext
from selfalign.core.records import Comparison, Verdict
from selfalign.data.containers import read_rows
from selfalign.data.rows import Row, is_blank, shown
from selfalign.judges.comparisons import bias_statistics
from selfalign.judges.pairwise import Pairwise
from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_share
from selfalign.store.artifacts import Counts, StageOutput

LABELS = ("A>B", "B>A")

CATEGORIES = (
    ("mmlu-pro", "knowledge"), ("livebench-reasoning", "reasoning"), ("livebench-math", "math"),
    ("livecodebench", "coding"),
)  # fmt: skip
"""(beginning of a source's name, the category in which JudgeBench counts it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeRow:
    """A row of JudgeBench."""

    pair_id: str
    question: str
    response_A: str
    response_B: str
    label: str
    source: str = ""


@dataclass(kw_only=True, slots=True)
class JudgeBench(JudgeTest):
    """Compare two responses, of which one is right, and see whether the judge prefers it.

    A pairwise judge is asked in both orders, each of which counts +1 for the right response, -1 for the wrong one and 0
    for a tie or no verdict; the pair is right if the sum is positive, as in JudgeBench. A judge that scores single
    responses is right if the right one scores higher: a tie is wrong. (JudgeBench's own reward models give ties to B.)
    A pair with a missing score or verdict is `failed`, too.

    `accuracy` is the share of right pairs, over all and by category. A judge that guesses has 0.5, and a pairwise one
    0.25, because it must not contradict itself.
    """

    def read(self) -> list[LabelledResponses]:
        """Return the comparisons of the source.

        Raises:
            SelfalignError: a row is no comparison; file and line are named.
        """
        return [read_row(number, Row.of(*placed)) for number, placed in enumerate(read_rows(self.questions))]

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Write judgements.jsonl, and results.jsonl with a line for each pair. Return the metrics."""
        compared = self.chosen()
        judged = self.judge_all(context, out, compared)
        if is_pairwise := isinstance(self.judge, Pairwise):
            found = [comparison for one in compared for comparison in judged.comparisons.get(one.id, [])]
            sums = {comparison.instruction_id: votes(comparison) for comparison in found}
            failed = {one.instruction_id for one in found if one.outcome is None}
        else:
            found = []
            sums = {one.id: preference(judged.scores[one.id]) for one in compared}
            failed = {one.id for one in compared if None in judged.scores[one.id]}
        failed |= {one.id for one in compared if one.id not in sums}
        right = [float(sums.get(one.id, 0) > 0) for one in compared]
        rows = [result_row(one, judged, value) for one, value in zip(compared, right, strict=True)]
        write_lines(out.path / "results.jsonl", rows)
        undecided = [sums.get(one.id, 0) == 0 and one.id not in failed for one in compared]
        counts: Counts = {
            catalog.BENCHMARK_COMPARISONS.own: len(compared),
            catalog.BENCHMARK_CHANCE.own: 0.25 if is_pairwise else 0.5,
            catalog.BENCHMARK_FAILED.own: len(failed) / len(compared),
            catalog.BENCHMARK_TIED.own: sum(undecided) / len(compared),
            **bias_statistics(found),
            **judged.counts,
        }
        subsets = sorted({one.subset for one in compared})
        for subset in ("", *subsets):
            share = bootstrap_share(
                [(value, 1.0) for one, value in zip(compared, right, strict=True) if subset in ("", one.subset)]
            )
            metric = catalog.BENCHMARK_ACCURACY_IN.of(subset=subset) if subset else catalog.BENCHMARK_ACCURACY
            counts |= share.known(metric.own)
        return counts | {"dropped": {}}


def read_row(number: int, row: Row) -> LabelledResponses:
    """Return a row as labelled responses, the right one first.

    Raises:
        SelfalignError: the row has no question, or another label.
    """
    found = row.typed(JudgeRow)
    if is_blank(found.question):
        row.refuse("the question is empty")
    if found.label not in LABELS:
        row.refuse(f"the label must be {' or '.join(LABELS)}, got {shown(found.label)}")
    responses = [found.response_A, found.response_B]
    return LabelledResponses(
        id=str(number),
        name=found.pair_id,
        subset=category_of(found.source),
        instruction=found.question,
        responses=responses if found.label == LABELS[0] else responses[::-1],
    )


def category_of(source: str) -> str:
    """Return the category of a source of questions; its own name if JudgeBench has none for it."""
    return next((category for begun, category in CATEGORIES if source.startswith(begun)), named(source or "other"))


def votes(comparison: Comparison) -> int:
    """Return how many orders chose the first response, less those that chose the second."""
    value = {Verdict.A: 1, Verdict.B: -1}
    there, back = (value.get(verdict, 0) if verdict else 0 for verdict in (comparison.forward, comparison.backward))
    return there - back


def preference(scores: Sequence[float | None]) -> int:
    """Return 1 if the first score is the higher one, -1 if the second is, and 0 if they are equal or one is missing."""
    first, second = scores
    return 0 if first is None or second is None else (first > second) - (first < second)

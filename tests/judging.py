"""What tests of judges share: two instructions with answers, and a stage that judges them."""

from pathlib import Path
from typing import Any

from builders import instruction, records_artifact, response, workspace

from selfalign.core.jsonl import read_records
from selfalign.core.records import Judgement, ResponseScore
from selfalign.engines.transformers import Transformers
from selfalign.stages.judge import Judge, judge
from selfalign.store.artifacts import Artifact, Counts

FP32 = Transformers(dtype="float32")
ASKED = [instruction("bees", "What do bees do all day?"), instruction("tea", "How is tea made?")]
ANSWERS = [
    response("bees-1", "They fly and they dance."),
    response("bees-2", "Nothing."),
    response("bees-3", "Bees gather nectar, keep the hive warm and feed the brood; each has its turn at every job."),
    response("tea-1", "Pour hot water over leaves."),
    response("tea-2", "Tea is a drink {made} from {response} leaves."),
]


def given(folder: Path, answers: list = ANSWERS) -> dict[str, Artifact]:
    """The instructions and so many of the answers as the stage takes them."""
    place = records_artifact(folder / "given", instructions=ASKED, responses=answers)
    return {"instructions": place, "responses": place}


def run_judge(folder: Path, kind: Judge, policy: Artifact | None, engine: Any = FP32, **more: Any) -> Counts:
    """Runs the stage into `folder`/out; `more` replaces what is judged, the reference or the seed."""
    inputs = {"reference": None, "seed": 1, **(more if "responses" in more else given(folder) | more)}
    return judge(workspace(folder / "out"), judge=kind, policy=policy, engine=engine, **inputs)


def judged(folder: Path, kind: Judge, policy: Artifact | None, engine: Any = FP32, **more: Any):
    """The stage's counts, and {response id: judgement} (the last of each response)."""
    counts = run_judge(folder, kind, policy, engine, **more)
    return counts, {j.response_id: j for j in read_records(folder / "out" / "judgements.jsonl", Judgement)}


def scores(folder: Path) -> dict[str, ResponseScore]:
    """What the stage wrote of every response."""
    return {score.id: score for score in read_records(folder / "out" / "scores.jsonl", ResponseScore)}

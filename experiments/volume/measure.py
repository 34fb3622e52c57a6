"""What a million instructions would take: records, pairs and training batches at growing sizes.

    python experiments/volume/measure.py FOLDER --instructions 10000 100000

Every stage is the real one, on a tiny random policy whose forward passes are left out: made-up texts and numbers stand
in their place, so that what is measured is everything else. Each size and each part is a process of its own. Prints a
table.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from selfalign.core.jsonl import join_sorted, stream_records, write_records
from selfalign.core.records import (
    FinishReason,
    Instruction,
    Judgement,
    JudgementStatus,
    PreferencePair,
    Response,
    ResponseScore,
)
from selfalign.data.pair_rules import BestWorst
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.engines.transformers import Transformers, TransformersGenerator
from selfalign.losses.refinement import Refinement
from selfalign.models.batches import PairExample, SharedPrompt, encode_pairs, pack, split_by_tokens
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.scorer import LogProbScorer
from selfalign.stages.pair import pair
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.stages.respond import RespondConfig, respond
from selfalign.store.artifacts import Artifact, StageOutput
from selfalign.training.config import LogProbSettings
from selfalign.training.dataset import StoredExamples, store_examples
from selfalign.training.reference import join_references
from selfalign.training.trainer import StepDataset

CANDIDATES, SAMPLES, WORDS = 4, 3, 30
"""Responses to an instruction, judgements of a response, and words of a text, on average."""

MAX_BATCH_TOKENS = 1 << 17
STEP_PAIRS = 64
LIMIT = 2048


def text(draw: random.Random) -> str:
    """Some made-up words."""
    return " ".join(f"w{draw.randrange(3000)}" for _ in range(draw.randint(WORDS // 2, WORDS * 3 // 2)))


# --- what stands in the place of a model ----------------------------------------------------------------------------


class Writer(TransformersGenerator):
    """Writes words drawn from each completion's seed."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """A text for every seed."""

        def one(seed: int) -> Completion:
            return Completion(text=text(random.Random(seed)), finish_reason=FinishReason.EOS, tokens=WORDS)

        return [[one(seed) for seed in request.seeds] for request in requests]


class Backend(Transformers):
    """Loads a writer."""

    def load(self, policy: PolicyCheckpoint) -> Writer:
        """The policy's tokenizer is used, its weights are not."""
        return Writer(policy.load("float32"), MAX_BATCH_TOKENS)


def made_up_sums(scorer: LogProbScorer, groups: Sequence[SharedPrompt]) -> list[list[float]]:
    """Two nats a token."""
    return [[-2.0 * len(response) for response in group.responses] for group in groups]


# --- parts ---------------------------------------------------------------------------------------------------------


def write_instructions(folder: Path, count: int) -> None:
    """The instructions."""
    draw = random.Random(0)
    asked = (Instruction(id=f"i{number:08}", text=text(draw), source="self") for number in range(count))
    write_records(folder / "instructions.jsonl", asked)


def write_responses(folder: Path, count: int) -> None:
    """The stage `respond`."""
    respond(
        workspace(folder),
        config=RespondConfig(candidates=CANDIDATES),
        policy=policy(folder),
        instructions=artifact(folder),
        engine=Backend(),
        seed=0,
    )


def write_judgements(folder: Path, count: int) -> None:
    """Made-up judgements and their means, as the stage `judge` leaves them."""

    def judged() -> Iterator[tuple[str, list[float]]]:
        for response in stream_records(folder / "responses.jsonl", Response):
            draw = random.Random(response.id)
            yield response.id, [float(draw.randint(0, 5)) for _ in range(SAMPLES)]

    def judgements() -> Iterator[Judgement]:
        draw = random.Random(1)
        for name, scores in judged():
            for n, score in enumerate(scores, start=1):
                status = JudgementStatus.OK
                yield Judgement(
                    id=f"{name}-{n}", response_id=name, status=status, score=score, text=text(draw), model="m", sample=n
                )

    write_records(folder / "judgements.jsonl", judgements())
    means = (ResponseScore(id=n, score=sum(s) / SAMPLES, valid=SAMPLES, variance=None) for n, s in judged())
    write_records(folder / "scores.jsonl", means)


def read_judgements(folder: Path, count: int) -> None:
    """Responses and judgements side by side, as tables and report read them."""
    responses, file = stream_records(folder / "responses.jsonl", Response), folder / "judgements.jsonl"
    families = join_sorted(responses, stream_records(file, Judgement), lambda one: one.response_id, file)
    assert sum(len(own) for _, own in families) == count * CANDIDATES * SAMPLES


def make_pairs(folder: Path, count: int) -> None:
    """The stage `pair`."""
    given = artifact(folder)
    pair(workspace(folder), rule=BestWorst(), instructions=given, responses=given, judgements=given, seed=0)


def write_references(folder: Path, count: int) -> None:
    """The stage `reference`, with the pass of Sr-DPO behind p⊕x."""
    LogProbScorer.score = made_up_sums  # pyright: ignore[reportAttributeAccessIssue]
    precision = LogProbSettings(dtype="float32", autocast="", max_length=LIMIT, max_batch_tokens=MAX_BATCH_TOKENS)
    reference_logprobs(
        workspace(folder), policy=policy(folder), pairs=artifact(folder), augmentation=Refinement(), precision=precision
    )


def store_pairs(folder: Path, count: int) -> None:
    """Pairs and their reference values into the table that training reads."""
    stored(folder)


def build_batches(folder: Path, count: int) -> None:
    """Every step of one epoch, fetched, cut into passes and packed, as the trainer does it."""
    for step in StepDataset(stored(folder), STEP_PAIRS, 1, 0):
        pairs = cast(list[PairExample], step)
        for part in split_by_tokens(sorted(pairs, key=len), MAX_BATCH_TOKENS):
            pack([example.plain for example in part])
            pack([example.augmented for example in part if example.augmented is not None])


PARTS: dict[str, Callable[[Path, int], None]] = {
    "instructions": write_instructions,
    "respond": write_responses,
    "judgements written": write_judgements,
    "judgements read": read_judgements,
    "pair": make_pairs,
    "reference": write_references,
    "tokens to table": store_pairs,
    "batches of an epoch": build_batches,
}


def stored(folder: Path) -> StoredExamples[PairExample]:
    """The pairs as the stage `align` stores and finds them."""
    records, tally = stream_records(folder / "pairs.jsonl", PreferencePair), Counter[str]()
    tokenizer = PolicyCheckpoint(folder.parent / "policy").load_tokenizer()
    encoded = encode_pairs(tokenizer, records, Refinement(), LIMIT, tally)
    examples = join_references(encoded, folder / "references.jsonl", "reference")
    return store_examples(folder / "table", PairExample, examples, tally)


def artifact(folder: Path) -> Artifact:
    """A folder as a finished artifact."""
    return Artifact(stage="given", key="k", path=folder, digest="d", counts={}, seconds=0.0)


def policy(folder: Path) -> Artifact:
    """The tiny random policy."""
    return artifact(folder.parent / "policy")


def workspace(folder: Path) -> StageOutput:
    """Where a stage writes: among the records of the others."""
    return StageOutput(folder, "stage", lambda row: None)


# --- measuring -----------------------------------------------------------------------------------------------------


def memory() -> tuple[float, float]:
    """(private, resident) memory of this process now, MB: a memory-mapped file's pages are resident and not private."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("RssAnon", "VmRSS")))
    sizes = {name: float(size.split()[0]) / 1024 for name, size in pairs}
    return sizes["RssAnon"], sizes["VmRSS"]


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, processor seconds and peak memory (MB, above what there was) of what happens inside."""
    peak, before, done = list(memory()), memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[:] = map(max, peak, memory())

    found: dict[str, float] = {"baseline": before[0]}
    watcher = threading.Thread(target=watch)
    watcher.start()
    started, used = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found |= {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}
        done.set()
        watcher.join()
        found |= {"private": peak[0] - before[0], "resident": peak[1] - before[1]}


def measure(folder: Path, part: str, count: int) -> dict[str, float]:
    """One part, in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--part", part, "--instructions", str(count)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Measures all parts at every size, or one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instructions", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--part", choices=PARTS)
    job = parser.parse_args()
    if job.part:
        place = job.folder / str(job.instructions[0])
        place.mkdir(parents=True, exist_ok=True)
        with watched() as found:
            PARTS[job.part](place, job.instructions[0])
        print(json.dumps(found))
        return
    if not (job.folder / "policy").exists():
        fetch_pretrained(ModelConfig(path="random:tiny"), job.folder / "policy")
    for part in PARTS:
        for count in job.instructions:
            before = disk(job.folder / str(count))
            found = measure(job.folder, part, count)
            shutil.rmtree(job.folder / str(count) / "scratch", ignore_errors=True)  # A journal goes with its stage.
            grown = disk(job.folder / str(count)) - before
            print(
                f"| {part} | {count:,} | {found['seconds']:.0f} | {found['processor']:.0f} | {found['private']:.0f} "
                f"| {found['resident']:.0f} | {grown / 1e6:.0f} |",
                flush=True,
            )


def disk(folder: Path) -> int:
    """Bytes below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()

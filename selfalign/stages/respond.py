"""respond: instructions + a policy → N candidate responses each; and the responses of several writers, joined."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import join_sorted, stream_records, write_records
from selfalign.core.records import Instruction, Response
from selfalign.engines.protocol import Engine, Sampling
from selfalign.engines.responses import ResponseCounts, generate_responses
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage

DEMONSTRATION = "demonstration"
NEXT = "next"
WRITERS = ("self", "previous", "sft", "base", NEXT, DEMONSTRATION)
"""Who may write candidates."""


@dataclass(kw_only=True, slots=True)
class RespondConfig:
    """How candidates are generated. arXiv 2401.10020 takes N=4 at temperature 0.7 and top-p 0.9.

    Attributes:
        candidates: N, the number of responses to each instruction, by each model that writes.
        sampling: how they are sampled.
        writers: who writes them: "self" (M_t), "previous" (M_{t-1}), "sft" (M1), "base" (M0), "next" (the model that
            this iteration would give if M_t wrote in its place), or "demonstration" (the given answer, one for each
            instruction, with data.instruct.source=demonstrations).
    """

    candidates: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    writers: list[str] = field(default_factory=lambda: ["self"], metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        self.sampling.check("data.respond.sampling")
        if self.candidates < 1:
            raise SelfalignError(f"data.respond.candidates must be 1 or more, got {self.candidates}")
        unknown = [one for one in self.writers if one not in WRITERS]
        if unknown or not self.writers or len(set(self.writers)) < len(self.writers):
            raise SelfalignError(
                f"data.respond.writers must be a list of {', '.join(WRITERS)}, each once at most; got {self.writers}"
            )

    def by_one_writer(self) -> "RespondConfig":
        """Return the settings of one writer, in whose key the others do not stand."""
        return replace(self, writers=["self"])

    @property
    def most_candidates(self) -> int:
        """The number of responses to an instruction by all writers together."""
        models = [writer for writer in self.writers if writer != DEMONSTRATION]
        return len(models) * self.candidates + len(self.writers) - len(models)


def size(*, config: RespondConfig, instructions: Artifact, **others: object) -> Size:
    """Return the number of responses and their maximum length in tokens."""
    count = records_in(instructions, "instructions")
    text = f"{amount(count)} instructions, {config.candidates} response{'s' * (config.candidates > 1)} each"
    counts = {"responses": count * config.candidates, "tokens_each": config.sampling.longest}
    return Size(text, counts)


@stage(size=size, all_ranks=True)
def respond(
    out: StageOutput,
    *,
    config: RespondConfig,
    policy: Artifact,
    instructions: Artifact,
    engine: Engine,
    seed: int,
) -> Counts:
    """Generate `candidates` responses to every instruction. Each response has its own random stream.

    Args:
        out: receives responses.jsonl.
        config: number of candidates and sampling.
        policy: the policy that responds.
        instructions: instructions.jsonl.
        engine: generates the responses.
        seed: seeds the sampling, together with the instruction's id and the candidate's number.

    Raises:
        SelfalignError: no instruction fits into the context.
    """
    return generate_responses(
        out,
        candidates=config.candidates,
        sampling=config.sampling,
        policy=PolicyCheckpoint(policy.path),
        instructions=instructions.path / "instructions.jsonl",
        engine=engine,
        seed=seed,
    )


def size_of_joined(*, parts: dict[str, Artifact], **others: object) -> Size:
    """Return the number of responses of all writers."""
    count = sum(records_in(part, "responses") for part in parts.values())
    tokens = max(part.counts.get("tokens_each", 0) for part in parts.values())
    return Size(f"{amount(count)} responses by {', '.join(parts)}", {"responses": count, "tokens_each": tokens})


@stage(size=size_of_joined)
def join_responses(out: StageOutput, *, instructions: Artifact, parts: dict[str, Artifact]) -> Counts:
    """Join the responses of several writers to the same instructions, and name the writer of each.

    Args:
        out: receives responses.jsonl.
        instructions: instructions.jsonl.
        parts: {writer: responses.jsonl}.
    """
    files = {writer: part.path / "responses.jsonl" for writer, part in parts.items()}
    tally = ResponseCounts()

    def by_instruction(file: Path) -> Iterator[tuple[Instruction, list[Response]]]:
        asked = stream_records(instructions.path / "instructions.jsonl", Instruction)
        return join_sorted(asked, stream_records(file, Response), lambda one: one.instruction_id, file)

    def joined() -> Iterator[Response]:
        groups = {writer: by_instruction(file) for writer, file in files.items()}
        for of_one in zip(*groups.values(), strict=True):
            for writer, (_, responses) in zip(groups, of_one, strict=True):
                yield from (replace(one, id=f"{one.id}-{writer}", writer=writer) for one in responses)

    write_records(out.path / "responses.jsonl", tally.watch(joined()))
    return tally.counts()

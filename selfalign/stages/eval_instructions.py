"""eval_instructions: a data source → the evaluation instructions."""

from collections.abc import Sequence

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, Instruction
from selfalign.data.mixtures import DataSource
from selfalign.data.schemas import Schema
from selfalign.data.sources import read_instructions
from selfalign.data.turns import compared, compared_prompt, texts_in
from selfalign.data.verifiable import checks_of
from selfalign.metrics import catalog
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import MANY, PlannedArtifact, Size, stage
from selfalign.training.splits import prompts_of


def size(*, source: DataSource, count: int, **others: object) -> Size:
    """Return the number of instructions."""
    return Size(f"{count or 'all'} instructions of {source}", {"instructions": count or MANY})


@stage(size=size, given=True)
def eval_instructions(
    out: StageOutput,
    *,
    source: DataSource,
    count: int,
    content: Content | str,
    seeds: Artifact | None,
    trained_on: Sequence[Artifact] = (),
    held_out: Sequence[Artifact] = (),
    schema: Schema | None = None,
    verifiable: bool = False,
) -> Counts:
    """Copy the first `count` instructions that no model was trained on into the store.

    A repeated instruction is left out, whatever its id, because it would count twice in every interval.

    Args:
        out: receives instructions.jsonl.
        source: a data source.
        count: number of instructions; 0 takes all.
        content: digest of the source.
        seeds: demonstrations.jsonl; instructions among its prompts are left out. None checks no demonstrations.
        trained_on: other artifacts that the models were trained on, with demonstrations.jsonl or pairs.jsonl.
        held_out: instructions.jsonl of the evaluation, if these instructions select among models.
        schema: the user's description of the source's rows; None for a known format.
        verifiable: whether each must say what is right, because responses are checked by it.

    Raises:
        SelfalignError: no instruction is left, one does not say what is right, or two that ask the same differ in it.
    """
    demonstrations: list[Demonstration] = []
    if seeds is not None and seeds.counts["ift"]:
        demonstrations = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    prompts = {text for demonstration in demonstrations for text in texts_in(demonstration.prompt)}
    given, drops = read_instructions(source, "evaluation", schema)
    new = [instruction for instruction in given if compared_prompt(instruction.prompt) not in prompts]
    known = {text for artifact in trained_on for text in prompts_of(artifact)}
    untrained = [instruction for instruction in new if compared_prompt(instruction.prompt) not in known]
    measured = {text for artifact in held_out for text in asked_in(artifact)}
    unmeasured = [instruction for instruction in untrained if compared_prompt(instruction.prompt) not in measured]
    if not unmeasured:
        where = " or prompts that the models were trained on" if trained_on else ""
        where += " or instructions that the models are evaluated on" if held_out else ""
        raise SelfalignError(
            f"{source}: all {len(given)} instructions are prompts of data.seed_data.demonstrations{where}. "
            "Give instructions that no model was trained on."
        )
    distinct: dict[str, Instruction] = {}
    for instruction in unmeasured:
        first = distinct.setdefault(compared(instruction.text), instruction)
        if (first.answer, first.constraints) != (instruction.answer, instruction.constraints):
            raise SelfalignError(
                f"{source}: {first.id} and {instruction.id} ask the same, but differ in what is right; keep one"
            )
    drops.update(duplicate=len(unmeasured) - len(distinct), trained_on=len(new) - len(untrained))
    drops.update(held_out=len(untrained) - len(unmeasured))
    kept = [*distinct.values()][: count or None]
    if verifiable:
        _check_verifiable(source, kept)
    write_records(out.path / "instructions.jsonl", kept)
    return {catalog.INSTRUCTIONS.name: len(kept), "dropped": {"in_demonstrations": len(given) - len(new), **(+drops)}}


def _check_verifiable(source: DataSource, instructions: Sequence[Instruction]) -> None:
    if silent := [one for one in instructions if not checks_of(one)]:
        raise SelfalignError(
            f"{source}: {len(silent)} of {len(instructions)} instructions, such as {silent[0].id}, have neither an "
            "answer nor constraints to check. Give them (docs/judges.md has their forms), or take "
            "shipped:verifiable and shipped:verifiable_test"
        )


def overlapping(artifacts: Sequence[Artifact], source: DataSource) -> list[Artifact]:
    """Return the artifacts that have an instruction of this data source among their prompts."""
    if not artifacts:
        return []
    instructions = {compared_prompt(instruction.prompt) for instruction in read_instructions(source, "evaluation")[0]}
    return [artifact for artifact in artifacts if any(text in instructions for text in prompts_of(artifact))]


def measured_by(artifacts: Sequence[Artifact], source: DataSource) -> list[Artifact]:
    """Return the artifacts of evaluation instructions that share an instruction with this data source."""
    made = [artifact for artifact in artifacts if not isinstance(artifact, PlannedArtifact)]
    if not made:
        return []
    instructions = {compared_prompt(instruction.prompt) for instruction in read_instructions(source, "evaluation")[0]}
    return [artifact for artifact in made if any(text in instructions for text in asked_in(artifact))]


def asked_in(artifact: Artifact) -> list[str]:
    """Return the prompts of an artifact's instructions.jsonl in the form in which they are compared."""
    return [
        compared_prompt(instruction.prompt)
        for instruction in read_records(artifact.path / "instructions.jsonl", Instruction)
    ]

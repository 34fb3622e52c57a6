"""eval_instructions: given data → the evaluation instructions."""

from collections.abc import Sequence

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, Instruction
from selfalign.data.schemas import Schema
from selfalign.data.sources import read_instructions
from selfalign.data.turns import compared, texts_in
from selfalign.metrics import catalog
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import MANY, PlannedArtifact, Size, stage
from selfalign.training.splits import prompts_of


def size(*, source: str, count: int, **others: object) -> Size:
    """The first ones, or all."""
    return Size(f"{count or 'all'} instructions of {source}", {"instructions": count or MANY})


@stage(size=size, given=True)
def eval_instructions(
    out: StageOutput,
    *,
    source: str,
    count: int,
    content: Content | str,
    seeds: Artifact | None,
    trained_on: Sequence[Artifact] = (),
    held_out: Sequence[Artifact] = (),
    schema: Schema | None = None,
) -> Counts:
    """Copies the first `count` instructions (0 takes all) that no demonstration answers into the store.

    One that stands there again, under whatever id, is left out: it would count twice in every interval.

    Args:
        out: gets instructions.jsonl.
        source: a data source.
        count: how many.
        content: of the source.
        seeds: demonstrations.jsonl, whose prompts a model learns the answers to; None looks at none.
        trained_on: what else the models were trained on, demonstrations.jsonl or pairs.jsonl.
        held_out: instructions.jsonl that the models are measured on, where these are for choosing among models.
        schema: says the source's rows in a format that is known, where the user describes one.

    Raises:
        SelfalignError: no instruction is left.
    """
    demonstrations: list[Demonstration] = []
    if seeds is not None and seeds.counts["ift"]:
        demonstrations = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    taught = {text for demonstration in demonstrations for text in texts_in(demonstration.prompt)}
    given, drops = read_instructions(source, "evaluation", schema)
    apart = [instruction for instruction in given if compared(instruction.text) not in taught]
    trained = {text for artifact in trained_on for text in prompts_of(artifact)}
    untaught = [instruction for instruction in apart if compared(instruction.text) not in trained]
    measured = {compared(text) for artifact in held_out for text in asked_in(artifact)}
    free = [instruction for instruction in untaught if compared(instruction.text) not in measured]
    if not free:
        where = " or of what the models were trained on" if trained_on else ""
        where += " or are those that the models are measured on" if held_out else ""
        raise SelfalignError(
            f"{source}: all {len(given)} instructions are prompts of data.seed_data.demonstrations{where}"
        )
    once: dict[str, Instruction] = {}
    for instruction in free:
        once.setdefault(compared(instruction.text), instruction)
    drops.update(duplicate=len(free) - len(once), trained_on=len(apart) - len(untaught))
    drops.update(held_out=len(untaught) - len(free))
    kept = [*once.values()][: count or None]
    write_records(out.path / "instructions.jsonl", kept)
    return {catalog.INSTRUCTIONS.name: len(kept), "dropped": {"in_demonstrations": len(given) - len(apart), **(+drops)}}


def teaching(artifacts: Sequence[Artifact], source: str) -> list[Artifact]:
    """Those of what models were trained on that ask an instruction of this data source."""
    if not artifacts:
        return []
    asked = {compared(instruction.text) for instruction in read_instructions(source, "evaluation")[0]}
    return [artifact for artifact in artifacts if any(text in asked for text in prompts_of(artifact))]


def measured_by(artifacts: Sequence[Artifact], source: str) -> list[Artifact]:
    """Those of the instructions that models are measured on which are also in this data source."""
    made = [artifact for artifact in artifacts if not isinstance(artifact, PlannedArtifact)]
    if not made:
        return []
    asked = {compared(instruction.text) for instruction in read_instructions(source, "evaluation")[0]}
    return [artifact for artifact in made if any(compared(text) in asked for text in asked_in(artifact))]


def asked_in(artifact: Artifact) -> list[str]:
    """What an artifact's instructions.jsonl asks."""
    return [instruction.text for instruction in read_records(artifact.path / "instructions.jsonl", Instruction)]

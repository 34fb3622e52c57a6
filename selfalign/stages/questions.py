"""questions: given data → the evaluation instructions."""

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, Instruction
from selfalign.data.schemas import Schema
from selfalign.data.sources import read_instructions
from selfalign.data.turns import compared, texts_in
from selfalign.metrics import catalog
from selfalign.store.artifacts import Artefact, Content, Counts, Workspace
from selfalign.store.stage import MANY, Size, stage


def size(*, source: str, count: int, **others: object) -> Size:
    """The first ones, or all."""
    return Size(f"{count or 'all'} instructions of {source}", {"instructions": count or MANY})


@stage(size=size, given=True)
def questions(
    out: Workspace,
    *,
    source: str,
    count: int,
    content: Content | str,
    seeds: Artefact | None,
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
    if not apart:
        raise SelfalignError(f"{source}: all {len(given)} instructions are prompts of data.seeds.demonstrations")
    once: dict[str, Instruction] = {}
    for instruction in apart:
        once.setdefault(compared(instruction.text), instruction)
    drops["duplicate"] += len(apart) - len(once)
    kept = [*once.values()][: count or None]
    write_records(out.path / "instructions.jsonl", kept)
    return {catalog.INSTRUCTIONS.name: len(kept), "dropped": {"in_demonstrations": len(given) - len(apart), **(+drops)}}

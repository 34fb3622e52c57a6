"""given_outputs: a file of another model's answers → responses to the evaluation instructions."""

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction
from selfalign.data.sources import read_outputs
from selfalign.data.thinking import given_response
from selfalign.data.turns import compared
from selfalign.metrics import catalog
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import Size, records_in, stage


def size(*, source: str, instructions: Artifact, **others: object) -> Size:
    """One answer an instruction."""
    return Size(f"answers of {source}", {"responses": records_in(instructions, "instructions")})


@stage(size=size, given=True)
def given_outputs(out: StageOutput, *, source: str, content: Content | str, instructions: Artifact) -> Counts:
    """Finds the given answer to each instruction, by the instruction's text; a second one is left out and counted.

    Args:
        out: gets responses.jsonl.
        source: a data source of answers.
        content: of the source.
        instructions: instructions.jsonl.

    Raises:
        SelfalignError: the source answers none of the instructions.
    """
    asked = read_records(instructions.path / "instructions.jsonl", Instruction)
    rows, drops = read_outputs(source)
    given = {compared(row.instruction): row for row in reversed(rows)}
    found = [(one, given[text]) for one in asked if (text := compared(one.text)) in given]
    responses = [given_response(f"{one.id}-1", one.id, row.output, row.generator) for one, row in found]
    if not responses:
        raise SelfalignError(f"{source}: answers none of the {len(asked)} evaluation instructions, word for word")
    write_records(out.path / "responses.jsonl", responses)
    drops.update(unanswered=len(asked) - len(responses), second_answer=len(rows) - len(given))
    return {catalog.RESPONSES.name: len(responses), "dropped": dict(sorted((+drops).items()))}

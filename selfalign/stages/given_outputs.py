"""given_outputs: another model's outputs → responses to the evaluation instructions."""

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
    """Return at most one response for each instruction."""
    return Size(f"answers of {source}", {"responses": records_in(instructions, "instructions")})


@stage(size=size, given=True)
def given_outputs(out: StageOutput, *, source: str, content: Content | str, instructions: Artifact) -> Counts:
    """Find the given output for each instruction by the instruction's text. Further outputs are dropped and counted.

    Args:
        out: receives responses.jsonl.
        source: a data source of outputs.
        content: digest of the source.
        instructions: instructions.jsonl.

    Raises:
        SelfalignError: the source has an output for none of the instructions.
    """
    prompts = read_records(instructions.path / "instructions.jsonl", Instruction)
    rows, drops = read_outputs(source)
    outputs = {compared(row.instruction): row for row in reversed(rows)}
    found = [(prompt, outputs[text]) for prompt in prompts if (text := compared(prompt.text)) in outputs]
    responses = [given_response(f"{prompt.id}-1", prompt.id, row.output, row.generator) for prompt, row in found]
    if not responses:
        raise SelfalignError(
            f"{source}: has an output for none of the {len(prompts)} evaluation instructions. Both texts must be equal "
            "word for word"
        )
    write_records(out.path / "responses.jsonl", responses)
    drops.update(unanswered=len(prompts) - len(responses), second_answer=len(rows) - len(outputs))
    return {catalog.RESPONSES.name: len(responses), "dropped": dict(sorted((+drops).items()))}

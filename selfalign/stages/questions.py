"""questions: given data → the evaluation instructions."""

from selfalign.data import read_instructions
from selfalign.records import write_records
from selfalign.store import Counts, Workspace


def questions(out: Workspace, *, source: str, count: int, content: str) -> Counts:
    """Copies the first `count` evaluation instructions (0 takes all) into the store.

    Args:
        out: gets instructions.jsonl.
        source: a data source.
        count: how many.
        content: digest of the source.
    """
    instructions = read_instructions(source, "evaluation")[: count or None]
    write_records(out.path / "instructions.jsonl", instructions)
    return {"instructions": len(instructions)}

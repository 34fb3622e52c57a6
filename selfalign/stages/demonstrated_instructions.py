"""demonstrated_instructions: demonstrations → their prompts as instructions, and their answers as responses.

They train a policy against what was demonstrated (SPIN, arXiv 2401.01335).
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, stream_records, write_records
from selfalign.core.records import Demonstration, Instruction, Response
from selfalign.data.thinking import given_response
from selfalign.data.turns import as_text, compared_prompt
from selfalign.engines.responses import ResponseCounts
from selfalign.metrics import catalog
from selfalign.models.batches import answer_read_by, encode_group
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import answer_prompt
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage


def size(*, count: int, **others: object) -> Size:
    """Return the number of instructions."""
    return Size(f"{count} prompts of demonstrations", {"instructions": count})


@stage(size=size, given=True)
def demonstrated_instructions(
    out: StageOutput, *, count: int, seeds: Artifact, held_out: list[Artifact], seed: int
) -> Counts:
    """Draw prompts of demonstrations as instructions. Each iteration draws anew, so a prompt may come again.

    Args:
        out: receives instructions.jsonl.
        count: number of instructions.
        seeds: demonstrations.jsonl, of which those for evaluation fine-tuning are left out.
        held_out: held-out instructions, of which none is drawn.
        seed: of the draw.

    Raises:
        SelfalignError: there are fewer.
    """
    measured = {compared_prompt(one.prompt) for part in held_out for one in _instructions(part)}
    demonstrations = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    first = {compared_prompt(one.prompt): one for one in reversed(demonstrations) if _asks(one)}
    usable = [one for text, one in reversed(first.items()) if text not in measured]
    if len(usable) < count:
        raise SelfalignError(
            f"{out.label}: data.instruct.count={count}, but data.seed_data.demonstrations has {len(usable)} prompts to "
            "answer again: lower it or give more"
        )
    drawn = random.Random(seed).sample(usable, count)
    write_records(out.path / "instructions.jsonl", map(_instruction, drawn))
    return {catalog.WRITTEN.name: len(usable), catalog.KEPT.name: count}


def _asks(demonstration: Demonstration) -> bool:
    """Whether a demonstration answers a conversation with a text of its own."""
    begun = demonstration.prefill or demonstration.response_calls
    return demonstration.source == "ift" and not isinstance(demonstration.prompt, str) and not begun


def _instruction(demonstration: Demonstration) -> Instruction:
    prompt = demonstration.prompt
    assert not isinstance(prompt, str)
    turns = prompt if len(prompt) > 1 else []
    return Instruction(id=demonstration.id, text=as_text(prompt), source="given", turns=turns)


def size_of_responses(*, instructions: Artifact, **others: object) -> Size:
    """Return the number of responses."""
    count = records_in(instructions, "instructions")
    return Size(f"{amount(count)} demonstrated answers", {"responses": count})


@stage(size=size_of_responses)
def demonstrated_responses(out: StageOutput, *, instructions: Artifact, seeds: Artifact, base: Artifact) -> Counts:
    """Take the demonstrated answers to prompts of demonstrations.

    Args:
        out: receives responses.jsonl.
        instructions: instructions.jsonl of `demonstrated_instructions`.
        seeds: demonstrations.jsonl.
        base: M0, whose tokenizer counts the answers' tokens.
    """
    tokenizer = PolicyCheckpoint(base.path).load_tokenizer()
    demonstrations = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    answers = {one.id: one.response for one in demonstrations}
    tally = ResponseCounts()

    def taken() -> Iterator[Response]:
        for asked in _instructions(instructions):
            one = given_response(f"{asked.id}-1", asked.id, answers[asked.id], "human")
            answer = answer_read_by(tokenizer, one)
            [ids] = encode_group(tokenizer, asked.id, answer_prompt(tokenizer, asked.prompt), [answer]).responses
            yield replace(one, tokens=len(ids))

    write_records(out.path / "responses.jsonl", tally.watch(taken()))
    return tally.counts()


def _instructions(artifact: Artifact) -> Iterator[Instruction]:
    return stream_records(artifact.path / "instructions.jsonl", Instruction)

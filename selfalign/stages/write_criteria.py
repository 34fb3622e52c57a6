"""write_criteria: instructions + a policy → the same instructions with criteria of their own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from msgspec import UNSET

from selfalign.core.files import derive_seed
from selfalign.core.jsonl import chunks, open_records, stream_records
from selfalign.core.records import Criterion, FinishReason, Instruction
from selfalign.engines.protocol import Completion, Engine, Generator, Request, generate_batched
from selfalign.judges.criteria import CriteriaConfig
from selfalign.metrics import catalog
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.journal import Journal
from selfalign.store.stage import Size, amount, records_in, stage


def size(*, config: CriteriaConfig, policy: Artifact, instructions: Artifact, **others: object) -> Size:
    """Return the number of instructions and criteria, and the writer."""
    count = records_in(instructions, "instructions")
    text = f"up to {config.count} criteria for each of {amount(count)} instructions, written by {policy.key}"
    return Size(text, {"instructions": count})


@stage(size=size, all_ranks=True)
def write_criteria(
    out: StageOutput,
    *,
    config: CriteriaConfig,
    policy: Artifact,
    instructions: Artifact,
    engine: Engine,
    seed: int,
) -> Counts:
    """Write criteria for every instruction (arXiv 2507.17746, there from reference answers, here from the task alone).

    Args:
        out: receives instructions.jsonl. An instruction for which no criterion could be read has none.
        config: how they are asked for and sampled.
        policy: the policy that writes.
        instructions: instructions.jsonl.
        engine: generates the texts.
        seed: seeds the sampling, together with the instruction's id and the attempt.
    """
    file, tally = instructions.path / "instructions.jsonl", Counter[str]()
    count = sum(1 for _ in stream_records(file, Instruction))
    with (
        engine.load(PolicyCheckpoint(policy.path)) as generator,
        out.journal(count, "instructions") as journal,
        open_records(out.path / "instructions.jsonl") as write,
    ):
        for chunk in chunks(stream_records(file, Instruction)):
            found = _write(generator, journal, config, chunk, seed, tally)
            write(replace(one, criteria=found.get(one.id) or UNSET) for one in chunk)
        return {
            catalog.INSTRUCTIONS.name: count,
            catalog.CRITERIA.name: tally.pop("criteria", 0),
            "dropped": dict(sorted(tally.items())),
            **generator.counts,
        }


def _write(
    generator: Generator,
    journal: Journal,
    config: CriteriaConfig,
    instructions: Sequence[Instruction],
    seed: int,
    tally: Counter[str],
) -> dict[str, list[Criterion]]:
    """Return {instruction id: its criteria}, of those for which some could be read."""
    prompts = {one.id: encode_prompt(generator.tokenizer, config.ask(one.text)) for one in instructions}
    room = generator.context - config.sampling.longest
    wanted = [name for name, prompt in prompts.items() if len(prompt) <= room]
    tally["prompt_too_long"] += len(prompts) - len(wanted)
    found: dict[str, list[Criterion]] = {}
    for attempt in range(config.attempts):
        requests = [Request(prompt=prompts[name], seeds=[derive_seed(seed, name, attempt)]) for name in wanted]
        label = f"{instructions[0].id}-try{attempt + 1}"
        written = generate_batched(generator, requests, config.sampling, journal, label, size=int(not attempt))
        found |= {
            name: criteria
            for name, [made] in zip(wanted, written, strict=True)
            if (criteria := config.read(_whole_lines(made)))
        }
        wanted = [name for name in wanted if name not in found]
        if not wanted:
            break
    tally["no_criteria"] += len(wanted)
    tally["criteria"] += sum(map(len, found.values()))
    return found


def _whole_lines(made: Completion) -> str:
    """Return a text without the line in which the token limit cut it."""
    return made.text.rpartition("\n")[0] if made.finish_reason is FinishReason.LENGTH else made.text

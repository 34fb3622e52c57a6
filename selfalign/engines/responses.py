"""Responses of a policy to instructions, for the stage `respond` and for checkpoint selection."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.jsonl import chunks, count_records, stream_records, write_records
from selfalign.core.records import FinishReason, Instruction, Response
from selfalign.engines.protocol import Completion, Engine, Generator, Request, Sampling, generate_batched
from selfalign.metrics import catalog
from selfalign.metrics.intervals import RunningMean
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import answer_prompt, encode_prompt, fault_counts, text_faults, warn_of_faults
from selfalign.store.artifacts import Counts, StageOutput
from selfalign.store.journal import Journal

logger = logging.getLogger(__name__)

OFTEN_TRUNCATED = 0.1
"""A share of thoughts without an end that tells of too small a budget."""


def generate_responses(
    out: StageOutput,
    *,
    candidates: int,
    sampling: Sampling,
    policy: PolicyCheckpoint,
    instructions: Path,
    engine: Engine,
    seed: int,
) -> Counts:
    """Answer every instruction `candidates` times. Each response has a random stream of its own.

    Args:
        out: gets responses.jsonl.
        candidates: responses to each instruction.
        sampling: how they are sampled.
        policy: the policy that answers.
        instructions: path of an instructions.jsonl.
        engine: the engine.
        seed: combined with the instruction's id and the candidate's number, it seeds the sampling of each response.

    Raises:
        SelfalignError: no instruction fits into the context.
    """
    tally, faults, dropped, fitted = ResponseCounts(), Counter[str](), 0, 0

    def written(generator: Generator, journal: Journal) -> Iterator[Response]:
        nonlocal dropped, fitted
        limit = generator.context - sampling.longest
        for number, chunk in enumerate(chunks(stream_records(instructions, Instruction))):
            asked = [answer_prompt(generator.tokenizer, record.prompt) for record in chunk]
            prompts = [encode_prompt(generator.tokenizer, prompt) for prompt in asked]
            fitting = [(record, prompt) for record, prompt in zip(chunk, prompts, strict=True) if len(prompt) <= limit]
            journal.advance(candidates * (len(chunk) - len(fitting)))
            dropped += len(chunk) - len(fitting)
            fitted += len(fitting)
            for record, _ in fitting:
                faults.update(text_faults(generator.tokenizer, record.prompt))
            requests = [
                Request(prompt=prompt, seeds=[derive_seed(seed, record.id, n) for n in range(candidates)])
                for record, prompt in fitting
            ]
            made = generate_batched(generator, requests, sampling, journal, str(number))
            for (record, _), completions in zip(fitting, made, strict=True):
                yield from tally.watch(_responses(record, completions, generator.digest))
        warn_of_faults(generator.tokenizer, faults, fitted, "instructions")
        if not tally.tokens.count:
            raise SelfalignError(
                f"{out.label}: no instruction fits into the context of {generator.context} tokens with "
                f"max_new_tokens={sampling.max_new_tokens}. Lower max_new_tokens, or give shorter instructions."
            )

    units = count_records(instructions) * candidates
    with engine.load(policy) as generator, out.journal(units, "responses") as journal:
        write_records(out.path / "responses.jsonl", written(generator, journal))
    if (share := tally.truncated.value or 0.0) > OFTEN_TRUNCATED:
        logger.warning(
            "%s: %.0f %% of the responses are thoughts without an end, which have no answer to judge: raise "
            "thought_tokens or max_new_tokens of their sampling",
            out.label,
            100 * share,
        )
    return {
        **tally.counts(),
        "dropped": {"prompt_too_long": dropped},
        **fault_counts(faults),
        **generator.counts,
    }


@dataclass(slots=True)
class ResponseCounts:
    """Running counts of responses: lengths of answers and thoughts, and the shares that are finished and truncated."""

    tokens: RunningMean = field(default_factory=RunningMean)
    characters: RunningMean = field(default_factory=RunningMean)
    finished: RunningMean = field(default_factory=RunningMean)
    thought_tokens: RunningMean = field(default_factory=RunningMean)
    truncated: RunningMean = field(default_factory=RunningMean)

    def watch(self, responses: Iterable[Response]) -> Iterator[Response]:
        """Yield the same responses and count them."""
        for response in responses:
            self.tokens.add(response.tokens)
            self.characters.add(len(response.text))
            self.finished.add(response.finished)
            self.thought_tokens.add(response.thought_tokens)
            self.truncated.add(response.finish_reason is FinishReason.TRUNCATED)
            yield response

    def counts(self) -> Counts:
        """Return their number, lengths and shares."""
        return {
            catalog.RESPONSES.name: self.tokens.count,
            catalog.MEAN_TOKENS.name: self.tokens.value,
            catalog.MEAN_CHARACTERS.name: self.characters.value,
            catalog.FINISHED_SHARE.name: self.finished.value,
            **self.thought_counts(),
        }

    def thought_counts(self) -> Counts:
        """Length of the thoughts and share of those without an end; nothing where nobody has thought."""
        if not (self.thought_tokens.value or self.truncated.value):
            return {}
        return {
            catalog.MEAN_THOUGHT_TOKENS.name: self.thought_tokens.value,
            catalog.TRUNCATED_SHARE.name: self.truncated.value,
        }


def _responses(record: Instruction, completions: list[Completion], model: str) -> Iterator[Response]:
    for number, completion in enumerate(completions, start=1):
        yield Response(
            id=f"{record.id}-{number}",
            instruction_id=record.id,
            text=completion.text,
            finish_reason=completion.finish_reason,
            tokens=completion.tokens,
            model=model,
            ids=completion.ids,
            thought=completion.thought,
            thought_tokens=completion.thought_tokens,
        )

"""respond: instructions + a policy → N candidate responses each."""

from dataclasses import dataclass, field

import msgspec

from selfalign.data import as_prompt
from selfalign.errors import SelfalignError
from selfalign.files import derive_seed
from selfalign.generation import Backend, Generator, Request, Sampling
from selfalign.models import PolicyFiles
from selfalign.records import Instruction, Response, as_plain, read_records, write_records
from selfalign.store import Artefact, Counts, Workspace
from selfalign.tokenization import encode_prompt


@dataclass(kw_only=True, slots=True)
class RespondConfig:
    """How candidates are written: N=4 at T=0.7 and top-p 0.9 in arXiv 2401.10020.

    Attributes:
        candidates: N, responses to each instruction.
        sampling: how they are drawn.
    """

    candidates: int = 4
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.sampling.check("data.respond.sampling")
        if self.candidates < 1:
            raise SelfalignError(f"data.respond.candidates must be 1 or more, got {self.candidates}")


def respond(
    out: Workspace,
    *,
    config: RespondConfig,
    policy: Artefact,
    instructions: Artefact,
    generate: Backend,
    seed: int,
) -> Counts:
    """Answers every instruction `candidates` times; each response has a random stream of its own.

    Args:
        out: gets responses.jsonl.
        config: how many, and how they are drawn.
        policy: who answers.
        instructions: instructions.jsonl.
        generate: the backend.
        seed: draws the tokens, together with the instruction's id and the candidate's number.

    Raises:
        SelfalignError: no instruction fits into the context.
    """
    records = read_records(instructions.path / "instructions.jsonl", Instruction)
    with generate.load(PolicyFiles(policy.path)) as generator:
        limit = generator.context - config.sampling.max_new_tokens
        prompts = [encode_prompt(generator.tokenizer, as_prompt(record.text)) for record in records]
        fitting = [(record, prompt) for record, prompt in zip(records, prompts, strict=True) if len(prompt) <= limit]
        if not fitting:
            raise SelfalignError(
                f"{out.label}: no instruction fits into the context of {generator.context} tokens with "
                f"max_new_tokens={config.sampling.max_new_tokens}"
            )
        lengths = [len(prompt) for _, prompt in fitting]
        responses: dict[str, list[Response]] = {}
        with out.journal(len(fitting) * config.candidates, "responses") as journal:
            for number, batch in enumerate(generator.plan(lengths, config.candidates, config.sampling.max_new_tokens)):
                members = [fitting[index] for index in batch]
                rows = journal.batch(
                    str(number),
                    len(members) * config.candidates,
                    lambda members=members: as_plain(_answer(generator, members, config, seed)),
                )
                for response in msgspec.convert(rows, list[Response]):
                    responses.setdefault(response.instruction_id, []).append(response)
    ordered = [response for record, _ in fitting for response in responses[record.id]]
    write_records(out.path / "responses.jsonl", ordered)
    return {
        "responses": len(ordered),
        "mean_tokens": sum(response.tokens for response in ordered) / len(ordered),
        "mean_characters": sum(len(response.text) for response in ordered) / len(ordered),
        "finished_share": sum(response.finish_reason == "eos" for response in ordered) / len(ordered),
        "dropped": {"prompt_too_long": len(records) - len(fitting)},
        **generator.counts,
    }


def _answer(
    generator: Generator, members: list[tuple[Instruction, list[int]]], config: RespondConfig, seed: int
) -> list[Response]:
    requests = [
        Request(prompt=prompt, seeds=[derive_seed(seed, record.id, number) for number in range(config.candidates)])
        for record, prompt in members
    ]
    return [
        Response(
            id=f"{record.id}-{number}",
            instruction_id=record.id,
            text=completion.text,
            finish_reason=completion.finish_reason,
            tokens=completion.tokens,
            model=generator.digest,
        )
        for (record, _), completions in zip(members, generator.write(requests, config.sampling), strict=True)
        for number, completion in enumerate(completions, start=1)
    ]

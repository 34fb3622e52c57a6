"""respond: instructions + a policy → N candidate responses each."""

from dataclasses import dataclass, field

from selfalign.data import as_prompt
from selfalign.errors import SelfalignError
from selfalign.files import derive_seed
from selfalign.generation import Backend, Request, Sampling, write_all
from selfalign.models import PolicyFiles
from selfalign.records import Instruction, Response, read_records, write_records
from selfalign.store import Artefact, Counts, Workspace, together
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


@together
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
        requests = [
            Request(prompt=prompt, seeds=[derive_seed(seed, record.id, number) for number in range(config.candidates)])
            for record, prompt in fitting
        ]
        with out.journal(len(fitting) * config.candidates, "responses") as journal:
            written = write_all(generator, requests, config.sampling, journal, "responses")
    ordered = [
        Response(
            id=f"{record.id}-{number}",
            instruction_id=record.id,
            text=completion.text,
            finish_reason=completion.finish_reason,
            tokens=completion.tokens,
            model=generator.digest,
        )
        for (record, _), completions in zip(fitting, written, strict=True)
        for number, completion in enumerate(completions, start=1)
    ]
    write_records(out.path / "responses.jsonl", ordered)
    return {
        "responses": len(ordered),
        "mean_tokens": sum(response.tokens for response in ordered) / len(ordered),
        "mean_characters": sum(len(response.text) for response in ordered) / len(ordered),
        "finished_share": sum(response.finish_reason == "eos" for response in ordered) / len(ordered),
        "dropped": {"prompt_too_long": len(records) - len(fitting)},
        **generator.counts,
    }

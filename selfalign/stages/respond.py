"""respond: instructions + a policy → N candidate responses each."""

from dataclasses import dataclass, field

from selfalign.core.errors import SelfalignError
from selfalign.engines.protocol import Engine, Sampling
from selfalign.engines.responses import generate_responses
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage


@dataclass(kw_only=True, slots=True)
class RespondConfig:
    """How candidates are generated. arXiv 2401.10020 takes N=4 at temperature 0.7 and top-p 0.9.

    Attributes:
        candidates: N, the number of responses to each instruction.
        sampling: how they are sampled.
    """

    candidates: int = 4
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.sampling.check("data.respond.sampling")
        if self.candidates < 1:
            raise SelfalignError(f"data.respond.candidates must be 1 or more, got {self.candidates}")


def size(*, config: RespondConfig, instructions: Artifact, **others: object) -> Size:
    """Return the number of responses and their maximum length in tokens."""
    count = records_in(instructions, "instructions")
    text = f"{amount(count)} instructions, {config.candidates} response{'s' * (config.candidates > 1)} each"
    counts = {"responses": count * config.candidates, "tokens_each": config.sampling.longest}
    return Size(text, counts)


@stage(size=size, all_ranks=True)
def respond(
    out: StageOutput,
    *,
    config: RespondConfig,
    policy: Artifact,
    instructions: Artifact,
    engine: Engine,
    seed: int,
) -> Counts:
    """Generate `candidates` responses to every instruction. Each response has its own random stream.

    Args:
        out: receives responses.jsonl.
        config: number of candidates and sampling.
        policy: the policy that responds.
        instructions: instructions.jsonl.
        engine: generates the responses.
        seed: seeds the sampling, together with the instruction's id and the candidate's number.

    Raises:
        SelfalignError: no instruction fits into the context.
    """
    return generate_responses(
        out,
        candidates=config.candidates,
        sampling=config.sampling,
        policy=PolicyCheckpoint(policy.path),
        instructions=instructions.path / "instructions.jsonl",
        engine=engine,
        seed=seed,
    )

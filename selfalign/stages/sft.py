"""sft: M0 + demonstrations → M1."""

from itertools import groupby

from selfalign.batches import Group, drop_too_long, share_prompt
from selfalign.errors import SelfalignError
from selfalign.models import PolicyFiles
from selfalign.records import Demonstration, read_records
from selfalign.store import Artefact, Counts, Workspace
from selfalign.tokenization import encode_prompt, encode_response
from selfalign.training import Likelihood, Optimization, Weights, train


def sft(
    out: Workspace,
    *,
    policy: Artefact,
    base: Artefact,
    demonstrations: Artefact,
    optimization: Optimization,
    weights: Weights,
) -> Counts:
    """Fine-tunes a policy on demonstrations; the loss is on target tokens only.

    Args:
        out: gets the trained policy.
        policy: where training starts.
        base: M0, which an adapter belongs to.
        demonstrations: demonstrations.jsonl.
        optimization: rates, sizes and lengths.
        weights: which weights are trained.
    """
    records = read_records(demonstrations.path / "demonstrations.jsonl", Demonstration)
    tokenizer = PolicyFiles(policy.path).load_tokenizer()
    groups = [
        share_prompt(
            family[0].id,
            [encode_prompt(tokenizer, record.prompt) for record in family],
            [encode_response(tokenizer, record.response, finished=True) for record in family],
        )
        for family in families(records)
    ]
    kept, too_long = drop_too_long(groups, optimization.max_length)
    if not kept:
        raise SelfalignError(f"none of {len(records)} demonstrations fits into train.sft.max_length tokens")
    train(
        out,
        policy=PolicyFiles(policy.path),
        base=PolicyFiles(base.path),
        examples=kept,
        objective=Likelihood(optimization.average),
        optimization=optimization,
        weights=weights,
    )
    return {
        "demonstrations": examples_in(kept),
        "tokens": sum(map(len, kept)),
        "dropped": {"too_long": too_long},
    }


def families(records: list[Demonstration]) -> list[list[Demonstration]]:
    """Neighbours of one question together, every other demonstration alone."""
    return [list(family) for _, family in groupby(records, key=lambda record: record.question or record.id)]


def examples_in(groups: list[Group]) -> int:
    """How many responses the groups hold."""
    return sum(len(group.responses) for group in groups)

"""reference_logprobs: pairs + a policy → its log-probabilities of both responses."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from selfalign.core.jsonl import chunks, stream_records, write_records
from selfalign.core.records import PairReference, PairTokens, PreferencePair
from selfalign.data.labelled import stream_labelled
from selfalign.losses.refinement import Refinement
from selfalign.metrics import catalog
from selfalign.models.batches import PairExample, SharedPrompt, encode_pairs
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.labelled import encode_labelled
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import fault_counts, token_texts
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.journal import Journal
from selfalign.store.stage import Size, amount, stage
from selfalign.training.config import LogProbSettings
from selfalign.training.unpaired import examples_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def size(*, pairs: Artifact, augmentation: Refinement | None, unpaired: bool = False, **others: object) -> Size:
    """Return the number of pairs, or of labelled responses."""
    count, kind = amount(examples_in(pairs, unpaired=unpaired)), "labelled responses" if unpaired else "pairs"
    return Size(f"log-probabilities of {count} {kind} given x{' and p⊕x' * (augmentation is not None)}", {})


@stage(size=size, all_ranks=True)
def reference_logprobs(
    out: StageOutput,
    *,
    policy: Artifact,
    pairs: Artifact,
    augmentation: Refinement | None,
    precision: LogProbSettings,
    unpaired: bool = False,
    tokens_of: int = 0,
) -> Counts:
    """Compute log-probabilities of every pair under a policy, given x and, for the Sr losses, given p⊕x.

    Args:
        out: receives references.jsonl; values are nats, summed over response tokens. tokens.jsonl has, of some pairs,
            those of each token given p⊕x.
        policy: the policy, usually the reference.
        pairs: pairs.jsonl.
        augmentation: p; None if the loss has no second pass.
        precision: the settings of training, so that the policy's values agree at the first step.
        unpaired: whether the pairs, or the responses of labelled.jsonl, are scored as labelled responses, each beside
            the response to another prompt.
        tokens_of: the number of pairs, the first ones that are scored, that get into tokens.jsonl. They need p.
    """
    loaded = PolicyCheckpoint(policy.path).load(precision.dtype, keep_adapter=True)
    scorer = LogProbScorer(loaded, precision.max_batch_tokens, autocast=precision.autocast)
    tokenizer, tally = loaded.tokenizer, Counter[str]()
    limit, settings = precision.max_length, {"mask_thought": precision.mask_thought}
    if unpaired:
        examples = encode_labelled(tokenizer, stream_labelled(pairs.path), limit, tally, **settings)
    else:
        records = stream_records(pairs.path / "pairs.jsonl", PreferencePair)
        examples = encode_pairs(tokenizer, records, augmentation, limit, tally, loaded.context, **settings)
    responses = 4 if augmentation else 2
    with out.journal(responses * examples_in(pairs, unpaired=unpaired), "responses") as journal:
        first: list[SharedPrompt] = []

        def references() -> Iterator[PairReference]:
            for chunk in chunks(examples):
                first.extend(e.augmented for e in chunk[: tokens_of - len(first)] if e.augmented is not None)
                yield from _score(scorer, journal, chunk)

        write_records(out.path / "references.jsonl", references())
        journal.advance(responses * tally["too_long"])
    if tokens_of:
        write_records(out.path / "tokens.jsonl", _score_tokens(scorer, tokenizer, first))
    return {
        **({catalog.LABELLED.name: tally["labelled"]} if unpaired else {catalog.PAIRS.name: tally["pairs"]}),
        catalog.PROMPTS_CUT.name: tally["cut"],
        catalog.PROMPTS_CUT_BEHIND_P.name: tally["cut_behind_p"],
        **fault_counts(tally),
        "dropped": {"too_long": tally["too_long"]},
    }


def _score(scorer: LogProbScorer, journal: Journal, examples: list[PairExample]) -> list[PairReference]:
    """Return the records of some pairs, in their order."""
    augmented = [example.augmented for example in examples if example.augmented is not None]
    sums = list(scorer.score_all([example.plain for example in examples], journal, "plain"))
    sums_p = list(scorer.score_all(augmented, journal, "augmented")) or [[None, None]] * len(examples)
    return [
        PairReference(
            id=example.id, chosen=chosen, rejected=rejected, augmented_chosen=chosen_p, augmented_rejected=rejected_p
        )
        for example, (chosen, rejected), (chosen_p, rejected_p) in zip(examples, sums, sums_p, strict=True)
    ]


def _score_tokens(scorer: LogProbScorer, tokenizer: "Tokenizer", groups: list[SharedPrompt]) -> Iterator[PairTokens]:
    """Yield the records of the tokens of some pairs, in their order."""
    values = (row for batch in scorer.plan(groups) for row in scorer.score_tokens(batch))
    for group, (chosen, rejected) in zip(groups, values, strict=True):
        texts = [token_texts(tokenizer, response) for response in group.responses]
        yield PairTokens(
            id=group.id,
            chosen=[texts[0][at] for at in group.scored_places(0)],
            rejected=[texts[1][at] for at in group.scored_places(1)],
            chosen_values=chosen,
            rejected_values=rejected,
        )

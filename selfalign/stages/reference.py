"""reference: pairs + the reference policy → its log-probabilities, computed once."""

from selfalign.batches import Group, encode_pairs
from selfalign.models import PolicyFiles
from selfalign.records import PairReference, PreferencePair, read_records, write_records
from selfalign.refinement import Refinement
from selfalign.scoring import Scorer
from selfalign.store import Artefact, Counts, Workspace
from selfalign.training import Precision, disable_dropout


def reference(
    out: Workspace,
    *,
    policy: Artefact,
    pairs: Artefact,
    refinement: Refinement | None,
    precision: Precision,
) -> Counts:
    """Scores every pair under the reference policy, given x and, for the Sr losses, given p⊕x.

    Args:
        out: gets references.jsonl.
        policy: the reference.
        pairs: pairs.jsonl.
        refinement: p, or None where the loss has no refinement.
        precision: as training will have it, so that the policy's own values start out the same.
    """
    records = read_records(pairs.path / "pairs.jsonl", PreferencePair)
    loaded = PolicyFiles(policy.path).load(precision.dtype)
    examples, too_long = encode_pairs(loaded.tokenizer, records, refinement, precision.max_length)
    disable_dropout(loaded.model)
    scorer = Scorer(loaded, precision.batch_tokens, autocast=precision.autocast)
    plain = [example.plain for example in examples]
    augmented = [example.augmented for example in examples if example.augmented is not None]
    with out.journal(len(plain) + len(augmented), "pairs") as journal:

        def score(name: str, groups: list[Group]) -> list[list[float]]:
            return [
                sums
                for batch in scorer.plan(groups)
                for sums in journal.batch(
                    f"{name}-{batch[0].id}-{len(batch)}", len(batch), lambda batch=batch: scorer.score(batch)
                )
            ]

        sums, sums_p = score("plain", plain), score("augmented", augmented) or [[None, None]] * len(plain)
    references = [
        PairReference(
            id=group.id,
            chosen=chosen,
            rejected=rejected,
            augmented_chosen=chosen_p,
            augmented_rejected=rejected_p,
        )
        for group, (chosen, rejected), (chosen_p, rejected_p) in zip(plain, sums, sums_p, strict=True)
    ]
    write_records(out.path / "references.jsonl", references)
    return {"pairs": len(references), "dropped": {"too_long": too_long}}

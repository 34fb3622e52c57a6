"""reference: pairs + the reference policy → its log-probabilities, computed once."""

from selfalign.batches import encode_pairs
from selfalign.models import PolicyFiles
from selfalign.records import PairReference, PreferencePair, read_records, write_records
from selfalign.refinement import Refinement
from selfalign.scoring import Scorer
from selfalign.store import Artefact, Counts, Workspace, together
from selfalign.training import Precision, set_dropout


@together
def reference(
    out: Workspace,
    *,
    policy: Artefact,
    pairs: Artefact,
    augmentation: Refinement | None,
    precision: Precision,
) -> Counts:
    """Scores every pair under the reference policy, given x and, for the Sr losses, given p⊕x.

    Args:
        out: gets references.jsonl.
        policy: the reference.
        pairs: pairs.jsonl.
        augmentation: p, or None where the loss has no second pass.
        precision: as training will have it, so that the policy's own values start out the same.
    """
    records = read_records(pairs.path / "pairs.jsonl", PreferencePair)
    loaded = PolicyFiles(policy.path).load(precision.dtype)
    encoded = encode_pairs(loaded.tokenizer, records, augmentation, precision.max_length)
    set_dropout(loaded.model, 0.0)
    scorer = Scorer(loaded, precision.batch_tokens, autocast=precision.autocast)
    plain = [example.plain for example in encoded.examples]
    augmented = [example.augmented for example in encoded.examples if example.augmented is not None]
    with out.journal(2 * (len(plain) + len(augmented)), "responses") as journal:
        sums = list(scorer.score_all(plain, journal, "plain"))
        sums_p = list(scorer.score_all(augmented, journal, "augmented")) or [[None, None]] * len(plain)
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
    return {"pairs": len(references), "prompts_cut": encoded.cut, "dropped": {"too_long": encoded.too_long}}

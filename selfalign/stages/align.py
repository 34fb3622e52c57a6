"""align: M_t + preference pairs → M_{t+1}."""

import logging
import math
from collections import Counter

from selfalign.core.jsonl import stream_records
from selfalign.core.records import PreferencePair
from selfalign.data.labelled import stream_labelled
from selfalign.losses.protocol import PreferenceLoss, UnpairedLoss, is_unpaired
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import averages
from selfalign.metrics.rewards import reward_intervals
from selfalign.models.batches import PairExample
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import fault_counts
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, stage
from selfalign.training.checkpoint_selection import CheckpointSelection
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.dataset import store_examples
from selfalign.training.preference import encode_preferences, open_objective
from selfalign.training.splits import hold_out
from selfalign.training.train import train
from selfalign.training.unpaired import examples_in, label_counts

logger = logging.getLogger(__name__)


def size(*, pairs: Artifact, loss: PreferenceLoss | UnpairedLoss, optimization: Optimization, **others: object) -> Size:
    """Return the loss, the number of pairs or labelled responses, the epochs and the batch size."""
    kind = "labelled responses" if is_unpaired(loss) else "pairs"
    text = f"{loss.title} on {amount(examples_in(pairs, unpaired=is_unpaired(loss)))} {kind}"
    return Size(f"{text}, epochs {optimization.epochs}, batch {optimization.batch_size}", {})


@stage(size=size, all_ranks=True)
def align(
    out: StageOutput,
    *,
    policy: Artifact,
    base: Artifact,
    pairs: Artifact,
    reference: Artifact,
    loss: PreferenceLoss | UnpairedLoss,
    start: Artifact | None,
    held_out: int,
    trained_on: list[Artifact],
    selection: CheckpointSelection | None,
    optimization: Optimization,
    weights: TrainableWeights,
) -> Counts:
    """Train a policy on preference pairs.

    Args:
        out: receives the trained policy.
        policy: M_t, the start of training.
        base: M0, the base of an adapter.
        pairs: pairs.jsonl, or labelled.jsonl for an unpaired loss, which takes both.
        reference: references.jsonl with the reference policy's log-probabilities of these pairs; or the reference
            policy itself, which then scores the pairs at every step.
        loss: one of `selfalign.losses.preference`.
        start: references.jsonl with M_t's own log-probabilities of these pairs. None if the reference is M_t itself
            (the loss of the first step is then known and checked), or if another policy scores at every step.
        held_out: number of pairs to measure on instead of training on them. They share no text with other pairs.
        trained_on: artifacts that the policy was trained on. Held-out pairs share no text with them either.
        selection: selects the step whose policy is kept; None keeps the last step.
        optimization: rates, sizes and lengths.
        weights: the weights to train.
    """
    objective = open_objective(loss, policy, base, reference, start, optimization, weights)
    files, tally = PolicyCheckpoint(policy.path), Counter[str]()
    encoded = encode_preferences(
        files, pairs, reference, start, loss, optimization.max_length, tally, mask_thought=optimization.mask_thought
    )
    examples = store_examples(out.scratch / "pairs", PairExample, encoded, tally)
    unpaired = is_unpaired(loss)
    records = stream_labelled(pairs.path) if unpaired else stream_records(pairs.path / "pairs.jsonl", PreferencePair)
    training, held, split = hold_out(examples, records, held_out, trained_on)
    checkpoints = selection.open(out, PolicyCheckpoint(base.path)) if selection else None
    steps = optimization.epochs * math.ceil(len(training) / optimization.batch_size)
    if selection and steps <= selection.interval_steps:
        logger.warning(
            "%s: %d examples give %d steps, so train.checkpoint_selection.interval_steps=%d has no two checkpoints to "
            "compare, and the last is taken. Lower it",
            *(out.label, len(training), steps, selection.interval_steps),
        )
    trained = train(
        out,
        policy=files,
        base=PolicyCheckpoint(base.path),
        examples=training,
        objective=objective,
        optimization=optimization,
        weights=weights,
        checkpoints=checkpoints,
    )
    counts: Counts = {
        **(label_counts(training) if unpaired else {catalog.PAIRS.name: len(training)}),
        catalog.PROMPTS_CUT.name: examples.counts.get("cut", 0),
        catalog.PROMPTS_CUT_BEHIND_P.name: examples.counts.get("cut_behind_p", 0),
        **fault_counts(examples.counts),
        "dropped": {"too_long": examples.counts.get("too_long", 0)}
        | ({"beside_held_out": split.beside} if split else {}),
        **averages(objective.measure(trained, training, optimization)),
    }
    if checkpoints is not None:
        counts |= checkpoints.counts()
    if split is not None:
        measured = objective.measure(trained, held, optimization)
        numbers = averages(measured) | reward_intervals(measured)
        counts |= {catalog.HELD_OUT_PAIRS.name: len(held), catalog.HELD_OUT_PASSED_OVER.name: split.passed_over}
        counts |= {f"{catalog.HELD_OUT}{name}": value for name, value in numbers.items()}
    return counts

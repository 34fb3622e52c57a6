"""`train`: a policy, examples and an objective → the trained policy; transformers' Trainer does the rest."""

from collections.abc import Sequence
from typing import cast

import torch

from selfalign.core import distributed
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.scorer import make_scoring
from selfalign.store.artifacts import StageOutput
from selfalign.training.checkpoint_selection import CheckpointSelector
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.objective import Example, Objective
from selfalign.training.parallelism import gather_full_tensors
from selfalign.training.prepare import prepare


def train(
    out: StageOutput,
    *,
    policy: PolicyCheckpoint,
    base: PolicyCheckpoint,
    examples: Sequence[Example],
    objective: Objective,
    optimization: Optimization,
    weights: TrainableWeights,
    checkpoints: CheckpointSelector | None = None,
) -> Policy:
    """Trains a policy and writes it into the workspace; goes on from the last checkpoint if there is one.

    Args:
        out: where the policy, the log and the checkpoints go.
        policy: where training starts.
        base: the checkpoint that an adapter belongs to.
        examples: tokenised records.
        objective: the loss over them.
        optimization: rates, sizes and lengths.
        weights: which weights are trained, their dtype, the seed of everything random, and the layout.
        checkpoints: decides after which step the policy is taken; the last one without it.

    Returns:
        The trained policy, in memory, made to score.

    Raises:
        SelfalignError: the loss is not finite (the record ids are named), or the first step is not what it must be.
    """
    # Importing transformers' Trainer takes seconds, which no one who only composes a config should wait for.
    from selfalign.training.trainer import StepTrainer

    weights.parallelism.check_possible()
    torch.manual_seed(weights.seed)
    # What is shared out goes to the GPU a layer at a time.
    loaded = policy.load(weights.dtype, device="cpu" if weights.parallelism.sharded else "", trainable=True)
    prepare(loaded, policy, weights, optimization.dropout)
    if optimization.gradient_checkpointing:
        # transformers 5.23 has renamed it; older ones know the first name only.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(loaded.model, name) for name in names if hasattr(loaded.model, name))
        enable({"use_reentrant": False})
        loaded.model.enable_input_require_grads()
    trainer = StepTrainer(loaded, examples, objective, optimization, out, weights, checkpoints)
    last = trainer.run()
    if checkpoints is not None and checkpoints.chosen not in (None, last):
        loaded = checkpoints.files(checkpoints.chosen).load(weights.dtype, trainable=True)
        make_scoring(loaded)
    loaded.model.eval()
    whole = loaded
    if weights.parallelism.sharded:
        whole = gather_full_policy(loaded, policy, weights)
    distributed.on_main(lambda: PolicyCheckpoint(out.path).save(cast(Policy, whole), base))
    return loaded


def gather_full_policy(shared: Policy, start: PolicyCheckpoint, weights: TrainableWeights) -> Policy | None:
    """The trained policy, of which each process has a share, whole in the main process; None in the others."""
    whole = None
    if distributed.is_main():
        whole = start.load(weights.dtype, device="cpu", trainable=True)
        prepare(whole, start, weights, 0.0)
    gather_full_tensors(shared.model, whole.model if whole else None)
    return whole

"""Training: a policy, examples and an objective → the trained policy, with transformers' Trainer."""

from collections.abc import Sequence
from typing import cast

import torch

from selfalign.core import distributed
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.prompt_states import share_prompt_states
from selfalign.models.scorer import make_scoring
from selfalign.store.artifacts import StageOutput
from selfalign.training.checkpoint_selection import CheckpointSelector
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.objective import Example, Objective
from selfalign.training.parallelism import gather_full_tensors
from selfalign.training.prepare import cast_frozen_layers, prepare


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
    """Train a policy and write it to the stage's output. Training continues from the last checkpoint if there is one.

    Args:
        out: receives the policy, the log and the checkpoints.
        policy: the start of training.
        base: the base of an adapter.
        examples: tokenised examples.
        objective: the loss over them.
        optimization: rates, sizes and lengths.
        weights: the weights to train, their dtype, the seed of all randomness, and parallelism.
        checkpoints: selects the step whose policy is kept; None keeps the last step.

    Returns:
        The trained policy in memory; its forward pass returns log-probabilities.

    Raises:
        SelfalignError: the loss is not finite (the message names the records), or the first step has wrong values.
    """
    # Importing transformers' Trainer takes seconds, and composing a config does not need it.
    from selfalign.training.trainer import StepTrainer

    weights.parallelism.check_possible()
    torch.manual_seed(weights.seed)
    # A sharded policy moves to the GPU one layer at a time.
    loaded = policy.load(weights.dtype, device="cpu" if weights.parallelism.sharded else "", trainable=True)
    prepare(loaded, policy, weights, optimization.dropout)
    if weights.parallelism.sharded:
        # Processes gather a layer's weights together, so each must make as many passes as the others.
        share_prompt_states(loaded.model, enabled=False)
    elif optimization.compute_dtype == "bfloat16":
        cast_frozen_layers(loaded.model)  # FSDP2 wants one dtype in a layer.
    if optimization.gradient_checkpointing:
        # transformers 5.23 renamed the method; older versions have the second name only.
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
    full = loaded
    if weights.parallelism.sharded:
        full = gather_full_policy(loaded, policy, weights)
    distributed.on_main(lambda: PolicyCheckpoint(out.path).save(cast(Policy, full), base))
    return loaded


def gather_full_policy(sharded: Policy, start: PolicyCheckpoint, weights: TrainableWeights) -> Policy | None:
    """Gather a sharded policy. Return the full policy in the main process and None in the others."""
    full = None
    if distributed.is_main():
        full = start.load(weights.dtype, device="cpu", trainable=True)
        prepare(full, start, weights, 0.0)
    gather_full_tensors(sharded.model, full.model if full else None)
    return full

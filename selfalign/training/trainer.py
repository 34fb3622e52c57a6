"""transformers' Trainer with one optimiser step as its batch."""

import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Sums, add_sums, averages
from selfalign.models.checkpoint import Policy, autocast, default_device
from selfalign.models.logprobs import router_coefficient
from selfalign.store.artifacts import StageOutput
from selfalign.training import resume_state
from selfalign.training.checkpoint_selection import CheckpointSelector
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.objective import Example, Objective, ObjectiveOutput
from selfalign.training.optimizers import build_optimizer
from selfalign.training.parallelism import (
    Microbatch,
    Parallelism,
    layers_to_shard,
    local_microbatches,
    upcast_trainable,
)

STATE = "trainer_state.json"
"""File of Trainer's own state. It is written last, so a checkpoint with this file is complete."""


class StepDataset(Dataset[list[Example]]):
    """The examples of each optimiser step, over all epochs. The seed gives each epoch its own order."""

    def __init__(self, examples: Sequence[Example], batch_size: int, epochs: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.orders = [shuffled(len(examples), derive_seed(seed, "order", epoch)) for epoch in range(epochs)]

    def __len__(self) -> int:
        return len(self.orders) * self._per_epoch

    def __getitem__(self, index: int) -> list[Example]:
        epoch, step = divmod(index, self._per_epoch)
        order = self.orders[epoch][step * self.batch_size : (step + 1) * self.batch_size]
        return [self.examples[i] for i in order.tolist()]

    @property
    def _per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    def __iter__(self) -> Iterator[list[Example]]:
        return (self[index] for index in range(len(self)))


def shuffled(count: int, seed: int) -> torch.Tensor:
    """Return 0 … count-1 in a random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class StepTrainer(Trainer):
    """A Trainer whose batch is a whole optimiser step, split into microbatches by a token budget.

    The step's loss is the sum over its examples divided by the step's weight. So the split into microbatches and
    processes changes only rounding and, with dropout, which activations are dropped.
    """

    def __init__(
        self,
        policy: Policy,
        examples: Sequence[Example],
        objective: Objective,
        optimization: Optimization,
        out: StageOutput,
        weights: TrainableWeights,
        checkpoints: CheckpointSelector | None = None,
    ) -> None:
        self.policy = policy
        self.checkpoints = checkpoints
        self.objective = objective
        self.optimization = optimization
        self.out = out
        self.weights = weights
        asked = optimization.router_loss_coefficient
        self.router_coefficient = router_coefficient(policy.model) if asked is None else asked
        self.folder = out.scratch / "checkpoints"
        self.step_metrics: dict[str, float] = {}
        self.step_tokens = 0
        self.steps = StepDataset(examples, optimization.batch_size, optimization.epochs, weights.seed)
        arguments = _arguments(optimization, self.folder, weights.parallelism, len(self.steps))
        plugin: dict[str, Any] | None = arguments.fsdp_plugin_args
        if plugin:
            plugin["mixed_precision_policy"] = upcast_trainable(policy.model)
            plugin["transformer_cls_names_to_wrap"] = layers_to_shard(policy.model)
        super().__init__(
            model=policy.model,
            args=arguments,
            train_dataset=self.steps,
            callbacks=[_AroundStep(self)],
        )
        self.remove_callback(PrinterCallback)

    def run(self) -> int:
        """Train from the start or from the last complete checkpoint. Return the number of steps done."""
        checkpoint = distributed.broadcast(last_checkpoint(self.folder))
        done = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
        self.out.rewind_log(lambda row: row["step"] <= done)
        if self.checkpoints is not None and self.checkpoints.resume(done):
            return done
        with ExitStack() as stack:
            self.advance = stack.enter_context(self.out.progress(len(self.steps), "steps"))
            self.advance(done)
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return self.state.global_step

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the steps in order. Every process gets the whole step and takes its share in `training_step`."""
        return DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_only)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the chosen optimiser of the trained weights."""
        self.plain_optimizer = build_optimizer(self.policy.model.parameters(), self.optimization)
        self.optimizer = self.plain_optimizer  # Until accelerate wraps it.
        return self.optimizer

    def compute_loss_context_manager(self) -> Any:
        """Return autocast to the dtype of multiplications."""
        return autocast(self.args.device, self.optimization.compute_dtype)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Do forward and backward passes over this process's microbatches. Return the loss of the whole step."""
        model.train()
        examples = self.objective.arrange(inputs)
        weight = self.objective.weight(examples)
        microbatches = local_microbatches(self.policy.model, examples, self.optimization.microbatch_tokens)
        with self.compute_loss_context_manager():
            self.objective.begin_step(model, microbatches, self.state.global_step / len(self.steps))
        totals = StepTotals()
        for number, microbatch in enumerate(microbatches, start=1):
            if self.optimization.dropout:
                step, rank = self.state.global_step, distributed.rank()
                torch.manual_seed(derive_seed(self.weights.seed, "dropout", step, rank, number))
            # DDP sums gradients once a step. FSDP2 does so in every pass, or each process would hold all of them.
            synchronises = number == len(microbatches) or self.weights.parallelism.sharded
            with nullcontext() if synchronises else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    output = self.objective(model, microbatch.examples)
                minimised = output.loss
                if output.router_loss is not None:
                    own = self.objective.weight(microbatch.examples)
                    minimised = minimised + own * self.router_coefficient * output.router_loss
                    output.metrics[catalog.ROUTER_LOSS.name] = Mean(own * float(output.router_loss.detach()), own)
                # Both strategies average gradients over the processes.
                scale = 0.0 if microbatch.repeated else distributed.count() / weight
                self.accelerator.backward(minimised * scale)
            totals.add(microbatch, output)
        totals.peak_memory = peak_memory(self.args.device)
        step = reduce(StepTotals.merged, distributed.gather(totals))
        if step.not_finite:
            ids = ", ".join(dict.fromkeys(step.not_finite))
            raise SelfalignError(
                f"{self.out.label}: the loss is not finite at step {self.state.global_step + 1} (records {ids}); "
                "lower the learning rate or check these records. The last checkpoint is kept"
            )
        self.step_metrics = averages(step.metrics) | {catalog.PEAK_MEMORY_GB.name: step.peak_memory / 2**30}
        self.step_tokens = sum(map(len, examples))
        if self.state.global_step == 0:
            self.objective.check_first_step(step.distance, step.loss_distance)
        return torch.tensor(step.loss / weight, device=self.args.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the resume state, then Trainer's own state, and remove older checkpoints."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        resume_state.save(folder, self.policy.model, self.plain_optimizer, self.lr_scheduler)
        distributed.on_main(lambda: self._keep_only(folder))

    def _keep_only(self, folder: Path) -> None:
        self.state.save_to_json(str(folder / STATE))
        for other in set(self.folder.glob("checkpoint-*")) - {folder}:
            shutil.rmtree(other)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load nothing here: `_load_optimizer_and_scheduler` loads everything after the model is distributed."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the resume state."""
        if checkpoint:
            resume_state.load(Path(checkpoint), self.policy.model, self.plain_optimizer, self.lr_scheduler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the metrics of each step. The row that Trainer adds at the end of training is left out."""
        if "loss" in logs:
            row = {
                "step": self.state.global_step,
                catalog.LOSS.name: logs["loss"],
                catalog.LEARNING_RATE.name: logs["learning_rate"],
                catalog.GRAD_NORM.name: logs["grad_norm"],
                **self.step_metrics,
            }
            self.out.log({name: float(f"{value:.6g}") for name, value in row.items()} | {"step": row["step"]})

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0, because the inputs are records, not tensors."""
        return 0


@dataclass(slots=True)
class StepTotals:
    """Totals of one optimiser step on one rank, or over several ranks with `merged`.

    Attributes:
        loss: the loss, summed over the examples.
        metrics: sums of the metrics.
        distance: the largest `ObjectiveOutput.distance`.
        loss_distance: the largest `ObjectiveOutput.loss_distance`.
        not_finite: ids of the records in microbatches whose loss is not finite.
        peak_memory: the most memory of a process, bytes.
    """

    loss: float = 0.0
    metrics: Sums = field(default_factory=dict)
    distance: float = 0.0
    loss_distance: float = 0.0
    not_finite: list[str] = field(default_factory=list)
    peak_memory: int = 0

    def add(self, microbatch: Microbatch[Any], output: ObjectiveOutput) -> None:
        """Add a forward pass. A repeated microbatch is skipped, because another process adds it."""
        if microbatch.repeated:
            return
        loss = float(output.loss.detach())
        not_finite = [] if math.isfinite(loss) else [example.id for example in microbatch.examples]
        merged = self.merged(StepTotals(loss, output.metrics, output.distance, output.loss_distance, not_finite))
        for name in self.__slots__:
            setattr(self, name, getattr(merged, name))

    def merged(self, other: "StepTotals") -> "StepTotals":
        """Return the totals of both."""
        return StepTotals(
            self.loss + other.loss,
            add_sums(self.metrics, other.metrics),
            max(self.distance, other.distance),
            max(self.loss_distance, other.loss_distance),
            self.not_finite + other.not_finite,
            max(self.peak_memory, other.peak_memory),
        )


class _AroundStep(TrainerCallback):
    """Checks parallelism, times steps, moves the progress bar, and stops training if checkpoint selection says so."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.weights.parallelism.check_effect(trainer.accelerator, trainer.model_wrapped)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.monotonic() - self.started
        self.trainer.step_metrics |= {
            catalog.STEP_SECONDS.name: seconds,
            catalog.TOKENS_PER_SECOND.name: self.trainer.step_tokens / seconds,
        }
        self.trainer.advance(1)
        checkpoints, step = self.trainer.checkpoints, state.global_step
        if checkpoints is not None:
            with torch.random.fork_rng():
                last = step == len(self.trainer.steps)
                control.should_training_stop |= checkpoints.on_checkpoint(self.trainer.policy, step, last=last)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: allocated on the GPU, or resident in this process if there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Trainer's own state is written last."""
    found = [(int(path.name[11:]), path) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for step, path in sorted(found, reverse=True):
        try:
            if TrainerState.load_from_json(str(path / STATE)).global_step == step:
                return path
        except (OSError, ValueError, TypeError):
            continue
    return None


def _arguments(optimization: Optimization, folder: Path, layout: Parallelism, steps: int) -> TrainingArguments:
    names = {"constant": "constant_with_warmup"}
    schedule: dict[str, Any] = {"lr_scheduler_type": names.get(optimization.schedule, optimization.schedule)}
    if optimization.schedule == "cosine":
        schedule["lr_scheduler_type"] = "cosine_with_min_lr"
        schedule["lr_scheduler_kwargs"] = {"min_lr": optimization.final_learning_rate}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=optimization.learning_rate,
        # The rate is 0 at the first warm-up step, so not all steps can be warm-up.
        warmup_steps=min(math.ceil(optimization.warmup_ratio * steps), steps - 1),
        max_grad_norm=optimization.max_grad_norm,
        save_steps=optimization.checkpoint_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=default_device() == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cache=True,  # This keeps the saved config unchanged; scoring does not use a cache.
        **schedule,
        **layout.arguments(),
    )
    # Each process uses one GPU. With several, Trainer would wrap the model with DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    # `compute_loss_context_manager` sets the dtype; without this, accelerate's launcher would override it.
    arguments.mixed_precision = "no"
    return arguments


def _only(items: list[Any]) -> Any:
    return items[0]

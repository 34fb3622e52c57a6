"""transformers' Trainer, fed one optimiser step at a time."""

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
from selfalign.training.parallelism import Microbatch, Parallelism, local_microbatches, upcast_trainable

STATE = "trainer_state.json"
"""Trainer's own state; it is written last, so a checkpoint is whole when it can be read."""


class StepDataset(Dataset[list[Example]]):
    """The examples of each optimiser step, all epochs in a row, each in its own order drawn from the seed."""

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
    """0 … count-1 in an order drawn from the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class StepTrainer(Trainer):
    """Trainer whose batch is a whole optimiser step, cut into forward passes by a token budget.

    The step's loss is the sum over its examples divided by the step's weight, so cutting it differently, or among
    several processes, changes nothing but rounding. Where activations are dropped, it changes which.
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
        if arguments.fsdp_plugin_args:
            arguments.fsdp_plugin_args["mixed_precision_policy"] = upcast_trainable(policy.model)
        super().__init__(
            model=policy.model,
            args=arguments,
            train_dataset=self.steps,
            callbacks=[_AroundStep(self)],
        )
        self.remove_callback(PrinterCallback)

    def run(self) -> int:
        """Trains from the start, or from the last whole checkpoint; returns the steps done."""
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
        """The steps in their order: every process gets all of a step, and takes its share in `training_step`."""
        return DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_only)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The one that was chosen, over the weights that are trained."""
        self.plain_optimizer = build_optimizer(self.policy.model.parameters(), self.optimization)
        self.optimizer = self.plain_optimizer  # Until accelerate wraps it.
        return self.optimizer

    def compute_loss_context_manager(self) -> Any:
        """Multiplications in the dtype asked for."""
        return autocast(self.args.device, self.optimization.compute_dtype)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over this process's share of an optimiser step; returns the loss of the whole."""
        model.train()
        examples = self.objective.arrange(inputs)
        weight = self.objective.weight(examples)
        passes = local_microbatches(examples, self.optimization.microbatch_tokens)
        share = StepTotals()
        for number, part in enumerate(passes, start=1):
            if self.optimization.dropout:
                step, rank = self.state.global_step, distributed.rank()
                torch.manual_seed(derive_seed(self.weights.seed, "dropout", step, rank, number))
            # DDP adds gradients up once a step; FSDP2 in every pass, or each process would keep them all.
            together = number == len(passes) or self.weights.parallelism.sharded
            with nullcontext() if together else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    outcome = self.objective(model, part.examples)
                minimised = outcome.loss
                if outcome.router_loss is not None:
                    own = self.objective.weight(part.examples)
                    minimised = minimised + own * self.router_coefficient * outcome.router_loss
                    outcome.metrics[catalog.ROUTER_LOSS.name] = Mean(own * float(outcome.router_loss.detach()), own)
                # Both layouts average gradients over the processes.
                scale = 0.0 if part.repeated else distributed.count() / weight
                self.accelerator.backward(minimised * scale)
            share.add(part, outcome)
        share.peak_memory = peak_memory(self.args.device)
        whole = reduce(StepTotals.joined, distributed.gather(share))
        if whole.broken:
            ids = ", ".join(dict.fromkeys(whole.broken))
            raise SelfalignError(
                f"{self.out.label}: the loss is not finite at step {self.state.global_step + 1} (records {ids}); "
                "lower the learning rate or look at these records. The last checkpoint is kept"
            )
        self.step_metrics = averages(whole.metrics) | {catalog.PEAK_MEMORY_GB.name: whole.peak_memory / 2**30}
        self.step_tokens = sum(map(len, examples))
        if self.state.global_step == 0:
            self.objective.check_first_step(whole.distance, whole.loss_distance)
        return torch.tensor(whole.loss / weight, device=self.args.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a snapshot, the trainer's own state last, and removes the older ones."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        resume_state.save(folder, self.policy.model, self.plain_optimizer, self.lr_scheduler)
        distributed.on_main(lambda: self._keep_only(folder))

    def _keep_only(self, folder: Path) -> None:
        self.state.save_to_json(str(folder / STATE))
        for other in set(self.folder.glob("checkpoint-*")) - {folder}:
            shutil.rmtree(other)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Left to `_load_optimizer_and_scheduler`, which comes when the model is laid out."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Takes the whole snapshot back."""
        if checkpoint:
            resume_state.load(Path(checkpoint), self.policy.model, self.plain_optimizer, self.lr_scheduler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Passes each step's numbers on; what Trainer adds at the end of training is left out."""
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
        """Not counted: the inputs are records, not tensors."""
        return 0


@dataclass(slots=True)
class StepTotals:
    """Loss and metric totals of one optimizer step on one rank, or merged over ranks by `joined`; fields as in
    `Outcome`.

    `broken` are the ids of records in passes whose loss is not finite.
    """

    loss: float = 0.0
    metrics: Sums = field(default_factory=dict)
    distance: float = 0.0
    loss_distance: float = 0.0
    broken: list[str] = field(default_factory=list)
    peak_memory: int = 0

    def add(self, part: Microbatch[Any], outcome: ObjectiveOutput) -> None:
        """Counts a pass in; a repeated one is another process's to count."""
        if part.repeated:
            return
        loss = float(outcome.loss.detach())
        broken = [] if math.isfinite(loss) else [example.id for example in part.examples]
        seen = StepTotals(loss, outcome.metrics, outcome.distance, outcome.loss_distance, broken)
        joined = self.joined(seen)
        for name in self.__slots__:
            setattr(self, name, getattr(joined, name))

    def joined(self, other: "StepTotals") -> "StepTotals":
        """Both together."""
        return StepTotals(
            self.loss + other.loss,
            add_sums(self.metrics, other.metrics),
            max(self.distance, other.distance),
            max(self.loss_distance, other.loss_distance),
            self.broken + other.broken,
            max(self.peak_memory, other.peak_memory),
        )


class _AroundStep(TrainerCallback):
    """Checks the layout, times steps, moves the progress bar, and stops where the selection of checkpoints says so."""

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
    """The most memory so far, bytes: allocated on the GPU, or resident in this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer state is what Trainer writes last."""
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
        # The rate is 0 at the first of them, so they are never all there are.
        warmup_steps=min(math.ceil(optimization.warmup_ratio * steps), steps - 1),
        max_grad_norm=optimization.max_grad_norm,
        save_steps=optimization.checkpoint_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=default_device() == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cache=True,  # As the config that is saved has it; scoring never asks for one.
        **schedule,
        **layout.arguments(),
    )
    # Of several GPUs a process takes one; Trainer would put the model into DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    # `compute_loss_context_manager` says what is multiplied in; what accelerate's own launcher says would go before it.
    arguments.mixed_precision = "no"
    return arguments


def _only(items: list[Any]) -> Any:
    return items[0]

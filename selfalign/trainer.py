"""transformers' Trainer, fed one optimiser step at a time."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from selfalign.batches import split_by_tokens
from selfalign.errors import SelfalignError
from selfalign.files import derive_seed
from selfalign.metrics import Sums, add_sums, averages
from selfalign.models import Policy
from selfalign.optimizers import build_optimizer
from selfalign.progress import progress_bar
from selfalign.store import Workspace
from selfalign.training import Checkpoints, Example, Objective, Optimization


class Steps(Dataset[list[Example]]):
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

    The step's loss is the sum over its examples divided by the step's weight, so cutting it differently changes
    nothing but rounding.
    """

    def __init__(
        self,
        policy: Policy,
        examples: Sequence[Example],
        objective: Objective,
        optimization: Optimization,
        out: Workspace,
        seed: int,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.policy = policy
        self.checkpoints = checkpoints
        self.objective = objective
        self.optimization = optimization
        self.out = out
        self.step_metrics: dict[str, float] = {}
        self.step_tokens = 0
        self.steps = Steps(examples, optimization.batch_size, optimization.epochs, seed)
        super().__init__(
            model=policy.model,
            args=_arguments(optimization, out.scratch / "checkpoints", policy.model.device.type, len(self.steps)),
            train_dataset=self.steps,
            optimizers=(build_optimizer(policy.model.parameters(), optimization), None),
            callbacks=[_AroundStep(self)],
        )
        self.remove_callback(PrinterCallback)

    def run(self) -> int:
        """Trains from the start, or from the last whole checkpoint; returns the steps done."""
        checkpoint = last_checkpoint(out := self.out.scratch / "checkpoints")
        done = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
        self.out.rewind_log(lambda row: row["step"] <= done)
        if self.checkpoints is not None and self.checkpoints.resume(done):
            return done
        with ExitStack() as stack:
            self.advance = stack.enter_context(progress_bar(self.out.label, len(self.steps), "steps"))
            self.advance(done)
            out.mkdir(exist_ok=True)
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return self.state.global_step

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps in their order; accelerate shards them over processes."""
        return self.accelerator.prepare(DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_only))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over one optimiser step; returns its loss."""
        model.train()
        examples = self.objective.arrange(inputs)
        weight = self.objective.weight(examples)
        loss = torch.zeros((), device=self.args.device)
        sums: Sums = {}
        distance = loss_distance = 0.0
        passes = split_by_tokens(sorted(examples, key=len), self.optimization.batch_tokens)
        for part in passes:
            with self.compute_loss_context_manager():
                outcome = self.objective(model, part)
            if not bool(torch.isfinite(outcome.loss)):
                ids = ", ".join(example.id for example in part)
                raise SelfalignError(
                    f"{self.out.label}: the loss is not finite at step {self.state.global_step + 1} (records {ids}); "
                    "lower the learning rate or look at these records. The last checkpoint is kept"
                )
            self.accelerator.backward(outcome.loss / weight)
            loss += outcome.loss.detach() / weight
            distance = max(distance, outcome.distance)
            loss_distance = max(loss_distance, outcome.loss_distance)
            sums = add_sums(sums, outcome.metrics)
        self.step_metrics = averages(sums)
        self.step_tokens = sum(map(len, examples))
        self.step_metrics["peak_memory_gb"] = peak_memory(self.args.device) / 2**30
        if self.state.global_step == 0:
            self.objective.check_first_step(distance, loss_distance)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Passes each step's numbers on; what Trainer adds at the end of training is left out."""
        if "loss" in logs:
            row = {
                "step": self.state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
                **self.step_metrics,
            }
            self.out.log({name: float(f"{value:.6g}") for name, value in row.items()} | {"step": row["step"]})

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the inputs are records, not tensors."""
        return 0


class _AroundStep(TrainerCallback):
    """Times a step, moves the progress bar, and stops training where the contest of checkpoints says so."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.monotonic() - self.started
        self.trainer.step_metrics |= {
            "step_seconds": seconds,
            "tokens_per_second": self.trainer.step_tokens / seconds,
        }
        self.trainer.advance(1)
        checkpoints, step = self.trainer.checkpoints, state.global_step
        if checkpoints is not None:
            with torch.random.fork_rng():
                last = step == len(self.trainer.steps)
                control.should_training_stop |= checkpoints.visit(self.trainer.policy, step, last=last)


def peak_memory(device: torch.device) -> int:
    """The most memory so far, bytes: allocated on the GPU, or resident in this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer state is what Trainer writes last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.rsplit("-", 1)[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return path
    return None


def _arguments(optimization: Optimization, folder: Path, device: str, steps: int) -> TrainingArguments:
    names = {"constant": "constant_with_warmup"}
    schedule: dict[str, Any] = {"lr_scheduler_type": names.get(optimization.schedule, optimization.schedule)}
    if optimization.schedule == "cosine":
        schedule["lr_scheduler_type"] = "cosine_with_min_lr"
        schedule["lr_scheduler_kwargs"] = {"min_lr": optimization.final_learning_rate}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=optimization.learning_rate,
        warmup_steps=math.ceil(optimization.warmup_share * steps),
        max_grad_norm=optimization.max_gradient_norm,
        bf16=optimization.dtype == "bfloat16",
        save_steps=optimization.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **schedule,
    )


def _only(items: list[Any]) -> Any:
    return items[0]

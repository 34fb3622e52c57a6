"""The settings of both training stages."""

import math
from dataclasses import dataclass, field
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.data.mixtures import data_source
from selfalign.engines.protocol import Sampling
from selfalign.models.checkpoint import resolve_dtype
from selfalign.models.config import DTYPES, LoRA
from selfalign.training.parallelism import Parallelism

CHOICES = {
    "schedule": ("cosine", "linear", "constant"),
    "optimizer": ("adamw", "rmsprop", "adamw_8bit"),
    "loss_reduction": ("tokens", "examples"),
    "dtype": ("auto", *DTYPES),
}


@dataclass(kw_only=True, slots=True)
class Optimization:
    """The optimisation of one training stage.

    Attributes:
        learning_rate: the peak of the learning rate.
        final_learning_rate: the end of the "cosine" schedule; "linear" ends at 0, "constant" stays at the peak.
        schedule: "cosine", "linear" or "constant", after the warm-up.
        warmup_ratio: share of the steps in which the rate rises from 0.
        optimizer: "adamw", "rmsprop", or "adamw_8bit" (extra `8bit`), whose state needs a quarter of the memory.
            For weights in bfloat16, the optimiser works on a float32 copy.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        epochs: passes over the data.
        batch_size: examples (demonstrations or pairs) in one optimiser step. Demonstrations of one `question`, as
            the EFT examples of its answers or the turns of a conversation, count as one.
        microbatch_tokens: the most tokens in one forward pass. A step is split into as many passes as it needs.
        max_length: the longest prompt with response, in tokens. Longer examples are dropped and counted.
        loss_reduction: "tokens" weights every target token equally (usual for SFT), "examples" every example.
        router_loss_coefficient: factor of the load balancing loss of a model with experts (Fedus et al. 2022, arXiv
            2101.03961), which is added to the loss of each forward pass. None takes the factor of the model's config, 0
            leaves the loss out.
        dropout: share of activations dropped in training, in all dropout layers of the architecture. With dropout, the
            policy does not start as its reference, so the first step is not checked.
        dtype: the dtype of multiplications: "float32", "bfloat16", or "auto" for the faster one on this machine.
            Weights keep model.dtype.
        gradient_checkpointing: whether the backward pass recomputes activations, to save memory.
        checkpoint_steps: steps between two checkpoints. A killed training continues from the last one.
        mask_thought: whether the thought before an answer is read without being trained on.
    """

    learning_rate: float
    final_learning_rate: float = 0.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    batch_size: int = 16
    microbatch_tokens: int = field(default=8192, metadata={"keyed": False})
    max_length: int = 2048
    loss_reduction: str = "tokens"
    router_loss_coefficient: float | None = None
    dropout: float = 0.0
    dtype: str = "auto"
    gradient_checkpointing: bool = field(default=False, metadata={"keyed": False})
    checkpoint_steps: int = field(default=100, metadata={"keyed": False})
    mask_thought: bool = field(default=False, metadata={"keyed": "if set"})

    @property
    def compute_dtype(self) -> str:
        """The dtype of multiplications, with "auto" resolved for this machine."""
        return resolve_dtype(self.dtype)

    def check(self, key: str) -> None:
        """Check every range. Messages name the setting as `key`.name.

        Raises:
            SelfalignError: a value is out of range.
        """
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise SelfalignError(f"{key}.{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("epochs", "batch_size", "microbatch_tokens", "max_length", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise SelfalignError(f"{key}.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("weight_decay", "router_loss_coefficient"):
            if not (getattr(self, name) or 0) >= 0:
                raise SelfalignError(f"{key}.{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            rate = self.final_learning_rate
            raise SelfalignError(f"{key}.final_learning_rate must lie between 0 and learning_rate, got {rate}")
        for name in ("dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise SelfalignError(f"{key}.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise SelfalignError(f"{key}.{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        self._check_use(key)

    def _check_use(self, key: str) -> None:
        if self.final_learning_rate and self.schedule != "cosine":
            raise SelfalignError(f"{key}.final_learning_rate has no meaning with schedule={self.schedule}; set it to 0")
        if self.weight_decay and self.optimizer == "rmsprop":
            raise SelfalignError(f"{key}.weight_decay has no meaning with optimizer={self.optimizer}; set it to 0")

    def logprob_settings(self, dtype: str) -> "LogProbSettings":
        """Return the settings of training on which log-probabilities depend; `dtype` is that of the weights."""
        autocast = "bfloat16" if self.compute_dtype == "bfloat16" else ""
        return LogProbSettings(
            dtype=dtype,
            autocast=autocast,
            max_length=self.max_length,
            max_batch_tokens=self.microbatch_tokens,
            mask_thought=self.mask_thought,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogProbSettings:
    """How log-probabilities are computed.

    Attributes:
        dtype: dtype of the weights.
        autocast: dtype of autocast; empty for none.
        max_length: the longest sequence in tokens.
        max_batch_tokens: the most tokens in one forward pass.
        mask_thought: whether thoughts are read without being scored.
    """

    dtype: str
    autocast: str
    max_length: int
    max_batch_tokens: int = field(metadata={"keyed": False})
    mask_thought: bool = field(default=False, metadata={"keyed": "if set"})


@dataclass(kw_only=True, slots=True)
class CheckpointSelectionConfig:
    """Selection of the checkpoint of an alignment that becomes the policy: the last that did not lose.

    Attributes:
        interval_steps: optimiser steps between two comparisons; 0 takes the last step without comparisons.
        instructions: a data source of validation instructions, which should differ from the evaluation instructions.
        count: number of instructions, the first ones; 0 takes all.
        head_to_head: the judge that compares the responses of two checkpoints, in both orders: a
            `CheckpointComparator` of checkpoint_selection.py.
        level: significance level of the one-sided sign test. A checkpoint loses, and training stops, if its wins would
            be this improbably few among equally good checkpoints. At 0.005 with 253 instructions, 2 to 3 % of runs
            with eight equally good checkpoints stop early.
        sampling: how responses are sampled.
    """

    interval_steps: int = 0
    instructions: Any = ""
    count: int = 0
    head_to_head: Any = None
    level: float = 0.005
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.instructions = data_source(self.instructions, "train.checkpoint_selection.instructions")
        self.sampling.check("train.checkpoint_selection.sampling")
        if self.interval_steps < 0 or self.count < 0:
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps and train.checkpoint_selection.count must be 0 or more"
            )
        if bool(self.interval_steps) != bool(self.instructions):
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps and train.checkpoint_selection.instructions belong "
                f"together: set both or none (got interval_steps={self.interval_steps}, "
                f"instructions={self.instructions!r})"
            )
        if not 0 < self.level < 0.5:
            raise SelfalignError(f"train.checkpoint_selection.level must be above 0 and below 0.5, got {self.level}")
        if self.interval_steps and self.head_to_head is None:
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps needs a judge: set train.checkpoint_selection.head_to_head, "
                "as in conf/train/full.yaml"
            )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Both training stages, and the reference policy.

    Attributes:
        sft: optimisation of M0 → M1.
        align: optimisation of M_t → M_{t+1}.
        reference_policy: "previous" (the start of the iteration, as in the papers), "sft" (M1) or "base" (M0).
        reference_logprobs: "precomputed" computes the reference's log-probabilities once, before training. "online"
            computes them at every step, with a second model in every process, or without the adapter if M0 is the
            reference. Then the change of log-probabilities from M_t to M_{t+1} is measured only if M_t is the
            reference.
        validation_pairs: number of pairs of each iteration that are held out (see splits.py) and measured after
            training.
        checkpoint_selection: selection of the checkpoint that becomes the policy.
        parallelism: distribution of the policy over the processes of a run.
    """

    sft: Optimization
    align: Optimization
    reference_policy: str = "previous"
    reference_logprobs: str = "precomputed"
    validation_pairs: int = 0
    checkpoint_selection: CheckpointSelectionConfig = field(default_factory=CheckpointSelectionConfig)
    parallelism: Parallelism = field(default_factory=Parallelism, metadata={"keyed": False})

    def __post_init__(self) -> None:
        self.sft.check("train.sft")
        self.align.check("train.align")
        if self.parallelism.sharded and "adamw_8bit" in (self.sft.optimizer, self.align.optimizer):
            raise SelfalignError(
                "train.parallelism.strategy=fsdp2 cannot shard the state of optimizer=adamw_8bit: set optimizer=adamw"
            )
        if self.parallelism.sharded and self.checkpoint_selection.interval_steps:
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps needs the full policy in each process: set "
                "train.parallelism.strategy=ddp"
            )
        if self.reference_policy not in ("previous", "sft", "base"):
            raise SelfalignError(f"train.reference_policy must be previous, sft or base; got {self.reference_policy!r}")
        if self.reference_logprobs not in ("precomputed", "online"):
            raise SelfalignError(
                f"train.reference_logprobs must be precomputed or online; got {self.reference_logprobs!r}"
            )
        if self.validation_pairs < 0:
            raise SelfalignError(f"train.validation_pairs must be 0 or more, got {self.validation_pairs}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainableWeights:
    """The weights to train: their dtype, the adapter, the seed of its initialisation and of data order, parallelism."""

    dtype: str
    lora: LoRA
    seed: int
    parallelism: Parallelism = field(default_factory=Parallelism, metadata={"keyed": False})

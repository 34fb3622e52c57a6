"""How weights are moved: the settings of both training stages."""

import math
from dataclasses import dataclass, field
from typing import Any

from selfalign.core.errors import SelfalignError
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
    """How one training stage moves the weights.

    Attributes:
        learning_rate: the peak.
        final_learning_rate: where "cosine" ends; "linear" ends at 0, "constant" stays at the peak.
        schedule: "cosine", "linear" or "constant", after the warm-up.
        warmup_ratio: share of the steps over which the rate rises from 0.
        optimizer: "adamw", "rmsprop", or "adamw_8bit" (the extra `8bit`), whose state is a quarter as large. Weights
            kept in bfloat16 have a float32 copy that the optimiser works on.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        epochs: passes over the data.
        batch_size: examples (demonstrations or pairs) an optimiser step.
        microbatch_tokens: the most tokens in one forward pass; a step is cut into as many passes as it needs.
        max_length: the longest prompt with response, in tokens; longer examples are dropped and counted.
        loss_reduction: "tokens" weighs every target token alike (usual for SFT), "examples" every example.
        dropout: share of activations dropped while training, wherever the architecture has a dropout; the policy
            then does not start as its reference, so the first step is not checked.
        dtype: to multiply in, "float32", "bfloat16" or "auto" for the faster one here; weights keep model.dtype.
        gradient_checkpointing: computes activations again in the backward pass, to save memory.
        checkpoint_steps: a killed training goes on from the last multiple of this many steps.
        mask_thought: reads the thought before an answer and teaches the answer alone; else both are taught.
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
    dropout: float = 0.0
    dtype: str = "auto"
    gradient_checkpointing: bool = field(default=False, metadata={"keyed": False})
    checkpoint_steps: int = field(default=100, metadata={"keyed": False})
    mask_thought: bool = field(default=False, metadata={"keyed": "if set"})

    @property
    def compute_dtype(self) -> str:
        """The dtype to multiply in, "auto" resolved for this machine."""
        return resolve_dtype(self.dtype)

    def check(self, key: str) -> None:
        """Checks every range; messages name the setting as `key`.name.

        Raises:
            SelfalignError: a value is out of range.
        """
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise SelfalignError(f"{key}.{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("epochs", "batch_size", "microbatch_tokens", "max_length", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise SelfalignError(f"{key}.{name} must be 1 or more, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise SelfalignError(f"{key}.weight_decay must be 0 or more, got {self.weight_decay}")
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
        """What a log-probability depends on besides weights and text."""
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
    """How policies are scored: dtype of the weights, of autocast (if there is one), the longest sequence, and whether
    thoughts are read without being scored.
    """

    dtype: str
    autocast: str
    max_length: int
    max_batch_tokens: int = field(metadata={"keyed": False})
    mask_thought: bool = field(default=False, metadata={"keyed": "if set"})


@dataclass(kw_only=True, slots=True)
class CheckpointSelectionConfig:
    """Which checkpoint of an alignment becomes the policy: the last that did not lose against the one before.

    Attributes:
        interval_steps: how often checkpoints are compared; 0 always takes the last step.
        instructions: a data source of validation instructions, apart from those of the evaluation.
        count: the first so many of them; 0 takes all.
        head_to_head: who compares the answers of two checkpoints, in both orders: a `CheckpointComparator` of
            checkpoint_selection.py.
        level: a checkpoint loses, and training stops, where so few wins or fewer among wins and losses had a smaller
            probability than this if both were as good (one-sided sign test). At 0.005 with 253 instructions, 2 to 3 %
            of runs with eight equally good checkpoints stop early.
        sampling: how the instructions are answered.
    """

    interval_steps: int = 0
    instructions: str = ""
    count: int = 0
    head_to_head: Any = None
    level: float = 0.005
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.sampling.check("train.checkpoint_selection.sampling")
        if self.interval_steps < 0 or self.count < 0:
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps and train.checkpoint_selection.count must be 0 or more"
            )
        if bool(self.interval_steps) != bool(self.instructions):
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps and train.checkpoint_selection.instructions are given "
                "together, or neither"
            )
        if not 0 < self.level < 0.5:
            raise SelfalignError(f"train.checkpoint_selection.level must be above 0 and below 0.5, got {self.level}")
        if self.interval_steps and self.head_to_head is None:
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps needs train.checkpoint_selection.head_to_head, who "
                "compares checkpoints; "
                "conf/train/full.yaml shows how"
            )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Both training stages, and the policy that alignment is measured against.

    Attributes:
        sft: M0 → M1.
        align: M_t → M_{t+1}.
        reference_policy: "previous" (the start of the iteration, as the papers), "sft" (M1) or "base" (M0).
        reference_logprobs: "precomputed" takes the reference's log-probabilities once, before training; "online" at
            every step, with a second model (whole in every process), or with the adapter switched off where M0 is the
            reference. Then it is not measured how far M_{t+1}'s lie from M_t's, unless M_t is the reference.
        validation_pairs: pairs of each iteration that are set aside (splits.py says which), and measured after
            training.
        checkpoint_selection: which checkpoint of an alignment becomes the policy.
        parallelism: what each of several processes keeps of the policy.
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
                "train.parallelism.strategy=fsdp2 cannot share out the state of optimizer=adamw_8bit: set adamw"
            )
        if self.parallelism.sharded and self.checkpoint_selection.interval_steps:
            raise SelfalignError(
                "train.checkpoint_selection.interval_steps needs a whole policy: set train.parallelism.strategy=ddp"
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
    """Which weights are trained, in which dtype, the seed of adapter initialisation and data order, and the layout."""

    dtype: str
    lora: LoRA
    seed: int
    parallelism: Parallelism = field(default_factory=Parallelism, metadata={"keyed": False})

"""The one trainer: sft and align give it examples and an objective; transformers' Trainer does the rest."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError, reason_of
from selfalign.metrics.catalog import Sums
from selfalign.models.batches import Batch, Group, make_batch
from selfalign.models.checkpoint import DTYPES, LoRA, Policy, PolicyFiles, fastest_dtype
from selfalign.models.scorer import make_scoring
from selfalign.store.artifacts import Workspace
from selfalign.training.checkpoint_choice import CheckpointSelector, ChooseConfig
from selfalign.training.parallelism import Layout, collect, out_of_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

CHOICES = {
    "schedule": ("cosine", "linear", "constant"),
    "optimizer": ("adamw", "rmsprop", "adamw_8bit"),
    "average": ("tokens", "examples"),
    "dtype": tuple(DTYPES),
}


@dataclass(kw_only=True, slots=True)
class Optimization:
    """How one training stage moves the weights.

    Attributes:
        learning_rate: the peak.
        final_learning_rate: where "cosine" ends; "linear" ends at 0, "constant" stays at the peak.
        schedule: "cosine", "linear" or "constant", after the warm-up.
        warmup_share: share of the steps over which the rate rises from 0.
        optimizer: "adamw", "rmsprop", or "adamw_8bit" (the extra `8bit`), whose state is a quarter as large. Weights
            kept in bfloat16 have a float32 copy that the optimiser works on.
        weight_decay: AdamW's.
        max_gradient_norm: gradients are scaled down to this norm.
        epochs: passes over the data.
        batch_size: examples (demonstrations or pairs) an optimiser step.
        batch_tokens: the most tokens in one forward pass; a step is cut into as many passes as it needs.
        max_length: the longest prompt with response, in tokens; longer examples are dropped and counted.
        average: "tokens" weighs every target token alike (usual for SFT), "examples" every example.
        dropout: share of activations dropped while training, wherever the architecture has a dropout; the policy
            then does not start as its reference, so the first step is not checked.
        dtype: to multiply in, "float32", "bfloat16" or "auto" for the faster one here; weights keep model.dtype.
        gradient_checkpointing: computes activations again in the backward pass, to save memory.
        checkpoint_steps: a killed training goes on from the last multiple of this many steps.
    """

    learning_rate: float
    final_learning_rate: float = 0.0
    schedule: str = "cosine"
    warmup_share: float = 0.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    epochs: int = 1
    batch_size: int = 16
    batch_tokens: int = field(default=8192, metadata={"keyed": False})
    max_length: int = 2048
    average: str = "tokens"
    dropout: float = 0.0
    dtype: str = "auto"
    gradient_checkpointing: bool = field(default=False, metadata={"keyed": False})
    checkpoint_steps: int = field(default=100, metadata={"keyed": False})

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            self.dtype = fastest_dtype()

    def check(self, key: str) -> None:
        """Checks every range; messages name the setting as `key`.name.

        Raises:
            SelfalignError: a value is out of range.
        """
        for name in ("learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise SelfalignError(f"{key}.{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("epochs", "batch_size", "batch_tokens", "max_length", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise SelfalignError(f"{key}.{name} must be 1 or more, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise SelfalignError(f"{key}.weight_decay must be 0 or more, got {self.weight_decay}")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            rate = self.final_learning_rate
            raise SelfalignError(f"{key}.final_learning_rate must lie between 0 and learning_rate, got {rate}")
        for name in ("dropout", "warmup_share"):
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

    def precision(self, dtype: str) -> "Precision":
        """What a log-probability depends on besides weights and text."""
        autocast = "bfloat16" if self.dtype == "bfloat16" else ""
        return Precision(dtype=dtype, autocast=autocast, max_length=self.max_length, batch_tokens=self.batch_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """How policies are scored: dtype of the weights, of autocast (if there is one), and the longest sequence."""

    dtype: str
    autocast: str
    max_length: int
    batch_tokens: int = field(metadata={"keyed": False})


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Both training stages, and the policy that alignment is measured against.

    Attributes:
        sft: M0 → M1.
        align: M_t → M_{t+1}.
        reference: "previous" (the start of the iteration, as the papers), "sft" (M1) or "base" (M0).
        reference_logps: "stored" computes the reference's log-probabilities once, before training; "live" at every
            step, with a second model (whole in every process), or with the adapter switched off where M0 is the
            reference. Then it is not measured how far M_{t+1}'s lie from M_t's, unless M_t is the reference.
        held_out_pairs: pairs of each iteration that are set aside (splits.py says which), and measured after training.
        choose: which checkpoint of an alignment becomes the policy.
        layout: what each of several processes keeps of the policy.
    """

    sft: Optimization
    align: Optimization
    reference: str = "previous"
    reference_logps: str = "stored"
    held_out_pairs: int = 0
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    layout: Layout = field(default_factory=Layout, metadata={"keyed": False})

    def __post_init__(self) -> None:
        self.sft.check("train.sft")
        self.align.check("train.align")
        if self.layout.sharded and "adamw_8bit" in (self.sft.optimizer, self.align.optimizer):
            raise SelfalignError(
                "train.layout.kind=fsdp2 cannot share out the state of optimizer=adamw_8bit: set adamw"
            )
        if self.layout.sharded and self.choose.every_steps:
            raise SelfalignError("train.choose.every_steps needs a whole policy: set train.layout.kind=ddp")
        if self.reference not in ("previous", "sft", "base"):
            raise SelfalignError(f"train.reference must be previous, sft or base; got {self.reference!r}")
        if self.reference_logps not in ("stored", "live"):
            raise SelfalignError(f"train.reference_logps must be stored or live; got {self.reference_logps!r}")
        if self.held_out_pairs < 0:
            raise SelfalignError(f"train.held_out_pairs must be 0 or more, got {self.held_out_pairs}")


class Example(Protocol):
    """One record to train on: its tokens, and what else the objective wants to know."""

    @property
    def id(self) -> str: ...

    def __len__(self) -> int: ...


class Objective(Protocol):
    """What is minimised: a sum over a step's examples, as `arrange` leaves them, divided by their weight."""

    def arrange(self, examples: Sequence[Any]) -> Sequence[Any]: ...

    def weight(self, examples: Sequence[Any]) -> float: ...

    def __call__(self, model: "PreTrainedModel", examples: Sequence[Any]) -> "Outcome": ...

    def check_first_step(self, distance: float, loss_distance: float) -> None: ...


@dataclass(slots=True)
class Outcome:
    """A forward pass: the loss summed over its examples, and metrics as (weighted sum, weight).

    `distance` is the largest value, either sign, of what must be 0 at the first step; `loss_distance` how far a loss
    is from its value there, as a share of it.
    """

    loss: Tensor
    metrics: Sums
    distance: float = 0.0
    loss_distance: float = 0.0


@dataclass(slots=True)
class Likelihood:
    """SFT: the negative log-likelihood of the responses, averaged over target tokens or over examples.

    Attributes:
        average: "tokens" or "examples".
    """

    average: str

    def arrange(self, examples: Sequence[Group]) -> Sequence[Group]:
        """As they are."""
        return examples

    def weight(self, examples: Sequence[Group]) -> float:
        """How many tokens, or examples, the step's loss is averaged over."""
        if self.average == "examples":
            return float(sum(len(group.responses) for group in examples))
        return float(sum(sum(group.scored()) for group in examples))

    def __call__(self, model: "PreTrainedModel", examples: Sequence[Group]) -> Outcome:
        batch, (logps, hits) = forward(model, examples, hits=True)
        losses = -batch.sum_by_response(logps)
        total, right, tokens = float(losses.sum().detach()), float(hits.sum()), float(batch.tokens.sum())
        if self.average == "examples":
            losses = losses / batch.tokens
        return Outcome(losses.sum(), {"loss_per_token": (total, tokens), "token_accuracy": (right, tokens)})

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        """SFT has no known starting value."""


def forward(model: "PreTrainedModel", groups: Sequence[Group], **options: bool) -> tuple[Batch, Any]:
    """The groups as a batch, and log p of its targets (nats), shape (response tokens,).

    With `hits`, these are two: also which targets were the likeliest. The model may be in DDP's wrapper.
    """
    own = out_of_wrapper(model)
    batch = make_batch(own, groups).to(own.device)
    return batch, model(predict_at=batch.predict_at, targets=batch.targets, **batch.inputs, **options)


def train(
    out: Workspace,
    *,
    policy: PolicyFiles,
    base: PolicyFiles,
    examples: Sequence[Example],
    objective: Objective,
    optimization: Optimization,
    weights: "Weights",
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

    weights.layout.check_possible()
    torch.manual_seed(weights.seed)
    # What is shared out goes to the GPU a layer at a time.
    loaded = policy.load(weights.dtype, device="cpu" if weights.layout.sharded else "", trainable=True)
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
    if weights.layout.sharded:
        whole = put_together(loaded, policy, weights)
    if whole is not None and distributed.is_main():
        PolicyFiles(out.path).save(whole, base)
    return loaded


def put_together(shared: Policy, start: PolicyFiles, weights: "Weights") -> Policy | None:
    """The trained policy, of which each process has a share, whole in the main process; None in the others."""
    whole = None
    if distributed.is_main():
        whole = start.load(weights.dtype, device="cpu", trainable=True)
        prepare(whole, start, weights, 0.0)
    collect(shared.model, whole.model if whole else None)
    return whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Which weights are trained, in which dtype, the seed of adapter initialisation and data order, and the layout."""

    dtype: str
    lora: LoRA
    seed: int
    layout: Layout = field(default_factory=Layout, metadata={"keyed": False})


def prepare(loaded: Policy, files: PolicyFiles, weights: Weights, dropout: float) -> None:
    """Adds an adapter if one is asked for and not there, sets dropout, and makes the model score."""
    has_adapter = hasattr(loaded.model, "peft_config")
    if has_adapter and not weights.lora.rank:
        raise SelfalignError(f"{files.path} has an adapter, but model.lora.rank=0 asks to train all weights")
    if weights.lora.rank and not has_adapter:
        loaded.model = add_adapter(loaded.model, weights.lora)
    make_scoring(loaded, dropout)


def add_adapter(model: "PreTrainedModel", lora: LoRA) -> "PreTrainedModel":
    """The model with a fresh adapter.

    Raises:
        SelfalignError: `lora.targets` names what it does not have or cannot adapt; its output layer, of which only the
            responses' tokens are computed; or its embedding, where that is its output layer too: merged, an adapter
            of the one would change the other as well.
    """
    from peft import LoraConfig, get_peft_model

    whole, embedding, head = lora.targets == "all-linear", model.get_input_embeddings(), model.get_output_embeddings()
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        target_modules=lora.targets if whole else lora.names,
        task_type="CAUSAL_LM",
    )
    names = ", ".join(linear_layers(model))

    def refuse(problem: str) -> SelfalignError:
        return SelfalignError(f"model.lora.targets={lora.targets}: {problem.rstrip('.')}; linear layers are {names}")

    try:
        adapted = cast(Any, get_peft_model(model, config))
    except ValueError as error:
        raise refuse(reason_of(error)) from error
    reached = [f".{name}" for name in adapted.targeted_module_names]
    unknown = [name for name in lora.names if not whole and not any(one.endswith(f".{name}") for one in reached)]
    if unknown:
        raise refuse(f"{type(model).__name__} has no layer {unknown[0]!r}")
    if model.get_output_embeddings() is not head:
        raise refuse("it names the output layer, which cannot have an adapter here: leave it out")
    if model.get_input_embeddings() is not embedding and getattr(head, "weight", None) is embedding.weight:
        raise refuse("its embedding is its output layer too, which an adapter of the one would change when merged")
    if whole and (left_out := layers_left_out(adapted)):
        logger.warning("model.lora.targets=all-linear does not reach %s: they stay as they are", ", ".join(left_out))
    return adapted


def layers_left_out(adapted: nn.Module) -> list[str]:
    """What the weights of several layers in one are called, such as those of experts, that have no adapter."""
    convolution = nn.modules.conv._ConvNd
    found = {
        f"{path.rsplit('.', 1)[-1]}.{name}"
        for path, layer in adapted.named_modules()
        if not isinstance(layer, convolution) and "base_layer" not in path and "lora_" not in path
        for name, weight in layer.named_parameters(recurse=False)
        if weight.dim() == 3
    }
    return sorted(found)


def linear_layers(model: "PreTrainedModel") -> list[str]:
    """What the linear layers of a model are called, its output layer aside."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    named = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    ]
    return sorted({name.rsplit(".", 1)[-1] for name in named})

"""Preparation of a policy for training: its adapter, dropout, and a forward pass that returns log-probabilities."""

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from selfalign.core.errors import SelfalignError, reason_of
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.config import ALL_LINEAR, LoRA
from selfalign.models.logprobs import decoder_of, model_within
from selfalign.models.scorer import make_scoring
from selfalign.training.config import TrainableWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def prepare(loaded: Policy, files: PolicyCheckpoint, weights: TrainableWeights, dropout: float) -> None:
    """Add an adapter if one is wanted and missing, set dropout, and make the model return log-probabilities.

    Raises:
        SelfalignError: the policy has an adapter, but all weights are to be trained; or an adapter cannot be added.
    """
    has_adapter = hasattr(loaded.model, "peft_config")
    if has_adapter and not weights.lora.rank:
        raise SelfalignError(
            f"{files.path} has an adapter, but model.lora.rank=0 trains all weights: set model.lora.rank"
        )
    if weights.lora.rank and not has_adapter:
        loaded.model = add_adapter(loaded.model, weights.lora)
    freeze_unused(loaded.model)
    make_scoring(loaded, dropout)


def freeze_unused(model: "PreTrainedModel") -> None:
    """Exclude what texts do not pass through, such as a model's part for images, from training.

    It would get no gradient, which DDP does not accept.
    """
    inner = model_within(model)
    parts = (decoder_of(inner), cast(nn.Module, inner.get_output_embeddings()))
    used = {id(weight) for part in parts for weight in part.parameters()}
    for weight in model.parameters():
        if id(weight) not in used:
            weight.requires_grad = False


def cast_frozen_layers(model: "PreTrainedModel") -> None:
    """Keep the weights of frozen linear layers in bfloat16, for training whose multiplications are in bfloat16.

    Autocast would cast them in every pass, to the same values. An output layer that is the embedding stays as it is,
    because embeddings are not multiplied.
    """
    embedding = cast(Any, model.get_input_embeddings()).weight
    linear = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    for weight in (layer.weight for layer in linear if layer.weight is not embedding):
        if not weight.requires_grad and weight.dtype == torch.float32:  # Those in 4 bits are integers.
            weight.data = weight.data.bfloat16()


def add_adapter(model: "PreTrainedModel", lora: LoRA) -> "PreTrainedModel":
    """Add a new adapter to a model.

    Raises:
        SelfalignError: `lora.targets` names a layer that does not exist or cannot be adapted; the output layer, which
            is computed for response tokens only; or an embedding tied to the output layer, because merging its adapter
            would change the output layer too.
    """
    from peft import LoraConfig, get_peft_model

    embedding, head, experts = model.get_input_embeddings(), model.get_output_embeddings(), expert_weights(model)
    whole = ALL_LINEAR in lora.names
    stacked = [name for name in lora.names if any(f".{one}".endswith(f".{name}") for one in experts)]
    layers = [name for name in lora.names if name not in (ALL_LINEAR, *stacked)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if whole else layers,
        target_parameters=stacked or None,
        task_type="CAUSAL_LM",
    )
    names = ", ".join([*linear_layers(model), *experts])

    def refuse(problem: str) -> SelfalignError:
        return SelfalignError(f"model.lora.targets={lora.targets}: {problem.rstrip('.')}; linear layers are {names}")

    try:
        adapted = cast(Any, get_peft_model(model, config))
    except ValueError as error:
        raise refuse(reason_of(error)) from error
    reached = [f".{name}" for name in adapted.targeted_module_names]
    unknown = [name for name in layers if not any(one.endswith(f".{name}") for one in reached)]
    if unknown:
        raise refuse(f"{type(model).__name__} has no layer {unknown[0]!r}")
    if model.get_output_embeddings() is not head:
        raise refuse("the output layer cannot have an adapter: remove it")
    if model.get_input_embeddings() is not embedding and getattr(head, "weight", None) is embedding.weight:
        raise refuse("the embedding is tied to the output layer, which merging its adapter would change too: remove it")
    left_out = [one for one in experts if not any(f".{one}".endswith(f".{name}") for name in stacked)]
    if whole and left_out:
        logger.warning(
            "model.lora.targets=%s does not include %s: these weights are not trained. To adapt them too, set "
            "model.lora.targets='%s'",
            lora.targets,
            ", ".join(left_out),
            ",".join([*lora.names, *left_out]),
        )
    return adapted


def linear_layers(model: "PreTrainedModel") -> list[str]:
    """Return the names of a model's linear layers, without its output layer."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    named = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    ]
    return sorted({name.rsplit(".", 1)[-1] for name in named})


def expert_weights(model: nn.Module) -> list[str]:
    """Return the names of stacked weights, such as those of mixture-of-experts layers, each with its module's name."""
    convolution = nn.modules.conv._ConvNd
    found = {
        f"{path.rsplit('.', 1)[-1]}.{name}"
        for path, layer in model.named_modules()
        if not isinstance(layer, convolution)
        for name, weight in layer.named_parameters(recurse=False)
        if weight.dim() == 3
    }
    return sorted(found)

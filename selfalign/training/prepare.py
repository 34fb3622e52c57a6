"""Preparation of a policy for training: its adapter, dropout, and a forward pass that returns log-probabilities."""

import logging
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from selfalign.core.errors import SelfalignError, reason_of
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.config import LoRA
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
    make_scoring(loaded, dropout)


def add_adapter(model: "PreTrainedModel", lora: LoRA) -> "PreTrainedModel":
    """Add a new adapter to a model.

    Raises:
        SelfalignError: `lora.targets` names a layer that does not exist or cannot be adapted; the output layer, which
            is computed for response tokens only; or an embedding tied to the output layer, because merging its adapter
            would change the output layer too.
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
        raise refuse("the output layer cannot have an adapter: remove it")
    if model.get_input_embeddings() is not embedding and getattr(head, "weight", None) is embedding.weight:
        raise refuse("the embedding is tied to the output layer, which merging its adapter would change too: remove it")
    if whole and (left_out := layers_left_out(adapted)):
        logger.warning(
            "model.lora.targets=all-linear does not include %s: these weights are not trained", ", ".join(left_out)
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


def layers_left_out(adapted: nn.Module) -> list[str]:
    """Return the names of stacked weights without an adapter, such as those of mixture-of-experts layers."""
    convolution = nn.modules.conv._ConvNd
    found = {
        f"{path.rsplit('.', 1)[-1]}.{name}"
        for path, layer in adapted.named_modules()
        if not isinstance(layer, convolution) and "base_layer" not in path and "lora_" not in path
        for name, weight in layer.named_parameters(recurse=False)
        if weight.dim() == 3
    }
    return sorted(found)

"""Base weights in 4 bits, with adapters trained beside them: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

The stored weights stay as they were; the linear layers, except the output layer, are quantised while they are loaded.
The policy is the quantised base with the adapter beside it, wherever it trains, scores or writes. Merging the two would
round the adapter away, and merging with the unquantised base would give another policy than the trained one.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from selfalign.core.errors import SelfalignError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZATIONS = ("none", "nf4")

NEEDS = "model.quantization=nf4 needs bitsandbytes: pip install 'selfalign[qlora]'"


def check_quantization(quantization: str, rank: int) -> None:
    """Check that quantised weights have an adapter, because they cannot be trained themselves.

    Raises:
        SelfalignError: there is no adapter, or the quantisation is unknown.
    """
    if quantization not in QUANTIZATIONS:
        raise SelfalignError(f"model.quantization must be one of {', '.join(QUANTIZATIONS)}; got {quantization!r}")
    if quantization != "none" and not rank:
        raise SelfalignError(
            f"model.quantization={quantization} freezes the weights, but model.lora.rank=0 trains them. Set "
            "model.lora.rank, for example to 16."
        )


def check_engine(quantization: str, engine: str) -> None:
    """Check that the engine can run 4-bit weights. Others would run the unquantised base, which is another policy.

    Raises:
        SelfalignError: weights in 4 bits are to be run by `engine=<engine>`.
    """
    if quantization != "none" and engine != "transformers":
        raise SelfalignError(
            f"engine={engine} cannot run a policy in 4 bits: set engine=transformers, or model.quantization=none"
        )


def quantise_on_load(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return the argument that makes transformers quantise a checkpoint to NF4 while it loads it.

    Args:
        dtype: of the multiplications in quantised layers.
        device: of the quantised layers.

    Raises:
        SelfalignError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SelfalignError(NEEDS)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # With its number, as accelerate has it, which trains a quantised model on no other.
    place = torch.cuda.current_device() if device == "cuda" else device
    return {"quantization_config": config, "device_map": {"": place}}


def keep_layers_differentiable(model: "PreTrainedModel") -> None:
    """Keep bitsandbytes from repacking 4-bit layers for inference, on CPUs that multiply bfloat16 by AVX-512.

    bitsandbytes 0.50 does so in the first pass without gradients and never undoes it. The kernel for repacked layers
    has no backward, so everything before such a layer trains on no gradient at all, and its values differ from those
    that the policy was trained with.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False

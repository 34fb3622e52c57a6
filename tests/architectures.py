"""Other people's architectures in tiny, with what selfalign is expected to do with each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from test_tokenizer import WITHOUT_BOS, build_tokenizer

from selfalign.core.files import write_json
from selfalign.models.checkpoint import PolicyCheckpoint, digest_weights

WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = {**EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
STATE_SPACE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@dataclass(frozen=True)
class Architecture:
    """A tiny model, and how it is to be scored and written with.

    Attributes:
        config: of the class of this name.
        settings: of that config.
        packs: whether packed rows are right for it.
        writes: the first way to write that is.
        dropout: whether it has a dropout.
    """

    config: str
    settings: dict[str, Any]
    packs: bool = True
    writes: str = "batches"
    dropout: bool = True

    def build(self) -> Any:
        """A model with weights large enough that every part of it matters."""
        config = getattr(transformers, self.config)(**self.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()


PADDED: dict[str, Any] = {"packs": False}
HYBRID: dict[str, Any] = {"packs": False, "writes": "prompts"}
UNCACHED: dict[str, Any] = {"packs": False, "writes": "without_cache"}

ARCHITECTURES = {
    "Llama": Architecture("LlamaConfig", SIZES),
    "Mistral": Architecture("MistralConfig", {**SIZES, "sliding_window": WINDOW}),
    "Gemma 3": Architecture("Gemma3TextConfig", {**SIZES, "head_dim": 12, "sliding_window": WINDOW}),
    "OLMo 3": Architecture("Olmo3Config", {**SIZES, "sliding_window": WINDOW}),
    "Mixtral": Architecture("MixtralConfig", {**SIZES, **LOCAL_EXPERTS}),
    "Qwen3-MoE": Architecture("Qwen3MoeConfig", {**SIZES, **EXPERTS, "moe_intermediate_size": 16, "head_dim": 12}),
    "OLMoE": Architecture("OlmoeConfig", {**SIZES, **EXPERTS}),
    "Granite-MoE": Architecture("GraniteMoeConfig", {**SIZES, **LOCAL_EXPERTS}),
    # Their windows are known to the mask alone, which packing replaces.
    "Qwen2-MoE": Architecture(
        "Qwen2MoeConfig",
        {**SIZES, **SHARED_EXPERT, "use_sliding_window": True, "sliding_window": WINDOW,
         "layer_types": ["sliding_attention"] * 2},
        **PADDED,
    ),
    "PhiMoE": Architecture("PhimoeConfig", {**SIZES, "num_local_experts": 4, "sliding_window": WINDOW}, **PADDED),
    "Doge": Architecture("DogeConfig", {**SIZES, "sliding_window": WINDOW}, **PADDED),
    # What their attention does besides, packing lacks.
    "Gemma 2": Architecture("Gemma2Config", {**SIZES, "head_dim": 12, "sliding_window": WINDOW}, **PADDED),
    "gpt-oss": Architecture(
        "GptOssConfig", {**SIZES, "head_dim": 12, "num_local_experts": 4, "sliding_window": WINDOW}, **PADDED
    ),
    # Their layers do not pass on what packing needs, or their attention cannot be exchanged.
    "Nemotron": Architecture("NemotronConfig", SIZES, **PADDED),
    "Llama 4": Architecture(
        "Llama4TextConfig",
        {**SIZES, "num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8, "attention_chunk_size": 16},
        **PADDED,
    ),
    "Falcon": Architecture("FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}, **PADDED),
    "Persimmon": Architecture("PersimmonConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    # A convolution, a recurrence or a state-space layer runs over all that stands in a row.
    "LFM2": Architecture("Lfm2Config", {**SIZES, "layer_types": ["conv", "full_attention"]}, **HYBRID, dropout=False),
    "Qwen3.5": Architecture("Qwen3_5TextConfig", {**SIZES, **LINEAR}, **HYBRID),
    "Qwen3-Next": Architecture("Qwen3NextConfig", {**SIZES, **SHARED_EXPERT, **LINEAR}, **HYBRID),
    "Jamba": Architecture(
        "JambaConfig",
        {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
         "mamba_d_state": 4, "use_mamba_kernels": False},
        **HYBRID,
    ),
    "Granite 4": Architecture(
        "GraniteMoeHybridConfig",
        {**SIZES, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
         "shared_intermediate_size": 16, "mamba_n_groups": 1},
        **HYBRID,
    ),
    "Nemotron-H": Architecture(
        "NemotronHConfig",
        {**SIZES, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8,
         "ssm_state_size": 8, "n_groups": 1, "head_dim": 8},
        **HYBRID,
    ),
    "Mamba": Architecture("MambaConfig", STATE_SPACE, **HYBRID, dropout=False),
    "Mamba 2": Architecture(
        "Mamba2Config", {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1}, **HYBRID, dropout=False
    ),
    # Their caches are not exact, or are not gone on from.
    "RecurrentGemma": Architecture(
        "RecurrentGemmaConfig",
        {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": WINDOW},
        **UNCACHED,
    ),
    "RWKV": Architecture(
        "RwkvConfig",
        {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
         "intermediate_size": 48},
        **UNCACHED,
        dropout=False,
    ),
}  # fmt: skip
"""By the name people know them by."""

REFUSED = {
    "CPM-Ant": Architecture(
        "CpmAntConfig",
        {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48,
         "num_hidden_layers": 2, "prompt_length": 4},
    ),
    "Phi-2": Architecture("PhiConfig", SIZES),
}  # fmt: skip
"""Those that cannot be used: padding changes their scores, or their output layer has a bias."""


def as_policy(model: Any, folder: Path, template: str | None = WITHOUT_BOS) -> PolicyCheckpoint:
    """A model as a fetched policy, with a byte-level tokenizer."""
    model.save_pretrained(folder / "weights")
    build_tokenizer(adds_bos=False, template=template).save_pretrained(folder / "tokenizer")
    write_json(folder / "weights.json", digest_weights(folder / "weights"))
    return PolicyCheckpoint(folder)


Builder = Callable[[], Any]

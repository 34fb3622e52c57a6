"""Other people's architectures in tiny, with what selfalign is expected to do with each."""

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
UNGROUPED = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
UNNAMED = {"vocab_size": 320, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = {**EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
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
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model, and how it is to be scored, written with and trained.

    Attributes:
        config: of the class of this name.
        settings: of that config.
        special: what sets it apart, for the page of models.
        packs: whether packed rows are right for it.
        shares: whether responses that go on from their prompt's states are, where packed rows are not.
        writes: the first way to write that is.
        dropout: whether it has a dropout.
        routes: whether it has experts with a load balancing loss.
    """

    config: str
    settings: dict[str, Any]
    special: str = ""
    packs: bool = True
    shares: bool = True
    writes: str = "tree"
    dropout: bool = True
    routes: bool = False

    @property
    def scores(self) -> str:
        """The way it is scored and trained, as the check of a model calls it."""
        return "packed" if self.packs else "prompt states shared" if self.shares else "padded"

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


PADDED: dict[str, Any] = {"packs": False, "writes": "batches"}
HYBRID: dict[str, Any] = {"packs": False, "writes": "prompts"}
NO_STATES: dict[str, Any] = {**HYBRID, "shares": False}
UNCACHED: dict[str, Any] = {"packs": False, "shares": False, "writes": "without_cache"}

ARCHITECTURES = {
    "Llama": Architecture("LlamaConfig", SIZES),
    "Llama, tied": Architecture("LlamaConfig", {**SIZES, "tie_word_embeddings": True}, "one matrix for both ends"),
    "Mistral": Architecture("MistralConfig", {**SIZES, "sliding_window": WINDOW}, "windows"),
    "Qwen3": Architecture("Qwen3Config", {**SIZES, "head_dim": 12}),
    "SmolLM3": Architecture(
        "SmolLM3Config", {**SIZES, "no_rope_layers": [1, 0]}, "every fourth layer without positions"
    ),
    "OLMo 3": Architecture("Olmo3Config", {**SIZES, "sliding_window": WINDOW}, "windows"),
    "Gemma 2": Architecture(
        "Gemma2Config", {**SIZES, "head_dim": 12, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
        "capped scores, windows",
    ),
    "Gemma 3": Architecture("Gemma3TextConfig", {**SIZES, "head_dim": 12, "sliding_window": WINDOW}, "windows"),
    "Gemma 3, 4B and up": Architecture(
        "Gemma3Config",
        {"text_config": {**SIZES, "head_dim": 12, "sliding_window": WINDOW}, "vision_config": VISION,
         "mm_tokens_per_image": 4},
        "windows; the part for images is not trained",
    ),
    "gpt-oss": Architecture(
        "GptOssConfig",
        {**SIZES, **LOCAL_EXPERTS, "head_dim": 12, "sliding_window": WINDOW, "rope_parameters": YARN},
        "sinks, windows, experts",
        routes=True,
    ),
    "Mixtral": Architecture("MixtralConfig", {**SIZES, **LOCAL_EXPERTS}, "experts", routes=True),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeConfig", {**SIZES, **EXPERTS, "moe_intermediate_size": 16, "head_dim": 12}, "experts", routes=True
    ),
    "OLMoE": Architecture("OlmoeConfig", {**SIZES, **EXPERTS}, "experts", routes=True),
    "Granite-MoE": Architecture("GraniteMoeConfig", {**SIZES, **LOCAL_EXPERTS}, "experts", routes=True),
    "Llama without positions": Architecture(
        "SmolLM3Config", {**SIZES, "no_rope_layers": [0, 0]}, "no positions but the causal mask"
    ),
    "GPT-2": Architecture(
        "GPT2Config", {**UNNAMED, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, "learned positions"
    ),
    "OPT": Architecture("OPTConfig", {**UNGROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32}, "learned positions"),
    "Phi-2": Architecture("PhiConfig", SIZES, "output layer with a bias"),
    "Persimmon": Architecture("PersimmonConfig", UNGROUPED),
    # Their windows are known to the mask alone, which packing replaces.
    "Qwen2-MoE": Architecture(
        "Qwen2MoeConfig",
        {**SIZES, **SHARED_EXPERT, "use_sliding_window": True, "sliding_window": WINDOW,
         "layer_types": ["sliding_attention"] * 2},
        "windows, experts",
        routes=True,
        **PADDED,
    ),
    "PhiMoE": Architecture(
        "PhimoeConfig", {**SIZES, "num_local_experts": 4, "sliding_window": WINDOW}, "windows, experts",
        routes=True,
        **PADDED,
    ),
    "Doge": Architecture("DogeConfig", {**SIZES, "sliding_window": WINDOW}, "biased scores, windows", **PADDED),
    # Their layers do not pass on what packing needs, or their attention cannot be exchanged.
    "Bloom": Architecture(
        "BloomConfig", {**UNNAMED, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi", **PADDED
    ),
    "MPT": Architecture(
        "MptConfig",
        {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 256},
        "ALiBi",
        **PADDED,
    ),
    "Falcon": Architecture("FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}, **PADDED),
    "Falcon-RW": Architecture(
        "FalconConfig",
        {**UNGROUPED, "alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False},
        "ALiBi",
        **PADDED,
    ),
    "GPT-J": Architecture(
        "GPTJConfig",
        {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256,
         "bos_token_id": None, "eos_token_id": None},
        "output layer with a bias",
        **PADDED,
    ),
    "Nemotron": Architecture("NemotronConfig", SIZES, **PADDED),
    "Llama 4": Architecture(
        "Llama4TextConfig",
        {**SIZES, "num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8, "attention_chunk_size": 16},
        "chunked attention, experts",
        **PADDED,
    ),
    # A convolution, a recurrence or a state-space layer runs over all that stands in a row.
    "LFM2": Architecture(
        "Lfm2Config", {**SIZES, "layer_types": ["conv", "full_attention"]}, "short convolutions",
        dropout=False,
        **HYBRID,
    ),
    "LFM2-MoE": Architecture(
        "Lfm2MoeConfig",
        {**SIZES, **EXPERTS, "layer_types": ["conv", "full_attention"], "moe_intermediate_size": 16,
         "num_dense_layers": 1},
        "short convolutions, experts",
        dropout=False,
        **HYBRID,
    ),
    "Qwen3.5": Architecture("Qwen3_5TextConfig", {**SIZES, **LINEAR}, "gated delta net", **HYBRID),
    "Qwen3.5-MoE": Architecture(
        "Qwen3_5MoeTextConfig", {**SIZES, **SHARED_EXPERT, **LINEAR}, "gated delta net, experts", routes=True, **HYBRID
    ),
    "Qwen3-Next": Architecture(
        "Qwen3NextConfig", {**SIZES, **SHARED_EXPERT, **LINEAR}, "gated delta net, experts", routes=True, **HYBRID
    ),
    "OLMo-hybrid": Architecture("OlmoHybridConfig", {**SIZES, **LINEAR}, "gated delta net", **HYBRID),
    "Granite 4": Architecture(
        "GraniteMoeHybridConfig",
        {**SIZES, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
         "shared_intermediate_size": 16},
        "Mamba-2, experts",
        routes=True,
        **HYBRID,
    ),
    "Nemotron-H": Architecture(
        "NemotronHConfig",
        {**SIZES, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8,
         "ssm_state_size": 8, "n_groups": 1, "head_dim": 8},
        "Mamba-2",
        **HYBRID,
    ),
    "Bamba": Architecture("BambaConfig", {**SIZES, **MAMBA, "attn_layer_indices": [1]}, "Mamba-2", **NO_STATES),
    "Falcon-H1": Architecture(
        "FalconH1Config",
        {**SIZES, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
        "Mamba-2 beside attention in each layer",
        **HYBRID,
    ),
    "Jamba": Architecture(
        "JambaConfig",
        {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
         "mamba_d_state": 4},
        "Mamba, experts",
        routes=True,
        **NO_STATES,
    ),
    "Mamba": Architecture("MambaConfig", STATE_SPACE, "Mamba alone", dropout=False, **NO_STATES),
    "Mamba 2": Architecture(
        "Mamba2Config", {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "Mamba-2 alone",
        dropout=False,
        **NO_STATES,
    ),
    # Their caches are not exact, or are not gone on from.
    "RecurrentGemma": Architecture(
        "RecurrentGemmaConfig",
        {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": WINDOW},
        "a recurrence, windows",
        **UNCACHED,
    ),
}  # fmt: skip
"""By the name people know them by."""

SCORED = {
    "packed": "packed, every prefix once",
    "prompt states shared": "padded, a pair's prompt once",
    "padded": "padded, the prompt with each response",
}
"""By what the check of a model calls it."""

WRITTEN = {
    "tree": "several prompts at a time, every prefix once",
    "batches": "several prompts at a time",
    "prompts": "one prompt at a time",
    "without_cache": "one prompt at a time, without a cache",
}


def matrix() -> str:
    """The table of docs/models.md: what is done with each architecture, and what sets it apart."""
    titles = ["family", "`…Config`", "special", "scored and trained", "written", "router loss", "dropout"]
    rows = [titles, ["---"] * len(titles)]
    for name, one in ARCHITECTURES.items():
        flags = ["yes" if flag else "–" for flag in (one.routes, one.dropout)]
        kind = f"`{one.config.removesuffix('Config')}`"
        rows.append([name, kind, one.special, SCORED[one.scores], WRITTEN[one.writes], *flags])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


REFUSED = {
    "CPM-Ant": Architecture(
        "CpmAntConfig",
        {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48,
         "num_hidden_layers": 2, "prompt_length": 4},
    ),
    "RWKV": Architecture(
        "RwkvConfig",
        {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
         "intermediate_size": 48},
    ),
}  # fmt: skip
"""Those that cannot be used."""


def as_policy(model: Any, folder: Path, template: str | None = WITHOUT_BOS) -> PolicyCheckpoint:
    """A model as a fetched policy, with a byte-level tokenizer."""
    model.save_pretrained(folder / "weights")
    build_tokenizer(adds_bos=False, template=template).save_pretrained(folder / "tokenizer")
    write_json(folder / "weights.json", digest_weights(folder / "weights"))
    return PolicyCheckpoint(folder)


if __name__ == "__main__":
    print(matrix(), end="")

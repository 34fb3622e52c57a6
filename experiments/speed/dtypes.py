"""Which dtype this machine writes, scores and trains faster in: the figures behind `dtype=auto`.

`python experiments/speed/dtypes.py` takes a model of SmolLM2-135M's shape with random weights, and alternates both
dtypes. A figure is the fastest of several turns. Both train on float32 weights; bfloat16 multiplies under autocast.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # As selfalign sets it.

import torch
from peft import LoraConfig, get_peft_model
from preference_step import SHAPES
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from selfalign.models.batches import SharedPrompt, pack
from selfalign.models.checkpoint import DTYPES, autocast
from selfalign.models.logprobs import score_responses_only
from selfalign.models.packed_attention import enable_packing
from selfalign.runs.summary import table
from selfalign.training.prepare import cast_frozen_layers

SHAPE = LlamaConfig(**SHAPES["smollm2_135m"], tie_word_embeddings=True)
CACHED = 200
"""Tokens behind which a token is written."""

Turn = Callable[[], object]


def main() -> None:
    """Print a table of milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    rows: list[list[str]] = []
    for what, make, sizes in (
        ("write a token, rows", writing, (1, 8, 32)),
        ("score, tokens", scoring, (150, 600, 2000)),
        ("train all weights, tokens", training, (150, 600, 2000)),
        ("train an adapter, tokens", adapter, (150, 600, 2000)),
    ):
        for size in sizes:
            slow, fast = fastest([make(dtype, size) for dtype in ("float32", "bfloat16")], turns)
            rows.append([f"{what}: {size}", f"{slow * 1e3:.0f}", f"{fast * 1e3:.0f}", f"{slow / fast:.2f}"])
    print(*table(["ms", "float32", "bfloat16", "float32 / bfloat16"], rows), sep="\n")


def fastest(ways: list[Turn], turns: int) -> list[float]:
    """Return the fewest seconds of each, in alternation."""
    best = [float("inf")] * len(ways)
    for _ in range(turns + 1):  # The first turn warms up; it is never the fastest.
        for number, way in enumerate(ways):
            started = time.perf_counter()
            way()
            best[number] = min(best[number], time.perf_counter() - started)
    return best


def build(dtype: str) -> Any:
    """The model, the same weights every time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SHAPE).to(DTYPES[dtype]).eval()


def drawn(count: int) -> list[int]:
    """Random tokens."""
    return torch.randint(1, SHAPE.vocab_size, (count,)).tolist()


def writing(dtype: str, rows: int) -> Turn:
    """The next token of several texts."""
    model, cache = build(dtype), DynamicCache(config=SHAPE)
    with torch.inference_mode():
        model(torch.randint(1, SHAPE.vocab_size, (rows, CACHED)), past_key_values=cache, logits_to_keep=1)
    tokens = torch.randint(1, SHAPE.vocab_size, (rows, 1))

    @torch.inference_mode()
    def turn() -> None:
        model(tokens, past_key_values=cache)
        cache.crop(-1)

    return turn


def scoring(dtype: str, tokens: int) -> Turn:
    """The log-probabilities of a few tokens behind a prompt, with weights in the dtype."""
    model = build(dtype)
    enable_packing(model)
    score_responses_only(model)
    return torch.inference_mode()(passing(model, tokens, ""))


def training(dtype: str, tokens: int) -> Turn:
    """A forward and backward pass over a pair."""
    model = build("float32").train()
    enable_packing(model)
    score_responses_only(model)
    forward = passing(model, tokens, dtype)
    return lambda: forward().sum().backward()


def adapter(dtype: str, tokens: int) -> Turn:
    """The same for an adapter of rank 16."""
    model: Any = get_peft_model(build("float32"), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if dtype == "bfloat16":
        cast_frozen_layers(model)
    enable_packing(model)
    score_responses_only(model)
    forward = passing(model.train(), tokens, dtype)
    return lambda: forward().sum().backward()


def passing(model: Any, tokens: int, multiplied: str) -> Callable[[], torch.Tensor]:
    """A forward pass over a pair whose responses are a third of the tokens."""
    each = tokens // 6
    group = SharedPrompt(
        id="pair", prompt=drawn(tokens - 2 * each), responses=[drawn(each), drawn(each)], num_context_tokens=[0, 0]
    )
    batch = pack([group])

    def forward() -> torch.Tensor:
        with autocast(torch.device("cpu"), multiplied):
            return model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs)

    return forward


if __name__ == "__main__":
    main()

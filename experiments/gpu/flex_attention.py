"""FlexAttention over a packed row against attention of each sequence by itself, in values and gradients.

    python experiments/gpu/flex_attention.py

Prints one JSON line. On a CPU only values are compared, without a window.
"""

import argparse
import itertools
import json
import shutil
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Groups = list[tuple[int, list[int]]]
"""The length of each prompt, and the lengths of its responses."""

SHAPES = {"1.24B": (32, 8, 64), "8B": (32, 8, 128), "without GQA": (6, 6, 64)}
"""{model: (heads, heads of keys and values, head size)}."""

KINDS = {"scoring": torch.inference_mode, "refinement": torch.no_grad, "training": nullcontext}
"""{kind of pass: how the package does it}. Each is compiled by itself."""

CASES: list[tuple[str, str, tuple[str, ...]]] = [
    ("1.24B", "autocast", ("scoring", "refinement", "training")),
    ("1.24B", "float32", ("training",)),
    ("8B", "bfloat16", ("training",)),
    ("without GQA", "autocast", ("training",)),
]
"""(model, mode, kinds of passes)."""

LENGTHS: list[Groups] = [
    [(70, [40, 30]), (5, [9])],
    [(40, [20, 1])],
    [(300, [150, 200]), (512, [64, 256]), (128, [90])],
    [(320 + 16 * n, [160 - 8 * n, 150 + 9 * n]) for n in range(12)],
]
"""Rows of 154, 61, 1,700 and about 8,600 tokens."""

WINDOW = 200

MODES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.float32, torch.bfloat16),
}
"""{mode: dtypes of query, key and value}. With float32 weights under autocast the rotary positions leave only the
value in bfloat16."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "autocast": 2e-2}
"""The largest error allowed, as a share of the largest value."""


def compare(
    groups: Groups, heads: tuple[int, int, int], mode: str, kind: str, window: int | None, device: str
) -> dict[str, float]:
    """Return the largest error of the values, and in training of the gradients, as a share of the largest value."""
    from selfalign.models.batches import SharedPrompt, pack
    from selfalign.models.packed_attention import whole_row

    count = itertools.count()
    sequences = [
        SharedPrompt(
            id=str(number),
            prompt=[next(count) for _ in range(prompt)],
            responses=[[next(count) for _ in range(length)] for length in responses],
            num_context_tokens=[0] * len(responses),
        )
        for number, (prompt, responses) in enumerate(groups)
    ]
    inputs = pack(sequences).inputs
    place = {token: at for at, token in enumerate(inputs["input_ids"][0].tolist())}
    paths = [[place[t] for t in [*one.prompt, *response]] for one in sequences for response in one.responses]
    layout = inputs["layout"].to(torch.device(device))

    draw = torch.Generator().manual_seed(0)
    query_heads, key_heads, size = heads
    shapes = [(1, number, len(place), size) for number in (query_heads, key_heads, key_heads)]
    rounded = MODES[mode][2]  # The dtype of the multiplications.
    values = [torch.randn(shape, generator=draw).to(device, rounded) for shape in shapes]
    query, key, value = (part.to(dtype) for part, dtype in zip(values, MODES[mode], strict=True))
    tensors = (query, key, value)
    exact_query, exact_key, exact_value = exact = [part.float() for part in values]

    training = kind == "training"
    for tensor in (*tensors, *exact):
        tensor.requires_grad_(training)
    with KINDS[kind](), torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
        found = whole_row(query, key, value, layout, None, window)
    expected = alone(exact_query, exact_key, exact_value, paths, window)
    errors = {"values": error(found, expected)}
    if training:
        probe = torch.randn(shapes[0], generator=draw).to(device)
        gradients = torch.autograd.grad((found.float() * probe).sum(), tensors)
        expected_gradients = torch.autograd.grad((expected * probe).sum(), exact)
        errors["gradients"] = max(map(error, gradients, expected_gradients))
    return errors


def alone(query: Tensor, key: Tensor, value: Tensor, paths: list[list[int]], window: int | None) -> Tensor:
    """Attend in each sequence by itself, given by its tokens' places in the row."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    output = torch.zeros_like(query)
    for path in paths:
        places = torch.tensor(path, device=query.device)
        mask = torch.ones(len(path), len(path), dtype=torch.bool, device=query.device).tril()
        if window:
            mask = mask.triu(1 - window)
        parts = (tensor[:, :, places] for tensor in (query, key, value))
        output = output.index_copy(2, places, scaled_dot_product_attention(*parts, attn_mask=mask))
    return output


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def main() -> None:
    """Compare all cases and print one JSON line. Exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, the first ones")
    parser.add_argument("--rows", type=int, default=len(LENGTHS), help="how many of the rows, the shortest first")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not shutil.which("g++"):
        problem = "on a CPU FlexAttention needs a C++ compiler, and there is no g++"
        print(json.dumps({"status": "skipped", "problem": problem}))
        return
    # In a run, FlexAttention beyond torch's limit of graphs would go on uncompiled, with all scores in memory.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    results: list[dict[str, Any]] = []
    for shape, mode, kinds in CASES[: arguments.cases]:
        torch._dynamo.reset()
        # On a CPU torch's kernel has no backward pass, and does not always compile with a window.
        passes = itertools.product((None, WINDOW), kinds) if device == "cuda" else [(None, "scoring")]
        for window, kind in passes:
            for groups in LENGTHS[: arguments.rows]:
                case: dict[str, Any] = {"shape": shape, "mode": mode, "kind": kind, "window": window}
                case["tokens"] = sum(prompt + sum(responses) for prompt, responses in groups)
                try:
                    case["errors"] = compare(groups, SHAPES[shape], mode, kind, window, device)
                except Exception as problem:  # noqa: BLE001 - a compiler may fail in any way, and the others go on
                    case["problem"] = f"{type(problem).__name__}: {problem}"[:500]
                results.append(case)
    wrong = [case for case in results if not max(case.get("errors", {"": 1}).values()) < TOLERANCE[case["mode"]]]
    print(json.dumps({"wrong": wrong, "cases": results}))
    if wrong:
        sys.exit(f"{len(wrong)} of {len(results)} cases differ or fail, such as {wrong[0]}")


if __name__ == "__main__":
    main()

"""The cache with room: always what transformers' own holds, without copying it for every token."""

from random import Random

import pytest
import torch
from mutation import mutated
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from selfalign.engines import kv_cache
from selfalign.engines.kv_cache import RoomyLayer, roomy_cache
from selfalign.engines.transformers import fill_gaps

HEADS, DIMENSIONS = 2, 4


def states(rows: int, tokens: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, rows, HEADS, tokens, DIMENSIONS, generator=noise)
    return keys, values


def check_like_dynamic_layer(layer: RoomyLayer, seed: int) -> None:
    """A prompt, its fan-out, tokens one by one, rows that leave or are doubled: both kinds are fed the same."""
    draw, noise, plain = Random(seed), torch.Generator().manual_seed(seed), DynamicLayer()
    rows, tokens = draw.randint(1, 4), draw.randint(1, 5)
    given = states(rows, tokens, noise)
    assert all(torch.equal(a, b) for a, b in zip(layer.update(*given), plain.update(*given), strict=True))
    owners = torch.tensor(sorted(draw.choices(range(rows), k=draw.randint(1, 9))))
    for kind in (layer, plain):
        kind.batch_select_indices(owners)
    rows = len(owners)
    for step in range(12):
        given = states(rows, 1, noise)
        seen, expected = layer.update(*given), plain.update(*given)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert layer.get_seq_length() == plain.get_seq_length()
        assert layer.get_mask_sizes(1) == plain.get_mask_sizes(1)
        order = fill_gaps([draw.random() < 0.2 for _ in range(rows)])
        if step == 5:
            order = [*order, *order, *order]
        if not order:
            return
        if len(order) != rows:
            for kind in (layer, plain):
                kind.batch_select_indices(torch.tensor(order))
            rows = len(order)


@pytest.mark.parametrize("room", [1, 3, 12])
def test_holds_what_the_layer_of_transformers_holds(room: int) -> None:
    for seed in range(20):
        check_like_dynamic_layer(RoomyLayer(room), seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keys[:rows, :, start:end] = key_states", "keys[:rows, :, start - 1 : end - 1] = key_states"),
        ("buffer[indices[to], :, :tokens]", "buffer[to, :, :tokens]"),
        ("or end > self._buffers[0].shape[2]", ""),
        ("            self._buffers = None\n", ""),
    ],
    ids=["one token too early", "rows that stay", "buffers that never grow", "buffers of the prompts alone"],
)
def test_broken_layer_is_noticed(old: str, new: str) -> None:
    failed = 0
    with mutated(kv_cache, old, new) as copy:
        for seed in range(20):
            try:
                check_like_dynamic_layer(copy.RoomyLayer(3), seed)
            except (AssertionError, RuntimeError):
                failed += 1
    assert failed


def test_nothing_is_copied_while_there_is_room() -> None:
    noise, layer = torch.Generator().manual_seed(0), RoomyLayer(10)
    layer.update(*states(2, 5, noise))
    layer.batch_select_indices(torch.tensor([0, 0, 0, 1, 1, 1]))
    places = {layer.update(*states(6, 1, noise))[0].data_ptr() for _ in range(5)}
    layer.batch_select_indices(torch.tensor([0, 5, 2, 3]))
    places |= {layer.update(*states(4, 1, noise))[0].data_ptr() for _ in range(5)}
    assert len(places) == 1


def test_layers_of_another_kind_stay_as_they_are() -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
    assert [type(layer) for layer in roomy_cache(LlamaConfig(**size), 4).layers] == [RoomyLayer] * 2
    windowed = roomy_cache(MistralConfig(**size, sliding_window=4), 4).layers
    assert all(layer.is_sliding for layer in windowed)
    assert not any(isinstance(layer, RoomyLayer) for layer in windowed)
    both = roomy_cache(Gemma2Config(**size), 4).layers
    assert [isinstance(layer, RoomyLayer) for layer in both].count(True) == 1

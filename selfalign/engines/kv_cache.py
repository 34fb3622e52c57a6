"""A key-value cache with room for the text to come, so that it is not copied for every token."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, written in place into buffers that grow by `room` tokens when they are full.

    `keys` and `values` are the filled part of the buffers, (rows, heads, tokens, dimensions).
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        assert self.keys is not None
        assert self.values is not None
        rows, start, end = len(self.keys), self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            self._buffers = (_with_room(self.keys, end + self.room), _with_room(self.values, end + self.room))
        keys, values = self._buffers
        keys[:rows, :, start:end] = key_states
        values[:rows, :, start:end] = value_states
        self.keys, self.values = keys[:rows, :, :end], values[:rows, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order. If there are no more rows than before, only those that move are copied."""
        if self._buffers is None or len(indices) > len(self._buffers[0]):
            super().batch_select_indices(indices)
            self._buffers = None
            return
        assert self.keys is not None
        tokens = self.keys.shape[2]
        to = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        for buffer in self._buffers:
            buffer[to, :, :tokens] = buffer[indices[to], :, :tokens]
        keys, values = self._buffers
        self.keys, self.values = keys[: len(indices), :, :tokens], values[: len(indices), :, :tokens]


def roomy_cache(config: "PreTrainedConfig", room: int) -> DynamicCache:
    """Return a cache for a model. Layers other than plain attention keep the cache that transformers gives them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _with_room(states: Tensor, tokens: int) -> Tensor:
    buffer = states.new_empty(*states.shape[:2], tokens, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer

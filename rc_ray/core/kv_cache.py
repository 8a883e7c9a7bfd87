"""Keys and values of tokens read so far: a search appends tokens and drops users.

Letters: B rows, T new tokens, L cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, in buffers that double when full: appending copies nothing."""

    keys: Tensor
    values: Tensor
    is_initialized: bool
    _buffers: list[Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, width) each; returns those of all L + T tokens."""
        start = self.keys.shape[-2] if self.is_initialized else 0
        end = start + key_states.shape[-2]
        if not self.is_initialized or end > self._buffers[0].shape[-2]:
            new = []
            for place, states in enumerate((key_states, value_states)):
                shape = (*states.shape[:-2], end + end // 2, states.shape[-1])
                buffer = states.new_zeros(shape)
                if start:
                    buffer[..., :start, :] = self._buffers[place][..., :start, :]
                new.append(buffer)
            self._buffers = new
            self.is_initialized = True
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the batch."""
        end = self.keys.shape[-2]
        self._buffers = [buffer[rows] for buffer in self._buffers]
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)


class KeyValueCache(Cache):  # type: ignore[misc]
    """The keys and values of all layers, (B, heads, L, width) each."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(num_layers)])

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows of the batch, in this order."""
        for layer in self.layers:
            layer.select(torch.tensor(rows, dtype=torch.long, device=layer.keys.device))

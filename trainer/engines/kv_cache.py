"""The key-value cache of the `hf` engine: one row per slot, each row at its own length.

transformers' own caches advance every row by the same step, so rows of unequal length need left padding and a row that
waits for its environment is dragged along. Here the engine says, before each forward, which rows take part and where
each token goes; the cache writes there and hands back a view. No tensor is concatenated and no row is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values as [slots, kv_heads, capacity, head_dim] tensors, one pair a layer; capacity grows by doubling.

    A column at or beyond a row's length may hold anything (padding and idle rows write there too): no mask lets a query
    see it before the token that belongs there has been written.
    """

    def __init__(self, slots: int, max_length: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)  # no layer of theirs is ever made
        self.slots = slots
        self.max_length = max_length
        self.capacity = min(max_length + 1, 256)
        self.stores: list[tuple[Tensor, Tensor]] = []
        self.rows: slice | Tensor = slice(0, 0)
        self.index: tuple[Tensor, Tensor] | None = None
        self.width = 0

    def reserve(self, width: int) -> None:
        """Make room for rows of `width` tokens, and one column more that takes the padding's overflow."""
        if width < self.capacity:
            return
        self.capacity = min(self.max_length + 1, max(2 * self.capacity, width + 1))
        self.stores = [(self._grown(keys), self._grown(values)) for keys, values in self.stores]

    def _grown(self, store: Tensor) -> Tensor:
        larger = store.new_zeros(store.shape[0], store.shape[1], self.capacity, store.shape[3])
        larger[:, :, : store.shape[2]] = store
        return larger

    def plan(self, rows: slice | Tensor, positions: Tensor, width: int) -> None:
        """For the next forward: token [i, j] goes to column positions[i, j] of row rows[i]; queries see `width`."""
        row_ids = torch.arange(rows.start, rows.stop, device=positions.device) if isinstance(rows, slice) else rows
        self.rows, self.width = rows, width
        self.index = (row_ids[:, None].expand_as(positions), positions.clamp_max(self.capacity - 1))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, kv_heads, tokens, head_dim] where the plan says; return what the queries may see."""
        if layer_idx == len(self.stores):
            self.stores.append((self._fresh(key_states), self._fresh(value_states)))
        keys, values = self.stores[layer_idx]
        assert self.index is not None, "plan() comes before every forward"
        row, column = self.index
        keys[row, :, column] = key_states.transpose(1, 2)
        values[row, :, column] = value_states.transpose(1, 2)
        return keys[self.rows, :, : self.width], values[self.rows, :, : self.width]

    def _fresh(self, states: Tensor) -> Tensor:
        return states.new_zeros(self.slots, states.shape[1], self.capacity, states.shape[3])

    def copy(self, source: int, targets: list[int], start: int, stop: int) -> None:
        """Copy columns start..stop of one row to others."""
        for store in (s for pair in self.stores for s in pair):
            store[targets, :, start:stop] = store[source, :, start:stop]

    def swap(self, a: int, b: int, width: int) -> None:
        """Exchange two rows."""
        for store in (s for pair in self.stores for s in pair):
            kept = store[a, :, :width].clone()
            store[a, :, :width] = store[b, :, :width]
            store[b, :, :width] = kept

    def drop(self) -> None:
        """Give the memory back."""
        self.stores = []
        self.capacity = min(self.max_length + 1, 256)

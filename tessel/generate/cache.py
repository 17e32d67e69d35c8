"""Keys and values of earlier positions, kept so that each new token costs one position's work.

Shape suffixes: B batch, S new positions, K all positions so far, G key/value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """One buffer a layer for keys and one for values, [B, capacity, G, D], doubled when it is full.

    Buffers take the dtype and device of what is first put in. They belong to one run of positions:
    a new text needs a new cache.
    """

    def __init__(self, capacity_tokens: int = 256) -> None:
        self.capacity_tokens = max(capacity_tokens, 1)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._num_tokens: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        """Positions that every layer has."""
        return min(self._num_tokens.values(), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers, the unused part included."""
        return sum(buffer.nbytes for buffers in (self._keys, self._values) for buffer in buffers.values())

    def update(self, layer: int, keys_BSGD: Tensor, values_BSGD: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys and values of a layer; returns views of all of them in order, [B, K, G, D]."""
        begin = self._num_tokens.get(layer, 0)
        end = begin + keys_BSGD.shape[1]
        while self.capacity_tokens < end:
            self.capacity_tokens *= 2
        for buffers, new_BSGD in ((self._keys, keys_BSGD), (self._values, values_BSGD)):
            buffers[layer] = self._with_room(buffers.get(layer), begin, new_BSGD)
            buffers[layer][:, begin:end] = new_BSGD
        self._num_tokens[layer] = end
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def _with_room(self, buffer: Tensor | None, used_tokens: int, like_BSGD: Tensor) -> Tensor:
        """The buffer itself if it has the capacity, else a new one that holds what it held."""
        if buffer is not None and buffer.shape[1] == self.capacity_tokens:
            return buffer
        batch, _, heads, head_dim = like_BSGD.shape
        larger = torch.empty(
            batch, self.capacity_tokens, heads, head_dim, dtype=like_BSGD.dtype, device=like_BSGD.device
        )
        if buffer is not None:
            larger[:, :used_tokens] = buffer[:, :used_tokens]
        return larger

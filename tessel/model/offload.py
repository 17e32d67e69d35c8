"""Activations that wait for backward in host memory. Changes no bit.

What is kept for backward inside a region goes to host memory as it is packed, storage by storage, and comes back
when backward asks for it; the first one that is asked for brings the region before along, which is next.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessel.config.memory import Memory
from tessel.runtime.host import Copy, HostCopies

# What is smaller is not worth a copy.
SMALLEST_BYTES = 4096


class Offload:
    """Which activations go to host memory, and those of the forward pass in progress.

    `num_layers`: everything that the first so many layers here keep. `attention`: what every layer's norm
    before attention and its attention keep. Parameters stay, and what all layers share, such as masks.
    """

    def __init__(self, num_layers: int = 0, attention: bool = False) -> None:
        self.num_layers, self.attention = num_layers, attention
        self.current: Region | None = None
        self._last: Region | None = None
        self._copies: HostCopies | None = None

    @classmethod
    def from_options(cls, memory: Memory) -> Offload | None:
        """From `--cpu-offloading` and `--swap-attention`; None where everything stays."""
        num_layers = memory.cpu_offloading_num_layers or 0
        return cls(num_layers, memory.swap_attention) if num_layers or memory.swap_attention else None

    def begin(self) -> None:
        """A forward pass begins."""
        self.current = self._last = None

    @contextmanager
    def region(self, module: nn.Module, shared: Iterable[Tensor | None], device: torch.device) -> Iterator[None]:
        """Within it, what is kept for backward goes to host memory, but for `module`'s parameters and `shared`."""
        if not torch.is_grad_enabled():
            yield
            return
        if self._copies is None:
            self._copies = HostCopies(device)
        region = Region(module, shared, self._copies, self._last)
        self.current = self._last = region
        try:
            with torch.autograd.graph.saved_tensors_hooks(region.pack, region.unpack):
                yield
        finally:
            self.current = None
            region.close()


class _Storage:
    """The bytes of a storage: in host memory, and on the device again once they were fetched."""

    def __init__(self, copies: HostCopies, here: Tensor) -> None:
        self._copies = copies
        self._host = copies.down(here)
        self._back: Copy | None = None

    def fetch(self) -> None:
        """Start the way back."""
        if self._back is None:
            # The way up runs after the way down: both are on one stream.
            self._back = self._copies.up(self._host.tensor)

    def get(self) -> torch.UntypedStorage:
        self.fetch()
        assert self._back is not None
        return self._back.on_device().untyped_storage()


@dataclass(frozen=True)
class _View:
    """A tensor that lies in a storage which is in host memory."""

    storage: _Storage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Region:
    """Hooks on saved tensors (see `saved_tensors_hooks`) for one module in one forward pass."""

    def __init__(
        self, module: nn.Module, shared: Iterable[Tensor | None], copies: HostCopies, previous: Region | None
    ) -> None:
        self._module = module
        self._shared = {_address(tensor) for tensor in shared if tensor is not None}
        self._copies = copies
        self._previous = previous
        # Held until the region is closed, so that an address means one storage.
        self._held: list[Tensor] = []
        self._storages: dict[int, _Storage] = {}
        self._known: list[weakref.ref[_Storage]] = []

    def pack(self, tensor: Tensor) -> Any:
        """The tensor itself where it stays."""
        if tensor.nbytes < SMALLEST_BYTES or type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        address = _address(tensor)
        # Asked anew each time: sharded parameters have their whole storage only while their module computes.
        if address in self._shared or address in {_address(p) for p in self._module.parameters() if _is_plain(p)}:
            return tensor
        storage = self._storages.get(address)
        if storage is None:
            here = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self._held.append(here)
            storage = self._storages[address] = _Storage(self._copies, here)
            self._known.append(weakref.ref(storage))
        return _View(storage, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        """What was packed, on the device."""
        if not isinstance(packed, _View):
            return packed  # type: ignore[no-any-return]
        storage = packed.storage.get()
        if self._previous is not None:
            self._previous._fetch()
            self._previous = None
        empty = torch.empty(0, dtype=packed.dtype, device=storage.device)
        return empty.set_(storage, packed.offset, packed.size, packed.stride)

    def close(self) -> None:
        """Nothing more is packed: let go of what lies on the device."""
        self._held.clear()
        self._storages.clear()

    def _fetch(self) -> None:
        for reference in self._known:
            storage = reference()
            if storage is not None:
                storage.fetch()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter

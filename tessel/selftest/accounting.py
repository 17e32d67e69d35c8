"""The tensors' own accounting: bytes that are alive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Bytes of every storage that was made inside, or is among `given`: now, and at most.

    Looked at after each operation that makes one: what an operation takes and returns inside itself is not seen.
    Storages that are shrunk and grown again, as FSDP2 does, count with what they have at the time.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._storages = WeakIdKeyDictionary()
        self.peak = 0
        for tensor in given:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = [self._see(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(is_new):
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes alive."""
        return sum(storage.nbytes() for storage in self._storages)

    def _see(self, tensor: Tensor) -> bool:
        """Whether its storage is a new one."""
        storage = local(tensor).untyped_storage()
        if tensor.is_meta or storage in self._storages:
            return False
        self._storages[storage] = True
        return True


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""How many bytes of tensors are alive: what a forward pass leaves for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Follows every storage that is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        before = {_key(tensor) for tensor in given if isinstance(tensor, Tensor)}
        before |= {storage._cdata for storage in given if isinstance(storage, torch.UntypedStorage)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in before:
                storage = tensor.untyped_storage()
                self._made[_key(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def num_bytes(self) -> int:
        """Of those that are still held by anything."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def forward_backward(model: Any, *arguments: Any, **keywords: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, every gradient, and the bytes alive between forward and backward."""
    torch.manual_seed(3)
    with Live() as live:
        loss = model(*arguments, **keywords)
        kept = live.num_bytes
    loss.sum().backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, kept

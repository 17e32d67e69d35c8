"""The tensors' own accounting: bytes that autograd keeps for backward, and what a step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tessel.selftest.accounting import LiveBytes, local


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps of one forward pass, without those of parameters.

    Parameters are those of `modules` at the time, gathered ones where FSDP2 gathers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._bytes: dict[int, int] = {}  # by address: none is freed before backward
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        # What is sharded still is not what computes.
        gathered = (p for module in self._modules for p in module.parameters() if not isinstance(p, DTensor))
        if address not in {_address(p) for p in gathered}:
            self._bytes[address] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def total(self) -> int:
        """The bytes so far."""
        return sum(self._bytes.values())


@dataclass(frozen=True)
class Measured:
    """What a rank's tensors took; `activations` of one micro-batch, `peak` of a step of several."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def measure(
    modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, train: Callable[[int], Any], num_micro_batches: int
) -> Measured:
    """Measure this rank's part of a training step, on any rank alike.

    `train(n)` runs forward and backward of n micro-batches, of this process or of a pipeline. Ends with an
    optimizer step and without gradients.
    """
    parameters = [p for module in modules for p in module.parameters()]
    with SavedBytes(modules) as saved:
        train(1)
    optimizer.zero_grad(set_to_none=True)
    state = [value for values in optimizer.state.values() for value in values.values()]
    with LiveBytes([*parameters, *state]) as live:
        train(num_micro_batches)
        gradients = num_bytes(p.grad for module in modules for p in module.parameters() if p.grad is not None)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Measured(num_bytes(parameters), gradients, num_bytes(state), saved.total, live.peak)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors, of a distributed one its local part."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _address(tensor: Tensor) -> int:
    return int(local(tensor).untyped_storage().data_ptr())

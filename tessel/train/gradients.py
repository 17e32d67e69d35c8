"""What a step measures and does on gradients, over all processes of the run.

Everything works on this process's part of each parameter and adds up by the table: an element that
several processes hold counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tessel.checkpoint.tiles import local_of
from tessel.parallel.peers import Peers
from tessel.train.optimizer import clip_, norm_of, norms_of, num_zeros


class Gradients:
    """The gradients of the trainable among `parameters` (name -> parameter).

    `copies`: how many processes hold the same elements, by name. `padding`: elements over the whole run that
    pad vocabularies; they have a gradient of zero and are not counted. `finalize` sums what backward left partial.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        peers: Peers | None = None,
        copies: Mapping[str, int] | None = None,
        padding: int = 0,
        finalize: Callable[[], None] | None = None,
    ) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._peers = peers or Peers()
        self._copies = copies or {}
        self._padding = padding
        self._finalize = finalize

    def finalize(self) -> None:
        """Sum what is still partial after the last backward of a step."""
        if self._finalize is not None:
            self._finalize()

    def local(self) -> list[Tensor]:
        """This process's part of every gradient that there is."""
        return [gradient for _, gradient in self._named()]

    def norm(self) -> float:
        """L2 norm over all elements of the model's gradient."""
        names, gradients = self._split(self._named())
        return self._norm(names, gradients)

    def params_norm(self) -> float:
        """L2 norm over all elements of the trainable parameters."""
        names, parameters = self._split([(name, local_of(p)) for name, p in self._parameters.items()])
        return self._norm(names, parameters)

    @torch.no_grad()
    def clip_(self, max_norm: float, norm: float) -> None:
        """Scale the gradients so that their norm is at most `max_norm`."""
        clip_(self.local(), max_norm, norm)

    def num_zeros(self) -> float:
        """Elements of the gradient that are exactly zero, vocabulary padding left out."""
        names, gradients = self._split(self._named())
        if self._peers.num_processes == 1:
            return num_zeros(gradients)
        counts = [num_zeros([g]) / self._copies.get(name, 1) for name, g in zip(names, gradients, strict=True)]
        total = self._peers.sum_everywhere(torch.tensor([sum(counts)], dtype=torch.float64, device=self._device()))
        return round(float(total)) - float(self._padding)

    @torch.no_grad()
    def largest(self) -> float:
        """The largest absolute element; NaN where there is one."""
        gradients = [gradient for gradient in self.local() if gradient.numel()]
        norms = torch._foreach_norm(gradients, ord=math.inf) if gradients else ()
        largest = torch.stack(list(norms)).max() if norms else torch.zeros((), device=self._device())
        return float(self._peers.largest(largest))

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(name, local_of(p.grad)) for name, p in self._parameters.items() if p.grad is not None]

    def _split(self, named: Sequence[tuple[str, Tensor]]) -> tuple[list[str], list[Tensor]]:
        return [name for name, _ in named], [tensor for _, tensor in named]

    def _device(self) -> torch.device:
        # A pipeline stage may have no parameters.
        return next((p.device for p in self._parameters.values()), self._peers.device)

    @torch.no_grad()
    def _norm(self, names: Sequence[str], tensors: Sequence[Tensor]) -> float:
        if self._peers.num_processes == 1:
            return float(norm_of(tensors))
        total = torch.zeros(1, dtype=torch.float64, device=self._device())
        for name, norm in zip(names, norms_of(tensors), strict=True):
            total += norm.double().square() / self._copies.get(name, 1)
        return float(self._peers.sum_everywhere(total).sqrt())

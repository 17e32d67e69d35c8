"""What runs micro-batches forward and backward: on this process alone, or as part of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tessel.data.loader import MicroBatch

# A micro-batch and its weights, cut to what this process's forward takes (context parallelism).
Localize = Callable[[MicroBatch, Tensor], tuple[MicroBatch, Tensor]]


class Runner(Protocol):
    """Runs the micro-batches of one step."""

    def train(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor], z_loss_coeff: float = 0.0) -> Tensor:
        """Forward and backward of every micro-batch; gradients add up in `.grad`.

        Returns this process's part of each micro-batch's loss terms, detached, fp32 [micro-batches, terms]: the
        weighted sum of nll, and with a z-loss that as a second term. Zeros where this process has no head.
        """
        ...

    def evaluate(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor]) -> Tensor:
        """The same, [micro-batches, 1] in fp64, without gradients."""
        ...


def whole(batch: MicroBatch, weights_BS: Tensor) -> tuple[MicroBatch, Tensor]:
    """Every process takes the whole sequence."""
    return batch, weights_BS


class PlainRunner:
    """One micro-batch after another through a whole model.

    What n replicas that share P bytes of parameters send for a step of M micro-batches, (n-1)/n P times:

        once                   1 all-gather, 1 reduce-scatter (no sharing: one all-reduce, which sends as much)
        `reduce_each`          1 all-gather, M reduce-scatters: gradients are held sharded
        and `gather_each`      2 M all-gathers, M reduce-scatters: so are parameters
    """

    def __init__(
        self, model: nn.Module, localize: Localize = whole, *, reduce_each: bool = True, gather_each: bool = False
    ) -> None:
        self._model = model
        self._localize = localize
        self._reduce_each = reduce_each
        self._gather_each = gather_each

    def train(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor], z_loss_coeff: float = 0.0) -> Tensor:
        """See `Runner`."""
        losses = []
        for number, (batch, weights) in enumerate(zip(batches, weights_BS, strict=True)):
            if isinstance(self._model, FSDPModule):
                is_last = number == len(batches) - 1
                self._model.set_requires_gradient_sync(is_last or self._reduce_each)
                self._model.set_reshard_after_backward(is_last or self._gather_each)
                self._model.set_is_last_backward(is_last)
            loss = self._forward(batch, weights, z_loss_coeff)
            loss.sum().backward()
            losses.append(loss.detach().reshape(-1))
        return torch.stack(losses)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor]) -> Tensor:
        """See `Runner`."""
        losses = [self._forward(*pair, 0.0) for pair in zip(batches, weights_BS, strict=True)]
        return torch.stack(losses).reshape(-1, 1)

    def _forward(self, batch: MicroBatch, weights_BS: Tensor, z_loss_coeff: float) -> Tensor:
        batch, weights_BS = self._localize(batch, weights_BS)
        loss: Tensor = self._model(
            batch.tokens_BS,
            batch.rope_positions_BS,
            batch.segments_BS,
            labels_BS=batch.labels_BS,
            weights_BS=weights_BS,
            z_loss_coeff=z_loss_coeff,
        )
        return loss

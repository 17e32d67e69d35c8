"""What runs the micro-batches of a step through this process's stage, as `tessel.parallel.runner.Runner`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import torch
from mindspore import mint
from torch import Tensor

from tessel.data.loader import MicroBatch
from tessel.layout.schedules import one_forward_one_backward
from tessel.mindspore_engine import collectives
from tessel.mindspore_engine.model import Decoder, Inputs
from tessel.mindspore_engine.optimizer import Gradients


class StageRunner:
    """Micro-batches through a stage by 1F1B; through a whole model, that is one after another.

    MindSpore has gradients of functions, and no graph that outlives a call: between a forward and its backward a
    stage keeps its input alone, and backward computes the stage again. The last stage computes once.

    `ranks` are the processes of the pipeline, this one at `place`. Sent for each micro-batch: its activations to the
    next stage, and their gradient back, in `dtype`.
    """

    def __init__(
        self, decoder: Decoder, parameters: Sequence[Any], gradients: Gradients, ranks: Sequence[int], place: int
    ) -> None:
        self.decoder, self._parameters, self._gradients = decoder, list(parameters), gradients
        self._ranks, self._place = ranks, place

    def train(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor], z_loss_coeff: float = 0.0) -> Tensor:
        """See `tessel.parallel.runner.Runner`; gradients add up in `Gradients`."""
        assert not z_loss_coeff
        losses = [0.0] * len(batches)
        waiting: dict[int, tuple[Inputs, Any]] = {}
        unsent = None
        for work, number in one_forward_one_backward(len(self._ranks), self._place, len(batches)):
            if work == "F":
                inputs = self.decoder.inputs(batches[number], weights_BS[number])
                waiting[number] = inputs, self._received(inputs)
                # Not before: two neighbours that both send first would wait for each other.
                self._send_back(unsent)
                unsent = None
                self._forward(*waiting[number])
            else:
                self._send_back(unsent)
                losses[number], unsent = self._backward(*waiting.pop(number))
        self._send_back(unsent)
        return torch.tensor(losses)[:, None]

    def evaluate(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor]) -> Tensor:
        """See `tessel.parallel.runner.Runner`."""
        losses = [0.0] * len(batches)
        for number, (batch, weights) in enumerate(zip(batches, weights_BS, strict=True)):
            inputs = self.decoder.inputs(batch, weights)
            x_BSE = self._received(inputs)
            if self.decoder.stage.is_last:
                losses[number] = float(self.decoder(inputs, x_BSE).asnumpy())
            self._forward(inputs, x_BSE)
        return torch.tensor(losses, dtype=torch.float64)[:, None]

    def _received(self, inputs: Inputs) -> Any:
        """What the stage before has made of a micro-batch."""
        if self.decoder.stage.is_first:
            return None
        return collectives.receive(*self.decoder.activations(inputs), self._ranks[self._place - 1])

    def _forward(self, inputs: Inputs, x_BSE: Any) -> None:
        """Hand a micro-batch on; the last stage has nothing to do before backward."""
        if not self.decoder.stage.is_last:
            collectives.send(self.decoder(inputs, x_BSE), self._ranks[self._place + 1])

    def _send_back(self, gradient: Any) -> None:
        if gradient is not None:
            collectives.send(gradient, self._ranks[self._place - 1])

    def _backward(self, inputs: Inputs, x_BSE: Any) -> tuple[float, Any]:
        """(this stage's loss, the gradient of its input or None); those of the parameters are added up."""
        stage, upstream = self.decoder.stage, None
        if not stage.is_last:
            upstream = collectives.receive(*self.decoder.activations(inputs), self._ranks[self._place + 1])

        def scalar(x_BSE: Any) -> Any:
            out = self.decoder(inputs, x_BSE)
            return out if upstream is None else mint.sum(out.astype(ms.float32) * upstream.astype(ms.float32))

        if stage.is_first:
            value, of_parameters = ms.value_and_grad(scalar, None, self._parameters)(None)
            of_input = None
        elif self._parameters:
            value, (of_input, of_parameters) = ms.value_and_grad(scalar, 0, self._parameters)(x_BSE)
        else:
            value, of_input = ms.value_and_grad(scalar, 0)(x_BSE)
            of_parameters = ()
        self._gradients.add(of_parameters)
        return float(value.asnumpy()) if stage.is_last else 0.0, of_input

"""What a run trains: this process's part of the model, its optimizer, and what runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessel.layout.adapters import AdapterSpec
from tessel.layout.tiles import Tile
from tessel.model.balance import Balance
from tessel.model.transformer import Transformer
from tessel.parallel.peers import Peers
from tessel.parallel.runner import Runner
from tessel.train.gradients import Gradients
from tessel.train.optimizer import keep_state, state_by_name
from tessel.train.scaler import GradScaler


@dataclass(frozen=True)
class Learner:
    """This process's part of a model, what updates it, and the names under which a checkpoint holds both.

    `parts`: one module for each pipeline stage of this process; the whole model where there are no pipelines.
    `tiles`: which part of the whole each parameter is, before data parallelism cuts it further. `balance`: what
    all routers share, of every part.
    """

    parts: tuple[Transformer, ...]
    optimizer: torch.optim.Optimizer
    scaler: GradScaler | None
    dtype: torch.dtype
    runner: Runner
    gradients: Gradients
    peers: Peers
    tiles: Mapping[str, Tile]
    balance: Balance

    def weights(self) -> dict[str, Tensor]:
        """This process's trained parameters by name, fp32, not copies: all of them, or the adapters."""
        return {name: p.detach() for name, p in named_parameters(self.parts).items() if p.requires_grad}

    @property
    def adapters(self) -> AdapterSpec | None:
        """The kind of adapters that are trained, and not the model."""
        return self.parts[0].config.adapters

    def tensors(self, with_optimizer: bool) -> dict[str, Tensor]:
        """What a checkpoint of the run holds, not copies."""
        tensors = {f"model.{name}": tensor for name, tensor in self.weights().items()}
        return tensors | self.optimizer_tensors() if with_optimizer else tensors

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's part of `tensors`: loading into it in place, then `keep_optimizer`, loads the optimizer."""
        return {f"optimizer.{name}": tensor for name, tensor in state_by_name(self.optimizer).items()}

    def keep_optimizer(self, loaded: Mapping[str, Tensor]) -> None:
        """Take over what was loaded into `optimizer_tensors`, some of which may be copies."""
        keep_state(self.optimizer, {name.removeprefix("optimizer."): tensor for name, tensor in loaded.items()})


def named_parameters(parts: Sequence[Transformer]) -> dict[str, nn.Parameter]:
    """The parameters of all parts by their names, which are the whole model's."""
    return {name: parameter for part in parts for name, parameter in part.named_parameters()}

"""What is measured and done on gradients, and the optimizers, by MindSpore.

Both have the methods that `tessel.train.step` and `tessel.train.trainer` ask of the torch engine's, and torch's
arithmetic. Everything works on this process's part of each parameter; figures add up over processes as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore import mint, ops

from tessel.config.run import Optimizer as OptimizerConfig
from tessel.layout.sharding import ParamRule
from tessel.mindspore_engine.collectives import Group, Groups
from tessel.parallel.peers import Peers


class Gradients:
    """The sums of a step's gradients so far, by the name of the parameter; none between steps.

    `copies`: how many processes hold the same elements. `padding`: elements over the whole run that pad vocabularies.
    """

    def __init__(
        self,
        parameters: Mapping[str, ms.Parameter],
        rules: Mapping[str, ParamRule],
        peers: Peers,
        groups: Groups | None,
        copies: Mapping[str, int],
        padding: int,
        sequence_parallel: bool,
    ) -> None:
        self._parameters = parameters
        self._peers = peers
        self._copies, self._padding = copies, padding
        self._sums = {name: list(_partial_over(rules[name], groups, sequence_parallel)) for name in parameters}
        self.held: dict[str, ms.Tensor] = {}

    def add(self, gradients: tuple[ms.Tensor, ...]) -> None:
        """Take in the gradients of a micro-batch, in the parameters' order."""
        for name, gradient in zip(self._parameters, gradients, strict=True):
            self.held[name] = self.held[name] + gradient if name in self.held else gradient

    def finalize(self) -> None:
        """Sum over replicas, and what the sharding table calls partial. The tied copies last: both are whole then."""
        for name, parameter in self._parameters.items():
            if name not in self.held:  # no micro-batch: its peers wait for it all the same
                self.held[name] = mint.zeros(parameter.shape, dtype=parameter.dtype)
            for group in self._sums[name]:
                self.held[name] = group.sum(self.held[name])

    def norm(self) -> float:
        """L2 norm over all elements of the model's gradient."""
        return self._norm(self.held)

    def params_norm(self) -> float:
        """L2 norm over all elements of the parameters."""
        return self._norm(self._parameters)

    def clip_(self, max_norm: float, norm: float) -> None:
        """Scale by max_norm / (norm + 1e-6), Megatron's rule, where that is less than 1."""
        coefficient = max_norm / (norm + 1.0e-6)
        if coefficient < 1.0:
            self.held = {name: gradient * coefficient for name, gradient in self.held.items()}

    def num_zeros(self) -> float:
        """Elements of the gradient that are exactly zero, vocabulary padding left out."""
        counts = {name: float(mint.sum((g == 0).astype(ms.float32)).asnumpy()) for name, g in self.held.items()}
        return round(self._over_processes(counts)) - float(self._padding)

    def clear(self) -> None:
        """Forget them."""
        self.held = {}

    def _norm(self, tensors: Mapping[str, ms.Tensor]) -> float:
        return math.sqrt(self._over_processes({name: _square_sum(tensor) for name, tensor in tensors.items()}))

    def _over_processes(self, figures: Mapping[str, float]) -> float:
        """Each figure of elements that several processes hold counts once."""
        own = sum(figure / self._copies.get(name, 1) for name, figure in figures.items())
        return float(self._peers.sum_everywhere(torch.tensor([own], dtype=torch.float64)))


def _partial_over(rule: ParamRule, groups: Groups | None, sequence_parallel: bool) -> Iterator[Group]:
    if groups is None:
        return
    axes = rule.partial_axes
    for group, is_partial in (
        (groups.dp, True),
        (groups.tp, "tp" in axes or ("sequence" in axes and sequence_parallel)),
        (groups.kv_replicas, "kv_replicas" in axes),
        (groups.tied_stages, "tied_stages" in axes),
    ):
        if group is not None and is_partial:
            yield group


def _square_sum(x: ms.Tensor) -> float:
    """Row by row, so that a long sum in fp32 loses nothing that shows."""
    rows = mint.sum(x * x, dim=-1)
    return float(np.sum(rows.asnumpy(), dtype=np.float64))


class Optimizer:
    """AdamW, or SGD with momentum, over `groups` (`tessel.train.optimizer.parameter_groups`).

    Weight decay is decoupled in AdamW and part of the gradient in SGD. State has torch's names, and is all there from
    the start: exp_avg and exp_avg_sq (AdamW) or momentum_buffer (SGD), fp32, by parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, gradients: Gradients) -> None:
        self.param_groups = groups
        self._gradients = gradients
        self._is_adam = config.optimizer == "adam"
        self._momentum = config.sgd_momentum
        kinds = ("exp_avg", "exp_avg_sq") if self._is_adam else ("momentum_buffer",) if self._momentum else ()
        for group in groups:
            group |= {"lr": config.lr or 0.0, "weight_decay": config.weight_decay}
            group |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps} if self._is_adam else {}
        self.state = {
            f"{kind}.{name}": ms.Parameter(ms.Tensor(np.zeros(parameter.shape, np.float32)), name=f"{kind}.{name}")
            for group in groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            for kind in kinds
        }
        self.steps = {name: 0 for group in groups for name in group["names"]} if self._is_adam else {}

    def step(self) -> None:
        """Update every parameter by its gradient."""
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                gradient = self._gradients.held[name]
                ops.assign(parameter, (self._adam if self._is_adam else self._sgd)(name, parameter, gradient, group))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        del set_to_none
        self._gradients.clear()

    def _adam(self, name: str, parameter: ms.Parameter, gradient: ms.Tensor, group: Mapping[str, Any]) -> ms.Tensor:
        """arXiv 1711.05101, in torch's order of operations."""
        self.steps[name] += 1
        (beta1, beta2), steps, rate = group["betas"], self.steps[name], group["lr"]
        mean, square = self.state[f"exp_avg.{name}"], self.state[f"exp_avg_sq.{name}"]
        ops.assign(mean, mean + (gradient - mean) * (1 - beta1))
        ops.assign(square, square * beta2 + gradient * gradient * (1 - beta2))
        root = mint.sqrt(square) / math.sqrt(1 - beta2**steps) + group["eps"]
        return parameter * (1 - rate * group["weight_decay"]) - mean / root * (rate / (1 - beta1**steps))

    def _sgd(self, name: str, parameter: ms.Parameter, gradient: ms.Tensor, group: Mapping[str, Any]) -> ms.Tensor:
        if group["weight_decay"]:
            gradient = gradient + parameter * group["weight_decay"]
        if self._momentum:
            buffer = self.state[f"momentum_buffer.{name}"]
            ops.assign(buffer, buffer * self._momentum + gradient)
            gradient = buffer
        return parameter - gradient * group["lr"]

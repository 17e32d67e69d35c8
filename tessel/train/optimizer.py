"""Optimizer, its parameter groups, and what is measured and done on gradients.

Everything here takes lists of parameters or tensors and looks at this process's part of each
(`local_of`), so that it works on whole parameters and on shards alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tessel.config.memory import Memory
from tessel.config.run import Optimizer as OptimizerConfig
from tessel.layout.sharding import parameters as sharding_rules
from tessel.model.config import ModelConfig
from tessel.train import frugal
from tessel.train.state import Blockwise

# torch's L2 norm on CPU adds up in fp32 vector lanes: the error is 1e-5 relative at 1M elements, 8e-5 at 4M, 7e-4
# at 17M and 1.4e-2 at 134M (an embedding). In rows it stays under 1e-7, at the same speed. Up to the first of these
# lengths the norm is torch's own all the same: so Megatron's runs on CPU are met to the last digit that they print.
NORM_WHOLE_ELEMENTS = 4_194_304
NORM_ROW_ELEMENTS = 16_384


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], model_config: ModelConfig, optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and learning rate, from the sharding table.

    As in Megatron, biases and norms have no weight decay, and --decoupled-lr is for the embedding and
    the output layer. A group holds `params`, `names` (in the same order), `wd_mult` (1.0 or 0.0),
    `is_decoupled_lr` and, with a decoupled rate, its `max_lr` and `min_lr` (read by `Scheduler.apply`).
    The group that decays by --lr is always there, if only empty: a pipeline stage may have no parameters, or
    the embedding alone, and its rate is the one that is logged.
    """
    rules = sharding_rules(model_config)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        rule = rules[name]
        decoupled = optimizer.decoupled_lr is not None and rule.is_embedding_or_output
        key = (rule.weight_decay, decoupled)
        group = groups.setdefault(key, _empty_group(rule.weight_decay, decoupled, optimizer))
        group["params"].append(parameter)
        group["names"].append(name)
    groups.setdefault((True, False), _empty_group(True, False, optimizer))
    return list(groups.values())


def _empty_group(weight_decay: bool, decoupled: bool, optimizer: OptimizerConfig) -> dict[str, Any]:
    group: dict[str, Any] = {
        "params": [],
        "names": [],
        "wd_mult": 1.0 if weight_decay else 0.0,
        "is_decoupled_lr": decoupled,
    }
    if decoupled:
        group["max_lr"] = optimizer.decoupled_lr
        # Without a minimum of its own, the group decays to --min-lr: no key, the schedule's value holds.
        if optimizer.decoupled_min_lr is not None:
            group["min_lr"] = optimizer.decoupled_min_lr
    return group


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, memory: Memory | None = None
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, with its state allocated at once (so a checkpoint always has it all).

    Weight decay is decoupled in AdamW and, as in Megatron, part of the gradient in SGD. Learning rate and
    weight decay are set by `Scheduler.apply` before the first step. Where `memory` asks for it, the state
    lies elsewhere or takes less: see `train/frugal.py`.
    """
    if memory is not None and frugal.is_needed(memory):
        return frugal.FrugalOptimizer(groups, config, memory)
    common: dict[str, Any] = {"lr": config.lr or 0.0, "weight_decay": config.weight_decay}
    kind: type[torch.optim.Optimizer]
    if config.optimizer == "adam":
        kind = torch.optim.AdamW
        common |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    else:
        kind = torch.optim.SGD
        common |= {"momentum": config.sgd_momentum}
    # torch's fused SGD does not know what to do with distributed tensors.
    can_fuse = config.optimizer == "adam" or not any(
        isinstance(p, DTensor) for group in groups for p in group["params"]
    )
    try:
        # One pass over memory: on CPU three times as fast as the other forms, and equal to rounding.
        optimizer = kind(groups, fused=can_fuse, **common)  # type: ignore[call-arg]
    except RuntimeError:  # torch has no fused form for this device or dtype
        optimizer = kind(groups, fused=False, **common)  # type: ignore[call-arg]
    _allocate_state(optimizer)
    return optimizer


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """What torch would do at the first step, now; zero momentum gives the same first update as none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.AdamW):
                # A fused kernel reads the step where the parameter is; the others, on the CPU.
                device = parameter.device if group["fused"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            elif group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, float | None]:
    """The present learning rate, and the decoupled one where there is one, as logged.

    As in Megatron, which reduces it over ranks, the first is rounded to fp32.
    """
    rates = {bool(group["is_decoupled_lr"]): float(group["lr"]) for group in optimizer.param_groups}
    return float(np.float32(rates[False])), rates.get(True)


@torch.no_grad()
def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements of local tensors: scalar fp32, on the first one's device.

    Infinite or NaN where one of them is.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    # Short ones first: rounding depends on the order.
    parts = sorted(_norms(tensors), key=len)
    norms = [norm.to(tensors[0].device) for norms in parts for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor: scalars in fp32, each where its tensor is."""
    return [norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)) for norms in _norms(tensors)]


def _norms(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Of each tensor the norms of its parts: one on an accelerator and of a short one, two of long rows on a CPU."""
    is_short = [t.device.type != "cpu" or t.numel() <= NORM_WHOLE_ELEMENTS for t in tensors]
    short = [tensor for tensor, fits in zip(tensors, is_short, strict=True) if fits]
    of_short = iter(torch._foreach_norm(short, dtype=torch.float32) if short else ())
    return [
        [next(of_short)] if fits else _norms_of_rows(tensor) for tensor, fits in zip(tensors, is_short, strict=True)
    ]


def _norms_of_rows(tensor: Tensor) -> list[Tensor]:
    flat = tensor.reshape(-1)
    num_in_rows = flat.numel() // NORM_ROW_ELEMENTS * NORM_ROW_ELEMENTS
    rows = flat[:num_in_rows].view(-1, NORM_ROW_ELEMENTS)
    in_rows = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
    return [in_rows, torch.linalg.vector_norm(flat[num_in_rows:], dtype=torch.float32)]


@torch.no_grad()
def clip_(gradients: Sequence[Tensor], max_norm: float, norm: float | Tensor) -> None:
    """Scale local gradients in place by max_norm / (norm + 1e-6), Megatron's rule, where that is less than 1."""
    coefficient = max_norm / (float(norm) + 1.0e-6)
    if coefficient < 1.0 and gradients:
        torch._foreach_mul_(list(gradients), coefficient)


@torch.no_grad()
def num_zeros(gradients: Sequence[Tensor]) -> float:
    """Elements of local gradients that are exactly zero; a float, as Megatron prints it."""
    counts = [grad.numel() - torch.count_nonzero(grad) for grad in gradients]
    return float(sum(int(count) for count in counts))


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a checkpoint says of each group for other suites, as plain numbers."""
    keys = ("wd_mult", "is_decoupled_lr", "max_lr", "min_lr", "lr", "weight_decay", "betas", "eps")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


def _named_state(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, dict[str, Any], str]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            for key in state:
                yield f"{key}.{name}", state, key


def state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's own tensors (not copies) as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`.

    SGD has `momentum_buffer.<parameter>`. Loading into them in place, and then `keep_state`, is loading the
    optimizer. State of 8 bits is shown as what it stands for: copies, fp32 and in host memory.
    """
    return {
        full_name: kept.decoded() if isinstance(kept := state[key], Blockwise) else kept
        for full_name, state, key in _named_state(optimizer)
    }


@torch.no_grad()
def keep_state(optimizer: torch.optim.Optimizer, loaded: Mapping[str, Tensor]) -> None:
    """Take over what was loaded into the tensors of `state_by_name`; they are needed for state of 8 bits alone."""
    for full_name, state, key in _named_state(optimizer):
        if isinstance(kept := state[key], Blockwise):
            kept.encode_(loaded[full_name])

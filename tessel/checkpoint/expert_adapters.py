"""Adapters of experts: each with tensors of its own on disk, as peft names them, and stacked in memory.

on disk     ....mlp.experts.J.PROJECTION.lora.A [r, in]
in memory   ....mlp.experts.lora.PROJECTION.A [X, r, in]
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_STACKED = re.compile(r"(.+\.experts)\.lora\.(\w+)\.(A|B)")
_SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.lora\.(A|B)")


def is_stacked(name: str) -> bool:
    """Whether a tensor in memory is of all experts' adapters."""
    return _STACKED.fullmatch(name) is not None


def unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From memory to disk; other tensors stay as they are."""
    single: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _STACKED.fullmatch(name)
        if found is None:
            single[name] = tensor
        else:
            single |= {f"{found[1]}.{j}.{found[2]}.lora.{found[3]}": part for j, part in enumerate(tensor.unbind())}
    return single


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From disk to memory; tensors of experts that are not all there, or not alike, stay as they are."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        found = _SINGLE.fullmatch(name)
        if found is None:
            whole[name] = tensor
        else:
            parts.setdefault(f"{found[1]}.lora.{found[3]}.{found[4]}", {})[int(found[2])] = name
    for name, experts in parts.items():
        held = [tensors[experts[j]] for j in sorted(experts)]
        if sorted(experts) == list(range(len(held))) and len({tensor.shape for tensor in held}) == 1:
            whole[name] = torch.stack(held)
        else:
            whole |= {single: tensors[single] for single in experts.values()}
    return whole

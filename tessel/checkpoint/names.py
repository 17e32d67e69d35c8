"""Names in a Hugging Face folder and names in memory, where they differ: experts, and Mixtral's router.

In memory an expert's matrix is one row of a stacked parameter, and a layer's mixture is always `mlp`:

    memory, of layer 0                   Mixtral                                     Qwen
    model.layers.0.mlp.gate.weight       ...0.block_sparse_moe.gate.weight           the same
    model.layers.0.mlp.experts.gate_proj ...0.block_sparse_moe.experts.E.w1.weight   ...mlp.experts.E.gate_proj.weight
    model.layers.0.mlp.experts.up_proj   ...0.block_sparse_moe.experts.E.w3.weight   ...mlp.experts.E.up_proj.weight
    model.layers.0.mlp.experts.down_proj ...0.block_sparse_moe.experts.E.w2.weight   ...mlp.experts.E.down_proj.weight

Expert E of a tile of a stacked parameter that begins at (e, i, j) is the stored tensor of expert e + E, from
(i, j) on. transformers 5 also saves stacks, with gate and up in one: `mlp.experts.gate_up_proj`, gate first.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_STORED_PARTS = {part: stored for stored, part in _MIXTRAL_PARTS.items()}
_EXPERT = re.compile(r"(.+\.)(block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(.+\.)(block_sparse_moe|mlp)\.experts\.gate_up_proj")
_STACKED = re.compile(r"(.+\.)mlp\.experts\.(gate_proj|up_proj|down_proj)")


class Place(NamedTuple):
    """Where a stored tensor belongs: in the parameter `name`, as one expert's row or all of it.

    `half` is 0 or 1 where the parameter is that half of the stored tensor, along dim 1.
    """

    name: str
    expert: int | None = None
    half: int | None = None


def places_of(stored: str) -> list[Place]:
    """The parameters that a stored tensor is for."""
    expert = _EXPERT.fullmatch(stored)
    if expert is not None:
        prefix, _, number, part = expert.groups()
        return [Place(f"{prefix}mlp.experts.{_MIXTRAL_PARTS.get(part, part)}", int(number))]
    fused = _FUSED.fullmatch(stored)
    if fused is not None:
        return [Place(f"{fused[1]}mlp.experts.{part}", half=half) for half, part in enumerate(("gate_proj", "up_proj"))]
    return [Place(stored.replace(".block_sparse_moe.", ".mlp."))]


def stored_name(name: str, family: str, expert: int) -> str:
    """The name that an expert's row of a stacked parameter has in a folder of the family."""
    stacked = _STACKED.fullmatch(name)
    assert stacked is not None, name
    prefix, part = stacked.groups()
    if family == "mixtral":
        return f"{prefix}block_sparse_moe.experts.{expert}.{_STORED_PARTS[part]}.weight"
    return f"{prefix}mlp.experts.{expert}.{part}.weight"


def is_stacked(name: str) -> bool:
    """Whether a parameter holds one matrix of every expert."""
    return _STACKED.fullmatch(name) is not None


def renamed(name: str, family: str) -> str:
    """The name of a parameter that is stored as it is, in a folder of the family."""
    return name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name

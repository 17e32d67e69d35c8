"""Low-rank adapters (LoRA, arXiv 2106.09685): which projections have one, under any suite's names.

A projection's weight W stays as it is, and y = W x + scale * B A x is computed, with A [r, in] and B [out, r]. In
memory the two are `PROJECTION.lora.A` and `PROJECTION.lora.B` beside `PROJECTION.weight`. Megatron's fused
projections (linear_qkv, linear_fc1) have one A for all that they fuse: the first of a group owns it, and the others
have a B alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tessel.config.nearest import nearest
from tessel.errors import UsageError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GROUPS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_LEGACY = {
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}
_ALL = ("all", "all-linear", "all_linear")

Held = Literal["plain", "nf4", "nf4-double"]


@dataclass(frozen=True)
class AdapterSpec:
    """Which projections have an adapter, and of which kind.

    Attributes:
        rank: r.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732).
        groups: the projections, those that share one A together; the first of them owns it.
        dropout: of an adapter's input, in training.
        weights: how the frozen weights of projections are held: in the compute dtype, or in NF4, with scales in fp32
            or in 8 bits.
        dora: rows of the adapted weights have learned lengths (arXiv 2402.09353), `PROJECTION.lora.magnitude` [out].
        experts: of a mixture's projections, each expert has an adapter, too: `experts.lora.PROJECTION.A` [X, r, in] and
            `.B` [X, out, r].
    """

    rank: int
    alpha: float
    groups: tuple[tuple[str, ...], ...]
    dropout: float = 0.0
    rslora: bool = False
    weights: Held = "plain"
    dora: bool = False
    experts: bool = True

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections, by their Hugging Face names, in the order of a layer."""
        wanted = {name for group in self.groups for name in group}
        return tuple(name for name in PROJECTIONS if name in wanted)

    def owner(self, projection: str) -> str | None:
        """The projection whose A this one uses: its own name as a rule; None where it has no adapter."""
        return next((group[0] for group in self.groups if projection in group), None)


def groups_of(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The groups that names of Hugging Face, Megatron core or legacy Megatron mean; `all`: every projection.

    Raises:
        UsageError: a name is unknown, or a projection is named twice.
    """
    groups: list[tuple[str, ...]] = []
    for name in names:
        fused = _LEGACY.get(name, name)
        if name in _ALL:
            groups += [(projection,) for projection in PROJECTIONS]
        elif fused in _GROUPS:
            groups.append(_GROUPS[fused])
        elif name in PROJECTIONS:
            groups.append((name,))
        else:
            known = [*PROJECTIONS, *_GROUPS, *_LEGACY, "all"]
            near = nearest(name, known)
            hint = f"; nearest: {near}" if near else ""
            raise UsageError(f"--lora-target-modules {name}: no such projection{hint}. There are {', '.join(known)}.")
    flat = [projection for group in groups for projection in group]
    doubled = sorted({projection for projection in flat if flat.count(projection) > 1})
    if doubled:
        raise UsageError(f"--lora-target-modules names {', '.join(doubled)} twice; name each projection once.")
    if not groups:
        raise UsageError("--lora-target-modules is empty; name projections, or all.")
    return tuple(sorted(groups, key=lambda group: PROJECTIONS.index(group[0])))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora." in name

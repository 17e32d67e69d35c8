"""Which process stands where: degrees, coordinates and groups, as pure arithmetic.

A rank's number is read as digits, the tensor-parallel one moving fastest (Megatron's order
tp-cp-ep-dp-pp):

    rank = tp + TP * (cp + CP * (dp + DP * pp))

Within one pipeline stage the same ranks are read a second time for the experts:

    rank = etp + ETP * (ep + EP * (edp + EDP * pp))

so that TP * CP * DP == ETP * EP * EDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tessel.errors import UsageError

Axis = Literal["tp", "cp", "dp", "pp"]
ExpertAxis = Literal["etp", "ep", "edp", "pp"]

_DENSE: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")
_EXPERT: tuple[ExpertAxis, ...] = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class Degrees:
    """What was asked for; the data-parallel degrees follow from the number of processes."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None  # the same as tp if not given, as in Megatron


@dataclass(frozen=True)
class Place:
    """Where a rank stands on every axis."""

    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0
    etp: int = 0
    ep: int = 0
    edp: int = 0


@dataclass(frozen=True)
class Topology:
    """The degrees of a run and the ranks on its axes."""

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    @classmethod
    def of(cls, degrees: Degrees, world_size: int) -> Topology:
        """The topology of `world_size` processes. Without experts, `etp` and `ep` mean nothing.

        Raises:
            UsageError: the degrees do not divide the number of processes.
        """
        etp = degrees.etp if degrees.etp is not None else degrees.tp
        product = degrees.tp * degrees.pp * degrees.cp
        if world_size % product:
            raise UsageError(
                f"--tensor-model-parallel-size {degrees.tp} x --pipeline-model-parallel-size {degrees.pp} x "
                f"--context-parallel-size {degrees.cp} = {product} does not divide the number of processes "
                f"{world_size}. {_processes(product, world_size)} Degrees that fit {world_size} processes: "
                f"{_products(world_size)}."
            )
        per_stage = world_size // degrees.pp
        if per_stage % (degrees.ep * etp):
            fits = [str(n) for n in range(1, per_stage // etp + 1) if per_stage % (n * etp) == 0] or ["none"]
            raise UsageError(
                f"--expert-model-parallel-size {degrees.ep} x --expert-tensor-parallel-size {etp} does not divide the "
                f"{per_stage} processes of a pipeline stage ({world_size} processes / "
                f"--pipeline-model-parallel-size {degrees.pp}). With --expert-tensor-parallel-size {etp}, "
                f"--expert-model-parallel-size may be {', '.join(fits)}."
            )
        return cls(world_size, degrees.tp, degrees.pp, degrees.cp, degrees.ep, etp)

    @property
    def dp(self) -> int:
        """Replicas that read different samples."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def place(self, rank: int) -> Place:
        """The coordinates of a rank."""
        dense = dict(zip(_DENSE, _digits(rank, [self._size(axis) for axis in _DENSE]), strict=True))
        expert = dict(zip(_EXPERT, _digits(rank, [self._size(axis) for axis in _EXPERT]), strict=True))
        return Place(**dense | expert)

    def groups(self, *axes: Axis) -> list[list[int]]:
        """The ranks that differ on `axes` alone, group by group; within a group in the order of their numbers."""
        return self._groups(_DENSE, axes)

    def expert_groups(self, *axes: ExpertAxis) -> list[list[int]]:
        """As `groups`, on the axes of the experts."""
        return self._groups(_EXPERT, axes)

    def describe(self) -> str:
        """The degrees above 1 in words, such as "TP2 PP2 DP2 on 8 processes"; ETP where it is not TP's."""
        sizes = [("TP", self.tp), ("PP", self.pp), ("CP", self.cp), ("DP", self.dp), ("EP", self.ep)]
        words = [f"{name}{size}" for name, size in sizes if size > 1]
        if self.etp != self.tp:
            words.append(f"ETP{self.etp}")
        return f"{' '.join(words) or 'one copy'} on {self.world_size} process{'es' if self.world_size > 1 else ''}"

    def _size(self, axis: str) -> int:
        return int(getattr(self, axis))

    def _groups(self, order: Sequence[str], axes: Sequence[str]) -> list[list[int]]:
        fixed = [i for i, axis in enumerate(order) if axis not in axes]
        sizes = [self._size(axis) for axis in order]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            digits = _digits(rank, sizes)
            found.setdefault(tuple(digits[i] for i in fixed), []).append(rank)
        return list(found.values())


def _digits(rank: int, sizes: Sequence[int]) -> list[int]:
    digits = []
    for size in sizes:
        rank, digit = divmod(rank, size)
        digits.append(digit)
    return digits


def _processes(product: int, world_size: int) -> str:
    below, above = world_size // product * product, (world_size // product + 1) * product
    return f"Start {' or '.join(str(n) for n in (below, above) if n)} processes, or change a degree."


def _products(world_size: int) -> str:
    """The products of degrees that divide the number of processes."""
    return "products of " + ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)

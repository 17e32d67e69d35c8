"""Whole parameters on the first process, out of the pieces that all processes hold: what an export writes.

One parameter is whole at a time, and each piece is sent once, by one of those that hold it, when the
first process asks for it: the others hold nothing but what they train with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from tessel.checkpoint.tiles import Part, part_of
from tessel.errors import TesselError
from tessel.layout.tiles import Tile
from tessel.runtime.team import Team

_SEND, _STOP = 1, 0
# Where a piece begins, and its extent.
Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Piece:
    rank: int
    box: Box


def write_whole(
    weights: Mapping[str, Tensor],
    tiles: Mapping[str, Tile],
    dtype: torch.dtype,
    write: Callable[[Iterator[tuple[str, Tensor]]], None],
    team: Team | None = None,
) -> None:
    """Call `write` on the first process with every parameter of the model, whole; see `gather_to_first`.

    Raises:
        TesselError: what `write` raises, on all processes.
    """
    team = team or Team()

    def take_part() -> None:
        with gather_to_first(weights, tiles, dtype, team) as tensors:
            if team.is_first:
                write(tensors)

    team.each(take_part)


@contextmanager
def gather_to_first(
    weights: Mapping[str, Tensor], tiles: Mapping[str, Tile], dtype: torch.dtype, team: Team | None = None
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Within it, the first process iterates over every parameter in the order of `tiles`, whole and unpadded.

    `weights`: what this process holds, by name: tiles, or DTensors that share a tile out. `tiles`: this
    process's tile of every parameter of the model, those of other pipeline stages included. All
    processes of `team` enter together; the others stay until the first has all it wants or leaves, and
    have nothing to iterate over. Pieces travel as `dtype`, over the CPU.

    Raises:
        TesselError: no process holds some part of a parameter.
    """
    team = team or Team()
    held = {name: part_of(weights[name], tile) for name, tile in tiles.items() if name in weights}
    if team.everyone is None:
        yield ((name, held[name].values) for name in tiles)
        return
    pieces = _deal_out(held, tiles, team)
    if not team.is_first:
        _send(held, pieces, dtype, team)
        yield iter(())
        return
    outstanding = Counter(piece.rank for found in pieces.values() for piece in found if piece.rank != 0)
    try:
        yield _receive(held, tiles, pieces, dtype, team, outstanding)
    finally:
        for rank in +outstanding:
            # One that has gone needs not be told, and what ended this is raised.
            with suppress(RuntimeError):
                distributed.send(torch.tensor([_STOP]), rank, group=team.everyone)


def _deal_out(held: Mapping[str, Part], tiles: Mapping[str, Tile], team: Team) -> dict[str, list[_Piece]]:
    """Who sends what, in the order of `tiles`: all of it on the first process, a process's own on the others."""
    boxes = {name: (part.start, tuple(part.values.shape)) for name, part in held.items() if part.values.numel()}
    offers: list[dict[str, Box]] | None = [{} for _ in range(team.size)] if team.is_first else None
    distributed.gather_object(boxes, offers, dst=0, group=team.everyone)
    plan: dict[str, list[_Piece]] = {}
    if offers is not None:
        plan = _plan(offers, tiles)
    team.first(lambda: _require_whole(plan, tiles))
    shares: list[dict[str, list[_Piece]]] | None = None
    if team.is_first:
        shares = [{} for _ in range(team.size)]
        for name, pieces in plan.items():
            for piece in pieces:
                shares[piece.rank].setdefault(name, []).append(piece)
    own: list[dict[str, list[_Piece]]] = [{}]
    distributed.scatter_object_list(own, shares, src=0, group=team.everyone)
    return plan if team.is_first else own[0]


def _plan(offers: Sequence[Mapping[str, Box]], tiles: Mapping[str, Tile]) -> dict[str, list[_Piece]]:
    """Each piece from one process: the first one itself if it holds it, else that with the fewest bytes so far."""
    load = [0] * len(offers)
    plan: dict[str, list[_Piece]] = {}
    for name in tiles:
        holders: dict[Box, list[int]] = {}
        for rank, boxes in enumerate(offers):
            if name in boxes:
                holders.setdefault(boxes[name], []).append(rank)
        plan[name] = []
        for box, ranks in holders.items():
            chosen = 0 if ranks[0] == 0 else min(ranks, key=lambda rank: load[rank])
            load[chosen] += math.prod(box[1])
            plan[name].append(_Piece(chosen, box))
    return plan


def _require_whole(plan: Mapping[str, Sequence[_Piece]], tiles: Mapping[str, Tile]) -> None:
    missing = [
        name
        for name, pieces in plan.items()
        if sum(math.prod(piece.box[1]) for piece in pieces) != math.prod(tiles[name].shape)
    ]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise TesselError(
            f"The processes hold no whole {', '.join(missing[:5])}{more}: the model cannot be put together."
        )


def _receive(
    held: Mapping[str, Part],
    tiles: Mapping[str, Tile],
    plan: Mapping[str, Sequence[_Piece]],
    dtype: torch.dtype,
    team: Team,
    outstanding: Counter[int],
) -> Iterator[tuple[str, Tensor]]:
    for name, pieces in plan.items():
        whole = torch.empty(tiles[name].shape, dtype=dtype)
        for piece in pieces:
            start, size = piece.box
            box = tuple(slice(begin, begin + length) for begin, length in zip(start, size, strict=True))
            if piece.rank == 0:
                whole[box] = held[name].values.to("cpu", dtype)
                continue
            outstanding[piece.rank] -= 1
            distributed.send(torch.tensor([_SEND]), piece.rank, group=team.everyone)
            received = torch.empty(size, dtype=dtype)
            distributed.recv(received, piece.rank, group=team.everyone)
            whole[box] = received
        yield name, whole


def _send(held: Mapping[str, Part], names: Iterable[str], dtype: torch.dtype, team: Team) -> None:
    word = torch.empty(1, dtype=torch.int64)
    for name in names:
        distributed.recv(word, 0, group=team.everyone)
        if int(word) == _STOP:
            return
        distributed.send(held[name].values.to("cpu", dtype).contiguous(), 0, group=team.everyone)

"""What one process finds out, and what fails, all know."""

from __future__ import annotations

import pytest
from torch import distributed

from tessel.errors import TesselError, UsageError
from tessel.runtime.failure import PeerFailedError
from tessel.runtime.team import Team
from tests.parallel.processes import run


def test_a_process_alone_asks_nobody() -> None:
    team = Team()
    assert (team.size, team.is_first, team.writes, team.shares_storage, team.node) == (1, True, True, True, 0)
    assert (team.each(lambda: 3), team.first(lambda: 4), team.writer(lambda: 5), team.gather(6)) == ([3], 4, 5, {0: 6})

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        team.each(fail)


def _fails(error: Exception, ranks: tuple[int, ...]) -> None:
    if distributed.get_rank() in ranks:
        raise error


def _one_place() -> None:
    team = Team.of()
    rank = distributed.get_rank()
    assert (team.size, team.is_first, team.writes) == (4, rank == 0, rank == 0)
    assert team.each(lambda: rank * 2) == [0, 2, 4, 6]
    assert team.first(lambda: rank) == team.writer(lambda: rank) == 0
    assert team.gather(rank) == ({r: r for r in range(4)} if rank == 0 else {})
    # One text, whoever says it.
    for ranks in ((0, 1, 2, 3), (2,)):
        with pytest.raises(UsageError, match="^wrong$"):
            team.each(lambda ranks=ranks: _fails(UsageError("wrong"), ranks))
    with pytest.raises(TesselError, match="^process 1: no 1\nprocess 2: no 2$"):
        team.each(lambda: _fails(TesselError(f"no {rank}"), (1, 2)))
    # A bug is told by the process that has it.
    expected = KeyError if rank == 1 else PeerFailedError
    with pytest.raises(expected, match="x"):
        team.each(lambda: _fails(KeyError("x"), (1,)))
    team.wait()


def test_processes_of_one_place() -> None:
    run(4, _one_place)


def _two_nodes() -> None:
    team = Team.of([[0, 1], [2, 3]])
    rank = distributed.get_rank()
    assert (team.node, team.writes, team.is_first, team.shares_storage) == (rank // 2, rank % 2 == 0, rank == 0, False)
    assert team.writer(lambda: rank) == rank // 2 * 2
    assert team.gather(rank) == {0: {0: 0, 1: 1}, 2: {2: 2, 3: 3}}.get(rank, {})
    with pytest.raises(TesselError, match="^node 1 .process 2.: full$"):
        team.writer(lambda: _fails(TesselError("full"), (2,)))


def test_processes_of_two_nodes() -> None:
    run(4, _two_nodes)

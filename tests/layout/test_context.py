"""Which positions a context-parallel rank holds, and which models and lengths can be shared."""

from __future__ import annotations

import pytest

from tessel.config.layout import Layout
from tessel.errors import UsageError
from tessel.layout.context import check_context, inner_degree, position_ranges, ring_ranges

COMM_TYPES = ("p2p", "allgather", "a2a", "a2a+p2p")


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 6, 8, 12])
def test_every_position_has_one_rank(comm_type: str, cp_size: int) -> None:
    for inner in (n for n in range(1, cp_size + 1) if cp_size % n == 0):
        seq_length = 2 * cp_size * 5
        ranks = position_ranges(seq_length, cp_size, comm_type, inner)
        held = [[p for start, stop in ranges for p in range(start, stop)] for ranges in ranks]
        assert {len(positions) for positions in held} == {seq_length // cp_size}
        assert sorted(sum(held, [])) == list(range(seq_length))


def test_the_orders() -> None:
    assert position_ranges(16, 2, "p2p") == [[(0, 4), (12, 16)], [(4, 8), (8, 12)]]
    assert position_ranges(16, 2, "allgather") == position_ranges(16, 2, "p2p")
    assert position_ranges(16, 2, "a2a") == [[(0, 8)], [(8, 16)]]
    assert position_ranges(16, 4, "a2a+p2p", 2) == [[(0, 4)], [(12, 16)], [(4, 8)], [(8, 12)]]
    assert position_ranges(24, 6, "a2a+p2p", 3) == [
        [(0, 4)], [(4, 6), (18, 20)], [(20, 24)], [(6, 10)], [(10, 12), (12, 14)], [(14, 18)],
    ]  # fmt: skip
    assert position_ranges(16, 4, "a2a+p2p", 4) == position_ranges(16, 4, "a2a")
    assert position_ranges(16, 4, "a2a+p2p", 1) == position_ranges(16, 4, "p2p")


@pytest.mark.parametrize("cp_size", [4, 8])
def test_inner_ranks_hold_what_a_place_of_the_ring_computes(cp_size: int) -> None:
    for place in range(cp_size // 2):
        inner_ranks = position_ranges(64, cp_size, "a2a+p2p", 2)[2 * place : 2 * place + 2]
        assert sum(inner_ranks, []) == ring_ranges(64, cp_size // 2, place)


def test_a_length_that_does_not_divide_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="2 x 2 equal chunks"):
        position_ranges(10, 2, "p2p")
    with pytest.raises(ValueError, match="4 equal parts"):
        position_ranges(10, 4, "a2a")


def test_the_inner_degree() -> None:
    assert inner_degree("p2p", 8, None, 8, 1) == inner_degree("allgather", 8, None, 8, 1) == 1
    assert inner_degree("a2a", 8, None, 2, 1) == 8
    assert inner_degree("a2a+p2p", 8, 4, 2, 1) == 4
    assert inner_degree("a2a+p2p", 8, None, 4, 1) == 4, "as large as the KV heads allow"
    assert inner_degree("a2a+p2p", 8, None, 4, 2) == 2, "of one tensor-parallel rank"
    assert inner_degree("a2a+p2p", 8, None, 2, 4) == 1
    assert inner_degree("a2a+p2p", 4, None, 6, 1) == 2


def layout(cp: int, comm_type: str | None = None, inner: int | None = None) -> Layout:
    return Layout(context_parallel_size=cp, cp_comm_type=comm_type, ulysses_degree_in_cp=inner)


@pytest.mark.parametrize(
    ("asked", "heads", "seq_length", "message"),
    [
        (layout(4, "a2a"), (6, 2, 1), 64, "deals the 6 attention heads of a process out to 4, which does not divide "
         "them: use --context-parallel-size 1, 2, 3 or 6, or --cp-comm-type p2p."),
        (layout(8, "a2a"), (8, 8, 2), 64, "the 4 attention heads of a process out to 8"),
        (layout(4, "a2a+p2p", 4), (6, 6, 1), 64, "use --ulysses-degree-in-cp 1 or 2, or --cp-comm-type p2p."),
        (layout(4), (8, 8, 1), 20, "20 tokens is not a multiple of 2 x --context-parallel-size 4 = 8: 16 or 24 would"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared(asked: Layout, heads: tuple[int, int, int], seq_length: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_context(asked, *heads, seq_length)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "heads", "seq_length"),
    [
        (layout(1), (3, 1, 1), 7),
        (layout(4), (3, 1, 1), 64),
        (layout(4, "a2a"), (8, 2, 1), 64),
        (layout(4, "a2a"), (12, 3, 3), 64),
        (layout(6, "a2a+p2p", 3), (6, 2, 2), 24),
        (layout(4, "a2a+p2p"), (6, 6, 1), 64),
    ],
)
def test_what_can(asked: Layout, heads: tuple[int, int, int], seq_length: int) -> None:
    check_context(asked, *heads, seq_length)

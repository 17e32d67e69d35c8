"""Which blocks context-parallel ranks compute: every visible pair once, little else, and all ranks alike."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tessel.layout.context import ring_ranges
from tessel.model.attention import Visibility
from tessel.parallel.blocks import Block
from tessel.parallel.context import ContextAttention
from tessel.parallel.ring import Work

CPU = torch.device("cpu")
WAYS = [("p2p", 1), ("allgather", 1), ("a2a", 4), ("a2a+p2p", 2)]


@dataclass(frozen=True)
class Standing:
    """As much of a process group as it takes to know one's place."""

    num_ranks: int
    number: int

    def size(self) -> int:
        return self.num_ranks

    def rank(self) -> int:
        return self.number


def attention(num_ranks: int, rank: int, comm_type: str, inner: int) -> ContextAttention:
    return ContextAttention(Standing(num_ranks, rank), comm_type, inner)  # type: ignore[arg-type]


def works(
    num_ranks: int, comm_type: str, inner: int, length: int, segments_BW: Tensor | None, window: int | None
) -> list[Work]:
    return [
        attention(num_ranks, rank, comm_type, inner).work(length, segments_BW, window, CPU) for rank in range(num_ranks)
    ]


def segments_of(*rows: list[int]) -> Tensor:
    """Each row is the lengths of its segments, numbered from 0."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def comes_back() -> Tensor:
    segments_BW = segments_of([100, 50, 42, 64])
    segments_BW[segments_BW == 2] = 0
    return segments_BW


def positions_at(length: int, ring_size: int, place: int) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ring_ranges(length, ring_size, place)])


def seen_by(work: Work, block: Block) -> Tensor:
    """bool [S, K] of a block."""
    num_queries, num_keys = block.queries[1] - block.queries[0], block.keys[1] - block.keys[0]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if block.kind == "causal":
        assert num_queries == num_keys
        return seen.tril()
    return work.masks(block)[0, 0] if block.kind == "masked" else seen


DOCUMENTS = {
    "none": None,
    "one": segments_of([256]),
    "runs": segments_of([100, 120, 36], [7, 200, 49]),
    "short": segments_of([1, 2, 3, 250], [5] * 51 + [1]),
    "comes back": comes_back(),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("window", [None, 1, 30, 33, 34, 150, 256])
@pytest.mark.parametrize(("comm_type", "inner"), WAYS)
def test_every_visible_pair_is_computed_once(documents: str, window: int | None, comm_type: str, inner: int) -> None:
    length, segments_BW = 256, DOCUMENTS[documents]
    mask = Visibility(segments_BW).mask(length, length, window, CPU)
    expected = torch.ones(1, length, length, dtype=torch.bool).tril() if mask is None else mask[:, 0]
    rows = 1 if segments_BW is None else len(segments_BW)
    times = torch.zeros(rows, length, length, dtype=torch.int32)
    size = 4 // inner
    for rank, work in enumerate(works(4, comm_type, inner, length, segments_BW, window)):
        if rank % inner:
            continue  # inner ranks compute the same pairs of other heads
        place = rank // inner
        for step, blocks in enumerate(work.steps):
            queries = positions_at(length, size, place)
            keys = (
                torch.arange(length) if comm_type == "allgather" else positions_at(length, size, (place - step) % size)
            )
            for block in blocks:
                at = torch.meshgrid(queries[slice(*block.queries)], keys[slice(*block.keys)], indexing="ij")
                for row in range(rows) if block.row is None else [block.row]:
                    times[row].index_put_(at, seen_by(work, block).int(), accumulate=True)
    assert torch.equal(times, expected.expand(rows, -1, -1).int())


@pytest.mark.parametrize(("comm_type", "inner"), WAYS)
@pytest.mark.parametrize("num_ranks", [4, 8])
def test_ranks_work_alike(num_ranks: int, comm_type: str, inner: int) -> None:
    inner = num_ranks if comm_type == "a2a" else inner
    pairs = [
        sum(block.num_pairs for blocks in work.steps for block in blocks)
        for work in works(num_ranks, comm_type, inner, 1024, None, None)
    ]
    visible = 1024 * 1025 // 2 * inner // num_ranks
    assert max(pairs) <= 1.05 * min(pairs)
    assert max(pairs) == pytest.approx(visible, rel=0.01), "nothing hidden is computed"


def test_a_ring_takes_few_blocks() -> None:
    for work in works(8, "p2p", 1, 1024, None, None):
        assert [len(blocks) for blocks in work.steps[1:]] == [1] * 7, "what lies side by side is one block"
        assert sorted(block.kind for block in work.steps[0]) == ["causal", "causal", "full"]


def test_a_window_costs_what_it_shows() -> None:
    (work,) = works(1, "a2a", 1, 8192, None, 256)
    pairs = sum(block.num_pairs for blocks in work.steps for block in blocks)
    assert pairs <= 2 * 8192 * 256
    assert max(block.queries[1] - block.queries[0] for block in work.steps[0]) <= 1024


def test_documents_cost_what_they_show() -> None:
    lengths = [1000, 3000, 96]
    (work,) = works(1, "a2a", 1, 4096, segments_of(lengths), None)
    assert sum(block.num_pairs for block in work.steps[0]) == sum(n * (n + 1) // 2 for n in lengths)
    (work,) = works(1, "a2a", 1, 4096, segments_of([8] * 512), None)
    assert sum(block.num_pairs for block in work.steps[0]) <= 4096 * 1024, "short ones: squares on the diagonal alone"


def test_what_is_known_of_a_batch_is_worked_out_once() -> None:
    ours = attention(2, 0, "p2p", 1)
    first, second = segments_of([100, 156]), segments_of([156, 100])
    work = ours.work(256, first, None, CPU)
    assert ours.work(256, first, None, CPU) is work
    assert ours.work(256, first, 20, CPU) is not work
    assert ours.work(256, second, None, CPU).steps != work.steps
    assert ours.work(128, None, None, CPU).steps != ours.work(256, None, None, CPU).steps

"""Which positions of a sequence a context-parallel rank holds, and whether heads and length allow it.

Pure arithmetic. The order of positions that each way of sharing a sequence wants is defined here alone:

- `p2p` and `allgather`, zigzag: of 2 x CP equal chunks, rank r holds r and 2 x CP - 1 - r. A query sees
  what comes before it, so the pairs of an early and a late chunk are all worth the same work.
- `a2a`: rank r holds the r-th of CP equal parts. Each rank computes some heads over the whole
  sequence, so that the work is even whatever the order.
- `a2a+p2p`: rank = inner + INNER * outer. Outer place p has the two zigzag chunks of a ring of CP / INNER
  places; its inner ranks, neighbours by number, each hold an equal part of these two, one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tessel.config.layout import Layout
from tessel.config.layout_rules import any_of, near
from tessel.errors import UsageError

# Positions from the first up to, and not with, the second.
Range = tuple[int, int]

DEFAULT_COMM_TYPE = "p2p"


def inner_degree(comm_type: str, cp_size: int, asked: int | None, num_kv_heads: int, tp: int) -> int:
    """Ranks of one all-to-all between heads and sequence; 1 where there is none.

    With `a2a+p2p` it is `asked` (--ulysses-degree-in-cp), or the largest divisor of `cp_size` that deals out
    the key/value heads of a tensor-parallel rank without copies.
    """
    if comm_type == "a2a":
        return cp_size
    if comm_type != "a2a+p2p":
        return 1
    if asked is not None:
        return asked
    local_kv_heads = max(num_kv_heads // tp, 1)
    return max(n for n in _divisors(cp_size) if local_kv_heads % n == 0)


def ring_ranges(seq_length: int, ring_size: int, place: int) -> list[Range]:
    """The zigzag chunks of a place in a ring, in order; everything in a ring of one.

    `seq_length` must be a multiple of 2 x `ring_size`.
    """
    if ring_size == 1:
        return [(0, seq_length)]
    chunk, rest = divmod(seq_length, 2 * ring_size)
    if rest:
        raise ValueError(f"a sequence of {seq_length} does not make 2 x {ring_size} equal chunks")
    return [(number * chunk, (number + 1) * chunk) for number in (place, 2 * ring_size - 1 - place)]


def position_ranges(seq_length: int, cp_size: int, comm_type: str, inner: int = 1) -> list[list[Range]]:
    """The positions of each context-parallel rank, as ranges in the order in which it holds them.

    `inner` is `inner_degree`, which matters for `a2a+p2p` alone. All ranks hold as many.
    """
    if seq_length % cp_size:
        raise ValueError(f"a sequence of {seq_length} does not make {cp_size} equal parts")
    if comm_type == "a2a":
        inner = cp_size
    elif comm_type != "a2a+p2p":
        inner = 1
    part = seq_length // cp_size
    ranks = []
    for rank in range(cp_size):
        outer_place, inner_place = divmod(rank, inner)
        chunks = ring_ranges(seq_length, cp_size // inner, outer_place)
        ranks.append(list(_cut(chunks, inner_place * part, (inner_place + 1) * part)))
    return ranks


def check_context(layout: Layout, num_heads: int, num_kv_heads: int, tp: int, seq_length: int) -> None:
    """Whether a model's heads and a sequence can be shared as asked.

    Raises:
        UsageError: they cannot; names the degrees or lengths that would do.
    """
    cp = layout.context_parallel_size
    if cp == 1:
        return
    comm_type = layout.cp_comm_type or DEFAULT_COMM_TYPE
    if seq_length % (2 * cp):
        raise UsageError(
            f"A sequence of {seq_length} tokens is not a multiple of 2 x --context-parallel-size {cp} = {2 * cp}: "
            f"{near(seq_length, 2 * cp)} would be."
        )
    inner = inner_degree(comm_type, cp, layout.ulysses_degree_in_cp, num_kv_heads, tp)
    local_heads = max(num_heads // tp, 1)
    if local_heads % inner == 0:
        return
    fits = [n for n in _divisors(cp if comm_type == "a2a+p2p" else local_heads) if local_heads % n == 0]
    flag = "--ulysses-degree-in-cp" if comm_type == "a2a+p2p" else "--context-parallel-size"
    raise UsageError(
        f"--cp-comm-type {comm_type} deals the {local_heads} attention heads of a process out to {inner}, which does "
        f"not divide them: use {flag} {any_of(fits)}, or --cp-comm-type p2p."
    )


def _cut(ranges: Iterable[Range], first: int, last: int) -> Iterable[Range]:
    """What stands at `first` up to `last` of the ranges one after another."""
    at = 0
    for start, stop in ranges:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            yield start + low, start + high
        at += stop - start


def _divisors(number: int) -> Sequence[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

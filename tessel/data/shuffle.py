"""numpy's RandomState.shuffle of long arrays, bit for bit, in about half the time.

numpy swaps one pair after the other, and waits for memory at each. Here a block of random numbers
is drawn at once, the few swaps of the block that meet in one place are followed one by one, and all
others are one gather and one scatter.
"""

from __future__ import annotations

import math

import numpy as np

# Shorter arrays stay in the processor's caches, where numpy is about as fast.
_BULK_FROM = 1 << 22
# The most that numpy draws from 32 random bits.
_BULK_UP_TO = 1 << 32
# Swaps of a block that are expected to meet in one place.
_MEETINGS = 16
_MAX_BLOCK = 1 << 16  # their numbers fit u16
_NUM_SLOTS = 1 << 19


def shuffle(values: np.ndarray, rng: np.random.RandomState, *, bulk_from: int = _BULK_FROM) -> None:
    """Shuffle a one-dimensional array in place as `rng.shuffle` does, and leave `rng` as that would.

    Fisher-Yates from the end: for i = n - 1 .. 1, values i and j change places, where j is the next 32 bits
    of `rng`, masked to the length of i, that are at most i. `bulk_from`: below so many, numpy goes on.
    """
    top = len(values) - 1
    if bulk_from <= top < _BULK_UP_TO:
        slots = np.zeros(_NUM_SLOTS, np.uint16)
        while top >= bulk_from:
            partners = _draw(top, rng)
            _swap(values, top, partners, slots)
            top -= len(partners)
    rng.shuffle(values[: top + 1])


def _draw(top: int, rng: np.random.RandomState) -> np.ndarray:
    """i64[b]: the partners of i = top, top - 1, ...; as many as a block of random numbers gives."""
    mask = (1 << top.bit_length()) - 1
    # A smaller i may need a smaller mask, so the block ends before.
    num_drawn = min(math.isqrt(2 * _MEETINGS * top), top - (mask >> 1), _MAX_BLOCK)
    drawn = rng.randint(0, 1 << 32, size=num_drawn, dtype=np.uint32)
    drawn &= np.uint32(mask)
    # By numbers and not by a mask of bools: those are copied with a branch for each.
    drawn = drawn.take(np.flatnonzero(drawn <= top)).astype(np.int64)
    # So far, each was held against `top`; i has gone down by one with each that was taken before.
    refused: list[int] = []
    for at in np.flatnonzero(drawn > np.arange(top, top - len(drawn), -1)).tolist():
        if int(drawn[at]) > top - (at - len(refused)):
            refused.append(at)
    return np.delete(drawn, refused) if refused else drawn


def _swap(values: np.ndarray, top: int, partners: np.ndarray, slots: np.ndarray) -> None:
    """Swap `values[top - k]` and `values[partners[k]]` for k = 0, 1, ..., in this order."""
    num = len(partners)
    window = values[top - num + 1 : top + 1][::-1]
    leaving = window.copy()  # [k]: what stands at top - k when its turn comes
    coming = values.take(partners)  # [k]: what stands at partners[k] then
    last_swap_at: dict[int, int] = {}
    for k in _meeting(partners, top - num, slots):
        partner = int(partners[k])
        if partner > top - num:
            coming[k] = leaving[top - partner]
            leaving[top - partner] = leaving[k]
        else:
            before = last_swap_at.get(partner)
            if before is not None:
                coming[k] = leaving[before]
            last_swap_at[partner] = k
    values[partners] = leaving  # of a place that is named twice, the last swap's value stays
    window[:] = coming


def _meeting(partners: np.ndarray, below: int, slots: np.ndarray) -> list[int]:
    """In order, the k whose partner lies above `below`, within the block's own places, or is another's, too.

    `slots` u16[_NUM_SLOTS] is room to work in: whoever shares a slot with a later one does not find itself there.
    """
    numbers = np.arange(len(partners), dtype=np.uint16)
    slot_of = partners & (len(slots) - 1)
    slots[slot_of] = numbers
    found = slots.take(slot_of)
    crowded = np.flatnonzero(found != numbers)
    holders = found[crowded]
    theirs = partners[crowded]
    same = theirs == partners[holders]
    ordered = np.sort(theirs)
    twice = np.union1d(theirs[same], ordered[1:][ordered[1:] == ordered[:-1]])
    within = np.flatnonzero(partners > below)
    return np.unique(np.concatenate((crowded[np.isin(theirs, twice)], holders[same], within))).tolist()

"""The orders of work in a pipeline, and which numbers of micro-batches they take: pure arithmetic.

P ranks, M micro-batches; F is a forward, B a backward, I and W its halves: the gradients of the inputs, then
those of the weights. Rank r of P, whose stage is r, or v stages with virtual pipelining:

    1f1b                      min(P - 1 - r, M) F to warm up, then F B in turn, then the B that are left. At most
                              min(P - r, M) micro-batches are between F and B (PipeDream-Flush, arXiv 2006.09503).
    interleaved               The same over v stages a rank, in rounds of P micro-batches: P of them through the
                              rank's first stage, then through its second, ... 2 (P - 1 - r) + (v - 1) P forwards
                              to warm up (arXiv 2104.04473; Megatron-LM's order).
    interleaved-zero-bubble   Backward in halves: P - 1 - r + (v - 1) P forwards to warm up, and W as late as fills
                              the bubble: r behind I on rank r (ZB-H1 of arXiv 2401.10241, interleaved).
    zbv                       Two stages a rank, down the ranks and up again (ZB-V of arXiv 2401.10241, section 6).
"""

from __future__ import annotations

from typing import Literal

Work = Literal["F", "B"]
INTERLEAVED = ("interleaved", "interleaved-zero-bubble")


def one_forward_one_backward(pp: int, pp_rank: int, num_micro_batches: int) -> list[tuple[Work, int]]:
    """What a rank does under 1f1b, in order: ("F" or "B", number of the micro-batch). Any number of these will do."""
    num_warm_up = min(pp - 1 - pp_rank, num_micro_batches)
    order: list[tuple[Work, int]] = [("F", number) for number in range(num_warm_up)]
    for number in range(num_micro_batches - num_warm_up):
        order += [("F", num_warm_up + number), ("B", number)]
    return [*order, *(("B", number) for number in range(num_micro_batches - num_warm_up, num_micro_batches))]


def takes(schedule: str, pp: int, num_micro_batches: int) -> bool:
    """Whether a schedule can run so many micro-batches.

    Interleaved ones go in rounds of equal size, P or somewhat more; fewer than P are one round.
    """
    num_rounds = max(1, num_micro_batches // pp)
    return num_micro_batches > 0 and (schedule not in INTERLEAVED or num_micro_batches % num_rounds == 0)


def taken_near(schedule: str, pp: int, num_micro_batches: int) -> list[int]:
    """The nearest numbers of micro-batches, below and above, that a schedule can run."""
    below = next((n for n in range(num_micro_batches, 0, -1) if takes(schedule, pp, n)), None)
    above = next(n for n in range(max(num_micro_batches, 1), num_micro_batches + pp + 1) if takes(schedule, pp, n))
    return sorted({n for n in (below, above) if n is not None})

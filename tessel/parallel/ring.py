"""Attention of a part of the queries to keys that other ranks hold: by a ring, or by gathering them.

Both keep the rank's own q, k, v, output and lse for backward, and let keys and values come a second time
there. KV below stands for the bytes of keys and values of the whole sequence in one layer, n for the
ranks. Gradients of keys and values travel in their dtype.

========== ============================= ========================================== ==================
function   a rank sends in forward       in backward                                holds of others
========== ============================= ========================================== ==================
ring       (n-1)/n KV                    (n-1)/n KV, and (n-1)/n KV of gradients    2/n KV
gathered   (n-1)/n KV (all-gather)       the same, and (n-1)/n KV (reduce-scatter)  KV
========== ============================= ========================================== ==================

The ring sends to the next rank what it computes with, so that the exchange is under way meanwhile.

Shape suffixes: B batch, H query heads, G key/value heads, S queries of this rank, K keys of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

from tessel.layout.context import Range
from tessel.parallel.blocks import Backward, Block, Masks, Total
from tessel.parallel.collectives import gather_from, scatter_to


@dataclass(frozen=True)
class Ring:
    """Who comes after whom, as numbers within `group`: a rank sends to `destinations[rank]`."""

    group: ProcessGroup | None
    size: int
    place: int
    destinations: tuple[int, ...]

    @classmethod
    def of(cls, group: ProcessGroup, inner: int) -> Ring:
        """Ranks `inner` apart form a ring: all of them with 1, each alone where `inner` is the group's size."""
        num_ranks = group.size()
        return cls(
            group=group,
            size=num_ranks // inner,
            place=group.rank() // inner,
            destinations=tuple((rank + inner) % num_ranks for rank in range(num_ranks)),
        )

    def send(self, x: Tensor) -> _UnderWay:
        """Begin to send `x` to the next rank, and to receive what the one before sends."""
        assert self.group is not None
        return _UnderWay(x, self.group, self.destinations)


class _UnderWay:
    """What arrives is what the rank before has sent; the shape is the same."""

    def __init__(self, x: Tensor, group: ProcessGroup, destinations: Sequence[int]) -> None:
        self._sent = x  # until it has left
        self._coming = functional.permute_tensor(x.flatten(), list(destinations), group)

    def arrived(self) -> Tensor:
        return functional.wait_tensor(self._coming).view(self._sent.shape)


@dataclass(frozen=True)
class Work:
    """The blocks of each step, and their masks. Step t of a ring is about keys of the rank t places before."""

    steps: Sequence[Sequence[Block]]
    masks: Masks


class RingAttention(torch.autograd.Function):
    """`apply(q_BSHD, k_BKGD, v_BKGD, ring, work)` -> [B, S, H, D]."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, ring: Ring, work: Work) -> Tensor:
        total = Total(q_BSHD, work.masks)
        kv_2BKGD = torch.stack((k_BKGD, v_BKGD)) if ring.size > 1 else None
        keys, values = k_BKGD, v_BKGD
        for step, blocks in enumerate(work.steps):
            coming = ring.send(kv_2BKGD) if kv_2BKGD is not None and step + 1 < ring.size else None
            total.add(keys, values, blocks)
            if coming is not None:
                kv_2BKGD = coming.arrived()
                keys, values = kv_2BKGD.unbind()
        out_BSHD, lse_BHS = total.result()
        ctx.save_for_backward(q_BSHD, k_BKGD, v_BKGD, out_BSHD, lse_BHS)
        ctx.ring, ctx.work = ring, work
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BSHD, k_BKGD, v_BKGD, out_BSHD, lse_BHS = ctx.saved_tensors
        ring: Ring = ctx.ring
        work: Work = ctx.work
        backward = Backward.of(grads[0], q_BSHD, out_BSHD, lse_BHS, work.masks)
        coming = ring.send(torch.stack((k_BKGD, v_BKGD))) if ring.size > 1 else None
        own_grads = backward.through(k_BKGD, v_BKGD, work.steps[0])
        grads_coming: _UnderWay | None = None
        # A rank adds to the gradients that come with others' keys; after the last step they go home.
        for step in range(1, ring.size):
            assert coming is not None
            kv_2BKGD = coming.arrived()
            coming = ring.send(kv_2BKGD) if step + 1 < ring.size else None
            grads_2BKGD = torch.stack(backward.through(kv_2BKGD[0], kv_2BKGD[1], work.steps[step]))
            if grads_coming is not None:
                grads_2BKGD += grads_coming.arrived()
            grads_coming = ring.send(grads_2BKGD.to(k_BKGD.dtype))
        grad_k_BKGD, grad_v_BKGD = own_grads
        if grads_coming is not None:
            from_others = grads_coming.arrived()
            grad_k_BKGD, grad_v_BKGD = grad_k_BKGD + from_others[0], grad_v_BKGD + from_others[1]
        return (
            backward.grad_q_BSHD.to(q_BSHD.dtype),
            grad_k_BKGD.to(k_BKGD.dtype),
            grad_v_BKGD.to(v_BKGD.dtype),
            None,
            None,
        )


class GatheredAttention(torch.autograd.Function):
    """`apply(q_BSHD, k_BKGD, v_BKGD, group, ranges, work)` -> [B, S, H, D].

    `ranges` are the positions of every rank. The one step of `work` is about all keys, in their natural order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHD: Tensor,
        k_BKGD: Tensor,
        v_BKGD: Tensor,
        group: ProcessGroup,
        ranges: Sequence[Sequence[Range]],
        work: Work,
    ) -> Tensor:
        total = Total(q_BSHD, work.masks)
        total.add(*_gathered(k_BKGD, v_BKGD, group, ranges), work.steps[0])
        out_BSHD, lse_BHS = total.result()
        ctx.save_for_backward(q_BSHD, k_BKGD, v_BKGD, out_BSHD, lse_BHS)
        ctx.group, ctx.ranges, ctx.work = group, ranges, work
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_BSHD, k_BKGD, v_BKGD, out_BSHD, lse_BHS = ctx.saved_tensors
        work: Work = ctx.work
        backward = Backward.of(grads[0], q_BSHD, out_BSHD, lse_BHS, work.masks)
        all_grads = backward.through(*_gathered(k_BKGD, v_BKGD, ctx.group, ctx.ranges), work.steps[0])
        grads_2BWGD = torch.stack(all_grads).to(k_BKGD.dtype)
        by_rank = [torch.cat([grads_2BWGD[:, :, slice(*r)] for r in ranges], dim=2) for ranges in ctx.ranges]
        grad_k_BKGD, grad_v_BKGD = scatter_to(torch.cat(by_rank), ctx.group, 0).unbind()
        return backward.grad_q_BSHD.to(q_BSHD.dtype), grad_k_BKGD, grad_v_BKGD, None, None, None


def _gathered(
    k_BKGD: Tensor, v_BKGD: Tensor, group: ProcessGroup, ranges: Sequence[Sequence[Range]]
) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence, by position, from what each rank holds of it."""
    kv_N2BKGD = gather_from(torch.stack((k_BKGD, v_BKGD)), group, 0).unflatten(0, (group.size(), 2))
    pieces = []
    for rank, own in enumerate(ranges):
        at = 0
        for start, stop in own:
            pieces.append((start, kv_N2BKGD[rank, :, :, at : at + stop - start]))
            at += stop - start
    pieces.sort(key=lambda piece: piece[0])
    keys, values = torch.cat([piece for _, piece in pieces], dim=2).unbind()
    return keys, values

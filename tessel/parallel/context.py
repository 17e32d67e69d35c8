"""Context parallelism: ranks share each sequence, and attention brings its parts together.

Everything but attention works on one token at a time, so a rank computes it for its own positions.
Attention is replaced by one of four ways (--cp-comm-type); which positions a rank has with each is said by
`layout/context.py`. All are built on `blocks.py`: causality, documents and windows are exact, and no mask or
score larger than one block is held.

- `p2p`: keys and values go round a ring (`ring.py`).
- `allgather`: keys and values are gathered (`ring.py`).
- `a2a`, Ulysses (arXiv 2309.14509): an all-to-all turns all heads of a part of the sequence into some heads of
  the whole. With n ranks, of which each holds Q, K, V and O bytes of its own, a rank sends (n-1)/n (Q + K + V + O)
  in forward and again in backward. With fewer KV heads than ranks these are repeated just so often that
  each rank gets some: c copies send c K and c V instead.
- `a2a+p2p`: an all-to-all over the inner ranks, then a ring over the outer ones, in which a rank has 1/inner of
  the KV heads (or copies): (n-1)/n (Q + K + V + O) of the inner n, and the ring's volume of what remains.

Shape suffixes: B batch, S positions of this rank, K the same of keys, W those after an all-to-all, H query
heads, G key/value heads, D head_dim; N ranks of an all-to-all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tessel.data.loader import MicroBatch
from tessel.layout.context import DEFAULT_COMM_TYPE, Range, inner_degree, position_ranges, ring_ranges
from tessel.model.attention import Visibility
from tessel.model.config import ModelConfig
from tessel.model.transformer import Layer, Transformer
from tessel.parallel.blocks import Documents, blocks_of, masks_of
from tessel.parallel.collectives import all_to_all
from tessel.parallel.groups import Groups
from tessel.parallel.ring import GatheredAttention, Ring, RingAttention, Work
from tessel.parallel.runner import Localize


def apply_context_parallel(
    model: Transformer, groups: Groups, comm_type: str | None, ulysses_degree: int | None
) -> None:
    """Let the attention of every layer see the whole sequence, of which `model` gets this rank's part.

    `comm_type` and `ulysses_degree` are --cp-comm-type and --ulysses-degree-in-cp; None for their defaults. Nothing
    changes where the degree is 1. Batches are cut by `local_part`, segments stay those of the whole row.
    """
    if groups.cp is None:
        return
    comm_type = comm_type or DEFAULT_COMM_TYPE
    attention = ContextAttention(groups.cp, comm_type, resolved_degree(model.config, groups, comm_type, ulysses_degree))
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        layer.self_attn.kernel = attention
    model.model.builds_masks = False


def resolved_degree(config: ModelConfig, groups: Groups, comm_type: str, asked: int | None) -> int:
    """`inner_degree` of a model on these groups."""
    topology = groups.topology
    return inner_degree(comm_type, topology.cp, asked, config.num_key_value_heads, topology.tp)


class ContextAttention:
    """An attention kernel whose q, k and v are this rank's part of the sequence; its segments are whole rows.

    One serves all layers: which blocks there are is worked out once for a batch. `inner` as from `inner_degree`.
    """

    def __init__(self, group: ProcessGroup, comm_type: str, inner: int) -> None:
        self._group, self._comm_type, self._inner = group, comm_type, inner
        self._ring = Ring.of(group, inner)
        self._documents = Documents(None)
        self._works: dict[tuple[int, int | None], Work] = {}

    # Which blocks there are depends on the data, and exchanges under way are no part of a compiled graph.
    @torch.compiler.disable
    def __call__(
        self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, visibility: Visibility, window: int | None, dropout: float
    ) -> Tensor:
        """[B, S, H, D] -> [B, S, H, D]; see `model.attention.AttentionFn`."""
        if dropout > 0:
            raise ValueError("attention that is shared out has no dropout of its probabilities")
        seq_length = q_BSHD.shape[1] * self._group.size()
        work = self.work(seq_length, visibility.segments_BK, window, q_BSHD.device)
        if self._inner > 1:
            q_BSHD, k_BKGD, v_BKGD = self._to_heads(q_BSHD, k_BKGD, v_BKGD)
        out: Tensor
        if self._comm_type == "allgather":
            ranges = position_ranges(seq_length, self._group.size(), self._comm_type)
            out = GatheredAttention.apply(q_BSHD, k_BKGD, v_BKGD, self._group, ranges, work)
        else:
            out = RingAttention.apply(q_BSHD, k_BKGD, v_BKGD, self._ring, work)
        return self._to_sequence(out) if self._inner > 1 else out

    def work(self, seq_length: int, segments_BW: Tensor | None, window: int | None, device: torch.device) -> Work:
        """What this rank computes of a sequence with these segments, step by step."""
        if window is not None and window >= seq_length:
            window = None
        if segments_BW is not self._documents.segments_BW:
            self._documents, self._works = Documents(segments_BW), {}
        key = (seq_length, window)
        if key not in self._works:
            steps = [
                blocks_of(self._queries(seq_length), keys, self._documents, window) for keys in self._keys(seq_length)
            ]
            self._works[key] = Work(steps, masks_of(self._documents, window, device))
        return self._works[key]

    def _queries(self, seq_length: int) -> Sequence[Range]:
        return ring_ranges(seq_length, self._ring.size, self._ring.place)

    def _keys(self, seq_length: int) -> list[list[Range]]:
        """The keys' positions at each step."""
        size, place = self._ring.size, self._ring.place
        by_place = [ring_ranges(seq_length, size, (place - step) % size) for step in range(size)]
        return [sorted(sum(by_place, []))] if self._comm_type == "allgather" else by_place

    def _to_heads(self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From all heads of this rank's positions to some heads of the inner ranks' positions."""
        copies = math.lcm(k_BKGD.shape[2], self._inner) // k_BKGD.shape[2]
        if copies > 1:
            k_BKGD, v_BKGD = (x.repeat_interleave(copies, dim=2) for x in (k_BKGD, v_BKGD))
        by_rank = [x.unflatten(2, (self._inner, -1)) for x in (q_BSHD, k_BKGD, v_BKGD)]
        sizes = [x.shape[3] for x in by_rank]
        mixed_NBSHD = all_to_all(torch.cat(by_rank, dim=3).movedim(2, 0), self._group, *self._splits())
        q_BWHD, k_BWGD, v_BWGD = mixed_NBSHD.transpose(0, 1).flatten(1, 2).split(sizes, dim=2)
        return q_BWHD, k_BWGD, v_BWGD

    def _to_sequence(self, out_BWHD: Tensor) -> Tensor:
        """The way back."""
        out_NBSHD = out_BWHD.unflatten(1, (self._inner, -1)).transpose(0, 1)
        return all_to_all(out_NBSHD, self._group, *self._splits()).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _splits(self) -> tuple[list[int], list[int]]:
        """Rows of dim 0 to and from each rank: one for each inner neighbour."""
        first = self._group.rank() // self._inner * self._inner
        splits = [int(first <= rank < first + self._inner) for rank in range(self._group.size())]
        return splits, splits


def local_part(
    batch: MicroBatch, weights_BS: Tensor, cp_size: int, cp_rank: int, comm_type: str | None, inner: int = 1
) -> tuple[MicroBatch, Tensor]:
    """This rank's positions of a batch and of its weights; `segments_BS` stays whole, [B, the whole sequence].

    The result says where its tokens stand: its positions are those of RoPE. `inner` as from `inner_degree`.
    """
    if cp_size == 1:
        return batch, weights_BS
    seq_length = batch.tokens_BS.shape[1]
    ranges = position_ranges(seq_length, cp_size, comm_type or DEFAULT_COMM_TYPE, inner)[cp_rank]

    def cut(x: Tensor) -> Tensor:
        return torch.cat([x[:, start:stop] for start, stop in ranges], dim=1)

    positions_BS = batch.rope_positions_BS
    if positions_BS is None:
        positions_BS = torch.arange(seq_length, device=batch.tokens_BS.device).expand(batch.tokens_BS.shape)
    own_part = replace(
        batch,
        tokens_BS=cut(batch.tokens_BS),
        labels_BS=cut(batch.labels_BS),
        loss_mask_BS=cut(batch.loss_mask_BS),
        positions_BS=cut(positions_BS),
        is_part=True,
    )
    return own_part, cut(weights_BS)


def localizer(config: ModelConfig, groups: Groups, comm_type: str | None, ulysses_degree: int | None) -> Localize:
    """`local_part` for this process, as a runner takes it. The flags as in `apply_context_parallel`."""
    comm_type = comm_type or DEFAULT_COMM_TYPE
    inner = resolved_degree(config, groups, comm_type, ulysses_degree)
    size, rank = groups.topology.cp, groups.place.cp
    return partial(local_part, cp_size=size, cp_rank=rank, comm_type=comm_type, inner=inner)

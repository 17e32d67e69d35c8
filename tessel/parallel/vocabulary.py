"""A vocabulary dealt out to tensor-parallel ranks: the embedding, and what the head's loss has to ask the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tessel.errors import UsageError
from tessel.layout.tiles import Tile
from tessel.model.layers import Embedding
from tessel.parallel.collectives import join_from


@dataclass(frozen=True)
class RankVocabulary:
    """`tessel.model.loss.VocabularyPart` of a tensor-parallel rank: rows `first` to `first + num_rows` of `size`."""

    first: int
    num_rows: int
    size: int
    group: ProcessGroup

    @classmethod
    def of(cls, tile: Tile, group: ProcessGroup) -> RankVocabulary:
        """The part that a rank's tile of the embedding or of the head says.

        Raises:
            UsageError: so few rows that the last rank would have none; raised on every rank.
        """
        size, local_rows = tile.shape[0], tile.local_shape[0]
        if size <= (group.size() - 1) * local_rows:
            raise UsageError(
                f"A vocabulary of {size} rows leaves the last of {group.size()} tensor-parallel processes without any: "
                "lower --tensor-model-parallel-size."
            )
        return cls(tile.start[0], tile.size[0], size, group)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor of this shape, [ranks, ...]; sends (n-1) times its bytes."""
        return join_from(x[None], self.group, 0)

    def join(self, logits_BSV: Tensor) -> Tensor:
        """The logits of the whole vocabulary, alike on every rank, without those of padding rows."""
        return join_from(logits_BSV, self.group, -1)[..., : self.size]


class VocabularyEmbedding(nn.Module):
    """The embedding where a rank has some rows: zeros for the tokens of others, then `leave` sums over ranks."""

    def __init__(self, embedding: Embedding, part: RankVocabulary, leave: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.part, self.leave = part, leave

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """tokens [B, S], integers -> [B, S, hidden_size], or this rank's part of S."""
        rows_BS = tokens_BS - self.part.first
        is_here_BS = (rows_BS >= 0) & (rows_BS < self.part.num_rows)
        x_BSE = F.embedding(torch.where(is_here_BS, rows_BS, 0), self.weight)
        return self.leave(x_BSE.masked_fill(~is_here_BS[..., None], 0))

"""A layout together with a batch: what memory and time are predicted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from tessel.layout.sharding import DecoderShape
from tessel.layout.topology import Topology

RecomputeChoice = Literal["none", "selective", "mlp", "full"]


class RoutedShape(DecoderShape, Protocol):
    """What prediction needs to know of a model beyond the table."""

    @property
    def num_experts_per_tok(self) -> int: ...


@dataclass(frozen=True)
class Choice:
    """One way of training a model.

    `layers` are those of each pipeline rank, in virtual stages of `num_chunks` a rank. Of `recompute`, selective
    means attention, mlp what its name says, and full whole layers, each by itself. `compute_bytes` are those of an
    element in forward and backward; weights, gradients and moments are fp32. `copies`: how often a sharded state is
    held (--num-distributed-optimizer-instances).
    """

    topology: Topology
    layers: tuple[int, ...]
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    sequence_parallel: bool = False
    num_chunks: int = 1
    sharding_strategy: str = "no_shard"
    copies: int = 1
    recompute: RecomputeChoice = "none"
    compute_bytes: int = 2

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.seq_length // self.topology.cp

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a replica in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.topology.dp)

    @property
    def num_shards(self) -> tuple[int, int]:
        """Ranks that share a dense parameter, and those that share an expert's."""
        if self.sharding_strategy == "no_shard":
            return 1, 1
        topology = self.topology
        return topology.dp * topology.cp // self.copies, topology.edp // self.copies

    @property
    def is_wrapped(self) -> bool:
        """Whether FSDP2 holds the parameters: in low precision, or where replicas share or sum something."""
        return self.compute_bytes < 4 or self.topology.dp * self.topology.cp > 1 or self.topology.edp > 1

    @property
    def reduces_each(self) -> bool:
        """Whether gradients are summed over replicas after each micro-batch, not once after the last."""
        return self.topology.pp == 1 and (
            self.topology.world_size == 1 or self.sharding_strategy in ("optim_grads", "optim_grads_params")
        )

    @property
    def reshards(self) -> bool:
        """Whether gathered weights are dropped between forward and backward."""
        return self.sharding_strategy == "optim_grads_params"


def chunks_in_flight(choice: Choice, pp_rank: int) -> int:
    """Most forward passes of virtual stages whose backward is still to come, of a pipeline rank.

    1F1B: PP - rank micro-batches (arXiv 2104.04473, 2.2.1); interleaved: the warm-up of 2 (PP - 1 - rank) and
    (chunks - 1) rounds of PP, and the one that computes.
    """
    pp, chunks = choice.topology.pp, choice.num_chunks
    total = choice.num_micro_batches * chunks
    if chunks == 1:
        return min(pp - pp_rank, total)
    rounds = max(choice.num_micro_batches // pp, 1)
    warm_up = (chunks - 1) * (choice.num_micro_batches // rounds) + 2 * (pp - 1 - pp_rank)
    return min(warm_up + 1, total)

"""Expert parallelism: each rank holds some of the experts, or parts of them, and tokens travel to theirs and back.

Every rank of a pipeline stage holds tokens of its own. The rows that a rank has for the experts go to the ranks
that hold these (ep), are joined there with those of the ranks that hold other parts of the same experts
(etp), computed, summed over the parts, and sent back. How many rows go where is exchanged first.

For each micro-batch and layer, with R = tokens of a rank x experts of a token rows of b bytes, a rank sends

    ep   (ep-1)/ep R b to the experts and as much back, when the load is even; the same again in backward
    etp  (etp-1) R b to the other parts, and as much in their sums; the same again in backward

and 8 bytes for each expert and peer. Experts' gradients are then partial over the replicas of an expert alone.
A limited capacity holds for the tokens of one rank, so that what is dropped depends on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from tessel.layout.sharding import rule_of
from tessel.layout.tiles import tile_of
from tessel.model.config import ModelConfig
from tessel.model.moe import Compute, MixtureOfExperts, opposite, permute
from tessel.model.transformer import Transformer
from tessel.parallel.collectives import all_to_all, join_from
from tessel.parallel.groups import Groups
from tessel.parallel.overlap import FusedProducts
from tessel.parallel.tensor import Boundary, cut_parameters, parallelize_mlp


def apply_expert_parallel(
    model: Transformer, config: ModelConfig, groups: Groups, products: FusedProducts | None = None
) -> None:
    """Give `model`, or a pipeline stage of it, this rank's experts and what takes tokens to them, in place.

    `products`: as of `apply_tensor_parallel`, for the expert that sees every token.
    After `apply_tensor_parallel`, which cuts all else, and with sequence parallelism where there is
    tensor parallelism. Weights may be on the meta device or real. Routers learn who shares their tokens.

    Raises:
        UsageError: a degree does not divide what it cuts.
    """
    rules = {name: rule_of(name, config) for name, _ in model.named_parameters()}
    tiles = {name: tile_of(rule, groups.topology, groups.place) for name, rule in rules.items() if rule.is_expert}
    cut_parameters(model, tiles)
    model.balance.peers = StagePeers(groups)
    for module in model.modules():
        if not isinstance(module, MixtureOfExperts):
            continue
        if groups.ep is not None or groups.etp is not None:
            module.experts.exchange = ExpertExchange(groups.ep, groups.etp)
        if module.shared_expert is not None and groups.tp is not None:
            parallelize_mlp(module.shared_expert, Boundary(groups.tp, sequence_parallel=True, products=products))


@dataclass(frozen=True)
class StagePeers:
    """The ranks of a pipeline stage that hold other tokens; see `tessel.model.balance.TokenPeers`."""

    groups: Groups

    @property
    def num_parts(self) -> int:
        """Ranks that share the tokens of a micro-batch."""
        return self.groups.topology.tp * self.groups.topology.cp

    @property
    def num_replicas(self) -> int:
        """Replicas that compute other micro-batches."""
        return self.groups.topology.dp

    def sum_over_parts(self, counts: Tensor) -> Tensor:
        """Added up over the ranks that share the micro-batch."""
        return _summed(counts, self.groups.tp, self.groups.cp)

    def sum_over_all(self, counts: Tensor) -> Tensor:
        """Added up over all ranks of the stage."""
        return _summed(counts, self.groups.tp, self.groups.cp, self.groups.dp)


def _summed(counts: Tensor, *groups: ProcessGroup | None) -> Tensor:
    counts = counts.detach().clone()
    for group in groups:
        if group is not None:
            distributed.all_reduce(counts, group=group)
    return counts


class ExpertExchange:
    """Takes rows to the ranks that hold their experts, has them computed there, and brings the results back."""

    def __init__(self, ep: ProcessGroup | None, etp: ProcessGroup | None) -> None:
        self.ep, self.etp = ep, etp
        self.num_ranks = 1 if ep is None else ep.size()
        self.num_parts = 1 if etp is None else etp.size()

    def __call__(self, rows_NE: Tensor, counts_X: Tensor, compute: Compute) -> Tensor:
        """Rows sorted by expert, as many of each as `counts_X` says -> the experts' outputs in the same order."""
        counts_PRX = self._counts(counts_X)
        own = self.etp.rank() if self.etp is not None else 0
        rows = (counts_X.view(self.num_ranks, -1).sum(1), counts_PRX[own].sum(1), counts_PRX.sum((1, 2)))
        # Lengths are the host's to know: it waits for the device here, once.
        numbers = torch.cat(rows).tolist()
        sent, received = numbers[: self.num_ranks], numbers[self.num_ranks : 2 * self.num_ranks]
        of_parts = numbers[2 * self.num_ranks :]

        rows_NE = all_to_all(rows_NE, self.ep, received, sent)
        rows_NE = self._to_parts(rows_NE, of_parts)
        order_N = _by_expert(counts_PRX)
        inverse_N = opposite(order_N)
        out_NE = compute(permute(rows_NE, order_N, inverse_N), counts_PRX.sum(dim=(0, 1)))
        out_NE = self._from_parts(permute(out_NE, inverse_N, order_N), of_parts, own)
        return all_to_all(out_NE, self.ep, sent, received)

    @torch.no_grad()
    def _counts(self, counts_X: Tensor) -> Tensor:
        """Rows that arrive for each local expert, by part and rank that they come from: [parts, ranks, experts]."""
        counts_RX = all_to_all(counts_X, self.ep).view(self.num_ranks, -1)
        return join_from(counts_RX[None], self.etp, dim=0)

    def _to_parts(self, rows_NE: Tensor, of_parts: list[int]) -> Tensor:
        """The rows of all parts on each: an all-gather of unequal lengths, whose backward sums."""
        if self.etp is None:
            return rows_NE
        return all_to_all(rows_NE.repeat(self.num_parts, 1), self.etp, of_parts, [len(rows_NE)] * self.num_parts)

    def _from_parts(self, out_NE: Tensor, of_parts: list[int], own: int) -> Tensor:
        """The sum over parts, to each its own rows: a reduce-scatter of unequal lengths."""
        if self.etp is None:
            return out_NE
        out_NE = all_to_all(out_NE, self.etp, [of_parts[own]] * self.num_parts, of_parts)
        return out_NE.view(self.num_parts, of_parts[own], out_NE.shape[-1]).sum(dim=0)


def _by_expert(counts_PRX: Tensor) -> Tensor:
    """The order that sorts rows, which arrive by part and rank, by expert."""
    numbers_X = torch.arange(counts_PRX.shape[-1], device=counts_PRX.device)
    experts_N = numbers_X.expand_as(counts_PRX).reshape(-1).repeat_interleave(counts_PRX.reshape(-1))
    return experts_N.argsort(stable=True)

"""A mixture of experts in place of a layer's MLP: router, stacked experts, shared expert.

Switch Transformer (arXiv 2101.03961), Mixtral (arXiv 2401.04088), a shared expert as in Qwen1.5-MoE.
Shape suffixes: B batch, S sequence, T = B x S tokens, E hidden size, X experts, K experts of a token, N = T x K rows,
F inner width of an expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.model.balance import Balance
from tessel.model.config import ModelConfig
from tessel.model.layers import MLP, Linear, gated
from tessel.model.recompute import MOE, MOE_ACTIVATION, SHARED_EXPERTS, forgetting, recomputed

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# (rows sorted by expert [N, E], rows of each expert [X], what computes them so) -> the experts' outputs [N, E]
Compute = Callable[[Tensor, Tensor], Tensor]
Exchange = Callable[[Tensor, Tensor, Compute], Tensor]


class Router(nn.Module):
    """Chooses the experts of each token; `weight` [X, E].

    softmax: the K largest logits, with a softmax over these (`norm_topk_prob`) or over all of them. sigmoid: the
    K largest scores, each plus the expert's bias, divided by their sum without it. Times `routed_scaling_factor`.
    """

    def __init__(self, config: ModelConfig, layer: int, balance: Balance) -> None:
        super().__init__()
        self.layer, self.balance, self.topk = layer, balance, config.num_experts_per_tok
        self.is_sigmoid, self.normalised = config.scoring_func == "sigmoid", config.norm_topk_prob
        self.factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, E] -> weights [T, K] and experts [T, K] of each token.

        Where capacity is limited, a choice that was dropped has weight 0 and an expert's number of X.
        """
        options = self.balance.options
        dtype = options.dtype or x_BSE.dtype
        logits_BSX = F.linear(x_BSE.to(dtype), self.weight.to(dtype))
        logits_TX = logits_BSX.flatten(0, 1)
        weights_TK, experts_TK = self._choose(logits_TX)
        num_experts = logits_TX.shape[1]
        # The micro-batch's loss counts choices before any is dropped, the sequence's after, as in Megatron.
        chosen_TX = torch.zeros_like(logits_TX, dtype=torch.bool).scatter(1, experts_TK, True)
        counted_TX = chosen_TX
        if options.capacity_factor is not None:
            capacity = math.ceil(experts_TK.numel() / num_experts * options.capacity_factor)
            kept_TX = chosen_TX & self._kept(chosen_TX, weights_TK, experts_TK, capacity, x_BSE.shape[:2])
            kept_TK = kept_TX.gather(1, experts_TK)
            weights_TK, experts_TK = weights_TK * kept_TK, experts_TK.where(kept_TK, num_experts)
            if options.level == "seq_aux_loss":
                counted_TX = kept_TX
        if self.training and torch.is_grad_enabled():
            scores_BSX = self._shares(logits_BSX.float())
            counts_BX = counted_TX.view(logits_BSX.shape).sum(dim=1)
            log_z_T = logits_TX.float().logsumexp(dim=-1)
            weights_TK = self.balance.attach(self.layer, weights_TK, scores_BSX, log_z_T, counts_BX)
        return weights_TK.to(x_BSE.dtype), experts_TK

    def _choose(self, logits_TX: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_sigmoid:
            scores_TX = logits_TX.float().sigmoid().to(logits_TX.dtype)
            bias_LX = self.balance.bias_LX
            ranked_TX = scores_TX if bias_LX is None else scores_TX + bias_LX[self.layer].to(scores_TX.device)
            experts_TK = ranked_TX.detach().topk(self.topk, dim=-1).indices
            weights_TK = scores_TX.gather(1, experts_TK)
            if self.topk > 1:
                weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.normalised:
            best_TK, experts_TK = logits_TX.topk(self.topk, dim=-1)
            weights_TK = best_TK.float().softmax(dim=-1).to(logits_TX.dtype)
        else:
            weights_TK, experts_TK = logits_TX.float().softmax(dim=-1).topk(self.topk, dim=-1)
            weights_TK = weights_TK.to(logits_TX.dtype)
        return weights_TK * self.factor if self.factor != 1.0 else weights_TK, experts_TK

    def _shares(self, logits_BSX: Tensor) -> Tensor:
        """Each expert's share of a token's score, of which the auxiliary loss takes means."""
        if not self.is_sigmoid:
            return logits_BSX.softmax(dim=-1)
        scores_BSX = logits_BSX.sigmoid()
        return scores_BSX / (scores_BSX.sum(dim=-1, keepdim=True) + 1e-20) if self.topk > 1 else scores_BSX

    def _kept(
        self, chosen_TX: Tensor, weights_TK: Tensor, experts_TK: Tensor, capacity: int, shape: torch.Size
    ) -> Tensor:
        """Which choices fit an expert's capacity: those of most weight, or the first by position, then sequence."""
        if self.balance.options.drop_policy == "position":
            by_position = chosen_TX.view(*shape, -1).transpose(0, 1)
            places = by_position.flatten(0, 1).cumsum(dim=0).view(by_position.shape)
            return (places <= capacity).transpose(0, 1).reshape(chosen_TX.shape)
        weights_TX = torch.zeros_like(chosen_TX, dtype=weights_TK.dtype).scatter(1, experts_TK, weights_TK.detach())
        best = weights_TX.topk(min(capacity, len(weights_TX)), dim=0).indices
        return torch.zeros_like(chosen_TX).scatter(0, best, True)


class Experts(nn.Module):
    """Gated MLPs, all in three stacked parameters: gate_proj and up_proj [X, F, E], down_proj [X, E, F].

    `exchange`, where there is one, takes rows to the ranks that hold their experts, and back.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = num_experts
        self.gate_proj = nn.Parameter(torch.empty(num_experts, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        # Beside these, by their names; see `model/lora.py`.
        self.lora: nn.ModuleDict | None = None
        # How frozen matrices are held in four bits, by their names; the parameters are then rows of bytes.
        self.nf4: nn.ModuleDict | None = None
        self.exchange: Exchange | None = None
        self.gated, self.grouped, self.spread, self.combine = gated, grouped_linear, spread, combine
        self.recompute_activation = False

    def forward(self, x_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor, may_drop: bool = False) -> Tensor:
        """sum_k weights[t, k] * expert[experts[t, k]](x[t]), [T, E].

        Each token is copied to K rows, which are sorted by expert; a grouped product computes them.
        `may_drop`: experts_TK has X where a choice was dropped.
        """
        experts_N = experts_TK.flatten()
        counts_X = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=x_TE.device)
        counts_X = counts_X.scatter_add(0, experts_N, torch.ones_like(experts_N))[: self.num_experts]
        rows_NE, places_N = self.spread(x_TE, experts_TK)
        num_kept = int(counts_X.sum()) if may_drop else len(rows_NE)
        kept_NE = rows_NE[:num_kept]
        if self.exchange is None:
            out_NE = self.compute(kept_NE, counts_X)
        else:
            out_NE = self.exchange(kept_NE, counts_X, self.compute)
        if num_kept < len(rows_NE):
            out_NE = F.pad(out_NE, (0, 0, 0, len(rows_NE) - num_kept))
        return self.combine(out_NE, places_N, weights_TK)

    def compute(self, rows_NE: Tensor, counts_X: Tensor) -> Tensor:
        """Rows sorted by expert through their experts, those that this module holds."""
        gate_NF = self._product(rows_NE, "gate_proj", counts_X)
        up_NF = self._product(rows_NE, "up_proj", counts_X)

        def down(inner_NF: Tensor) -> Tensor:
            return self._product(inner_NF, "down_proj", counts_X)

        if self.recompute_activation:
            return forgetting(self.gated, (gate_NF, up_NF), down)
        return down(self.gated(gate_NF, up_NF))

    def _product(self, rows_NI: Tensor, name: str, counts_X: Tensor) -> Tensor:
        weight = self.get_parameter(name)
        if self.nf4 is None:
            y_NO = self.grouped(rows_NI, weight, counts_X)
        else:
            y_NO = self.nf4[name](rows_NI, weight, counts_X, self.grouped)
        if self.lora is None or name not in self.lora:
            return y_NO
        adapted_NO: Tensor = self.lora[name](rows_NI, y_NO, counts_X)
        return adapted_NO


class MixtureOfExperts(nn.Module):
    """Experts behind a router, and where the family has one, a gated expert that sees every token."""

    def __init__(self, config: ModelConfig, layer: int, balance: Balance) -> None:
        super().__init__()
        self.gate = Router(config, layer, balance)
        self.experts = Experts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config, shared) if shared else None
        self.shared_expert_gate = Linear(config.hidden_size, 1) if shared else None
        self.recompute_shared = False

    def save_memory(self, recomputes: frozenset[str]) -> None:
        """What of it is recomputed, where not all of it is anyway (see `Recompute.modules_of`)."""
        inside = MOE not in recomputes
        self.experts.recompute_activation = inside and MOE_ACTIVATION in recomputes
        self.recompute_shared = inside and SHARED_EXPERTS in recomputes

    def forward(self, x_BSE: Tensor) -> Tensor:
        """[B, S, E] -> the same."""
        weights_TK, experts_TK = self.gate(x_BSE)
        may_drop = self.gate.balance.options.capacity_factor is not None
        out_BSE: Tensor = self.experts(x_BSE.flatten(0, 1), weights_TK, experts_TK, may_drop).view(x_BSE.shape)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            shared: Callable[[Tensor], Tensor] = self.shared_expert
            shared_BSE = recomputed(shared, x_BSE) if self.recompute_shared else shared(x_BSE)
            out_BSE = out_BSE + self.shared_expert_gate(x_BSE).sigmoid() * shared_BSE
        return out_BSE


def spread(x_TE: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's K copies, sorted by expert, [N, E]; with the places of the copies in it, for `combine`."""
    order_N = experts_TK.flatten().argsort(stable=True)
    places_N = opposite(order_N)
    rows_NE: Tensor = _Spread.apply(x_TE, order_N, places_N, experts_TK.shape[1])
    return rows_NE, places_N


def combine(rows_NE: Tensor, places_N: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum of the K rows of each token, [T, E]; `places_N` as from `spread`."""
    in_order_NE = permute(rows_NE, places_N, opposite(places_N))
    return torch.einsum("tk,tke->te", weights_TK, in_order_NE.view(*weights_TK.shape, -1))


class _Spread(torch.autograd.Function):
    """Copies each row K times and permutes the copies; backward permutes back and sums, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, order_N: Tensor, inverse_N: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.copies = copies
        return x_TE[order_N // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        grad_TKE = grads[0][inverse_N].view(-1, ctx.copies, grads[0].shape[1])
        return grad_TKE.sum(dim=1), None, None, None


def opposite(order_N: Tensor) -> Tensor:
    """The order that undoes another."""
    return torch.empty_like(order_N).scatter(0, order_N, torch.arange(len(order_N), device=order_N.device))


def permute(rows_NE: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """rows[order]; `inverse_N` is the opposite order, by which gradients go back."""
    permuted: Tensor = _Permute.apply(rows_NE, order_N, inverse_N)
    return permuted


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NE: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return rows_NE[order_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0][inverse_N], None, None


def grouped_linear(rows_NI: Tensor, weight_XOI: Tensor, counts_X: Tensor) -> Tensor:
    """Rows of each group times the group's matrix [O, I] -> [N, O]; `counts_X` rows in each, in order.

    torch's grouped_mm where it takes the device, the dtype and the sizes; else one product after another.
    """
    if len(rows_NI) and _suits_grouped(weight_XOI) and _has_grouped(rows_NI.device, rows_NI.dtype):
        ends_X = counts_X.cumsum(0).to(torch.int32)
        return F.grouped_mm(rows_NI, weight_XOI.transpose(-2, -1), offs=ends_X)
    parts = rows_NI.split(counts_X.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_XOI.unbind(0), strict=True)])


def _suits_grouped(weight_XOI: Tensor) -> bool:
    """Rows of 16 bytes, of both factors."""
    return all(size * weight_XOI.element_size() % 16 == 0 for size in weight_XOI.shape[1:])


@functools.cache
def _has_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm runs forward and backward here: tried on a few numbers."""
    if not hasattr(F, "grouped_mm"):
        return False
    # A layer that is to be recomputed must not count these among its tensors.
    shield = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), shield:
        rows = torch.ones(16, 16, dtype=dtype, device=device, requires_grad=True)
        weight = torch.ones(2, 16, 16, dtype=dtype, device=device, requires_grad=True)
        ends = torch.tensor([8, 16], dtype=torch.int32, device=device)
        try:
            out = F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
            torch.autograd.grad(out, (rows, weight), torch.ones_like(out))
        except (RuntimeError, NotImplementedError):
            return False
    return True

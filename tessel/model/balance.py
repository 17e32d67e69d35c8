"""What keeps experts evenly loaded: auxiliary losses, statistics, and the bias of the choice.

Auxiliary loss: Switch Transformer (arXiv 2101.03961), by sequence DeepSeek-V2 (arXiv 2405.04434), by global batch
arXiv 2501.11873. z-loss: ST-MoE (arXiv 2202.08906). Bias: arXiv 2408.15664.
Shape suffixes: L layers, X experts, T tokens, K experts of a token, B batch, S sequence, R rows of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tessel.config.experts import Experts as ExpertOptions
from tessel.model.config import ModelConfig

LOAD_BALANCING_LOSS = "load_balancing_loss"
Z_LOSS = "z_loss"
MAX_LOAD = "max expert load"
_NUM_LOSSES = 2  # the auxiliary loss and the z-loss stand before the counts in a row of sums
_LEVELS = {"softmax_topk": "none", "pai_megatron_aux_loss": "aux_loss"}
_DTYPES = {None: None, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class RouterOptions:
    """How a run balances: `level` of the auxiliary loss is aux_loss, seq_aux_loss, global_aux_loss or none."""

    level: str = "none"
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    expert_bias: bool = False
    bias_update_rate: float = 1e-3
    dtype: torch.dtype | None = None
    capacity_factor: float | None = None
    drop_policy: str = "probs"

    @classmethod
    def from_options(cls, options: ExpertOptions) -> RouterOptions:
        """From the `--moe-*` flags."""
        name = options.moe_router_load_balancing_type
        level = _LEVELS.get(name, name) if options.moe_aux_loss_coeff else "none"
        return cls(
            level,
            options.moe_aux_loss_coeff if level != "none" else 0.0,
            options.moe_z_loss_coeff or 0.0,
            options.moe_router_enable_expert_bias,
            options.moe_router_bias_update_rate,
            _DTYPES[options.moe_router_dtype],
            options.moe_expert_capacity_factor,
            options.moe_token_drop_policy,
        )


class TokenPeers(Protocol):
    """The ranks that hold other tokens: of the same micro-batch, and of what replicas compute meanwhile."""

    @property
    def num_parts(self) -> int:
        """Ranks that share the tokens of a micro-batch, evenly."""
        ...

    @property
    def num_replicas(self) -> int:
        """Replicas that compute other micro-batches."""
        ...

    def sum_over_parts(self, counts: Tensor) -> Tensor:
        """Counts of this rank's tokens, added up over the ranks that share the micro-batch."""
        ...

    def sum_over_all(self, counts: Tensor) -> Tensor:
        """The same, over the replicas too."""
        ...


class Balance:
    """What the routers of a model share: the weight of their losses, their sums, and the experts' biases.

    The trainer sets `loss_weight` before a step, and after its last backward reads the sums (`take`), adds them
    up over every process, and hands them to `update_bias` and `figures`. Sums are taken in backward, so
    that a layer which is computed twice counts once.
    """

    def __init__(self, config: ModelConfig, options: RouterOptions) -> None:
        self.options = options
        self.num_layers, self.num_experts = config.num_hidden_layers, config.num_experts
        self.topk = config.num_experts_per_tok
        self.layers = [layer for layer in range(self.num_layers) if config.has_experts(layer)]
        self.loss_weight = 1.0
        self.peers: TokenPeers | None = None
        self.bias_LX: Tensor | None = None
        if config.expert_bias is not None:
            self.bias_LX = torch.tensor(config.expert_bias, device="cpu")
        elif options.expert_bias:
            self.bias_LX = torch.zeros(self.num_layers, self.num_experts, device="cpu")
        self._sums_LR: Tensor | None = None
        self._global_counts: dict[int, tuple[Tensor, int]] = {}

    def start_step(self, loss_weight: float) -> None:
        """Begin a step. `loss_weight` is what each micro-batch's losses are multiplied with.

        That is the loss scale divided by the number of micro-batches of the global batch, so that
        the losses of a step are averaged over these, whatever weights its tokens have.
        """
        self.loss_weight = loss_weight
        self._global_counts.clear()

    def record(self, layer: int, losses_2: Tensor, counts_X: Tensor) -> None:
        """Add one micro-batch's losses, before their coefficients, and its tokens of each expert."""
        sums_LR = self._sums(counts_X.device)
        sums_LR[layer] += torch.cat((losses_2.float(), counts_X.float()))

    def _sums(self, device: torch.device) -> Tensor:
        if self._sums_LR is None:
            self._sums_LR = torch.zeros(self.num_layers, _NUM_LOSSES + self.num_experts, device=device)
        return self._sums_LR

    def take(self, device: torch.device) -> Tensor:
        """The sums since the last call, fp32 [L, 2 + X], which start anew.

        They are of this process's tokens and layers alone, and add up over every process.
        """
        sums_LR = self._sums(device)
        self._sums_LR = None
        return sums_LR

    @torch.no_grad()
    def update_bias(self, sums_LR: Tensor) -> None:
        """Raise the bias of experts with less than the mean load, and lower that of the others."""
        if self.bias_LX is None or not self.options.expert_bias:
            return
        counts_LX = sums_LR[:, _NUM_LOSSES:]
        below_LX = torch.sign(counts_LX.mean(dim=1, keepdim=True) - counts_LX)
        self.bias_LX = self.bias_LX.to(sums_LR.device) + below_LX * self.options.bias_update_rate

    def config_now(self, config: ModelConfig) -> ModelConfig:
        """The model's configuration with the biases as they are: they are saved there, and not among the weights."""
        if self.bias_LX is None:
            return config
        return replace(config, expert_bias=tuple(tuple(row) for row in self.bias_LX.tolist()))

    def figures(self, sums_LR: Tensor, num_micro_batches: int) -> Mapping[str, float]:
        """What is logged of a step: losses as means over layers and micro-batches, under Megatron's names.

        The largest load is that of the busiest expert of a layer over the layer's mean, averaged over layers.
        """
        rows_LR = sums_LR[self.layers].cpu().double()
        means = rows_LR[:, :_NUM_LOSSES].mean(dim=0) / num_micro_batches
        counts_LX = rows_LR[:, _NUM_LOSSES:]
        load = (counts_LX.amax(dim=1) / counts_LX.mean(dim=1).clamp(min=1e-9)).mean()
        values = {MAX_LOAD: float(load)}
        if self.options.level != "none":
            values[LOAD_BALANCING_LOSS] = float(means[0])
        if self.options.z_loss_coeff:
            values[Z_LOSS] = float(means[1])
        return values

    def attach(self, layer: int, weights_TK: Tensor, scores_BSX: Tensor, log_z_T: Tensor, counts_BX: Tensor) -> Tensor:
        """The weights as they are, through which the losses of this micro-batch enter in backward.

        `scores_BSX`: every expert's share of each token's score, fp32. `log_z_T`: log-partition of the logits.
        `counts_BX`: tokens of each sequence that chose each expert.
        """
        peers = self.peers
        num_parts = peers.num_parts if peers is not None else 1
        z_sum = log_z_T.square().sum() / (log_z_T.shape[0] * num_parts)
        shares_BX = scores_BSX.sum(dim=1)
        # A second computation of the layer must neither count nor ask other ranks: backward is the first one's.
        if _inside_backward():
            slopes_BX = torch.zeros_like(shares_BX)
        else:
            slopes_BX = self._slopes(layer, scores_BSX.shape[1], counts_BX)
        attached: Tensor = _Attach.apply(weights_TK, shares_BX, z_sum, slopes_BX, counts_BX.sum(dim=0), self, layer)
        return attached

    def _slopes(self, layer: int, num_tokens: int, counts_BX: Tensor) -> Tensor:
        """The auxiliary loss is linear in the sums of scores [B, X]; by what, as constants.

        At the level of the micro-batch it is X sum_x f_x p_x, f_x the share of choices that fell on expert x and
        p_x its mean score; at that of the sequence the mean of this over sequences; at that of the global batch f_x
        is the mean over what was seen of it so far. It is 1 where both are even.
        """
        level, peers = self.options.level, self.peers
        num_sequences, num_experts = counts_BX.shape
        if level == "none":
            return torch.zeros(counts_BX.shape, device=counts_BX.device)
        num_tokens *= peers.num_parts if peers is not None else 1
        factor = num_experts / self.topk
        counts_BX = counts_BX.float()
        if level == "seq_aux_loss":
            if peers is not None:
                counts_BX = peers.sum_over_parts(counts_BX)
            return counts_BX * (factor / (num_tokens * num_tokens * num_sequences))
        counts_X = counts_BX.sum(dim=0)
        num_tokens *= num_sequences
        share_tokens = num_tokens
        if level == "aux_loss" and peers is not None:
            counts_X = peers.sum_over_parts(counts_X)
        if level == "global_aux_loss":
            if peers is not None:
                counts_X = peers.sum_over_all(counts_X)
                share_tokens *= peers.num_replicas
            before, seen = self._global_counts.get(layer, (torch.zeros_like(counts_X), 0))
            self._global_counts[layer] = (before + counts_X, seen + 1)
            counts_X = (before + counts_X) / (seen + 1)
        slopes_X: Tensor = counts_X * (factor / (share_tokens * num_tokens))
        return slopes_X.expand(num_sequences, -1)


class _Attach(torch.autograd.Function):
    """Identity on the first argument; the losses, which nothing returns, have their gradients in backward.

    What backward needs is kept outside of saved tensors, which a recomputed layer would replace.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights_TK: Tensor,
        shares_BX: Tensor,
        z_loss: Tensor,
        slopes_BX: Tensor,
        counts_X: Tensor,
        balance: Balance,
        layer: int,
    ) -> Tensor:
        ctx.balance, ctx.layer, ctx.slopes_BX, ctx.counts_X = balance, layer, slopes_BX, counts_X
        ctx.losses_2 = torch.stack(((shares_BX * slopes_BX).sum(), z_loss)).detach()
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        balance, options = ctx.balance, ctx.balance.options
        balance.record(ctx.layer, ctx.losses_2, ctx.counts_X)
        shares_grad = ctx.slopes_BX * (options.aux_loss_coeff * balance.loss_weight)
        z_grad = torch.full_like(ctx.losses_2[1], options.z_loss_coeff * balance.loss_weight)
        return grads[0], shares_grad, z_grad, None, None, None, None


def _inside_backward() -> bool:
    """Whether backward is at work: a forward inside it computes anew what was not kept."""
    return bool(torch._C._current_graph_task_id() != -1)

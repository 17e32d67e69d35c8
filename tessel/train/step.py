"""One optimizer step: forward and backward over micro-batches, then clip and update.

Shape suffixes: B micro-batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tessel.data.loader import MicroBatch
from tessel.model.balance import Balance
from tessel.parallel.peers import Peers
from tessel.parallel.runner import Runner
from tessel.train.gradients import Gradients
from tessel.train.preference import Preferences
from tessel.train.scaler import DynamicScaler, GradScaler


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is the one that is logged.

    `num_tokens`: positions of all samples, padding included, of the step. `router`: the figures of a mixture of
    experts (`Balance.figures`), or of pairs of answers.
    """

    loss: float
    num_tokens: int
    grad_norm: float | None
    num_zeros: float | None
    skipped: bool
    router: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether the loss and the gradient's norm are numbers."""
        return math.isfinite(self.loss) and (self.grad_norm is None or math.isfinite(self.grad_norm))


def loss_weights(masks_BS: Sequence[Tensor], per_token: bool, peers: Peers | None = None) -> list[Tensor]:
    """The factor of each token's nll, so that the step's loss is a plain sum over everything.

    Megatron's default rule is the mean over micro-batches of each one's mean over its loss-bearing
    tokens; `per_token` is the mean over all loss-bearing tokens of the global batch. A micro-batch
    without such tokens counts as a mean of zero. The micro-batches of all replicas count.
    """
    peers = peers or Peers()
    counts = [mask.sum(dtype=torch.float64) for mask in masks_BS]
    if per_token:
        total = peers.sum_tokens(torch.stack(counts).sum()).clamp(min=1)
        return [(mask / total).float() for mask in masks_BS]
    num_micro_batches = len(masks_BS) * peers.num_replicas
    return [
        (mask / (count.clamp(min=1) * num_micro_batches)).float() for mask, count in zip(masks_BS, counts, strict=True)
    ]


class TrainStep:
    """Holds what a step needs. `gradients` are those of the parameters that the optimizer updates."""

    def __init__(
        self,
        runner: Runner,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        peers: Peers,
        balance: Balance | None = None,
        *,
        scaler: GradScaler | None,
        clip_grad: float,
        per_token_loss: bool,
        z_loss_coeff: float,
        count_zeros: bool,
        skip_not_finite: bool,
        largest_gradient: float = math.inf,
        logs_trained_loss: bool = False,
        preferences: Preferences | None = None,
    ) -> None:
        """`largest_gradient` is where a scaled gradient counts as overflowed. `balance`: of a mixture of experts.

        `logs_trained_loss`: the loss that is logged is the one whose gradient is taken, as MindSpeed-LLM's
        fine-tuning has it; else the mean over tokens, as Megatron has it whatever is trained. `preferences`: batches
        hold pairs of answers, and these weigh them.
        """
        self._runner = runner
        self._optimizer = optimizer
        self._gradients = gradients
        self._peers = peers
        self._balance = balance if balance is not None and balance.layers else None
        self.scaler = scaler
        self._clip_grad = clip_grad
        self._per_token_loss = per_token_loss
        self._z_loss_coeff = z_loss_coeff
        self._count_zeros = count_zeros
        self._skip_not_finite = skip_not_finite
        self._logs_trained_loss = logs_trained_loss
        self._preferences = preferences
        self._figures: Mapping[str, float] = {}
        # NaN compares as false, so an infinite bound still finds what is not finite.
        self._largest_gradient = min(largest_gradient, torch.finfo(torch.float32).max)

    def __call__(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch. A step that is skipped leaves weights and moments untouched.

        A step whose result is not finite is not applied either: the caller decides what follows.
        """
        loss_value, divisor, positions = self._forward_backward(batches)
        router = {**self._balanced(len(batches), loss_value.device), **self._figures}
        loss, num_tokens = float(loss_value), int(positions)
        self._gradients.finalize()
        finite = math.isfinite(loss)
        may_skip = self._skip_not_finite or (finite and isinstance(self.scaler, DynamicScaler))
        if self.scaler is not None and (finite or may_skip) and not self._unscale(float(divisor)):
            self._optimizer.zero_grad(set_to_none=True)
            norm = None if may_skip else math.inf
            return StepResult(loss, num_tokens, norm, None, skipped=may_skip, router=router)
        norm = self._gradients.norm()
        if not finite or not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            return StepResult(loss, num_tokens, norm, None, skipped=self._skip_not_finite, router=router)
        if self._clip_grad > 0:
            self._gradients.clip_(self._clip_grad, norm)
        zeros = self._gradients.num_zeros() if self._count_zeros else None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, num_tokens, norm, zeros, skipped=False, router=router)

    def _balanced(self, num_micro_batches: int, device: torch.device) -> Mapping[str, float]:
        """The routers' figures of the step, over all processes; their biases follow the load."""
        if self._balance is None:
            return {}
        sums_LR = self._peers.sum_everywhere(self._balance.take(device))
        self._balance.update_bias(sums_LR)
        return self._balance.figures(sums_LR, num_micro_batches * self._peers.num_replicas)

    def _forward_backward(self, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulate gradients; returns the logged loss, what they are still to be divided by, and the positions.

        All are scalars on the device. The second is not 1 only for the loss per token under a loss scale: Megatron
        divides by the number of tokens after the last backward, and what overflows depends on it.
        """
        if self._preferences is not None:
            return self._on_pairs(batches, self._preferences)
        masks = [batch.loss_mask_BS for batch in batches]
        own_tokens = torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum()
        num_tokens, positions = self._peers.sum_tokens(torch.stack((own_tokens, _positions(masks)))).unbind()
        num_tokens = num_tokens.clamp(min=1)
        divide_later = self._per_token_loss and self.scaler is not None
        weights = masks if divide_later else loss_weights(masks, self._per_token_loss, self._peers)
        scale = self.scaler.scale if self.scaler is not None else 1.0
        # The scale goes into the weights, so that it reaches the logits' gradient before fp16 does.
        weights = [weights_BS * scale for weights_BS in weights]
        if self._balance is not None:
            # Megatron averages the routers' losses over micro-batches; under the rule per token it weighs each
            # by its tokens, masked ones too, over those that count.
            size = (
                batches[0].tokens_BS.numel() if self._per_token_loss else 1.0 / len(batches) / self._peers.num_replicas
            )
            divisor = float(num_tokens) if self._per_token_loss and not divide_later else 1.0
            self._balance.start_step(scale * size / divisor)
        losses = self._runner.train(batches, weights, self._z_loss_coeff)
        nll = losses[:, 0].double()
        if self._logs_trained_loss and not self._per_token_loss:
            loss = self._peers.sum_losses(nll.sum()) / scale
        else:
            # A micro-batch's weights are its mask times one factor: dividing gives back its masked sum of nll.
            factors = torch.stack([_factor(*pair) for pair in zip(weights, masks, strict=True)])
            nll_sum = torch.where(factors > 0, nll / factors, nll).sum()
            loss = self._peers.sum_losses(nll_sum) / num_tokens
        return loss, num_tokens if divide_later else torch.ones_like(num_tokens), positions

    def _on_pairs(self, batches: Sequence[MicroBatch], preferences: Preferences) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.scaler.scale if self.scaler is not None else 1.0
        weighed = preferences.weigh(batches)
        if self._balance is not None:
            self._balance.start_step(scale / len(batches) / self._peers.num_replicas)
        self._runner.train(batches, [weights_BS * scale for weights_BS in weighed.weights], self._z_loss_coeff)
        self._figures = weighed.figures
        loss = torch.tensor(weighed.loss, dtype=torch.float64, device=self._peers.device)
        positions = self._peers.sum_tokens(_positions([batch.loss_mask_BS for batch in batches]))
        return loss, torch.ones_like(loss), positions

    @torch.no_grad()
    def _unscale(self, divisor: float) -> bool:
        """Divide gradients by the loss scale and `divisor`; False when one overflowed, the scale is then lowered."""
        assert self.scaler is not None
        overflow = not self._gradients.largest() <= self._largest_gradient
        if not overflow:
            torch._foreach_mul_(self._gradients.local(), self.scaler.inverse_scale / divisor)
        self.scaler.update(found_inf=overflow)
        return not overflow


def _positions(masks_BS: Sequence[Tensor]) -> Tensor:
    """Positions in the micro-batches of this replica, fp64."""
    return masks_BS[0].new_tensor(sum(mask.numel() for mask in masks_BS), dtype=torch.float64)


def _factor(weights_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """What the mask was multiplied by, fp64; 0 for an empty one."""
    at = mask_BS.argmax()
    mask = mask_BS.flatten()[at].double()
    return torch.where(mask > 0, weights_BS.flatten()[at].double() / mask.clamp(min=1e-30), 0.0)


def evaluation_sums(
    runner: Runner, batches: Sequence[MicroBatch], peers: Peers | None = None, *, by_micro_batch: bool = False
) -> tuple[float, float]:
    """Sum of nll over the loss-bearing tokens of all replicas, and the number of those tokens.

    `by_micro_batch`: the sum of the micro-batches' means, and the number of micro-batches.
    """
    peers = peers or Peers()
    masks = [batch.loss_mask_BS for batch in batches]
    if by_micro_batch:
        weights = [(mask / mask.sum(dtype=torch.float64).clamp(min=1e-30)).float() for mask in masks]
        means = peers.sum_losses(runner.evaluate(batches, weights).sum())
        return float(means), float(len(batches) * peers.num_replicas)
    nll = peers.sum_losses(runner.evaluate(batches, masks).sum())
    num_tokens = peers.sum_tokens(torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum())
    return float(nll), float(num_tokens)

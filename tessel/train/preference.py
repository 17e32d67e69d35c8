"""Direct preference optimisation: pairs of answers, weighed so that the loss stays a plain sum of nll.

For a pair, with D = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)):

    sigmoid   -(1 - s) log sigmoid(beta D) - s log sigmoid(-beta D)    DPO (arXiv 2305.18290), s: label smoothing
    hinge     max(0, 1 - beta D)                                      SLiC (arXiv 2305.10425)
    ipo       (D - 1 / (2 beta))^2, log-probabilities being means     IPO (arXiv 2310.12036)

The gradient of any of them is a factor for each answer times the gradient of its log-probability. So the answers'
log-probabilities are computed first, without gradients; the factors become the weights of the tokens' nll; and what
trains on text trains on preferences, on any layout. It costs one forward more, or a third.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tessel.config.dpo import Preference
from tessel.data.loader import Loader, MicroBatch
from tessel.model.lora import Adapter, ExpertAdapter
from tessel.model.transformer import Transformer
from tessel.parallel.apply import release_gathered
from tessel.parallel.peers import Peers
from tessel.parallel.runner import Runner
from tessel.train.reference_logps import KnownLogps, compute_logps


@dataclass(frozen=True)
class Weighed:
    """What a step of pairs trains with: the weights of each micro-batch's nll, the loss, and what is logged."""

    weights: list[Tensor]
    loss: float
    figures: Mapping[str, float]


class Preferences:
    """Weighs pairs. `reference`: what computes the other log-probabilities, while `as_reference` is entered.

    `known`: these log-probabilities, where they were computed before; then there need be no reference.

    A micro-batch holds the chosen answers of its pairs, and then the rejected ones.
    """

    def __init__(
        self,
        options: Preference,
        runner: Runner,
        parts: Sequence[Transformer],
        peers: Peers,
        reference: Runner | None,
        as_reference: Callable[[], AbstractContextManager[None]],
        known: KnownLogps | None = None,
    ) -> None:
        self._options, self._runner, self._parts, self._peers = options, runner, parts, peers
        self._reference, self._as_reference, self.known = reference, as_reference, known

    def weigh(self, batches: Sequence[MicroBatch]) -> Weighed:
        """The weights that give the gradient of the mean loss over all pairs of the global batch."""
        with self._evaluating():
            policy, reference, lengths = self._answers(batches)
        num_rows = sum(len(batch.tokens_BS) for batch in batches)
        own = slice(self._peers.replica * num_rows, (self._peers.replica + 1) * num_rows)
        pairs = _pair_order(batches, self._peers.num_replicas)
        loss, gradient, figures = preference_loss(self._options, policy, reference, lengths.clamp(min=1), pairs)
        factors = (-gradient[own]).split([len(batch.tokens_BS) for batch in batches])
        weights = [
            batch.loss_mask_BS * f[:, None].to(batch.loss_mask_BS) for batch, f in zip(batches, factors, strict=True)
        ]
        return Weighed(weights, loss, figures)

    def measure(self, batches: Sequence[MicroBatch]) -> tuple[int, float, Mapping[str, float]]:
        """The number of pairs of the global batch, their mean loss, and what is logged; no gradients.

        The model is in evaluation mode already. A pair without a token that bears loss is padding, and does not count.
        """
        policy, reference, lengths = self._answers(batches)
        chosen, rejected = _pair_order(batches, self._peers.num_replicas)
        counted = (lengths[chosen.to(lengths.device)] + lengths[rejected.to(lengths.device)] > 0).cpu()
        pairs = chosen[counted], rejected[counted]
        loss, _, figures = preference_loss(self._options, policy, reference, lengths.clamp(min=1), pairs)
        return int(counted.sum()), loss, figures

    def _answers(self, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each answer of every replica: the model's log-probability, the reference's, and its tokens; fp64."""
        rows = [row for batch in batches for row in rows_of(batch)]
        lengths = torch.stack([row.loss_mask_BS.sum(dtype=torch.float64) for row in rows])
        policy = self._logps(self._runner, rows)
        reference = self.reference_logps(rows) if self.known is None else self._shared(self.known.of(rows))
        return policy, reference, self._shared(lengths)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, and ready to be trained again after it."""
        for part in self._parts:
            part.eval()
        try:
            yield
        finally:
            for part in self._parts:
                release_gathered(part)
                part.train()

    def reference_logps(self, rows: Sequence[MicroBatch]) -> Tensor:
        """The reference's log-probability of each answer of every replica, fp64 [replicas x rows]."""
        assert self._reference is not None
        with self._as_reference():
            return self._logps(self._reference, rows)

    def precompute(self, path: Path, loader: Loader, num_pairs: int, micro_batch_size: int) -> KnownLogps:
        """The reference's log-probabilities of the first `num_pairs` samples, which are written to `path`."""
        with self._evaluating():
            return compute_logps(
                path,
                loader,
                num_pairs,
                micro_batch_size,
                self._peers,
                lambda batch: list(rows_of(batch)),
                self.reference_logps,
            )

    def with_known(self, known: KnownLogps) -> Preferences:
        """The same, with the reference's log-probabilities as they were computed before."""
        return Preferences(self._options, self._runner, self._parts, self._peers, None, contextlib.nullcontext, known)

    def _shared(self, values: Tensor) -> Tensor:
        """A number of each row of this replica -> those of every replica, fp64 [replicas x rows]."""
        everyone = torch.zeros(self._peers.num_replicas * len(values), dtype=torch.float64, device=self._peers.device)
        everyone[self._peers.replica * len(values) : (self._peers.replica + 1) * len(values)] = values.to(everyone)
        return self._peers.sum_tokens(everyone)

    def _logps(self, runner: Runner, rows: Sequence[MicroBatch]) -> Tensor:
        """Log-probability of each answer of every replica, fp64 [replicas x rows]."""
        nll = runner.evaluate(rows, [row.loss_mask_BS for row in rows])[:, 0]
        everyone = torch.zeros(self._peers.num_replicas * len(rows), dtype=torch.float64, device=nll.device)
        everyone[self._peers.replica * len(rows) : (self._peers.replica + 1) * len(rows)] = -nll
        return self._peers.sum_losses(everyone)


def rows_of(batch: MicroBatch) -> Iterator[MicroBatch]:
    """A micro-batch for each of its rows."""
    for row in range(len(batch.tokens_BS)):
        at = slice(row, row + 1)
        segments = None if batch.segments_BS is None else batch.segments_BS[at]
        yield replace(
            batch,
            tokens_BS=batch.tokens_BS[at],
            labels_BS=batch.labels_BS[at],
            loss_mask_BS=batch.loss_mask_BS[at],
            positions_BS=batch.positions_BS[at],
            segments_BS=segments,
        )


def _pair_order(batches: Sequence[MicroBatch], num_replicas: int) -> tuple[Tensor, Tensor]:
    """Where the chosen and the rejected answers of all pairs stand among all rows."""
    chosen: list[int] = []
    rejected: list[int] = []
    offset = 0
    for _ in range(num_replicas):
        for batch in batches:
            size = len(batch.tokens_BS) // 2
            chosen += range(offset, offset + size)
            rejected += range(offset + size, offset + 2 * size)
            offset += 2 * size
    return torch.tensor(chosen), torch.tensor(rejected)


def preference_loss(
    options: Preference, policy_R: Tensor, reference_R: Tensor, counts_R: Tensor, pairs: tuple[Tensor, Tensor]
) -> tuple[float, Tensor, dict[str, float]]:
    """The mean loss over pairs, its gradient by each answer's log-probability, and what is logged.

    `policy_R`, `reference_R`: log-probabilities of R answers, fp64; `counts_R`: their tokens; `pairs`: where among
    them the chosen and the rejected ones are. Rewards are beta times the difference to the reference.
    """
    with torch.enable_grad():
        policy = policy_R.detach().clone().requires_grad_()
        means = options.dpo_loss_type == "ipo"
        own, other = (policy / counts_R, reference_R / counts_R) if means else (policy, reference_R)
        chosen, rejected = (x.to(policy.device) for x in pairs)
        ratio = own - other
        difference = ratio[chosen] - ratio[rejected]
        losses = _losses(options, difference)
        if options.pref_ftx:
            losses = losses - options.pref_ftx * policy[chosen] / counts_R[chosen]
        loss = losses.mean()
        loss.backward()
    rewards = options.dpo_beta * ratio.detach()
    margins = rewards[chosen] - rewards[rejected]
    figures = {
        "rewards/chosen": float(rewards[chosen].mean()),
        "rewards/rejected": float(rewards[rejected].mean()),
        "rewards/accuracies": float((margins > 0).double().mean()),
        "rewards/margins": float(margins.mean()),
        "logps/chosen": float(policy_R[chosen].mean()),
        "logps/rejected": float(policy_R[rejected].mean()),
    }
    assert policy.grad is not None
    return float(loss.detach()), policy.grad, figures


def _losses(options: Preference, difference: Tensor) -> Tensor:
    beta, smoothing = options.dpo_beta, options.dpo_label_smoothing
    if options.dpo_loss_type == "hinge":
        return F.relu(1 - beta * difference)
    if options.dpo_loss_type == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * F.logsigmoid(beta * difference) - smoothing * F.logsigmoid(-beta * difference)


@contextmanager
def without_adapters(parts: Sequence[Transformer]) -> Iterator[None]:
    """The model as it was before its adapters."""
    found = [module for part in parts for module in part.modules() if isinstance(module, Adapter | ExpertAdapter)]
    for adapter in found:
        adapter.is_off = True
    try:
        yield
    finally:
        for adapter in found:
            adapter.is_off = False

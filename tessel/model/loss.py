"""Head and cross-entropy in one, some tokens at a time, so that the logits of a sequence are never held.

Shape suffixes: N tokens of the micro-batch, C tokens of a chunk, V vocabulary rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# fp32 logits of one chunk. Smaller chunks fit the cache better, larger ones add to the weight's
# gradient less often; measured in docs/LOG.md.
_CPU_LOGITS_BYTES = 64 * 2**20
_DEVICE_LOGITS_BYTES = 512 * 2**20
_MIN_CHUNK_TOKENS, _MAX_CHUNK_TOKENS = 256, 8192


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens in a chunk, from the vocabulary alone: never from the sequence."""
    budget_bytes = _CPU_LOGITS_BYTES if device.type == "cpu" else _DEVICE_LOGITS_BYTES
    return min(max(budget_bytes // (4 * vocab_size), _MIN_CHUNK_TOKENS), _MAX_CHUNK_TOKENS)


def chunked_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    chunk_tokens: int | None = None,
    z_loss_coeff: float = 0.0,
) -> Tensor:
    """sum_n weights_n * nll_n, a scalar in fp32; with a z-loss, a second term, and the result is both: [2].

    The second is sum_n weights_n * z_loss_coeff * logZ_n^2. What is minimised is their sum: backward
    goes through `.sum()`, since the gradient of both is had at once.

    nll is the cross-entropy of softmax(hidden W^T) with the label, logZ its log-partition
    (PaLM's z-loss, arXiv 2204.02311). `hidden_ND` and `weight_VD` are of one dtype, in which the
    three matrix products run; the softmax is fp32, and the weight's gradient is summed in fp32.
    Labels where the weight is 0 may be anything.

    Gradients are computed in forward, chunk by chunk, and only scaled in backward. In fp16 a loss
    scale therefore belongs into `weights_N`: the logits' gradients then carry it before they are
    rounded to fp16. Backward works once. Without gradients to compute, none are.
    """
    chunk = chunk_tokens or default_chunk_tokens(weight_VD.shape[0], weight_VD.device)
    weights_N = weights_N.float()
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        total: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, weights_N, chunk, z_loss_coeff)
        return total
    nll_N, log_z_N = _token_losses(hidden_ND, weight_VD, labels_N, weights_N != 0, chunk)
    return _weighted_sum(nll_N, log_z_N, weights_N, z_loss_coeff)


def chunked_nll(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy of each token, fp32 [N], without gradients."""
    chunk = chunk_tokens or default_chunk_tokens(weight_VD.shape[0], weight_VD.device)
    with torch.no_grad():
        return _token_losses(hidden_ND, weight_VD, labels_N, None, chunk)[0]


def _weighted_sum(nll_N: Tensor, log_z_N: Tensor, weights_N: Tensor, z_loss_coeff: float) -> Tensor:
    """The loss, or with a z-loss its two terms."""
    total = (weights_N * nll_N).sum()
    if not z_loss_coeff:
        return total
    return torch.stack((total, z_loss_coeff * (weights_N * log_z_N.square()).sum()))


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, counts_N: Tensor | None, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """(nll, logZ), each fp32 [N]."""
    nll_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    log_z_N = torch.empty_like(nll_N)
    if counts_N is not None:
        labels_N = labels_N.where(counts_N, 0)
    softmax = _ChunkSoftmax(weight_VD, min(chunk_tokens, max(len(nll_N), 1)))
    for part in _chunks(len(nll_N), chunk_tokens):
        _, nll_N[part], log_z_N[part] = softmax(hidden_ND[part], labels_N[part])
    return nll_N, log_z_N


class _ChunkSoftmax:
    """Probabilities and losses of one chunk after another, in one buffer."""

    def __init__(self, weight_VD: Tensor, chunk_tokens: int) -> None:
        self.weight_VD = weight_VD.detach()
        shape = (chunk_tokens, weight_VD.shape[0])
        self.logits_CV = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)
        low_precision = weight_VD.dtype != torch.float32
        self.probabilities_CV = (
            self.logits_CV.new_empty(shape, dtype=torch.float32) if low_precision else self.logits_CV
        )

    def __call__(self, hidden_CD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(softmax [C, V], nll [C], logZ [C]), fp32; the first lives until the next call."""
        num_tokens = hidden_CD.shape[0]
        logits_CV, out_CV = self.logits_CV[:num_tokens], self.probabilities_CV[:num_tokens]
        torch.mm(hidden_CD, self.weight_VD.t(), out=logits_CV)
        if out_CV.dtype != logits_CV.dtype:
            out_CV.copy_(logits_CV)
        label_logits_C = out_CV.gather(1, labels_C[:, None]).squeeze(1)
        largest_C = out_CV.amax(dim=-1)
        torch.softmax(out_CV, dim=-1, out=out_CV)
        # The largest probability is 1 / sum(exp(logit - largest)): logZ without a second pass of exponentials.
        log_z_C = largest_C - out_CV.amax(dim=-1).log()
        return out_CV, log_z_C - label_logits_C, log_z_C


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss is linear in the upstream gradient, so that its gradients can be had in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        chunk_tokens: int,
        z_loss_coeff: float,
    ) -> Tensor:
        ctx.hidden_grad_ND, ctx.weight_grad_VD, total = _losses_and_gradients(
            hidden_ND, weight_VD, labels_N, weights_N, chunk_tokens, z_loss_coeff, ctx.needs_input_grad[:2]
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        terms = grads[0].reshape(-1)
        if terms.numel() == 2 and bool(terms[0] != terms[1]):
            raise RuntimeError("the z-loss and the loss have one gradient: minimise their sum, not one of them.")
        upstream = terms[0]
        gradients = [ctx.hidden_grad_ND, ctx.weight_grad_VD]
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("backward through the chunked loss works once; run forward again.")
        ctx.hidden_grad_ND = ctx.weight_grad_VD = None
        # On a device the comparison would wait for it, and the product is cheap there.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return gradients[0], gradients[1], None, None, None, None


def _losses_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    chunk_tokens: int,
    z_loss_coeff: float,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(gradient of hidden, gradient of weight, loss). Per token, dlogits = w ((1 + 2 z logZ) softmax - onehot)."""
    num_tokens = hidden_ND.shape[0]
    hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    labels_N = labels_N.where(weights_N != 0, 0)
    hidden_grad_ND = torch.empty_like(hidden_ND) if needs_grad[0] else None
    weight_sum_VD = torch.empty_like(weight_VD, dtype=torch.float32) if needs_grad[1] else None
    summed = 0  # chunks in weight_sum_VD, whose memory the first one overwrites
    nll_N, log_z_N = torch.zeros_like(weights_N), torch.zeros_like(weights_N)
    softmax = _ChunkSoftmax(weight_VD, min(chunk_tokens, max(num_tokens, 1)))
    for part in _chunks(num_tokens, chunk_tokens):
        hidden_CD, labels_C, weights_C = hidden_ND[part], labels_N[part], weights_N[part, None]
        if weights_N.device.type == "cpu" and not weights_C.any():
            if hidden_grad_ND is not None:
                hidden_grad_ND[part] = 0
            continue
        grad_CV, nll_N[part], log_z_N[part] = softmax(hidden_CD, labels_C)
        # In fp32 the token's weight is put on the narrow side of each product, which saves a pass over
        # the chunk; in fp16 it has to be in before the rounding.
        narrow = grad_CV.dtype == hidden_CD.dtype
        _subtract_onehot(grad_CV, labels_C, log_z_N[part], z_loss_coeff, None if narrow else weights_C)
        if narrow:
            wide_CV, narrow_CD = grad_CV, hidden_CD * weights_C
        else:
            wide_CV, narrow_CD = softmax.logits_CV[: len(labels_C)].copy_(grad_CV), hidden_CD
        if weight_sum_VD is not None:
            _accumulate(weight_sum_VD, wide_CV, narrow_CD, first=summed == 0)
            summed += 1
        if hidden_grad_ND is not None:
            torch.mm(wide_CV, weight_VD, out=hidden_grad_ND[part])
            if narrow:
                hidden_grad_ND[part].mul_(weights_C)
    if weight_sum_VD is not None and summed == 0:
        weight_sum_VD.zero_()
    weight_grad_VD = None if weight_sum_VD is None else weight_sum_VD.to(weight_VD.dtype)
    return hidden_grad_ND, weight_grad_VD, _weighted_sum(nll_N, log_z_N, weights_N, z_loss_coeff)


def _accumulate(sum_VD: Tensor, wide_CV: Tensor, narrow_CD: Tensor, first: bool) -> None:
    """sum += wide^T narrow, in fp32; the first time, sum = wide^T narrow."""
    if wide_CV.dtype == sum_VD.dtype:
        torch.addmm(sum_VD, wide_CV.t(), narrow_CD, beta=0 if first else 1, out=sum_VD)
    elif first:
        sum_VD.copy_(wide_CV.t() @ narrow_CD)
    else:
        sum_VD.add_(wide_CV.t() @ narrow_CD)


def _subtract_onehot(
    grad_CV: Tensor, labels_C: Tensor, log_z_C: Tensor, z_loss_coeff: float, weights_C1: Tensor | None
) -> None:
    """softmax -> the logits' gradient, in place; without the token's weight where that is None."""
    scale_C1 = 1 + 2 * z_loss_coeff * log_z_C[:, None] if z_loss_coeff else None
    if weights_C1 is not None:
        scale_C1 = weights_C1 if scale_C1 is None else weights_C1 * scale_C1
    if scale_C1 is not None:
        grad_CV.mul_(scale_C1)
    onehot_C1 = torch.ones_like(log_z_C[:, None]) if weights_C1 is None else weights_C1
    grad_CV.scatter_add_(1, labels_C[:, None], -onehot_C1)

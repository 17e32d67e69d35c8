"""Head and cross-entropy in one, some tokens at a time, so that the logits of a sequence are never held.

The vocabulary may be in parts, each elsewhere: `VocabularyPart`.
Shape suffixes: N tokens of the micro-batch, C tokens of a chunk, V vocabulary rows, D hidden size,
P parts of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

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


class VocabularyPart(Protocol):
    """The rows of the vocabulary that are here, where others are elsewhere; every part calls in the same order."""

    @property
    def first(self) -> int:
        """The vocabulary's number of the first row here."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows here, at least one, without the padding that may follow them."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Every part's tensor of this shape, [P, ...], in one order everywhere."""
        ...

    def join(self, logits_BSV: Tensor) -> Tensor:
        """The logits of the whole vocabulary, from those of this part and its padding; with a gradient."""
        ...


def chunked_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    chunk_tokens: int | None = None,
    z_loss_coeff: float = 0.0,
    part: VocabularyPart | None = None,
) -> Tensor:
    """sum_n weights_n * nll_n, a scalar in fp32, without gradients in fp64; with a z-loss a second term, too: [2].

    The second is sum_n weights_n * z_loss_coeff * logZ_n^2. What is minimised is their sum: backward
    goes through `.sum()`, since the gradient of both is had at once.

    nll is the cross-entropy of softmax(hidden W^T) with the label, logZ its log-partition
    (PaLM's z-loss, arXiv 2204.02311). `hidden_ND` and `weight_VD` are of one dtype, in which the
    three matrix products run; the softmax is fp32, and the weight's gradient is summed in fp32.
    Labels where the weight is 0 may be anything.

    Gradients are computed in forward, chunk by chunk, and only scaled in backward. In fp16 a loss
    scale therefore belongs into `weights_N`: the logits' gradients then carry it before they are
    rounded to fp16. Backward works once. Without gradients to compute, none are.

    With `part`, `weight_VD` has that part's rows, and maybe padding after them, whose gradient is 0.
    The loss is that of the whole vocabulary, alike for every part; the gradient of `hidden_ND` is this
    part's contribution to the sum over all. For each chunk the parts gather two fp32 numbers a token.
    """
    chunk = chunk_tokens or default_chunk_tokens(weight_VD.shape[0], weight_VD.device)
    weights_N, weight_VD = weights_N.float(), _without_padding(weight_VD, part)
    needs_grad = hidden_ND.requires_grad, weight_VD.requires_grad
    if torch.is_grad_enabled() and any(needs_grad):
        with torch.no_grad():
            *gradients, total = _losses_and_gradients(
                hidden_ND, weight_VD, labels_N, weights_N, chunk, z_loss_coeff, needs_grad, part
            )
        # A node for each gradient: a pipeline may ask for the weight's later than for the other.
        for source, gradient in zip((hidden_ND, weight_VD), gradients, strict=True):
            if gradient is not None:
                total = total + _KnownGradient.apply(source, gradient, total.detach())
        return total
    nll_N, log_z_N = _token_losses(hidden_ND, weight_VD, labels_N, weights_N != 0, chunk, part)
    # In fp64: DPO takes differences of sums of thousands, of which fp32 would leave three decimals.
    return _weighted_sum(nll_N.double(), log_z_N.double(), weights_N, z_loss_coeff)


def chunked_nll(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk_tokens: int | None = None,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Cross-entropy of each token, fp32 [N], without gradients."""
    chunk = chunk_tokens or default_chunk_tokens(weight_VD.shape[0], weight_VD.device)
    with torch.no_grad():
        return _token_losses(hidden_ND, _without_padding(weight_VD, part), labels_N, None, chunk, part)[0]


def _without_padding(weight_VD: Tensor, part: VocabularyPart | None) -> Tensor:
    return weight_VD if part is None or part.num_rows == len(weight_VD) else weight_VD[: part.num_rows]


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
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    counts_N: Tensor | None,
    chunk_tokens: int,
    vocabulary: VocabularyPart | None,
) -> tuple[Tensor, Tensor]:
    """(nll, logZ), each fp32 [N]."""
    nll_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    log_z_N = torch.empty_like(nll_N)
    if counts_N is not None:
        labels_N = labels_N.where(counts_N, 0)
    softmax = _ChunkSoftmax(weight_VD, min(chunk_tokens, max(len(nll_N), 1)), vocabulary)
    for part in _chunks(len(nll_N), chunk_tokens):
        chunk = softmax(hidden_ND[part], labels_N[part])
        nll_N[part], log_z_N[part] = chunk.nll_C, chunk.log_z_C
    return nll_N, log_z_N


class _Chunk(NamedTuple):
    """What the softmax of a chunk gives. fp32; `softmax_CV` lives until the next one.

    Of a vocabulary in parts, `softmax_CV` is over this part's rows alone, which have `share_C1` of the
    probability; `columns_C1` and `is_here_C1` say where the labels are, and whether they are in this part.
    """

    softmax_CV: Tensor
    nll_C: Tensor
    log_z_C: Tensor
    columns_C1: Tensor
    is_here_C1: Tensor | None = None
    share_C1: Tensor | None = None


class _ChunkSoftmax:
    """Probabilities and losses of one chunk after another, in one buffer."""

    def __init__(self, weight_VD: Tensor, chunk_tokens: int, vocabulary: VocabularyPart | None = None) -> None:
        self.weight_VD, self.vocabulary = weight_VD.detach(), vocabulary
        shape = (chunk_tokens, weight_VD.shape[0])
        self.logits_CV = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)
        low_precision = weight_VD.dtype != torch.float32
        self.probabilities_CV = (
            self.logits_CV.new_empty(shape, dtype=torch.float32) if low_precision else self.logits_CV
        )

    def __call__(self, hidden_CD: Tensor, labels_C: Tensor) -> _Chunk:
        num_tokens = hidden_CD.shape[0]
        logits_CV, out_CV = self.logits_CV[:num_tokens], self.probabilities_CV[:num_tokens]
        torch.mm(hidden_CD, self.weight_VD.t(), out=logits_CV)
        if out_CV.dtype != logits_CV.dtype:
            out_CV.copy_(logits_CV)
        columns_C1, is_here_C1 = self._columns(labels_C[:, None])
        label_logits_C = out_CV.gather(1, columns_C1).squeeze(1)
        largest_C = out_CV.amax(dim=-1)
        torch.softmax(out_CV, dim=-1, out=out_CV)
        # The largest probability is 1 / sum(exp(logit - largest)): logZ without a second pass of exponentials.
        log_z_C = largest_C - out_CV.amax(dim=-1).log()
        if self.vocabulary is None or is_here_C1 is None:
            return _Chunk(out_CV, log_z_C - label_logits_C, log_z_C, columns_C1)
        label_logits_C = label_logits_C.where(is_here_C1.squeeze(1), 0)
        log_z_PC, label_logits_PC = self.vocabulary.gather(torch.stack((log_z_C, label_logits_C))).unbind(1)
        whole_log_z_C = log_z_PC.logsumexp(dim=0)
        share_C1 = (log_z_C - whole_log_z_C).exp()[:, None]
        nll_C = whole_log_z_C - label_logits_PC.sum(dim=0)
        return _Chunk(out_CV, nll_C, whole_log_z_C, columns_C1, is_here_C1, share_C1)

    def _columns(self, labels_C1: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the labels' columns here, whether they are here)."""
        if self.vocabulary is None:
            return labels_C1, None
        columns_C1 = labels_C1 - self.vocabulary.first
        is_here_C1 = (columns_C1 >= 0) & (columns_C1 < self.vocabulary.num_rows)
        return columns_C1.where(is_here_C1, 0), is_here_C1


class _KnownGradient(torch.autograd.Function):
    """Zeros, with a gradient that is had already and only to be scaled in backward."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        terms = grads[0].reshape(-1)
        if terms.numel() == 2 and bool(terms[0] != terms[1]):
            raise RuntimeError("the z-loss and the loss have one gradient: minimise their sum, not one of them.")
        upstream, gradient = terms[0], ctx.gradient
        if gradient is None:
            raise RuntimeError("backward through the chunked loss works once; run forward again.")
        ctx.gradient = None
        # On a device the comparison would wait for it, and the product is cheap there.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradient.mul_(upstream)
        return gradient, None, None


def _losses_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    chunk_tokens: int,
    z_loss_coeff: float,
    needs_grad: tuple[bool, bool],
    vocabulary: VocabularyPart | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(gradient of hidden, gradient of weight, loss). Per token, dlogits = w ((1 + 2 z logZ) softmax - onehot)."""
    num_tokens = hidden_ND.shape[0]
    hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    labels_N = labels_N.where(weights_N != 0, 0)
    hidden_grad_ND = torch.empty_like(hidden_ND) if needs_grad[0] else None
    weight_sum_VD = torch.empty_like(weight_VD, dtype=torch.float32) if needs_grad[1] else None
    summed = 0  # chunks in weight_sum_VD, whose memory the first one overwrites
    nll_N, log_z_N = torch.zeros_like(weights_N), torch.zeros_like(weights_N)
    softmax = _ChunkSoftmax(weight_VD, min(chunk_tokens, max(num_tokens, 1)), vocabulary)
    for part in _chunks(num_tokens, chunk_tokens):
        hidden_CD, labels_C, weights_C1 = hidden_ND[part], labels_N[part], weights_N[part, None]
        if weights_N.device.type == "cpu" and not weights_C1.any():
            if hidden_grad_ND is not None:
                hidden_grad_ND[part] = 0
            continue
        chunk = softmax(hidden_CD, labels_C)
        grad_CV, nll_N[part], log_z_N[part] = chunk.softmax_CV, chunk.nll_C, chunk.log_z_C
        # In fp32 the token's weight is put on the narrow side of each product, which saves a pass over
        # the chunk; in fp16 it has to be in before the rounding.
        narrow = grad_CV.dtype == hidden_CD.dtype
        _subtract_onehot(chunk, z_loss_coeff, None if narrow else weights_C1)
        if narrow:
            wide_CV, narrow_CD = grad_CV, hidden_CD * weights_C1
        else:
            wide_CV, narrow_CD = softmax.logits_CV[: len(labels_C)].copy_(grad_CV), hidden_CD
        if weight_sum_VD is not None:
            _accumulate(weight_sum_VD, wide_CV, narrow_CD, first=summed == 0)
            summed += 1
        if hidden_grad_ND is not None:
            torch.mm(wide_CV, weight_VD, out=hidden_grad_ND[part])
            if narrow:
                hidden_grad_ND[part].mul_(weights_C1)
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


def _subtract_onehot(chunk: _Chunk, z_loss_coeff: float, weights_C1: Tensor | None) -> None:
    """softmax -> the logits' gradient, in place; without the token's weight where that is None."""
    log_z_C1 = chunk.log_z_C[:, None]
    scale_C1 = 1 + 2 * z_loss_coeff * log_z_C1 if z_loss_coeff else None
    for factor_C1 in (chunk.share_C1, weights_C1):
        if factor_C1 is not None:
            scale_C1 = factor_C1 if scale_C1 is None else factor_C1 * scale_C1
    if scale_C1 is not None:
        chunk.softmax_CV.mul_(scale_C1)
    onehot_C1 = torch.ones_like(log_z_C1) if weights_C1 is None else weights_C1
    if chunk.is_here_C1 is not None:
        onehot_C1 = onehot_C1 * chunk.is_here_C1
    chunk.softmax_CV.scatter_add_(1, chunk.columns_C1, -onehot_C1)

"""Attention of some queries to some keys that tells how much it saw, so that blocks can be put together.

A block gives, beside its output, each query's logsumexp of the scaled scores. Outputs of several blocks of
keys, each weighted by exp(its lse - the lse of all), add up to attention over all of them
(FlashAttention-2, arXiv 2307.08691, section 3.1). The backward of a block takes the output and the lse of
*all* keys: the gradients of blocks then simply add up.

`block_forward` and `block_backward` choose among torch's fused attentions that give or take an lse, and
`PLAIN`, which is written out. Fewer key/value heads than query heads are never repeated in memory.

Shape suffixes: B batch, H query heads, G key/value heads, R = H / G, S queries, K keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from tessel.runtime.device import fused_block_attention

# The score of what is hidden, and the lse of a query that has seen nothing. Finite, so that two of them have a
# difference; whatever such a query got is weighted by exp(this - a real lse) = 0 when it meets a real block.
NOTHING = -1e30

# Of `PLAIN` at a time: 256 MiB in fp32.
_MOST_SCORES = 2**26

_aten = torch.ops.aten


class Block(Protocol):
    """One implementation. `visible` is True where a query may look, bool [1 or B, 1, S, K]; None: everywhere.

    `causal` says that S == K and queries stand where the keys do; `visible` is None then.
    """

    def forward(
        self, q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """(output [B, H, S, D], lse fp32 [B, H, S])."""
        ...

    def backward(
        self,
        grad_BHSD: Tensor,
        q_BHSD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        out_BHSD: Tensor,
        lse_BHS: Tensor,
        visible: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v through this block, given the output and lse of all blocks."""
        ...


class _Plain:
    """Written out, with scores and softmax in fp32 (fp64 for fp64), for so many queries at once as memory allows."""

    def forward(
        self, q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out_BHSD = torch.empty_like(q_BHSD)
        lse_BHS = torch.empty(q_BHSD.shape[:3], dtype=_wide_dtype(q_BHSD), device=q_BHSD.device)
        v_BG1KD = v_BGKD.to(lse_BHS.dtype)[:, :, None]
        for part in _parts(q_BHSD, k_BGKD):
            scores_BGRSK = _scores(q_BHSD, k_BGKD, visible, causal, part)
            lse_BGRS = scores_BGRSK.logsumexp(dim=-1)
            weights_BGRSK = scores_BGRSK.sub_(lse_BGRS[..., None]).exp_()
            out_BHSD[:, :, part] = (weights_BGRSK @ v_BG1KD).flatten(1, 2)
            lse_BHS[:, :, part] = lse_BGRS.flatten(1, 2)
        return out_BHSD, lse_BHS

    def backward(
        self,
        grad_BHSD: Tensor,
        q_BHSD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        out_BHSD: Tensor,
        lse_BHS: Tensor,
        visible: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, scale = k_BGKD.shape[1], q_BHSD.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=_wide_dtype(x)) for x in (q_BHSD, k_BGKD, v_BGKD))
        k_BG1KD, v_BG1KD = (x.to(grad_k.dtype)[:, :, None] for x in (k_BGKD, v_BGKD))
        for part in _parts(q_BHSD, k_BGKD):
            grad_BGRSD, q_BGRSD, out_BGRSD = (
                x[:, :, part].to(grad_q.dtype).unflatten(1, (groups, -1)) for x in (grad_BHSD, q_BHSD, out_BHSD)
            )
            lse_BGRS1 = lse_BHS[:, :, part].unflatten(1, (groups, -1))[..., None]
            weights_BGRSK = _scores(q_BHSD, k_BGKD, visible, causal, part).sub_(lse_BGRS1).exp_()
            grad_v += (weights_BGRSK.mT @ grad_BGRSD).sum(dim=2)
            delta_BGRS1 = (grad_BGRSD * out_BGRSD).sum(dim=-1, keepdim=True)
            grad_scores_BGRSK = (grad_BGRSD @ v_BG1KD.mT).sub_(delta_BGRS1).mul_(weights_BGRSK).mul_(scale)
            grad_q[:, :, part] = (grad_scores_BGRSK @ k_BG1KD).flatten(1, 2)
            grad_k += (grad_scores_BGRSK.mT @ q_BGRSD).sum(dim=2)
        return grad_q, grad_k, grad_v


class _OnCpu:
    """torch's flash attention for the CPU: 2 to 7 times as fast as written out, and it holds no scores."""

    def forward(
        self, q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHSD, k_BGKD, v_BGKD, 0.0, causal, attn_mask=_added(visible)
        )
        return out, lse

    def backward(
        self,
        grad_BHSD: Tensor,
        q_BHSD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        out_BHSD: Tensor,
        lse_BHS: Tensor,
        visible: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHSD, q_BHSD, k_BGKD, v_BGKD, out_BHSD, lse_BHS, 0.0, causal, attn_mask=_added(visible)
        )
        return grads


class _Flash:
    """Flash attention of an accelerator: 16-bit, and no mask but the causal one."""

    def forward(
        self, q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q_BHSD, k_BGKD, v_BGKD, 0.0, causal)
        return out, lse

    def backward(
        self,
        grad_BHSD: Tensor,
        q_BHSD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        out_BHSD: Tensor,
        lse_BHS: Tensor,
        visible: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros((), dtype=torch.int64, device=q_BHSD.device)  # the random state, for dropout
        lengths = (q_BHSD.shape[2], k_BGKD.shape[2])
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_backward(
            grad_BHSD, q_BHSD, k_BGKD, v_BGKD, out_BHSD, lse_BHS.contiguous(), None, None, *lengths, 0.0, causal,
            unused, unused,
        )  # fmt: skip
        return grads


PLAIN: Block = _Plain()
# By the names that `runtime.device.fused_block_attention` gives.
BLOCKS: dict[str, Block] = {"plain": PLAIN, "cpu": _OnCpu(), "flash": _Flash()}


def block_forward(
    q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """(output [B, H, S, D], lse fp32 [B, H, S]) by the fastest implementation that is right here; see `Block`."""
    return _chosen(q_BHSD, k_BGKD, v_BGKD, visible, causal).forward(q_BHSD, k_BGKD, v_BGKD, visible, causal)


def block_backward(
    grad_BHSD: Tensor,
    q_BHSD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    out_BHSD: Tensor,
    lse_BHS: Tensor,
    visible: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v through this block, given the output and lse of all blocks; see `Block`."""
    block = _chosen(q_BHSD, k_BGKD, v_BGKD, visible, causal)
    return block.backward(grad_BHSD, q_BHSD, k_BGKD, v_BGKD, out_BHSD, lse_BHS, visible, causal)


def _chosen(q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible: Tensor | None, causal: bool) -> Block:
    return BLOCKS[fused_block_attention(q_BHSD, k_BGKD, v_BGKD, masked=visible is not None, causal=causal)]


def _parts(q_BHSD: Tensor, k_BGKD: Tensor) -> Iterator[slice]:
    """The queries in runs, none with more than `_MOST_SCORES` scores."""
    batch, heads, num_queries, _ = q_BHSD.shape
    step = max(_MOST_SCORES // (batch * heads * k_BGKD.shape[2]), 1)
    return (slice(first, min(first + step, num_queries)) for first in range(0, num_queries, step))


def _scores(q_BHSD: Tensor, k_BGKD: Tensor, visible: Tensor | None, causal: bool, part: slice) -> Tensor:
    """Scaled scores of a part of the queries, [B, G, R, S, K], `NOTHING` where hidden."""
    dtype = _wide_dtype(q_BHSD)
    q_BGRSD = q_BHSD[:, :, part].to(dtype).unflatten(1, (k_BGKD.shape[1], -1)) * q_BHSD.shape[-1] ** -0.5
    scores_BGRSK: Tensor = q_BGRSD @ k_BGKD.to(dtype)[:, :, None].mT
    if causal:
        keys_K = torch.arange(k_BGKD.shape[2], device=q_BHSD.device)
        return scores_BGRSK.masked_fill_(keys_K > keys_K[part, None], NOTHING)
    return scores_BGRSK if visible is None else scores_BGRSK.masked_fill_(~visible[:, :, None, part], NOTHING)


def _added(visible: Tensor | None) -> Tensor | None:
    """The mask as what is added to scores."""
    if visible is None:
        return None
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, NOTHING)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

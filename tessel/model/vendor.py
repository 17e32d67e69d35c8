"""Kernels of Ascend NPUs, the operators of torch_npu, each as a row of the table in `model/kernels.py`.

No other file of the model names a vendor. torch_npu is not imported here: `runtime/device.py` does that where it is
installed, and the operators are then in `torch.ops.npu`. Calls are as Huawei documents them for Atlas A2 and A3 (Ascend
Extension for PyTorch, API reference); tests hold each call against the package's own schemas, and its result and
gradients against the plain row, with the operator's documented meaning in its place. None of it has run on the
hardware here: `tessel selftest` on an NPU does that.

Shape suffixes: B batch, S query positions, K key positions, H query heads, G key/value heads, D head_dim, T tokens,
R experts of a token, N = T x R rows, E hidden, I inputs, O outputs, X experts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessel.model.attention import Visibility

NAME = "npu"
# The inner dims that a product with a collective inside it takes.
INNER_SIZES = range(256, 65535)
# The side of the mask that stands for a causal one of any length, in sparse modes 2 to 4.
_COMPRESSED = 2048
_LEFT_UP_CAUSAL, _RIGHT_DOWN_CAUSAL, _EXPLICIT_MASK = 2, 3, 0
_GROUPS_OF_ROWS, _GROUPS_OF_INPUTS = 0, 2
_ONE_OUTPUT = 3


def fusion_attention(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, visibility: Visibility, window: int | None, dropout: float
) -> Tensor:
    """npu_fusion_attention: as TND where segments are runs, else as BNSD, causal by a compressed mask.

    Where a window or mixed segments need a mask of their own, it is given whole (sparse mode 0).
    """
    lengths = visibility.run_lengths
    if lengths is not None and (window is None or window >= max(lengths)):
        return _packed(q_BSHD, k_BKGD, v_BKGD, lengths, dropout)
    num_queries, num_keys = q_BSHD.shape[1], k_BKGD.shape[1]
    if visibility.segments_BK is None and (window is None or window >= num_keys):
        hidden = _causal(q_BSHD.device)
        mode = _LEFT_UP_CAUSAL if num_queries == num_keys else _RIGHT_DOWN_CAUSAL
    else:
        visible = visibility.mask(num_queries, num_keys, window, q_BSHD.device)
        assert visible is not None, "segments and windows have one"
        hidden, mode = ~visible, _EXPLICIT_MASK
    out_BHSD = torch.ops.npu.npu_fusion_attention(
        q_BSHD.transpose(1, 2),
        k_BKGD.transpose(1, 2),
        v_BKGD.transpose(1, 2),
        q_BSHD.shape[2],
        "BNSD",
        atten_mask=hidden,
        scale=q_BSHD.shape[3] ** -0.5,
        keep_prob=1.0 - dropout,
        sparse_mode=mode,
    )[0]
    attended: Tensor = out_BHSD.transpose(1, 2)
    return attended


def _packed(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, lengths: tuple[int, ...], dropout: float) -> Tensor:
    """Runs of the flattened batch, each causal by itself; the operator takes where each run ends."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    out_THD = torch.ops.npu.npu_fusion_attention(
        q_BSHD.flatten(0, 1),
        k_BSGD.flatten(0, 1),
        v_BSGD.flatten(0, 1),
        q_BSHD.shape[2],
        "TND",
        atten_mask=_causal(q_BSHD.device),
        scale=q_BSHD.shape[3] ** -0.5,
        keep_prob=1.0 - dropout,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=_RIGHT_DOWN_CAUSAL,
    )[0]
    attended: Tensor = out_THD.view(q_BSHD.shape)
    return attended


@functools.cache
def _causal(device: torch.device) -> Tensor:
    """True above the diagonal: what is hidden, as this operator wants it."""
    with torch.inference_mode(False):  # it outlives a generation, and training keeps it for backward
        return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """npu_rms_norm; its second result, 1 / rms, is for its own backward."""
    normed: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return normed


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """npu_add_rms_norm: the sum, and its norm."""
    normed, _, summed = torch.ops.npu.npu_add_rms_norm(x, added, weight, epsilon=eps)
    return summed, normed


def rotate(x_BSHD: Tensor, cos_BS1D: Tensor, sin_BS1D: Tensor) -> Tensor:
    """npu_rotary_mul, in the mode whose pairs are (i, i + D/2)."""
    rotated: Tensor = torch.ops.npu.npu_rotary_mul(x_BSHD, cos_BS1D, sin_BS1D, rotary_mode="half")
    return rotated


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """npu_swiglu: silu of the first half times the second."""
    product: Tensor = torch.ops.npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1)
    return product


def grouped_linear(rows_NI: Tensor, weight_XOI: Tensor, counts_X: Tensor) -> Tensor:
    """npu_grouped_matmul, with a gradient, which the operator has none of; see `moe.grouped_linear`."""
    if not len(rows_NI):
        return rows_NI @ weight_XOI[0].mT + weight_XOI.sum() * 0
    out_NO: Tensor = _GroupedLinear.apply(rows_NI, weight_XOI, counts_X.cumsum(0))
    return out_NO


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, weight_XOI: Tensor, ends_X: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NI, weight_XOI, ends_X)
        return _grouped(rows_NI, weight_XOI.mT, ends_X, _GROUPS_OF_ROWS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_NI, weight_XOI, ends_X = ctx.saved_tensors
        grad_NO = grads[0].contiguous()
        grad_rows_NI = _grouped(grad_NO, weight_XOI, ends_X, _GROUPS_OF_ROWS)
        # Each group's columns of the left factor times its rows of the right one.
        grad_weight_XIO = _grouped(rows_NI.mT, grad_NO, ends_X, _GROUPS_OF_INPUTS)
        return grad_rows_NI, grad_weight_XIO.mT, None


def _grouped(left: Tensor, right: Tensor, ends_X: Tensor, group_type: int) -> Tensor:
    product: Tensor = torch.ops.npu.npu_grouped_matmul(
        [left], [right], group_list=ends_X, split_item=_ONE_OUTPUT, group_type=group_type, group_list_type=0
    )[0]
    return product


def spread(x_TE: Tensor, experts_TR: Tensor) -> tuple[Tensor, Tensor]:
    """npu_moe_token_permute: each token's R copies, sorted by expert, [N, E]; with what `combine` needs to undo it."""
    rows_NE, places_N = torch.ops.npu.npu_moe_token_permute(x_TE, experts_TR.to(torch.int32))
    return rows_NE, places_N


def combine(rows_NE: Tensor, places_N: Tensor, weights_TR: Tensor) -> Tensor:
    """npu_moe_token_unpermute: the weighted sum of each token's rows, [T, E]."""
    combined: Tensor = torch.ops.npu.npu_moe_token_unpermute(rows_NE, places_N, probs=weights_TR)
    return combined


def gathered_linears(x_TI: Tensor, weights: Sequence[Tensor], communicator: str, num_ranks: int) -> tuple[Tensor, ...]:
    """npu_all_gather_base_mm: rows of all ranks times the first weight, gathered while they are multiplied (MC2).

    x [T of this rank, I], weights [O, I], each of its own O -> [T of all ranks, O] of each; the other products take
    the gathered rows. `communicator` is HCCL's name of the group. The gradient of x is summed over ranks and cut.
    """
    products: tuple[Tensor, ...] = _GatheredLinears.apply(x_TI, communicator, num_ranks, *weights)
    return products


class _GatheredLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, communicator: str, num_ranks: int, *weights: Tensor) -> tuple[Tensor, ...]:
        first_TO, whole_TI = _gather_and_multiply(x_TI, weights[0].mT, communicator, num_ranks)
        ctx.save_for_backward(whole_TI, *weights)
        ctx.group = (communicator, num_ranks)
        return (first_TO, *(whole_TI @ weight_OI.mT for weight_OI in weights[1:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole_TI, *weights = ctx.saved_tensors
        # Side by side they are one product, whose sum over ranks is made while it is multiplied.
        grad_TO, weight_OI = torch.cat(grads, dim=1), torch.cat(weights)
        grad_x_TI = _multiply_and_scatter(grad_TO, weight_OI, *ctx.group)
        wanted = ctx.needs_input_grad[3:]
        of_weights = (grad.mT @ whole_TI if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))
        return grad_x_TI, None, None, *of_weights


def scattered_linear(x_TI: Tensor, weight_OI: Tensor, communicator: str, num_ranks: int) -> Tensor:
    """npu_mm_reduce_scatter_base: this rank's rows of the sum over ranks of x times the weight (MC2).

    x [T of all ranks, I of this rank] -> [T of this rank, O]. The gradients of all ranks' rows are joined.
    """
    out_TO: Tensor = _ScatteredLinear.apply(x_TI, weight_OI, communicator, num_ranks)
    return out_TO


class _ScatteredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, communicator: str, num_ranks: int) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.group = (communicator, num_ranks)
        return _multiply_and_scatter(x_TI, weight_OI.mT, communicator, num_ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_TI, weight_OI = ctx.saved_tensors
        grad_x_TI, grad_TO = _gather_and_multiply(grads[0].contiguous(), weight_OI, *ctx.group)
        return grad_x_TI, grad_TO.mT @ x_TI if ctx.needs_input_grad[1] else None, None, None


def _gather_and_multiply(x: Tensor, right: Tensor, communicator: str, num_ranks: int) -> tuple[Tensor, Tensor]:
    product, whole = torch.ops.npu.npu_all_gather_base_mm(
        x, right, communicator, num_ranks, gather_index=0, gather_output=True
    )
    return product, whole


def _multiply_and_scatter(x: Tensor, right: Tensor, communicator: str, num_ranks: int) -> Tensor:
    product: Tensor = torch.ops.npu.npu_mm_reduce_scatter_base(x, right, communicator, num_ranks, reduce_op="sum")
    return product

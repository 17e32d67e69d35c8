"""Weights laid out for the CPU's matrix products, once and not at each product.

A product of some rows with a large matrix spends most of its time on reordering the matrix into the blocks that the
kernel reads. oneDNN can be given a matrix in these blocks: a product is then about twice as fast with 4 to 16 rows in
fp32, and up to 1.6 times with 1 to 32 rows in bf16. One row in fp32 is best multiplied with a matrix by columns, where
there are more rows than columns: long columns are added up instead of many short dot products. Either takes the place
of the plain matrix, so memory stays the same.

For every number of rows that it meets oneDNN compiles a kernel, which it keeps for as long as the process lives: some
150 KiB for each shape of matrix, in bf16 several times that. Prompts bring new numbers all the time, so products take
a few numbers of rows alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.model.layers import Linear

# oneDNN picks the blocks for so many rows; others take them, too.
_ROWS = 32
# Numbers of rows from each power of two to the next, for few rows and for many: on average one row in twenty, or in
# ten, is computed in vain. Kernels for many rows are the large ones, and only prompts need them.
_STEPS_OF_FEW, _STEPS_OF_MANY = 8, 4
_FEW_ROWS = 64


class PackedLinear(Linear):
    """A linear map whose weight is in oneDNN's blocks, for use without gradients."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS)
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.bias, self.lora, self.nf4 = linear.bias, linear.lora, None

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, without what is learned beside it."""
        rows_NI = x.flatten(0, -2)
        num_rows = len(rows_NI)
        if (more := padded_rows(num_rows) - num_rows) > 0:
            rows_NI = F.pad(rows_NI, (0, 0, 0, more))
        y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(rows_NI, self.weight, bias, "none", [], "")
        return y_NO[:num_rows].unflatten(0, x.shape[:-1])

    def dense_weight(self) -> Tensor:
        """The weight as numbers."""
        return self.weight.detach().to_dense()


def padded_rows(num_rows: int) -> int:
    """How many rows a product of `num_rows` takes: less than a quarter more, and one of a few numbers."""
    steps = _STEPS_OF_FEW if num_rows <= _FEW_ROWS else _STEPS_OF_MANY
    step = 1 << max((num_rows - 1).bit_length() - steps.bit_length(), 0)
    return -(-num_rows // step) * step


def suit_many_texts(model: nn.Module) -> None:
    """For texts together: put the weights of linear maps into blocks, one after another."""
    _pack(model, (torch.float32, torch.bfloat16))


def suit_one_text(model: nn.Module) -> None:
    """For one text at a time: store the weights of linear maps by columns or in blocks, where that helps."""
    _pack(model, (torch.bfloat16,))
    for _, _, linear in _plain(model):
        num_rows, num_columns = linear.weight.shape
        if num_rows > num_columns and linear.weight.dtype == torch.float32:
            linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t(), requires_grad=False)


def _pack(model: nn.Module, dtypes: Collection[torch.dtype]) -> None:
    # Operators of torch that it does not document: without them weights stay plain.
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes = [dtype for dtype in dtypes if dtype != torch.bfloat16]
    for owner, name, linear in _plain(model):
        if linear.weight.dtype in dtypes:
            setattr(owner, name, PackedLinear(linear))


def _plain(model: nn.Module) -> list[tuple[nn.Module, str, Linear]]:
    """Linear maps whose weights are plain on the CPU, each with its owner and its name there.

    The head is none of them, since the model takes it for a matrix (see `engine.suit_few_rows`), nor are those whose
    products ranks add up.
    """
    children = [(owner, name, child) for owner in model.modules() for name, child in owner.named_children()]
    return [
        (owner, name, child)
        for owner, name, child in children
        if type(child) is Linear and child.nf4 is None and name != "lm_head" and child.weight.device.type == "cpu"
    ]

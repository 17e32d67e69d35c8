"""Weights laid out for the CPU's matrix products, once and not at each product.

A product of a few rows with a large matrix spends most of its time on reordering the matrix into the blocks that the
kernel reads. oneDNN can be given a matrix in these blocks: with 4 to 16 rows a product is then about twice as fast,
with one or many a sixth. The matrix in blocks takes the place of the plain one, so memory stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessel.model.layers import Linear

# oneDNN picks the blocks for so many rows; others take them, too.
_ROWS = 32


class PackedLinear(Linear):
    """A linear map whose weight is in oneDNN's blocks, for use without gradients."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.bias, self.lora, self.nf4 = linear.bias, linear.lora, None

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, without what is learned beside it."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        return y

    def dense_weight(self) -> Tensor:
        """The weight as numbers."""
        return self.weight.detach().to_dense()


def pack_weights(model: nn.Module) -> None:
    """Put the fp32 weights of a model's linear maps on the CPU into blocks, one after another; the rest stays.

    Of the rest are the head, which is a matrix to the model and no map, and what ranks share row by row.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for owner in list(model.modules()):
        for name, linear in list(owner.named_children()):
            if type(linear) is not Linear or linear.nf4 is not None or name == "lm_head":
                continue
            if linear.weight.dtype == torch.float32 and linear.weight.device.type == "cpu":
                setattr(owner, name, PackedLinear(linear))

"""Overlap of tensor-parallel communication with matrix products, by what the device has for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tessel.model import vendor
from tessel.runtime import device as devices

FLAG = "--tp-comm-overlap"


@dataclass(frozen=True)
class FusedProducts:
    """Products with sequence parallelism's collectives inside them, on tensors [B, S, features] cut along S.

    The operators take matrices, whose rows the ranks share in their order: sequence before batch. With one sequence
    in a batch that is a view.
    """

    communicator: str
    num_ranks: int
    inner_sizes: range = vendor.INNER_SIZES

    def takes(self, *inner_sizes: int) -> bool:
        """Whether products with these inner dims may be among a linear map's, forward and backward."""
        return all(size in self.inner_sizes for size in inner_sizes)

    def gathered(self, x_BSI: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x [B, S of this rank, I], weights [O, I], each of its own O -> [B, S of all ranks, O] of each."""
        products = vendor.gathered_linears(_rows(x_BSI), weights, self.communicator, self.num_ranks)
        return tuple(_sequences(y, len(x_BSI)) for y in products)

    def scattered(self, x_BSI: Tensor, weight_OI: Tensor) -> Tensor:
        """x [B, S of all ranks, I of this rank] -> this rank's part of the sum over ranks, [B, S of this rank, O]."""
        product = vendor.scattered_linear(_rows(x_BSI), weight_OI, self.communicator, self.num_ranks)
        return _sequences(product, len(x_BSI))


def _rows(x_BSI: Tensor) -> Tensor:
    return x_BSI.transpose(0, 1).flatten(0, 1).contiguous()


def _sequences(rows_TO: Tensor, batch: int) -> Tensor:
    return rows_TO.unflatten(0, (-1, batch)).transpose(0, 1)


def enable_overlap(
    device: torch.device,
    group: ProcessGroup | None,
    sequence_parallel: bool,
    compiled: bool,
    dtype: torch.dtype,
) -> tuple[FusedProducts | None, str]:
    """Turn it on: products for the layers to take, where the device has such operators, and the line to log.

    Elsewhere it is async tensor parallelism, for layers that are compiled later: torch's compiler then runs an
    all-gather together with the products that take its result, and a product together with the reduce-scatter of its
    result, piece by piece over symmetric memory. Products with a bias are left as they are. Numbers change by the
    rounding of other products, as with any compiler. The line says what is used, or why nothing is.
    """
    if group is None:
        return None, _without("there is one tensor-parallel process")
    if not sequence_parallel:
        return None, _without("only gathers and scatters overlap, which need --sequence-parallel")
    fused, why = devices.fused_products_available(device, group.size(), dtype)
    if fused:
        return FusedProducts(devices.communicator_name(group, device), group.size()), f"{FLAG}: {why}"
    if devices.vendor_kernels_available(device)[0]:
        return None, _without(why)
    if not compiled:
        return None, _without("torch's compiler does it, which needs --compile")
    available, why = devices.symmetric_memory_available(device, group.size())
    if not available:
        return None, _without(why)
    _enable_async_products(group)
    return None, f"{FLAG}: torch's async tensor parallelism, in compiled layers"


def _without(reason: str) -> str:
    return f"{FLAG}: {reason}; going on without"


def _enable_async_products(group: ProcessGroup) -> None:
    # Private in torch 2.11 to 2.13, and what its own documentation of async tensor parallelism says to set.
    from torch._inductor import config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    config._micro_pipeline_tp = True

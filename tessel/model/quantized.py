"""Weights in four bits: NF4 (QLoRA, arXiv 2305.14314), as bitsandbytes quantises them on the CPU, bit for bit.

Each block of 64 consecutive elements of the whole tensor has one scale, its largest magnitude; an element is the
nearest of 16 numbers between -1 and 1 times that. With double quantisation the scales, less their mean, are stored
in 8 bits, with a scale of their own for every 256 of them. The table, the order of the two codes in a byte and the
8-bit numbers are those of bitsandbytes 0.50 (`functional.py`: `get_4bit_type`, `create_dynamic_map`,
`quantize_4bit`; `backends/default/ops.py`; `csrc/cpu_ops.cpp`).

A layer holds a box of a tensor that was quantised whole, so that every layout computes with the same numbers. Of
each row of the box it has the codes, and then the scales: one for each `group` of elements, which is a block of 64
where the cuts fall between blocks, and less where they do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, NESTED_BLOCK = 64, 256
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# The whole of a stored tensor, or a box of it.
Read = Callable[[tuple[slice, ...] | None], Tensor]
# Rows of each group times the group's matrix, as `model.moe.grouped_linear`.
Grouped = Callable[[Tensor, Tensor, Tensor], Tensor]
# Rows begin at addresses at which fp32 scales may be read.
_ALIGNMENT_BYTES = 4
_NESTED_STEPS = 65535


@dataclass(frozen=True)
class NestedScales:
    """8-bit scales: `values()[code] * absmax[block] + offset`; absmax fp32, one for 256 scales."""

    absmax: Tensor
    offset: float


@dataclass(frozen=True)
class Quantized:
    """A whole tensor of `shape` in NF4.

    Attributes:
        codes: uint8, two elements a byte, the first of them in its upper half.
        absmax: scales of the blocks of 64, fp32; uint8 with `nested`.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    nested: NestedScales | None = None

    def scales(self) -> Tensor:
        """Of every block, fp32."""
        if self.nested is None:
            return self.absmax
        values = nested_values().to(self.absmax.device)[self.absmax.int()]
        outer = self.nested.absmax.repeat_interleave(NESTED_BLOCK)[: len(values)]
        return values * outer + self.nested.offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor, computed in fp32."""
        num_elements = math.prod(self.shape)
        values = _pairs(self.codes)[:num_elements]
        scales = self.scales().repeat_interleave(BLOCK)[:num_elements]
        return (values * scales).view(self.shape).to(dtype)


def quantize_nf4(weight: Tensor, double: bool = False) -> Quantized:
    """The whole `weight` in NF4; `double`: its scales in 8 bits."""
    codes, absmax = _nearest(weight)
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1), value=7)  # the code of zero
    packed = (codes[::2] << 4) | codes[1::2]
    shape = tuple(weight.shape)
    if not double:
        return Quantized(packed, absmax, shape)
    offset = absmax.cpu().mean()  # a device may add in another order
    nested_codes, nested_absmax = _nearest_nested(absmax - offset.to(absmax))
    return Quantized(packed, nested_codes, shape, NestedScales(nested_absmax, float(offset)))


def _nearest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The code of every element, uint8 [n], and the scale of every block, fp32."""
    table = nf4_values().to(values.device)
    flat = values.reshape(-1).float()
    num_whole = flat.numel() // BLOCK * BLOCK
    absmax = flat[:num_whole].view(-1, BLOCK).abs().amax(dim=1)
    parts = [flat[:num_whole].view(-1, BLOCK) * (1.0 / absmax.clamp(min=1e-38))[:, None]]
    if num_whole < flat.numel():
        last = flat[num_whole:].abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        parts.append(flat[num_whole:] / last)
    scaled = torch.cat([part.reshape(-1) for part in parts]).clamp(-1, 1)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8), absmax


def _nearest_nested(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The code of every scale, uint8, and the scale of each block of them, fp32.

    As bitsandbytes does it on the CPU, a number is first rounded to one of 65536 steps from -1 to 1, so that a code
    may be the second nearest.
    """
    table = nested_values().to(scales.device)
    blocks = F.pad(scales, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax)[:, None]).clamp(-1, 1)
    steps = ((scaled + 1.0) * 0.5 * _NESTED_STEPS + 0.5).floor()
    codes = torch.bucketize(-1.0 + 2.0 * steps / _NESTED_STEPS, (table[:-1] + table[1:]) * 0.5, out_int32=True)
    codes = torch.where(absmax[:, None] == 0, 0, codes)
    return codes.to(torch.uint8).view(-1)[: len(scales)], absmax


@functools.cache
def nf4_values() -> Tensor:
    """The 16 numbers, rising, fp32."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device="cpu")


@functools.cache
def nested_values() -> Tensor:
    """The 256 numbers of 8-bit scales, rising, fp32: a sign, up to 7 leading zeros of an exponent, a fraction."""
    found = [0.0, 1.0]
    with torch.device("cpu"):
        for exponent in range(7):
            edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
            means = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
            found += [*means.tolist(), *(-means).tolist()]
        return torch.tensor(sorted(found), dtype=torch.float32)


@functools.lru_cache
def _pair_table(device: torch.device) -> Tensor:
    """Both numbers of a byte, seen as one fp64: one look-up gives two elements."""
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([nf4_values()[byte >> 4], nf4_values()[byte & 15]], dim=1)
    return pairs.view(torch.float64).view(256).to(device)


def _pairs(codes: Tensor) -> Tensor:
    """uint8 [..., n] -> fp32 [..., 2 n]."""
    return _pair_table(codes.device)[codes.int()].view(torch.float32)


@dataclass(frozen=True)
class Packing:
    """How a layer holds the box `start`, `size` of a weight of the whole `shape`: rows of bytes, seen as `dtype`.

    `double`: with 8-bit scales.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    double: bool

    @property
    def group(self) -> int:
        """Consecutive elements of a row that surely lie in one block."""
        return math.gcd(BLOCK, self.shape[-1], self.start[-1], self.size[-1])

    @property
    def num_groups(self) -> int:
        """Of a row."""
        return self.size[-1] // self.group

    @property
    def code_bytes(self) -> int:
        """Of a row, with padding."""
        return _aligned(-(-self.size[-1] // 2))

    @property
    def scale_bytes(self) -> int:
        """Of a row, with padding."""
        return _aligned(self.num_groups if self.double else 4 * self.num_groups)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Of the tensor of `dtype` that holds the rows."""
        return (*self.size[:-1], (self.code_bytes + self.scale_bytes) // self.dtype.itemsize)

    @property
    def nested_shape(self) -> tuple[int]:
        """Of the tensor with the scales of the 8-bit scales of the whole weight, and their offset."""
        return (-(-math.prod(self.shape) // (BLOCK * NESTED_BLOCK)) + 1 if self.double else 0,)

    def pack(self, whole: Quantized) -> tuple[Tensor, Tensor]:
        """The box's rows, and the scales of its 8-bit scales (`nested_shape`, fp32)."""
        box = tuple(slice(begin, begin + size) for begin, size in zip(self.start, self.size, strict=True))
        both = torch.stack([whole.codes >> 4, whole.codes & 15], dim=1).view(-1)
        codes = both[: math.prod(self.shape)].view(self.shape)[box]
        codes = F.pad(codes, (0, 2 * self.code_bytes - self.size[-1]), value=7)
        rows = (codes[..., ::2] << 4) | codes[..., 1::2]
        scales = whole.absmax[self._blocks(whole.absmax.device)].contiguous().view(torch.uint8)
        scales = F.pad(scales, (0, self.scale_bytes - scales.shape[-1]))
        packed = torch.cat([rows, scales], dim=-1).view(self.dtype)
        if whole.nested is None:
            return packed, whole.absmax.new_empty(0)
        offset = whole.nested.absmax.new_tensor([whole.nested.offset])
        return packed, torch.cat([whole.nested.absmax, offset])

    def dequantize(self, packed: Tensor, nested: Tensor, dtype: torch.dtype) -> Tensor:
        """The box of the weight, or of each of several, [..., O, I]."""
        rows = packed.detach().view(torch.uint8)
        values = _pairs(rows[..., : self.code_bytes])[..., : self.size[-1]]
        stored = rows[..., self.code_bytes :]
        if self.double:
            outer = nested[..., self._blocks(packed.device) // NESTED_BLOCK]
            offset = nested[..., -1, None, None]
            scales = nested_values().to(packed.device)[stored[..., : self.num_groups].int()] * outer + offset
        else:
            scales = stored.view(torch.float32)[..., : self.num_groups]
        weight = values.unflatten(-1, (self.num_groups, self.group)) * scales[..., None]
        return weight.flatten(-2).to(dtype)

    def _blocks(self, device: torch.device) -> Tensor:
        """The block of the whole weight that each group of the box lies in."""
        flat = torch.zeros((), dtype=torch.int64, device=device)
        stride = math.prod(self.shape)
        for dim, (begin, size) in enumerate(zip(self.start, self.size, strict=True)):
            stride //= self.shape[dim]
            step = self.group if dim == len(self.shape) - 1 else 1
            along = torch.arange(begin, begin + size, step, device=device) * stride
            flat = flat[..., None] + along
        return flat // BLOCK


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class _Linear(torch.autograd.Function):
    """x W^T with a weight that is dequantised for it, again in backward, and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, nested: Tensor, packing: Packing) -> Tensor:
        ctx.save_for_backward(packed, nested)
        ctx.packing = packing
        return F.linear(x, packing.dequantize(packed, nested, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        packed, nested = ctx.saved_tensors
        return grads[0] @ ctx.packing.dequantize(packed, nested, grads[0].dtype), None, None, None


class _GroupedLinear(torch.autograd.Function):
    """`_Linear` of rows sorted by expert, each with its expert's weight."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_NI: Tensor,
        packed: Tensor,
        nested: Tensor,
        packing: Packing,
        counts_X: Tensor,
        grouped: Grouped,
    ) -> Tensor:
        ctx.save_for_backward(packed, nested, counts_X)
        ctx.packing, ctx.grouped = packing, grouped
        return grouped(rows_NI, packing.dequantize(packed, nested, rows_NI.dtype), counts_X)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        packed, nested, counts_X = ctx.saved_tensors
        weight_XOI = ctx.packing.dequantize(packed, nested, grads[0].dtype)
        return ctx.grouped(grads[0], weight_XOI.transpose(1, 2), counts_X), None, None, None, None, None


class Nf4(nn.Module):
    """What a linear map needs besides its rows of bytes, which are its `weight`."""

    nested: Tensor

    def __init__(self, packing: Packing, device: torch.device) -> None:
        super().__init__()
        self.packing = packing
        nested = torch.empty(packing.nested_shape, dtype=torch.float32, device=device)
        self.register_buffer("nested", nested, persistent=False)

    def forward(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        y: Tensor = _Linear.apply(x, packed, self.nested, self.packing)
        return y

    def weight(self, packed: Tensor, first_row: int = 0) -> Tensor:
        """The rows of the weight that `packed` holds, the first of which is row `first_row`: fp32."""
        start, size = self.packing.start, self.packing.size
        rows = replace(self.packing, start=(start[0] + first_row, *start[1:]), size=(packed.shape[0], *size[1:]))
        return rows.dequantize(packed, self.nested, torch.float32)

    @torch.no_grad()
    def fill(self, packed: Tensor, read: Read, box: Sequence[slice]) -> None:
        """Quantise the whole weight that `read` gives, and write the part `box` of the packed rows into `packed`."""
        self.nested.copy_(_fill(self.packing, packed, read(None), box))


class Nf4Experts(nn.Module):
    """As `Nf4`, of stacked matrices [X, O, I], each of which was quantised whole: those from number `first` on."""

    nested: Tensor

    def __init__(self, packing: Packing, first: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.packing, self.first = packing, first
        nested = torch.empty((num_experts, *packing.nested_shape), dtype=torch.float32, device=device)
        self.register_buffer("nested", nested, persistent=False)

    def forward(self, rows_NI: Tensor, packed: Tensor, counts_X: Tensor, grouped: Grouped) -> Tensor:
        """Rows sorted by expert, `counts_X` of each, through `grouped` -> [N, O]."""
        y_NO: Tensor = _GroupedLinear.apply(rows_NI, packed, self.nested, self.packing, counts_X, grouped)
        return y_NO

    @torch.no_grad()
    def fill(self, packed: Tensor, read: Read, box: Sequence[slice]) -> None:
        """As of `Nf4`; one expert after another is read, those alone that are needed."""
        held, *inner = box
        for number in range(len(self.nested)):
            is_held = held.start <= number < held.stop
            if is_held or self.packing.double:
                expert = self.first + number
                whole = read((slice(expert, expert + 1), *(slice(0, size) for size in self.packing.shape)))[0]
                target = packed[number - held.start] if is_held else packed.new_empty(0)
                self.nested[number] = _fill(self.packing, target, whole, inner)


def _fill(packing: Packing, packed: Tensor, whole: Tensor, box: Sequence[slice]) -> Tensor:
    """Quantise `whole`, and write the part `box` of the packed rows into `packed`, if it is not empty.

    Returns the scales of the 8-bit scales.
    """
    value = whole.to(packed.device, packing.dtype)
    rows, nested = packing.pack(quantize_nf4(value, packing.double))
    if packed.numel():
        # As bytes: a copy of numbers might quieten what happens to be no number.
        packed.view(torch.uint8).copy_(rows[tuple(box)].contiguous().view(torch.uint8))
    return nested

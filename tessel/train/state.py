"""Optimizer state that takes less memory than fp32: rounding to bf16, and 8 bits a number with a scale for each block.

Both moments of Adam change by little at a step, the second one by a thousandth, which is less than half of what two
neighbouring numbers differ by in either form: rounded to the nearest, it would stay where it is. So what
the step writes of it is rounded up or down at random, with the true value as the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tessel.checkpoint.tiles import local_of

BLOCK = 256
NUM_DECADES = 7
# Elements decoded at a time.
_PART = 2**22


@functools.cache
def dynamic_values(signed: bool, device: torch.device) -> Tensor:
    """What the codes of 8 bits stand for, rising, fp32, largest 1.

    Numbers of many sizes: the first bits say the power of ten and the rest go to the digits, so the largest decade
    has the most of them (dynamic tree quantisation, arXiv 1511.04561). Unsigned, 0 and 254 numbers from 5.5e-7
    to 1, from which 1 is apart; signed, 0 and 127 of each sign.
    """
    values = [0.0, 1.0]
    for decade in range(NUM_DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        bounds = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        values += ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - NUM_DECADES + 1)).tolist()
    positive = sorted(values)
    if signed:
        # One too many: the smallest goes.
        del positive[1]
        positive = [-value for value in reversed(positive[1:])] + positive
    return torch.tensor(positive, dtype=torch.float32, device=device)


@dataclass
class Blockwise:
    """Numbers as codes of 8 bits, each block of 256 with the largest of its magnitudes as scale (arXiv 2110.02861).

    `codes`: uint8, of the shape of what it stands for. `scales`: fp32, one for each block of its local elements in
    their order. Unsigned codes hold square roots, and only 0 becomes 0, since what they stand for is divided by.
    """

    codes: Tensor
    scales: Tensor
    signed: bool

    @classmethod
    def zeros(cls, like: Tensor, signed: bool, device: torch.device, pin: bool = False) -> Blockwise:
        """Zeros of the shape of a tensor, distributed as it is, in memory of `device`."""
        codes = torch.zeros_like(like, dtype=torch.uint8, device=device, pin_memory=pin)
        zero = int((dynamic_values(signed, torch.device("cpu")) == 0).nonzero())
        local_of(codes).fill_(zero)
        num_blocks = -(-local_of(codes).numel() // BLOCK)
        return cls(codes, torch.zeros(num_blocks, device=device, pin_memory=pin), signed)

    def decoded(self) -> Tensor:
        """The numbers, fp32 and in host memory, distributed as the codes are; encoding them gives the codes again."""
        values = torch.zeros_like(self.codes, dtype=torch.float32, device="cpu")
        flat = local_of(values).view(-1)
        for part in parts_of(flat.numel()):
            flat[part] = read(State(local_of(self.codes), self.scales, self.signed), part).cpu()
        return values

    def encode_(self, values: Tensor) -> None:
        """Overwrite with fp32 numbers of the same shape and distribution, each rounded to the nearest code."""
        flat = local_of(values).reshape(-1)
        for part in parts_of(flat.numel()):
            own = State(local_of(self.codes), self.scales, self.signed)
            write(own, part, flat[part].to(self.scales.device))


@dataclass(frozen=True)
class State:
    """This process's part of one moment of one parameter, where it is being computed with.

    `values`: fp32, bf16 or codes; `scales`: those of codes, else None. `signed`: the first moment.
    """

    values: Tensor
    scales: Tensor | None
    signed: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return (self.values,) if self.scales is None else (self.values, self.scales)

    def elsewhere(self, tensors: Sequence[Tensor]) -> State:
        """The same held in other tensors."""
        return State(tensors[0], tensors[1] if len(tensors) > 1 else None, self.signed)


def local_state(kept: Tensor | Blockwise, signed: bool) -> State:
    """This process's part of what an optimizer keeps."""
    if isinstance(kept, Blockwise):
        return State(local_of(kept.codes), kept.scales, kept.signed)
    return State(local_of(kept), None, signed)


def parts_of(num_elements: int) -> list[slice]:
    """Slices that cover so many elements, each beginning with a block."""
    return [slice(begin, min(begin + _PART, num_elements)) for begin in range(0, num_elements, _PART)]


def read(state: State, part: slice) -> Tensor:
    """A slice of the flat state, fp32: a view where it is held in fp32, else a copy."""
    values = state.values.view(-1)[part]
    if state.scales is None:
        return values.float()
    decoded = dynamic_values(state.signed, values.device).index_select(0, values.int())
    decoded = _blocks(decoded) * state.scales[_blocks_in(part), None]
    decoded = decoded.view(-1)[: values.numel()]
    return decoded if state.signed else decoded.square_()


def write(state: State, part: slice, values: Tensor, generator: torch.Generator | None = None) -> None:
    """Overwrite a slice of the flat state with fp32 `values`: rounded at random by `generator`, or to the nearest."""
    target = state.values.view(-1)[part]
    if state.scales is not None:
        codes, scales = _encoded(values, state.signed, generator)
        target.copy_(codes)
        state.scales[_blocks_in(part)] = scales
    elif target.dtype is torch.bfloat16 and generator is not None:
        target.copy_(_rounded_to_bf16(values, generator))
    elif target.data_ptr() != values.data_ptr():
        target.copy_(values)


def _blocks(flat: Tensor) -> Tensor:
    """[n] -> [blocks, 256], filled up with zeros."""
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _blocks_in(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _encoded(values: Tensor, signed: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    blocks = _blocks(values if signed else values.sqrt())
    scales = blocks.abs().amax(dim=1)
    relative = (blocks / scales.where(scales > 0, 1.0)[:, None]).view(-1)[: values.numel()]
    table = dynamic_values(signed, values.device)
    codes = _below(relative, signed)
    low, high = table.index_select(0, codes), table.index_select(0, codes + 1)
    share = (relative - low) / (high - low)
    limit = torch.rand(share.shape, generator=generator, device=share.device) if generator is not None else 0.5
    codes += share > limit
    if not signed:
        codes = torch.maximum(codes, relative > 0)
    return codes.to(torch.uint8), scales


def _below(relative: Tensor, signed: bool) -> Tensor:
    """The code of the largest value up to each number, int32, at most the last but one; five times as fast as a search.

    The first 17 bits of a number leave two codes at most, of which a comparison takes the right one.
    """
    table = dynamic_values(signed, relative.device)
    first_bits = (relative.view(torch.int32) >> 15) & 0x1FFFF
    codes = _codes_by_bits(signed, relative.device).index_select(0, first_bits)
    codes += relative >= table.index_select(0, codes + 1)
    return codes.clamp_(max=len(table) - 2)


@functools.cache
def _codes_by_bits(signed: bool, device: torch.device) -> Tensor:
    """For the first 17 bits of an fp32, the code of the largest value up to the smallest number that begins so."""
    table = dynamic_values(signed, torch.device("cpu"))
    bits = torch.arange(1 << 17, dtype=torch.int64) << 15
    ends = torch.stack((bits, bits | 0x7FFF)).to(torch.int32).view(torch.float32).nan_to_num()
    codes = torch.bucketize(ends.amin(dim=0), table, right=True) - 1
    return codes.clamp_(0, len(table) - 2).to(torch.int32).to(device)


def _rounded_to_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> numbers that bf16 holds exactly: one of the two neighbours, the nearer one more often."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator, device=bits.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32)

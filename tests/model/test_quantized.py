"""NF4: the codes and scales of bitsandbytes, and boxes of a tensor that was quantised whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessel.model.moe import grouped_linear
from tessel.model.quantized import Nf4, Nf4Experts, Packing, nested_values, nf4_values, quantize_nf4

SHAPES = [(64, 64), (33, 50), (7, 9), (1, 3), (200, 896)]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bit_for_bit_as_bitsandbytes(dtype: torch.dtype, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    for shape in SHAPES:
        weight = (torch.randn(shape) * 0.02).to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        ours = quantize_nf4(weight, double)
        assert torch.equal(ours.codes, codes[:, 0])
        assert torch.equal(ours.absmax, state.absmax)
        if double:
            assert ours.nested is not None
            assert torch.equal(ours.nested.absmax, state.state2.absmax)
            assert ours.nested.offset == state.offset.item()
        with torch.compiler.set_stance("force_eager"):  # it compiles for each shape
            assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(codes, state))


def test_the_tables_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(nf4_values(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nested_values(), functional.create_dynamic_map())


def test_known_codes() -> None:
    """By hand: the nearest of the 16 numbers times the block's largest magnitude."""
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([2.0, -2.0, 0.9, -0.2])
    weight[1, 0] = -0.5
    quantized = quantize_nf4(weight)
    assert quantized.absmax.tolist() == [2.0, 0.5]
    assert quantized.codes[:2].tolist() == [15 << 4 | 0, 12 << 4 | 6]
    assert quantized.codes[32].item() == 0 << 4 | 7
    assert quantized.dequantize()[0, 2].item() == pytest.approx(2 * 0.4407098293)
    zeros = quantize_nf4(torch.zeros(5, 5))
    assert torch.equal(zeros.dequantize(), torch.zeros(5, 5))


def test_quantising_again_changes_nothing() -> None:
    torch.manual_seed(1)
    once = quantize_nf4(torch.randn(48, 100))
    again = quantize_nf4(once.dequantize())
    assert torch.equal(once.codes, again.codes) and torch.equal(once.absmax, again.absmax)


BOXES = [((96, 128), (0, 64), (96, 64)), ((30, 40), (10, 10), (20, 15)), ((4, 12, 40), (2, 0, 20), (2, 12, 20))]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("shape", "start", "size"), BOXES)
def test_a_box_is_that_of_the_whole(
    shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...], double: bool
) -> None:
    torch.manual_seed(2)
    whole = quantize_nf4(torch.randn(shape), double)
    box = tuple(slice(begin, begin + length) for begin, length in zip(start, size, strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        packing = Packing(shape, start, size, dtype, double)
        packed, nested = packing.pack(whole)
        assert packed.shape == packing.packed_shape and nested.shape == packing.nested_shape
        assert torch.equal(packing.dequantize(packed, nested, torch.float32), whole.dequantize()[box])


def test_backward_reaches_the_input_alone() -> None:
    torch.manual_seed(3)
    weight = torch.randn(24, 128)
    packing = Packing((24, 128), (0, 0), (24, 128), torch.float32, double=True)
    nf4 = Nf4(packing, torch.device("cpu"))
    packed = torch.empty(packing.packed_shape)
    nf4.fill(packed, lambda box: weight, (slice(0, 24), slice(None)))
    plain = quantize_nf4(weight, double=True).dequantize()
    x, same = (torch.linspace(-1, 1, 5 * 128).view(5, 128).requires_grad_() for _ in range(2))
    y, expected = nf4(x, packed), F.linear(same, plain)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize("double", [False, True])
def test_experts_of_a_box(double: bool) -> None:
    """Experts 1 and 2 of 4, a part of each, in their dequantised products, forward and backward."""
    torch.manual_seed(4)
    whole = torch.randn(4, 24, 128)
    packing = Packing((24, 128), (8, 0), (16, 128), torch.float32, double)
    experts = Nf4Experts(packing, 1, 2, torch.device("cpu"))
    packed = torch.empty(2, *packing.packed_shape)
    read: list[int] = []

    def reading(box: tuple[slice, ...] | None) -> torch.Tensor:
        assert box is not None
        read.append(box[0].start)
        return whole[box]

    for first in (0, 1):  # as two processes that share the experts would
        experts.fill(packed[first : first + 1], reading, (slice(first, first + 1), slice(0, 16), slice(None)))
    assert read == ([1, 2, 1, 2] if double else [1, 2])
    plain = torch.stack([quantize_nf4(whole[expert], double).dequantize()[8:] for expert in (1, 2)])
    counts = torch.tensor([3, 2])
    x, same = (torch.linspace(-1, 1, 5 * 128).view(5, 128).requires_grad_() for _ in range(2))
    y, expected = experts(x, packed, counts, grouped_linear), grouped_linear(same, plain, counts)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, same.grad)


def test_half_a_byte_an_element() -> None:
    packing = Packing((896, 896), (0, 0), (896, 896), torch.bfloat16, double=False)
    assert packing.packed_shape[1] * 2 == 896 // 2 + 4 * 896 // 64
    double = Packing((896, 896), (0, 0), (896, 896), torch.bfloat16, double=True)
    assert double.packed_shape[1] * 2 == 896 // 2 + 16

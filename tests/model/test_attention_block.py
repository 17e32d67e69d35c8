"""Blocks of attention: each implementation against autograd, and put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessel.model import attention_block
from tessel.model.attention_block import BLOCKS, NOTHING, block_backward, block_forward

ON_CPU = ["plain", "cpu"]


def inputs(heads: int, groups: int, dtype: torch.dtype, device: str = "cpu", length: int = 24) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output, each [2, heads, length, 8] of memory [2, length, heads, 8]."""
    shapes = ((2, length, number, 8) for number in (heads, groups, groups, heads))
    return tuple(torch.randn(shape).to(device, dtype).transpose(1, 2) for shape in shapes)


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def masks(length: int, device: str = "cpu") -> dict[str, tuple[Tensor | None, bool]]:
    """Name -> (visible, causal)."""
    random = torch.rand(1, 1, length, length) < 0.5
    random |= torch.eye(length, dtype=torch.bool)
    return {"full": (None, False), "causal": (None, True), "masked": (random.to(device), False)}


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("mask", ["full", "causal", "masked"])
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_implementation(name: str, mask: str, groups: int, dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(6, groups, dtype)
    visible, causal = masks(24)[mask]
    seen = torch.ones(24, 24, dtype=torch.bool).tril() if causal else visible
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference(*leaves, seen)
    expected_grads = torch.autograd.grad(expected, leaves, grad.float())
    tolerance = {"rtol": 1e-6, "atol": 3e-6} if dtype is torch.float32 else {"rtol": 0, "atol": 0.06}

    out, lse = BLOCKS[name].forward(q, k, v, visible, causal)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **tolerance)
    grads = BLOCKS[name].backward(grad, q, k, v, out, lse, visible, causal)
    for ours, theirs, x in zip(grads, expected_grads, (q, k, v), strict=True):
        assert ours.shape == x.shape
        torch.testing.assert_close(ours.float(), theirs, **tolerance)


@pytest.mark.parametrize("name", ON_CPU)
def test_two_blocks_are_the_whole(name: str) -> None:
    """The first block hides everything from some queries: what these got there must not count."""
    q, k, v, grad = inputs(4, 2, torch.float32)
    visible = torch.rand(1, 1, 24, 24) < 0.5
    visible[..., :12] &= torch.arange(24)[:, None] > 8
    visible[..., 12] = True
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference(*leaves, visible)
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    block, halves = BLOCKS[name], (slice(0, 12), slice(12, 24))
    parts = [block.forward(q, k[:, :, half], v[:, :, half], visible[..., half], False) for half in halves]
    assert (parts[0][1][:, :, :9] < NOTHING / 2).all()
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum((out * (own - lse).exp()[..., None] for out, own in parts), torch.zeros(()))
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected)
    grads = [block.backward(grad, q, k[:, :, h], v[:, :, h], out, lse, visible[..., h], False) for h in halves]
    torch.testing.assert_close(grads[0][0] + grads[1][0], expected_grads[0], rtol=0, atol=3e-6)
    for number in (1, 2):
        joined = torch.cat((grads[0][number], grads[1][number]), dim=2)
        torch.testing.assert_close(joined, expected_grads[number], rtol=0, atol=3e-6)


@pytest.mark.parametrize("mask", ["full", "causal", "masked"])
def test_the_plain_one_goes_part_by_part(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = inputs(4, 2, torch.float32)
    visible, causal = masks(24)[mask]
    plain = BLOCKS["plain"]
    out, lse = plain.forward(q, k, v, visible, causal)
    grads = plain.backward(grad, q, k, v, out, lse, visible, causal)
    most = 2 * 4 * 24 * 5
    monkeypatch.setattr(attention_block, "_MOST_SCORES", most)
    largest = []
    scores = attention_block._scores
    monkeypatch.setattr(attention_block, "_scores", lambda *a: largest.append((s := scores(*a)).numel()) or s)
    in_parts = plain.forward(q, k, v, visible, causal)
    grads_in_parts = plain.backward(grad, q, k, v, *in_parts, visible, causal)
    assert len(largest) == 10 and max(largest) == most
    for ours, theirs in zip((*in_parts, *grads_in_parts), (out, lse, *grads), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fp64_is_computed_in_fp64() -> None:
    q, k, v, _ = inputs(2, 2, torch.float64)
    out, _ = block_forward(q, k, v, None, True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch sees no accelerator")
@pytest.mark.parametrize("mask", ["full", "causal", "masked"])
@pytest.mark.parametrize("groups", [6, 2])
def test_on_an_accelerator(mask: str, groups: int) -> None:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    q, k, v, grad = inputs(6, groups, torch.bfloat16, accelerator.type, length=128)
    visible, causal = masks(128, accelerator.type)[mask]
    out, lse = block_forward(q, k, v, visible, causal)
    grads = block_backward(grad, q, k, v, out, lse, visible, causal)
    wide = [x.float() for x in (q, k, v)]
    expected, expected_lse = BLOCKS["plain"].forward(*wide, visible, causal)
    expected_grads = BLOCKS["plain"].backward(grad.float(), *wide, expected, expected_lse, visible, causal)
    for ours, theirs in zip((out, lse, *grads), (expected, expected_lse, *expected_grads), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.06)

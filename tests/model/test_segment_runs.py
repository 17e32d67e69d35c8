"""Attention run by run, as packs are trained on the CPU: outputs and gradients of the dense reference."""

import pytest
import torch

from tessel.model.attention import Visibility, plain_attention, run_lengths, sdpa_attention


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("lengths", [[[40, 33, 55]], [[128], [60, 68]], [[1, 90, 37], [64, 64]]])
def test_runs_have_the_outputs_and_gradients_of_a_dense_mask(lengths: list[list[int]], window: int | None) -> None:
    segments_BS = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    runs = run_lengths(segments_BS)
    assert runs == tuple(length for row in lengths for length in row)
    shapes = [(len(lengths), 128, heads, 16) for heads in (4, 2, 2)]
    grad_BSHD = torch.randn(shapes[0])
    results = []
    for attention, visibility in (
        (plain_attention, Visibility(segments_BS)),
        (sdpa_attention, Visibility(segments_BS, runs)),
    ):
        torch.manual_seed(3)
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        out_BSHD = attention(*inputs, visibility, window, 0.0)
        out_BSHD.backward(grad_BSHD)
        results.append([out_BSHD, *(each.grad for each in inputs)])
        if window is None:
            assert bool(visibility.masks) == (attention is plain_attention), "runs need no mask"
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6), (ours - theirs).abs().max()

"""Every implementation against the plain one; the choice and its words; torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.errors import UsageError
from tessel.model import kernels
from tessel.model.attention import Visibility, plain_attention
from tessel.model.kernels import ATTENTION, choose, compile_layers

_CPU = torch.device("cpu")


def _segments(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    return torch.repeat_interleave(torch.tensor([[0, 1, 2]]), torch.tensor([5, 40, 19]), dim=1).expand(2, -1)


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in ("unfused", "local", "flash")])
@pytest.mark.parametrize("kind", ["none", "segments"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_against_the_reference(name: str, kind: str, window: int | None, kv_heads: int) -> None:
    shapes = ((2, 64, 4, 16), (2, 64, kv_heads, 16), (2, 64, kv_heads, 16))
    results = []
    for implementation in (plain_attention, ATTENTION[name]):
        torch.manual_seed(1)
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        out_BSHD = implementation(*inputs, Visibility(_segments(kind)), window, 0.0)
        out_BSHD.backward(torch.randn(out_BSHD.shape))
        results.append([out_BSHD.detach(), *(x.grad for x in inputs)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["unfused", "fused"])
def test_attention_dropout(name: str) -> None:
    """Dropped probabilities are scaled so that the mean stays; without dropout nothing is random."""
    q, k = torch.randn(1, 32, 2, 8), torch.randn(1, 32, 2, 8)
    ones = torch.ones(1, 32, 2, 8)
    outputs = torch.stack([ATTENTION[name](q, k, ones, Visibility(), None, 0.3) for _ in range(200)])
    assert outputs.mean().item() == pytest.approx(1.0, abs=0.02)
    assert outputs.std() > 0.05
    assert torch.equal(*(ATTENTION[name](q, k, ones, Visibility(), None, 0.0) for _ in range(2)))


def test_the_choice_on_a_cpu() -> None:
    assert choose(_CPU, torch.float32).name == "fused"
    line = choose(_CPU, torch.bfloat16).describe()
    assert line.startswith("attention: fused (torch SDPA); no FlashAttention 3 or 4: ") and "cpu" in line
    for name in ("fused", "unfused", "local"):
        forced = choose(_CPU, torch.float32, name)
        assert forced.attention is ATTENTION[name]
        assert f"--attention-backend {name}" in forced.describe()


def test_a_forced_kernel_that_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match="--attention-backend flash cannot run: .*cpu.*auto or fused"):
        choose(_CPU, torch.bfloat16, "flash")
    with pytest.raises(UsageError, match="--attention-backend flsh: choose auto, unfused"):
        choose(_CPU, torch.float32, "flsh")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "dropout", "reason"),
    [
        (torch.float32, 64, 0.0, "computes in float32"),
        (torch.bfloat16, 512, 0.0, "this model has 512"),
        (torch.bfloat16, 64, 0.1, "--attention-dropout is 0.1"),
    ],
)
def test_what_flash_attention_cannot_do(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, dropout: float, reason: str
) -> None:
    activated: list[str] = []
    monkeypatch.setattr(kernels, "flash_attention_available", lambda device: (True, "FA3"))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    assert reason in choose(_CPU, dtype, head_dim=head_dim, dropout=dropout).describe()
    with pytest.raises(UsageError, match=reason):
        choose(_CPU, dtype, "flash", head_dim=head_dim, dropout=dropout)
    assert activated == []
    chosen = choose(_CPU, torch.bfloat16, head_dim=64)
    assert (chosen.name, activated) == ("flash", ["FA3"])


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers(pair: Any, tokens_BS: Tensor) -> None:
    segments_BS = (torch.arange(37) // 20).expand(3, -1)
    losses, gradients = [], []
    for compiled in (False, True):
        _, ours, _ = pair("Qwen3")
        if compiled:
            compile_layers(ours.layers)
        plain = ours(tokens_BS, labels_BS=tokens_BS, weights_BS=torch.ones(3, 37))
        packed = ours(tokens_BS, None, segments_BS, labels_BS=tokens_BS, weights_BS=torch.ones(3, 37))
        (plain + packed).backward()
        losses.append([plain.item(), packed.item()])
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name

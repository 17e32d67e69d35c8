"""Activations in host memory: the same bits, and nothing left on the device."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tessel.config.memory import Memory
from tessel.model import offload
from tessel.model.offload import Offload
from tessel.model.recompute import Recompute
from tessel.runtime.host import Copy, HostCopies
from tests.model.live import forward_backward

HIDDEN = {"attention_dropout": 0.2, "hidden_dropout": 0.2}


class Elsewhere(HostCopies):
    """Host memory apart from tensors: what is sent there is NumPy's, and what comes back is new."""

    sent = 0
    fetched: list[int]

    def down(self, source: Tensor) -> Copy:
        type(self).sent += 1
        return Copy(source.numpy().copy())  # type: ignore[arg-type]

    def up(self, source: Any) -> Copy:
        assert isinstance(source, np.ndarray)
        type(self).fetched.append(source.nbytes)
        return Copy(torch.from_numpy(source.copy()))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> type[Elsewhere]:
    monkeypatch.setattr(offload, "HostCopies", Elsewhere)
    Elsewhere.sent, Elsewhere.fetched = 0, []
    return Elsewhere


def _step(ours: Any, tokens_BS: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    return forward_backward(ours, tokens_BS, labels_BS=tokens_BS, weights_BS=torch.ones(tokens_BS.shape))


VARIANTS: dict[str, tuple[dict[str, Any], Recompute | None]] = {
    "one layer": ({"num_layers": 1}, None),
    "all layers": ({"num_layers": 9}, None),
    "attention": ({"attention": True}, None),
    "layers and recomputed norms": (
        {"num_layers": 2},
        Recompute("selective", modules=frozenset({"core_attn", "layernorm"}), activation_layers=None),
    ),
    "attention and recomputed mlp and norms": (
        {"attention": True},
        Recompute("selective", modules=frozenset({"mlp", "layernorm"})),
    ),
    "layers recomputed as a whole": ({"num_layers": 9}, Recompute("full", "uniform", 2)),
    "one layer, others as a whole": ({"num_layers": 3}, Recompute("full", "block", 1)),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("apart", [False, True])
def test_bitwise_equal(name: str, apart: bool, pair: Any, tokens_BS: Tensor, request: pytest.FixtureRequest) -> None:
    if apart:
        request.getfixturevalue("elsewhere")
    options, recompute = VARIANTS[name]
    loss, gradients, kept_bytes = _step(pair("Qwen3", ours={**HIDDEN, "recompute": recompute})[1], tokens_BS)
    again = _step(pair("Qwen3", ours={**HIDDEN, "recompute": recompute, "offload": Offload(**options)})[1], tokens_BS)
    assert torch.equal(again[0], loss)
    for parameter, gradient in gradients.items():
        assert torch.equal(again[1][parameter], gradient), parameter
    if apart:
        assert again[2] < kept_bytes
        assert Elsewhere.sent == len(Elsewhere.fetched) > 0


def test_more_layers_leave_less(elsewhere: type[Elsewhere], pair: Any, tokens_BS: Tensor) -> None:
    kept = [_step(pair("Llama", ours={"offload": Offload(number)})[1], tokens_BS)[2] for number in range(4)]
    per_layer = [before - after for before, after in zip(kept, kept[1:], strict=False)]
    assert all(size > 0.9 * kept[0] / 4 for size in per_layer)
    attention = _step(pair("Llama", ours={"offload": Offload(attention=True)})[1], tokens_BS)[2]
    assert kept[3] < attention < kept[0]


def test_document_masks_stay(elsewhere: type[Elsewhere], pair: Any, tokens_BS: Tensor) -> None:
    """They serve every layer."""
    segments_BS = torch.arange(37).expand(3, -1) // 4
    keywords = {"labels_BS": tokens_BS, "weights_BS": torch.ones(tokens_BS.shape)}
    plain = forward_backward(pair("Qwen2")[1], tokens_BS, None, segments_BS, **keywords)
    again = forward_backward(pair("Qwen2", ours={"offload": Offload(9)})[1], tokens_BS, None, segments_BS, **keywords)
    assert torch.equal(plain[0], again[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][name])
    assert 3 * 37 * 37 not in Elsewhere.fetched


def test_compiled_layers_travel_too(elsewhere: type[Elsewhere], pair: Any, tokens_BS: Tensor) -> None:
    results = []
    for moved in (None, Offload(9)):
        model = pair("Qwen2", ours={"offload": moved})[1]
        for layer in model.layers.values():
            layer.compile(backend="aot_eager")
        results.append(_step(model, tokens_BS))
    plain, again = results
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in plain[1].items())
    assert elsewhere.sent == len(elsewhere.fetched) > 0


class _Two(nn.Module):
    """Keeps its input twice, one of its views, and its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        return (y @ self.weight) * y.t() + y[:, :32].exp().sum()


def test_a_storage_travels_once_and_parameters_stay(elsewhere: type[Elsewhere]) -> None:
    module, moved = _Two(), Offload(1)
    x = torch.randn(64, 64, requires_grad=True)
    module(x).sum().backward()
    expected, x.grad = x.grad, None
    moved.begin()
    with moved.region(module, (), x.device):
        out = module(x)
    assert elsewhere.fetched == []
    out.sum().backward()
    assert torch.equal(x.grad, expected)
    # x, its sine, the product and the exponential of half: each once, and no weight.
    assert sorted(elsewhere.fetched) == [64 * 32 * 4, 64 * 64 * 4, 64 * 64 * 4, 64 * 64 * 4]
    assert elsewhere.sent == 4


def test_the_region_before_comes_along(elsewhere: type[Elsewhere]) -> None:
    module, moved = nn.Linear(64, 64), Offload(2)
    x = torch.randn(32, 64, requires_grad=True)
    moved.begin()
    with moved.region(module, (), x.device):
        y = module(x).sin()
    with moved.region(module, (), x.device):
        z = y.square()
    (gradient,) = torch.autograd.grad(z.sum(), y)
    assert len(elsewhere.fetched) == 3, "what z needs, and already what y needs"
    y.backward(gradient)
    assert len(elsewhere.fetched) == 3


def test_what_came_back_is_let_go(elsewhere: type[Elsewhere]) -> None:
    moved = Offload(1)
    x = torch.randn(64, 64, requires_grad=True)
    moved.begin()
    with moved.region(nn.Identity(), (), x.device):
        y = x.exp()
    storages = [weakref.ref(known()) for known in moved._last._known]  # type: ignore[union-attr, arg-type]
    y.sum().backward()
    del y
    assert [reference() for reference in storages] == [None]


def test_tiny_tensors_and_evaluation_stay(elsewhere: type[Elsewhere]) -> None:
    moved = Offload(1)
    small, large = torch.randn(8, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    with moved.region(nn.Identity(), (), small.device):
        small.sin().sum().backward()
    with torch.no_grad(), moved.region(nn.Identity(), (), small.device):
        large.sin()
    assert elsewhere.sent == 0
    assert moved.current is None


def test_from_options() -> None:
    assert Offload.from_options(Memory()) is None
    layers = Offload.from_options(Memory(cpu_offloading=True, cpu_offloading_num_layers=3))
    assert layers is not None and (layers.num_layers, layers.attention) == (3, False)
    attention = Offload.from_options(Memory(swap_attention=True))
    assert attention is not None and (attention.num_layers, attention.attention) == (0, True)

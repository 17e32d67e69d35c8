"""Recomputed activations change no bit, dropout included, and are fewer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.config.run import Kernels as KernelOptions
from tessel.errors import UsageError
from tessel.model.transformer import Recompute

VARIANTS = [
    Recompute("selective"),
    Recompute("full", "uniform", 1),
    Recompute("full", "uniform", 2),
    Recompute("full", "uniform", 9),
    Recompute("full", "block", 2),
    Recompute("full", "block", 9),
]


def _step(ours: Any, tokens_BS: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    saved_bytes = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved_bytes
        saved_bytes += tensor.nbytes
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = ours(tokens_BS, labels_BS=tokens_BS, weights_BS=torch.ones(tokens_BS.shape))
    forward_bytes = saved_bytes
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in ours.named_parameters()}, forward_bytes


@pytest.mark.parametrize("recompute", VARIANTS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_bitwise_equal(recompute: Recompute, dropout: float, pair: Any, tokens_BS: Tensor) -> None:
    dropouts = {"attention_dropout": dropout, "hidden_dropout": dropout}
    loss, gradients, kept_bytes = _step(pair("Qwen2", ours=dropouts)[1], tokens_BS)
    again = _step(pair("Qwen2", ours={**dropouts, "recompute": recompute})[1], tokens_BS)
    assert torch.equal(again[0], loss)
    for name, gradient in gradients.items():
        assert torch.equal(again[1][name], gradient), name
    assert again[2] < kept_bytes
    without = _step(pair("Qwen2")[1], tokens_BS)[0]
    assert torch.equal(without, loss) == (dropout == 0.0)


def test_dropout_is_off_in_evaluation(pair: Any, tokens_BS: Tensor) -> None:
    _, plain, _ = pair("Qwen2")
    _, dropping, _ = pair("Qwen2", ours={"attention_dropout": 0.5, "hidden_dropout": 0.5})
    assert torch.equal(dropping.eval()(tokens_BS), plain.eval()(tokens_BS))


def test_units() -> None:
    assert Recompute("full", "uniform", 2).units(5) == [(0, 2), (2, 4), (4, 5)]
    assert Recompute("full", "block", 2).units(5) == [(0, 1), (1, 2)]
    assert Recompute("selective").units(5) == []


def test_from_options() -> None:
    assert Recompute.from_options(KernelOptions()) is None
    assert Recompute.from_options(KernelOptions(recompute_activations=True)) == Recompute("selective")
    options = KernelOptions(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    assert Recompute.from_options(options) == Recompute("full", "block", 3)
    with pytest.raises(UsageError, match="needs --recompute-method; give uniform or block"):
        Recompute.from_options(KernelOptions(recompute_granularity="full"))
    with pytest.raises(UsageError, match="--recompute-num-layers 0 must be at least 1"):
        options = KernelOptions(recompute_granularity="full", recompute_method="block", recompute_num_layers=0)
        Recompute.from_options(options)

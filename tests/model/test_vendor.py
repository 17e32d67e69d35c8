"""The vendor's rows: calls that fit the package's declarations, results and gradients of the plain rows, training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tessel.model import vendor
from tessel.model.attention import Visibility, plain_attention
from tessel.model.catalog import ModelConfig
from tessel.model.init import initialize_
from tessel.model.kernels import OPERATIONS, Kernels, choose, of_vendor, unavailable
from tessel.model.transformer import Transformer
from tessel.runtime import device as devices
from tessel.selftest.kernels import CASES, compare
from tessel.selftest.training import FAMILIES
from tests.model import vendor_operators

CPU = torch.device("cpu")
ROWS = [operation for operation, rows in OPERATIONS.items() if vendor.NAME in rows]


@pytest.fixture(autouse=True)
def operators() -> None:
    vendor_operators.register()
    vendor_operators.CALLS.clear()


@pytest.mark.parametrize("operation", ROWS)
def test_a_row_computes_what_the_plain_formula_does(operation: str) -> None:
    """Forward and backward, in fp32, bf16 and fp16, on the shapes of `tessel selftest`."""
    text = compare(CPU, CASES[operation](OPERATIONS[operation][vendor.NAME]))
    assert "float32" in text and vendor_operators.CALLS.total() > 0


def test_every_operation_has_a_row() -> None:
    assert list(OPERATIONS) == ROWS


def test_queries_that_are_the_last_of_the_keys() -> None:
    shapes = ((2, 5, 4, 16), (2, 21, 2, 16), (2, 21, 2, 16))
    q, k, v = (torch.randn(shape) for shape in shapes)
    expected = plain_attention(q, k, v, Visibility(), None, 0.0)
    torch.testing.assert_close(vendor.fusion_attention(q, k, v, Visibility(), None, 0.0), expected)


def test_the_mask_serves_training_after_a_generation() -> None:
    vendor._causal.cache_clear()
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        vendor.fusion_attention(q, k, v, Visibility(), None, 0.0)
    assert not vendor._causal(CPU).is_inference()


def test_a_call_that_does_not_fit_is_refused() -> None:
    """What the other tests rely on: torch holds calls against the declarations."""
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="epsilom"):
        torch.ops.npu.npu_rms_norm(x, torch.ones(4), epsilom=1e-6)
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor'"):
        torch.ops.npu.npu_rms_norm(1e-6, x)


def config_of(family: str) -> ModelConfig:
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return ModelConfig.from_hf({**FAMILIES[family], **shape, "head_dim": 16})


def losses(config: ModelConfig, kernels: Kernels, segments_BS: Tensor | None) -> list[float]:
    model = Transformer(config, kernels)
    initialize_(model, config, 0.1, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens_BS = (torch.arange(80) * 7 % 64).expand(2, -1)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(
            tokens_BS, None, segments_BS, labels_BS=tokens_BS.roll(-1, 1), weights_BS=torch.full((2, 80), 1 / 160)
        )
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_trains_through_the_rows(family: str, packed: bool) -> None:
    config = config_of(family)
    segments_BS = (torch.arange(80) // 40).expand(2, -1) if packed else None
    expected = losses(config, Kernels(), segments_BS)
    assert vendor_operators.CALLS.total() == 0
    actual = losses(config, of_vendor("for a test"), segments_BS)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert actual[-1] < actual[0]
    called = {"npu_fusion_attention", "npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu"}
    if family == "mixture":
        called |= {"npu_grouped_matmul", "npu_moe_token_permute", "npu_moe_token_unpermute"}
    assert vendor_operators.CALLS.keys() == called


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operators are, all of them are taken; a kernel of torch's by name leaves the others as they are."""
    assert "this is cpu" in str(unavailable(vendor.NAME, CPU))
    monkeypatch.setattr("tessel.model.kernels.vendor_kernels_available", lambda device: (True, "2.13 is there"))
    for requested in ("auto", "flash"):
        chosen = choose(CPU, torch.float32, requested, dropout=0.1)
        assert chosen == of_vendor("2.13 is there")
        assert chosen.describe().startswith(
            "attention: npu (the vendor's fused attention); 2.13 is there; norm, rotary"
        )
    assert choose(CPU, torch.float32, "fused") == replace(
        Kernels(reason="asked for by --attention-backend fused"), others=vendor.NAME
    )


def test_what_an_old_package_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.metadata, "version", lambda package: "2.11.0")
    monkeypatch.setattr(torch.ops, "npu", object())
    there, why = devices.vendor_kernels_available.__wrapped__(torch.device("npu", 0) if _knows_npu() else _Npu())
    assert not there and why.startswith("torch_npu 2.11.0 has no npu_fusion_attention, npu_rms_norm")


class _Npu:
    type = "npu"


def _knows_npu() -> bool:
    try:
        torch.device("npu")
    except RuntimeError:
        return False
    return True

"""Products with a gather or a scatter inside them: what collectives and products apart give, in layers, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from tessel.layout.adapters import AdapterSpec
from tessel.layout.tiles import tiles_of
from tessel.layout.topology import Degrees, Topology
from tessel.model.config import ModelConfig
from tessel.model.recompute import Recompute
from tessel.model.transformer import Transformer
from tessel.parallel.collectives import gather_from, scatter_to
from tessel.parallel.expert import apply_expert_parallel
from tessel.parallel.groups import build_groups
from tessel.parallel.overlap import FusedProducts
from tessel.parallel.tensor import apply_tensor_parallel
from tessel.runtime import device as devices
from tessel.selftest.collectives import COLLECTIVES, _checked
from tessel.selftest.result import check
from tests.model import vendor_operators
from tests.parallel.processes import run
from tests.parallel.test_tensor import BASE, SentBytes, assert_near, backward, batch_of, config_of, fill

ANY_SIZE = range(1, 65535)
GATHER, SCATTER = "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"


def group_of_all() -> ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None
    return group


def largest_differences(ours: tuple[Tensor, ...], apart: tuple[Tensor, ...], leaves: list[Tensor]) -> list[float]:
    """Of outputs, and of gradients."""
    grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(len(y))) for y in ours]
    both = [[*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, grads)] for ys in (ours, apart)]
    return [float((a - b).abs().max()) for a, b in zip(*both, strict=True)]


def products_alone() -> list[float]:
    vendor_operators.register()
    group = group_of_all()
    generator = torch.Generator().manual_seed(group.rank())
    products = FusedProducts(group.group_name, group.size(), ANY_SIZE)
    found = []
    for batch in (1, 3):
        shapes = ((batch, 6, 8), (5, 8), (3, 8))
        x, *weights = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
        whole = gather_from(x, group, 1)
        apart = tuple(whole @ weight.T for weight in weights)
        found += largest_differences(products.gathered(x, weights), apart, [x, *weights])
        apart = (scatter_to(x @ weights[0].T, group, 1),)
        found += largest_differences((products.scattered(x, weights[0]),), apart, [x, weights[0]])
        frozen = weights[0].detach()
        found += largest_differences(products.gathered(x, [frozen]), (whole @ frozen.T,), [x])
    assert vendor_operators.CALLS == {GATHER: 6, SCATTER: 6}
    return found


def test_products_equal_collectives_and_products_apart() -> None:
    for found in run(2, products_alone):
        assert len(found) == 20 and max(found) < 1e-5


def on_ranks(config: ModelConfig, products: FusedProducts | None, **options: Any) -> Transformer:
    world_size = distributed.get_world_size()
    topology = Topology.of(Degrees(tp=world_size), world_size)
    groups = build_groups(topology, torch.device("cpu"), 1, 1, config.num_key_value_heads)
    with torch.device("meta"):
        model = Transformer(config, **options)
    apply_tensor_parallel(model, config, groups, True, products)
    if config.num_experts:
        apply_expert_parallel(model, config, groups, products)
    fill(model, config, tiles_of(config, topology, groups.place))
    return model


def layers_on_two_ranks() -> None:
    """Losses and gradients with the products, and what is called: nothing of layers is gathered or scattered apart."""
    vendor_operators.register()
    group = group_of_all()
    for family in ("qwen3", "llama with biases"):
        config = config_of(family)
        batch = batch_of(config)
        expected, gradients = backward(on_ranks(config, None), batch)
        products = FusedProducts(group.group_name, group.size(), ANY_SIZE)
        for recompute in (None, Recompute("selective", modules=frozenset({"layernorm"}))):
            model = on_ranks(config, products, recompute=recompute)
            vendor_operators.CALLS.clear()
            with SentBytes(group.size()) as counter:
                loss, ours = backward(model, batch)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            assert_near(ours, gradients)
            # Forward: one of each for attention, one of each for the MLP; backward: the other one.
            num_products = 4 * config.num_hidden_layers
            assert {GATHER: num_products, SCATTER: num_products} == vendor_operators.CALLS
            # What is under the operators here is counted as well: what they leave is the embedding's and the head's.
            assert counter.calls.count("reduce_scatter_tensor") == num_products + 2


def shared_expert_on_two_ranks() -> None:
    vendor_operators.register()
    group = group_of_all()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = ModelConfig.from_hf(
        {**BASE, **experts, "vocab_size": 64, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40}
    )
    batch = batch_of(config)
    expected, gradients = backward(on_ranks(config, None), batch)
    loss, ours = backward(on_ranks(config, FusedProducts(group.group_name, group.size(), ANY_SIZE)), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_near(ours, gradients)
    assert vendor_operators.CALLS == {GATHER: 8, SCATTER: 8}


def what_they_do_not_take() -> None:
    """Small inner dims, and adapters: the same numbers by collectives and products apart."""
    vendor_operators.register()
    group, config = group_of_all(), config_of("qwen3")
    small = FusedProducts(group.group_name, group.size())
    assert not small.takes(255) and small.takes(256, 65534) and not small.takes(256, 65535)
    adapters = AdapterSpec(2, 4, (("q_proj",), ("o_proj",), ("down_proj",)))
    for case, products in ((config, small), (replace(config, adapters=adapters), replace(small, inner_sizes=ANY_SIZE))):
        vendor_operators.CALLS.clear()
        batch = batch_of(config)
        expected, gradients = backward(on_ranks(case, None), batch)
        loss, ours = backward(on_ranks(case, products), batch)
        assert torch.equal(loss, expected)
        assert_near(ours, gradients)
        # gate and up have no adapter.
        num_products = config.num_hidden_layers if case.adapters else 0
        assert ({GATHER: num_products, SCATTER: num_products} if num_products else {}) == vendor_operators.CALLS


@pytest.mark.parametrize("function", [layers_on_two_ranks, shared_expert_on_two_ranks, what_they_do_not_take])
def test_two_ranks(function: Callable[[], None]) -> None:
    run(2, function)


def the_selftests_check(is_wrong: bool) -> str:
    vendor_operators.register()
    if is_wrong:
        meaning = vendor_operators.MEANINGS[SCATTER]
        vendor_operators.MEANINGS[SCATTER] = lambda *args, **named: meaning(*args, **named) + 1
    group = group_of_all()
    with (
        mock.patch.object(devices, "fused_products_available", lambda *_: (True, "")),
        mock.patch.object(devices, "communicator_name", lambda *_: group.group_name),
    ):
        body = COLLECTIVES["products with a gather or a scatter inside"]
        return check("collectives", "", lambda: _checked(body, torch.device("cpu"), group)).status


def test_the_selftests_check() -> None:
    assert run(2, the_selftests_check, False) == ["passed"] * 2
    assert run(2, the_selftests_check, True) == ["failed"] * 2

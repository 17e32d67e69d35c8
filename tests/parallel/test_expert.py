"""Expert parallelism of one layer: the numbers of one process on all tokens, and no more bytes than the textbook's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from tessel.layout.sharding import rule_of
from tessel.layout.tiles import tile_of
from tessel.layout.topology import Degrees, Topology
from tessel.model.balance import Balance, RouterOptions
from tessel.model.config import ModelConfig
from tessel.model.moe import MixtureOfExperts
from tessel.model.transformer import Transformer
from tessel.parallel.expert import apply_expert_parallel
from tessel.parallel.groups import build_groups
from tessel.parallel.tensor import apply_tensor_parallel
from tests.parallel.processes import run

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 24},
}
B, S, E = 2, 8, 32
LAYER = "model.layers.0.mlp."
LAYOUTS: dict[str, tuple[int, Degrees, str, RouterOptions]] = {
    "EP2": (2, Degrees(ep=2), "qwen3_moe", RouterOptions("aux_loss", 0.3, 0.2)),
    "EP4": (4, Degrees(ep=4), "mixtral", RouterOptions("aux_loss", 0.3, 0.2)),
    "EP2 ETP2": (4, Degrees(ep=2, etp=2), "qwen2_moe", RouterOptions("seq_aux_loss", 0.3, 0.2)),
    "ETP2": (2, Degrees(etp=2), "qwen3_moe", RouterOptions()),
    "TP2 EP2 ETP1": (4, Degrees(tp=2, ep=2, etp=1), "qwen2_moe", RouterOptions("aux_loss", 0.3, 0.2)),
    "TP2 EP2": (4, Degrees(tp=2, ep=2), "qwen2_moe", RouterOptions("seq_aux_loss", 0.3, 0.2)),
    "TP2 of one expert group": (2, Degrees(tp=2), "qwen2_moe", RouterOptions("aux_loss", 0.3, 0.2)),
    "TP2 CP2": (4, Degrees(tp=2, cp=2, ep=2), "qwen3_moe", RouterOptions("seq_aux_loss", 0.3, 0.2)),
    "DP2 EP1": (2, Degrees(), "qwen3_moe", RouterOptions("aux_loss", 0.3, 0.2)),
}
GLOBAL = (4, Degrees(tp=2, ep=2), "qwen3_moe", RouterOptions("global_aux_loss", 0.3, 0.0))
EVEN = {"EP2": Degrees(ep=2), "EP4": Degrees(ep=4), "EP2 ETP2": Degrees(ep=2, etp=2)}


def config_of(family: str) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, **FAMILIES[family]})


def mixture_of(model: Transformer) -> MixtureOfExperts:
    layer = model.layers["0"].mlp
    assert isinstance(layer, MixtureOfExperts)
    return layer


def whole_model(config: ModelConfig, options: RouterOptions) -> Transformer:
    model = Transformer(config, balance=Balance(config, options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(replica: int) -> tuple[Tensor, Tensor]:
    """Input and upstream gradient of a replica's micro-batch."""
    generator = torch.Generator().manual_seed(100 + replica)
    return torch.randn(B, S, E, generator=generator), torch.randn(B, S, E, generator=generator)


Result = tuple[Tensor, Tensor, dict[str, tuple[Tensor, Any]], Tensor]


def everything() -> dict[str, Any]:
    """What a rank has to say on every layout of this many ranks: starting them costs more than their work."""
    num_ranks = distributed.get_world_size()
    layouts = {**LAYOUTS, "global loss": GLOBAL}
    found: dict[str, Any] = {name: on_a_rank(*more) for name, (size, *more) in layouts.items() if size == num_ranks}
    for name, degrees in EVEN.items():
        if degrees.ep * (degrees.etp or 1) == num_ranks:
            found[f"even {name}"] = sent_when_even(degrees)
    if num_ranks == 2:
        found["one-sided"] = one_sided(Degrees(ep=2))
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    """By the number of ranks, what each of them found."""
    return {size: run(size, everything) for size in (2, 4)}


def on_a_rank(degrees: Degrees, family: str, options: RouterOptions) -> Result:
    """Output, gradient of the input, gradients with their places in the whole, sums of the balance."""
    config = config_of(family)
    topology = Topology.of(degrees, distributed.get_world_size())
    groups = build_groups(topology, torch.device("cpu"), 1, 1, config.num_key_value_heads)
    model = whole_model(config, options)
    apply_tensor_parallel(model, config, groups, sequence_parallel=True)
    apply_expert_parallel(model, config, groups)
    place = groups.place
    parts, part = topology.tp * topology.cp, place.cp * topology.tp + place.tp
    x_BSE, upstream_BSE = (whole.chunk(parts, dim=1)[part].contiguous() for whole in tokens(place.dp))
    x_BSE.requires_grad_()
    model.balance.start_step(1.0 / topology.dp)
    out_BSE = mixture_of(model)(x_BSE)
    out_BSE.backward(upstream_BSE)
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.startswith(LAYER):
            tile = tile_of(rule_of(name, config), topology, place)
            assert tuple(parameter.shape) == tile.local_shape, name
            assert parameter.grad is not None, name
            gradients[name] = (parameter.grad, tile.index())
    assert x_BSE.grad is not None
    return out_BSE.detach(), x_BSE.grad, gradients, model.balance.take(torch.device("cpu"))


def on_one_process(
    num_replicas: int, family: str, options: RouterOptions
) -> tuple[list[Tensor], list[Tensor], Any, Tensor]:
    model = whole_model(config_of(family), options)
    model.balance.start_step(1.0 / num_replicas)
    outputs, inputs = [], []
    for replica in range(num_replicas):
        x_BSE, upstream_BSE = tokens(replica)
        inputs.append(x_BSE.requires_grad_())
        outputs.append(mixture_of(model)(x_BSE))
        outputs[-1].backward(upstream_BSE)
    gradients = {name: p.grad for name, p in model.named_parameters() if name.startswith(LAYER)}
    return outputs, [x.grad for x in inputs if x.grad is not None], gradients, model.balance.take(torch.device("cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_on_one_process(layout: str, ranks: dict[int, list[dict[str, Any]]]) -> None:
    world_size, degrees, family, options = LAYOUTS[layout]
    results: list[Result] = [rank[layout] for rank in ranks[world_size]]
    topology = Topology.of(degrees, world_size)
    outputs, input_gradients, gradients, sums_LR = on_one_process(topology.dp, family, options)
    parts = topology.tp * topology.cp
    found = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for rank, (out_BSE, x_grad, own, _) in enumerate(results):
        place = topology.place(rank)
        part = place.cp * topology.tp + place.tp
        for actual, wholes in ((out_BSE, outputs), (x_grad, input_gradients)):
            expected = wholes[place.dp].chunk(parts, dim=1)[part]
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)
        for name, (gradient, index) in own.items():
            found[name][index] += gradient
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-6, f"{name}: {error}"
    torch.testing.assert_close(sum(result[3] for result in results), sums_LR, rtol=1e-6, atol=1e-6)


def test_the_global_loss_is_of_all_that_is_computed_at_once(ranks: dict[int, list[dict[str, Any]]]) -> None:
    """One process computes micro-batches one after another, and cannot see those that follow."""
    world_size, _, family, options = GLOBAL
    results: list[Result] = [rank["global loss"] for rank in ranks[world_size]]
    model = whole_model(config_of(family), options)
    layer = mixture_of(model)
    counts, scores = [], []
    for replica in range(2):
        logits_TX = (tokens(replica)[0] @ layer.gate.weight.T).flatten(0, 1)
        counts.append(torch.zeros_like(logits_TX).scatter(1, logits_TX.topk(2).indices, 1.0).mean(0) / 2)
        scores.append(logits_TX.softmax(-1).mean(0))
    share = (counts[0] + counts[1]) / 2
    expected = 8 * (share * (scores[0] + scores[1])).sum()
    assert sum(result[3] for result in results)[0, 0].item() == pytest.approx(expected.item(), rel=1e-5)


class SentRows(TorchDispatchMode):
    """Bytes of each all-to-all that are meant for other ranks, floating-point ones alone: not the counts of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.sent_bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all" in func.__name__ and args[0].is_floating_point():
            x, _, splits, group = args
            rank = distributed.distributed_c10d._resolve_process_group(group).rank()
            row_bytes = x.element_size() * x[0].numel() if len(x) else 0
            self.sent_bytes += (sum(splits) - splits[rank]) * row_bytes
            self.calls += 1
        return func(*args, **(kwargs or {}))


def sent_when_even(degrees: Degrees) -> tuple[int, int]:
    config = config_of("qwen3_moe")
    topology = Topology.of(degrees, distributed.get_world_size())
    groups = build_groups(topology, torch.device("cpu"), 1, 1, config.num_key_value_heads)
    model = whole_model(config, RouterOptions("aux_loss", 0.1))
    apply_expert_parallel(model, config, groups)
    layer = mixture_of(model)
    with torch.no_grad():
        # Token t prefers experts 2t and 2t + 1, modulo 8: as many for each.
        layer.gate.weight.copy_(torch.eye(8, E))
    x_TE = 0.01 * torch.randn(B * S, E)
    for token in range(B * S):
        x_TE[token, (2 * token) % 8] = x_TE[token, (2 * token + 1) % 8] = 9.0
    with SentRows() as sent:
        layer(x_TE.view(B, S, E).requires_grad_()).sum().backward()
    return sent.sent_bytes, sent.calls


@pytest.mark.parametrize("layout", EVEN)
def test_sends_no_more_than_the_textbook(layout: str, ranks: dict[int, list[dict[str, Any]]]) -> None:
    ep, etp = EVEN[layout].ep, EVEN[layout].etp or 1
    rows_bytes = B * S * 2 * E * 4
    textbook = 4 * (ep - 1) / ep * rows_bytes + 4 * (etp - 1) * rows_bytes
    for rank in ranks[ep * etp]:
        sent_bytes, calls = rank[f"even {layout}"]
        assert sent_bytes == textbook
        assert calls == (4 if etp == 1 else 8)


def one_sided(degrees: Degrees) -> Sequence[bool]:
    """All tokens choose experts of rank 0: the others compute nothing, and still take part."""
    config = config_of("qwen3_moe")
    topology = Topology.of(degrees, distributed.get_world_size())
    groups = build_groups(topology, torch.device("cpu"), 1, 1, config.num_key_value_heads)
    model = whole_model(config, RouterOptions(capacity_factor=1.0))
    apply_expert_parallel(model, config, groups)
    layer = mixture_of(model)
    with torch.no_grad():
        layer.gate.weight.zero_()[:2] = 1.0
    layer(torch.ones(B, S, E)).sum().backward()
    return [bool(parameter.grad is not None and parameter.grad.any()) for parameter in layer.experts.parameters()]


def test_ranks_without_tokens(ranks: dict[int, list[dict[str, Any]]]) -> None:
    assert [rank["one-sided"] for rank in ranks[2]] == [[True] * 3, [False] * 3]

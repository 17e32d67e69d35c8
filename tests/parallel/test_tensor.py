"""Tensor and sequence parallelism: the numbers of one process, and no more bytes than the textbook's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessel.errors import UsageError
from tessel.layout.sharding import ParamRule, parameters
from tessel.layout.tiles import Tile, tile_of, tiles_of
from tessel.layout.topology import Degrees, Topology
from tessel.model.attention import Visibility
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.recompute import Recompute
from tessel.model.transformer import Transformer
from tessel.parallel.gradients import PartialSums
from tessel.parallel.groups import Groups, build_groups
from tessel.parallel.tensor import apply_tensor_parallel
from tessel.parallel.vocabulary import RankVocabulary
from tests.parallel.processes import run

BASE: dict[str, Any] = {
    "vocab_size": 67,  # which neither 2 nor 4 divides
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "vocab_size": 64},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
}
B, S = 2, 16
Batch = dict[str, Tensor]


def config_of(family: str) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, **FAMILIES[family]})


def fill(model: Transformer, config: ModelConfig, tiles: dict[str, Tile] | None = None) -> None:
    """Random weights, and random biases and norms too: at 0 and 1 they would hide mistakes."""
    model.to_empty(device="cpu")
    initialize_(model, config, std=0.1, seed=1, tiles=tiles)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.dim() == 1:
                shape = parameter.shape if tiles is None else tiles[name].shape
                noise = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(noise if tiles is None else noise[tiles[name].index()])


def one_process(config: ModelConfig, **options: Any) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, **options)
    fill(model, config)
    return model


def on_ranks(config: ModelConfig, sequence_parallel: bool, **options: Any) -> tuple[Transformer, Groups]:
    """This rank's part of the same model, all ranks being tensor-parallel."""
    world_size = distributed.get_world_size()
    topology = Topology.of(Degrees(tp=world_size), world_size)
    groups = build_groups(topology, torch.device("cpu"), 1, 1, config.num_key_value_heads)
    with torch.device("meta"):
        model = Transformer(config, **options)
    apply_tensor_parallel(model, config, groups, sequence_parallel)
    fill(model, config, tiles_of(config, topology, groups.place))
    return model, groups


def batch_of(config: ModelConfig, seed: int = 0) -> Batch:
    """Two documents a row, some tokens without weight; every row of the vocabulary may occur."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS1 = torch.randint(0, config.vocab_size, (B, S + 1), generator=generator)
    segments_BS = (torch.arange(S)[None] >= torch.tensor([[5], [11]])).long()
    weights_BS = torch.rand(B, S, generator=generator)
    weights_BS[:, ::5] = 0
    return {
        "tokens_BS": tokens_BS1[:, :-1],
        "labels_BS": tokens_BS1[:, 1:].where(weights_BS > 0, -100),
        "weights_BS": weights_BS,
        "segments_BS": segments_BS,
    }


def backward(model: nn.Module, batch: Batch, z: float = 1e-2) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss terms, gradients)."""
    model.zero_grad()
    loss: Tensor = model(**batch, z_loss_coeff=z)
    loss.sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not isinstance(parameter, DTensor), name
        gradients[name] = parameter.grad.clone()
    return loss.detach(), gradients


def joined(local: dict[str, Tensor], config: ModelConfig, groups: Groups, sums: Callable[[ParamRule], bool]) -> Batch:
    """Whole tensors from every rank's tiles: added up where `sums` says so, else equal where they overlap."""
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, local)
    whole = {}
    for name, rule in parameters(config).items():
        total, seen = torch.zeros(rule.shape), torch.zeros(rule.shape, dtype=torch.bool)
        for rank, tensors in enumerate(everywhere):
            tile = tile_of(rule, groups.topology, groups.topology.place(rank))
            assert tuple(tensors[name].shape) == tile.local_shape, name
            padded = tensors[name].clone()
            piece = padded[tile.local_index()].clone()
            padded[tile.local_index()] = 0
            assert not padded.any(), f"{name}: padding is not 0"
            if sums(rule):
                total[tile.index()] += piece
            else:
                overlap = seen[tile.index()]
                assert torch.equal(piece[overlap], total[tile.index()][overlap]), f"{name}: copies differ"
                total[tile.index()] = piece
            seen[tile.index()] = True
        assert seen.all(), name
        whole[name] = total
    return whole


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All together within 1e-6, and each tensor, where the sum may cancel, within 1e-5; relative, in the 2-norm."""
    assert ours.keys() == theirs.keys()
    errors = torch.stack([(ours[name] - tensor).norm() for name, tensor in theirs.items()])
    sizes = torch.stack([tensor.norm() for tensor in theirs.values()])
    assert errors.norm() <= 1e-6 * sizes.norm()
    for name, error, size in zip(theirs, errors, sizes, strict=True):
        assert error <= 1e-5 * size, f"{name}: {error / size:.1e}"


def parity(family: str, sequence_parallel: bool) -> None:
    config = config_of(family)
    model, groups = on_ranks(config, sequence_parallel)
    alone = one_process(config)
    local = dict(model.named_parameters())
    whole = {name: parameter.detach() for name, parameter in alone.named_parameters()}
    weights = joined({name: p.detach() for name, p in local.items()}, config, groups, lambda rule: False)
    assert all(torch.equal(weights[name], whole[name]) for name in whole), "the start is not that of one process"

    def is_partial(rule: ParamRule) -> bool:
        axes = rule.partial_axes
        return "tp" in axes or ("sequence" in axes and sequence_parallel) or "kv_replicas" in axes

    finalize = PartialSums(local, parameters(config), groups, sequence_parallel)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (alone, model)]
    for step in range(2):
        batch = batch_of(config, step)
        (expected, theirs), (loss, ours) = backward(alone, batch), backward(model, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert_near(joined(ours, config, groups, is_partial), theirs)
        finalize()
        for optimizer in optimizers:
            optimizer.step()
    weights = joined({name: p.detach() for name, p in local.items()}, config, groups, lambda rule: False)
    assert_near(weights, whole)


def every_family(sequence_parallel: bool) -> None:
    for family in FAMILIES:
        parity(family, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_equal_to_one_process(num_ranks: int, sequence_parallel: bool) -> None:
    """With 4 ranks, each of the 2 key/value heads has two copies."""
    run(num_ranks, every_family, sequence_parallel)


def without_gradients(sequence_parallel: bool) -> None:
    config = config_of("llama with biases")
    model, _ = on_ranks(config, sequence_parallel)
    alone, batch = one_process(config), batch_of(config)
    inputs = batch["tokens_BS"], None, batch["segments_BS"]
    with torch.no_grad():
        expected, logits_BSV = alone(*inputs), model(*inputs)
        assert logits_BSV.shape == (B, S, config.vocab_size)
        torch.testing.assert_close(logits_BSV, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model(*inputs, logits=torch.tensor([expected.shape[1] - 1])), expected[:, -1:], rtol=1e-5, atol=1e-5
        )
        labels_BS = batch["labels_BS"].clamp(min=0)
        expected = alone.per_token_nll(batch["tokens_BS"], labels_BS)
        torch.testing.assert_close(model.per_token_nll(batch["tokens_BS"], labels_BS), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(**batch), alone(**batch), rtol=1e-6, atol=0)


def gradients_through_logits() -> None:
    config = config_of("qwen2 tied")
    model, groups = on_ranks(config, False)
    alone, tokens_BS = one_process(config), batch_of(config)["tokens_BS"]
    results = []
    for each in (model, alone):
        each(tokens_BS).tanh().square().sum().backward()
        results.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    sums = {"kv_replicas", "tp"}
    assert_near(joined(results[0], config, groups, lambda rule: bool(sums & set(rule.partial_axes))), results[1])


def recomputed() -> None:
    config = config_of("qwen3")
    for sequence_parallel in (False, True):
        expected, gradients = backward(on_ranks(config, sequence_parallel)[0], batch_of(config))
        parts = Recompute("selective", modules=frozenset({"layernorm", "core_attn"}), activation_layers=None)
        for recompute in (Recompute("full"), Recompute("full", "block", 1), Recompute("selective"), parts):
            loss, again = backward(on_ranks(config, sequence_parallel, recompute=recompute)[0], batch_of(config))
            assert torch.equal(loss, expected)
            assert all(torch.equal(again[name], gradients[name]) for name in gradients)


def in_bf16() -> None:
    """As near to the fp32 loss as one process in bf16, give or take."""
    config = config_of("qwen2 tied")
    alone, batch = one_process(config), batch_of(config)
    exact = alone(**batch)
    rounded = alone.to(torch.bfloat16)(**batch)
    for sequence_parallel in (False, True):
        loss, gradients = backward(on_ranks(config, sequence_parallel)[0].to(torch.bfloat16), batch, z=0.0)
        assert loss.dtype == torch.float32
        assert abs(loss - exact) <= 3 * abs(rounded - exact) + 1e-3 * exact
        assert all(gradient.dtype == torch.bfloat16 for gradient in gradients.values())


def compiled() -> None:
    config = config_of("qwen3")
    model, _ = on_ranks(config, True)
    expected, gradients = backward(model, batch_of(config))
    for layer in model.layers.values():
        layer.compile(backend="aot_eager", fullgraph=True)
    loss, again = backward(model, batch_of(config))
    torch.testing.assert_close(loss, expected)
    assert_near(again, gradients)


@pytest.mark.parametrize("function", [recomputed, in_bf16, compiled, gradients_through_logits])
def test_two_ranks(function: Callable[[], None]) -> None:
    run(2, function)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_without_gradients(sequence_parallel: bool) -> None:
    run(2, without_gradients, sequence_parallel)


class SentBytes(TorchDispatchMode):
    """Bytes that this rank's collectives send, each as a ring sends it."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.num_ranks = num_ranks
        self.sent_bytes = 0.0
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.__name__.partition(".")[0]
        if func.namespace == "_c10d_functional" and kind != "wait_tensor":
            others = self.num_ranks - 1
            of_input = {
                "all_reduce": 2 * others / self.num_ranks,
                "reduce_scatter_tensor": others / self.num_ranks,
                "all_gather_into_tensor": others,
            }
            self.sent_bytes += of_input[kind] * args[0].nbytes
            self.calls.append(kind)
        return func(*args, **(kwargs or {}))


def sent(sequence_parallel: bool) -> tuple[float, list[str]]:
    """What one micro-batch sends. The gather of a chunk's losses is the only one of the loss."""
    config = config_of("qwen2 tied")
    model, _ = on_ranks(config, sequence_parallel)
    with SentBytes(distributed.get_world_size()) as counter:
        backward(model, batch_of(config))
    return counter.sent_bytes, counter.calls


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sends_no_more_than_the_textbook(num_ranks: int, sequence_parallel: bool) -> None:
    config = config_of("qwen2 tied")
    layers = config.num_hidden_layers
    all_reduce_bytes = 2 * (num_ranks - 1) / num_ranks * B * S * config.hidden_size * 4
    textbook_bytes = (4 * layers + 2) * all_reduce_bytes
    loss_bytes = (num_ranks - 1) * B * S * 8
    for sent_bytes, calls in run(num_ranks, sent, sequence_parallel):
        assert sent_bytes == textbook_bytes + loss_bytes <= 1.05 * textbook_bytes
        pairs = 4 * layers + 2
        expected = {"all_gather_into_tensor": pairs + 1, "reduce_scatter_tensor": pairs}
        if not sequence_parallel:
            expected = {"all_reduce": pairs, "all_gather_into_tensor": 1}
        assert {kind: calls.count(kind) for kind in calls} == expected


def masks(model: Transformer) -> dict[str, Tensor]:
    """What dropout left in the embedding and after attention, and of a constant inside it; and what is drawn next."""
    layer = model.layers["0"]
    heads = [torch.ones(1, 8, 2, 8) for _ in range(3)]
    stream: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0]))
    model(batch_of(model.config)["tokens_BS"])
    return {
        "embedding": stream[0] != 0,
        "hidden": stream[1] != stream[0],
        "attention": layer.self_attn.kernel(*heads, Visibility(), None, 0.5),
        "after": torch.rand(8),
    }


def dropped(sequence_parallel: bool) -> dict[str, list[Any]]:
    """As lists: a tensor sent to another process needs the sender to be alive when it is read."""
    torch.manual_seed(3)
    model, _ = on_ranks(config_of("qwen3"), sequence_parallel, attention_dropout=0.5, hidden_dropout=0.5)
    return {name: mask.tolist() for name, mask in masks(model).items()}


def test_dropout_masks() -> None:
    """Alike where ranks hold the same activations, else each rank's own; the ranks stay in step."""
    same = {
        sequence_parallel: {name: first[name] == second[name] for name in first}
        for sequence_parallel in (False, True)
        for first, second in [run(2, dropped, sequence_parallel)]
    }
    assert same[False] == {"embedding": True, "hidden": True, "attention": False, "after": True}
    assert same[True]["after"] and not same[True]["embedding"] and not same[True]["hidden"]


def recomputed_with_dropout() -> None:
    config = config_of("qwen3")
    options = {"attention_dropout": 0.3, "hidden_dropout": 0.3}
    for sequence_parallel in (False, True):
        results = []
        for recompute in (None, Recompute("full"), Recompute("selective")):
            torch.manual_seed(5)
            model, _ = on_ranks(config, sequence_parallel, recompute=recompute, **options)
            results.append(backward(model, batch_of(config)))
        for loss, gradients in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)
        without = on_ranks(config, sequence_parallel, **options)[0].eval()(**batch_of(config))
        assert not torch.equal(without, results[0][0])
        assert torch.equal(without, on_ranks(config, sequence_parallel)[0](**batch_of(config)))


def test_recomputation_draws_the_same_masks() -> None:
    run(2, recomputed_with_dropout)


def real_weights_are_cut() -> None:
    config = config_of("llama with biases")
    model, groups = on_ranks(config, False)
    alone = one_process(config)
    apply_tensor_parallel(alone, config, groups, False)
    expected = model.state_dict()
    assert list(expected) == list(alone.state_dict())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in alone.state_dict().items())


def test_real_weights_are_cut_to_what_a_rank_would_draw() -> None:
    run(2, real_weights_are_cut)


def test_a_rank_without_rows_is_refused() -> None:
    tile = Tile((5, 8), (0, 0), (2, 8), (2, 8))
    with pytest.raises(UsageError, match="5 rows leaves the last of 4 .* lower --tensor-model-parallel-size"):
        RankVocabulary.of(tile, SimpleNamespace(size=lambda: 4))  # type: ignore[arg-type]

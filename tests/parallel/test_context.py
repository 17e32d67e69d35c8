"""Context parallelism against one process: attention, whole models, volumes sent, and the cut of a batch.

Every rank computes the whole by itself, too, and compares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from tessel.data.loader import MicroBatch
from tessel.layout.context import position_ranges
from tessel.layout.topology import Topology
from tessel.model.attention import Visibility, plain_attention
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.recompute import Recompute
from tessel.model.transformer import Transformer
from tessel.parallel.context import ContextAttention, apply_context_parallel, local_part, localizer
from tessel.parallel.groups import Groups, build_groups
from tests.parallel.processes import run

# Name of a deviation -> its size.
Deviations = dict[str, float]
TOLERANCE = 1e-6


def ways(num_ranks: int) -> list[tuple[str, int]]:
    """(comm type, inner degree): each of the four, the hybrid in each of its shapes."""
    hybrids = [("a2a+p2p", inner) for inner in range(1, num_ranks + 1) if num_ranks % inner == 0]
    return [("p2p", 1), ("allgather", 1), ("a2a", num_ranks), *hybrids]


def cutter(length: int, comm_type: str, inner: int) -> Callable[[Tensor], Tensor]:
    """What cuts this rank's part out of [B, length, ...]."""
    ranges = position_ranges(length, distributed.get_world_size(), comm_type, inner)[distributed.get_rank()]
    return lambda x: torch.cat([x[:, start:stop] for start, stop in ranges], dim=1)


def segments_of(*rows: list[int]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def deviation(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    assert ours.shape == expected.shape
    return float((ours.float() - expected).abs().max() / expected.abs().max().clamp(min=1))


def shapes() -> Iterator[tuple[str, int, Tensor | None, int | None, tuple[int, int]]]:
    """(name, length, segments, window, (heads, KV heads))."""
    comes_back = segments_of([70, 30, 60], [40, 60, 60])
    comes_back[comes_back == 2] = 0
    documents = {
        "no segments": (32, None),
        "very short": (32, segments_of([1, 2, 1, 5, 20, 3], [32])),
        "random": (160, segments_of([70, 83, 7], [31, 1, 128])),
        "comes back": (160, comes_back),
    }
    for name, (length, segments) in documents.items():
        for window in (None, 5) if length == 32 else (None, 5, 100):
            for heads in ((4, 4), (4, 2), (4, 1), (12, 3)):
                if heads == (4, 2) or (length, window) == (32, None):
                    yield f"{name}, window {window}, heads {heads}", length, segments, window, heads


def attend(dtype: torch.dtype) -> Deviations:
    found = {}
    for name, length, segments, window, (heads, kv_heads) in shapes():
        inputs = [(torch.randn(2, length, n, 8) / 2).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]
        leaves = [x.float().requires_grad_() for x in inputs[:3]]
        expected = plain_attention(*leaves, Visibility(segments), window, 0.0)
        expected_grads = torch.autograd.grad(expected, leaves, inputs[3].float())
        for comm_type, inner in ways(distributed.get_world_size()):
            ours = ContextAttention(distributed.group.WORLD, comm_type, inner)
            cut = cutter(length, comm_type, inner)
            local = [cut(x).requires_grad_() for x in inputs[:3]]
            out = ours(*local, Visibility(segments), window, 0.0)
            assert out.dtype == dtype
            grads = torch.autograd.grad(out, local, cut(inputs[3]))
            for what, mine, whole in zip("oqkv", (out, *grads), (expected, *expected_grads), strict=True):
                found[f"{comm_type} {inner}, {name}: {what}"] = deviation(mine, cut(whole))
    return found


def worst(results: list[Deviations], tolerance: float) -> dict[str, list[float]]:
    """What deviates by more on some rank."""
    assert all(result.keys() == results[0].keys() for result in results) and results[0]
    sizes = {name: [result[name] for result in results] for name in results[0]}
    return {name: values for name, values in sizes.items() if not max(values) <= tolerance}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_attention_equals_the_whole(num_ranks: int) -> None:
    assert not worst(run(num_ranks, attend, torch.float32), TOLERANCE)


def test_attention_in_bf16() -> None:
    results = run(2, attend, torch.bfloat16)
    assert not worst(results, 0.02)
    assert max(results[0].values()) > 1e-4, "it is computed in bf16"


_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 1},
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
}
LENGTH = 32


def batch_of(segments_BS: Tensor | None, reset_positions: bool) -> tuple[MicroBatch, Tensor]:
    """Two random sequences with uneven loss masks: nearly all of them in one place."""
    tokens = torch.randint(0, 64, (2, LENGTH + 1))
    mask = (torch.rand(2, LENGTH) < 0.3).float()
    mask[0, 20:] = 0
    positions = torch.arange(LENGTH).repeat(2, 1)
    if reset_positions:
        positions = positions % 11
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, positions, segments_BS), mask / mask.sum()


def losses_and_gradients(model: Transformer, batch: MicroBatch, weights_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(
        batch.tokens_BS, batch.rope_positions_BS, batch.segments_BS, labels_BS=batch.labels_BS, weights_BS=weights_BS
    )
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def groups_of(num_ranks: int, num_kv_heads: int) -> Groups:
    return build_groups(Topology(num_ranks, cp=num_ranks), torch.device("cpu"), 1, 1, num_kv_heads)


RECOMPUTE = {"nothing": None, "attention": Recompute("selective"), "layers": Recompute("full")}


def build(config: ModelConfig, recompute: Recompute | None = None) -> Transformer:
    model = Transformer(config, recompute=recompute)
    initialize_(model, config, std=0.1, seed=1)
    return model


def train_models(comm_types: list[tuple[str, int]]) -> Deviations:
    groups = groups_of(distributed.get_world_size(), 2)
    found = {}
    batches = {
        "no segments": batch_of(None, reset_positions=True),
        "documents": batch_of(segments_of([3, 1, 28], [17, 15]), reset_positions=True),
    }
    for family, changes in FAMILIES.items():
        config = ModelConfig.from_hf(_TINY | changes)
        expected = {name: losses_and_gradients(build(config), *batch) for name, batch in batches.items()}
        for (comm_type, inner), (recomputed, recompute) in zip(comm_types, [*RECOMPUTE.items()] * 2, strict=False):
            model = build(config, recompute)
            apply_context_parallel(model, groups, comm_type, inner)
            localize = localizer(config, groups, comm_type, inner)
            for name, (batch, weights) in batches.items():
                loss, grads = losses_and_gradients(model, *localize(batch, weights))
                for x in (loss, *grads):
                    distributed.all_reduce(x)
                expected_loss, expected_grads = expected[name]
                label = f"{family}, {comm_type} {inner}, {name}, recomputes {recomputed}"
                found[f"{label}: loss"] = abs(float(loss / expected_loss) - 1)
                assert len(grads) == len(list(model.parameters()))
                pairs = zip(grads, expected_grads, strict=True)
                found[f"{label}: gradients"] = max(deviation(ours, theirs) for ours, theirs in pairs)
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_model_trains_as_on_one_process(num_ranks: int) -> None:
    comm_types = [way for way in ways(num_ranks) if way not in (("a2a+p2p", 1), ("a2a+p2p", num_ranks))]
    assert not worst(run(num_ranks, train_models, comm_types), TOLERANCE)


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.namespace in ("_c10d_functional", "c10d")
            and "wait" not in func.__name__
            and "wrap" not in func.__name__
        ):
            name, x, rank = func.__name__.split(".")[0], args[0], distributed.get_rank()
            num_bytes = x.numel() * x.element_size()
            if name == "all_to_all_single":
                own, rows = args[2][rank], sum(args[2])
                self.sent[name] += num_bytes * (rows - own) // rows
            elif name == "all_gather_into_tensor":
                self.sent[name] += num_bytes * (distributed.get_world_size() - 1)
            elif name == "reduce_scatter_tensor":
                self.sent[name] += num_bytes * (distributed.get_world_size() - 1) // distributed.get_world_size()
            else:
                raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


def send(heads: int, kv_heads: int) -> list[tuple[str, int, int, int, dict[str, int]]]:
    """(comm type, inner degree, bytes sent forward, backward, those by operation)."""
    found = []
    for comm_type, inner in ways(distributed.get_world_size()):
        local = [torch.randn(2, 8, n, 16, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
        with SentBytes() as forward:
            out = ContextAttention(distributed.group.WORLD, comm_type, inner)(*local, Visibility(None), None, 0.0)
        with SentBytes() as backward:
            out.sum().backward()
        sums = sum(forward.sent.values()), sum(backward.sent.values())
        found.append((comm_type, inner, *sums, dict(forward.sent)))
    return found


@pytest.mark.parametrize(("heads", "kv_heads", "copies_of_4"), [(8, 4, 1), (8, 1, 4)])
def test_no_more_is_sent_than_the_textbook_says(heads: int, kv_heads: int, copies_of_4: int) -> None:
    one_head = 2 * 8 * 16 * 4  # bytes of a rank's part of one head: batch, positions, head_dim, fp32
    kv, qo = 2 * kv_heads * one_head, 2 * heads * one_head
    for results in run(4, send, heads, kv_heads):
        for comm_type, inner, forward, backward, _ in results:
            copies = {1: 1, 2: max(copies_of_4 // 2, 1), 4: copies_of_4}[inner]
            outer = 4 // inner
            # A rank of the ring has 1/inner of the heads of inner x as many positions.
            ring = (outer - 1) * copies * kv
            exchange = (inner - 1) / inner * (qo + copies * kv)
            assert 0.95 * (ring + exchange) <= forward <= 1.05 * (ring + exchange), (comm_type, inner)
            assert 0.95 * (2 * ring + exchange) <= backward <= 1.05 * (2 * ring + exchange), (comm_type, inner)


@pytest.mark.parametrize("comm_type", ["p2p", "allgather", "a2a", "a2a+p2p"])
@pytest.mark.parametrize("segmented", [False, True])
def test_a_batch_is_cut_and_put_together(comm_type: str, segmented: bool) -> None:
    segments = segments_of([3, 1, 28], [17, 15]) if segmented else None
    batch, weights = batch_of(segments, reset_positions=True)
    parts = [local_part(batch, weights, 4, rank, comm_type, 2) for rank in range(4)]
    ranges = position_ranges(LENGTH, 4, comm_type, 2)
    order = torch.cat([torch.arange(start, stop) for own in ranges for start, stop in own]).argsort()
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS"):
        joined = torch.cat([getattr(part, name) for part, _ in parts], dim=1)
        assert torch.equal(joined[:, order], getattr(batch, name))
    assert torch.equal(torch.cat([own for _, own in parts], dim=1)[:, order], weights)
    positions = torch.cat([part.positions_BS for part, _ in parts], dim=1)[:, order]
    expected = batch.positions_BS if segmented else torch.arange(LENGTH).repeat(2, 1)
    assert torch.equal(positions, expected), "positions that were set back are for segments alone"
    for part, _ in parts:
        assert part.rope_positions_BS is part.positions_BS
        assert part.segments_BS is batch.segments_BS
        assert part.to(torch.device("cpu")).rope_positions_BS is not None


def test_one_process_keeps_its_batch() -> None:
    batch, weights = batch_of(None, reset_positions=False)
    assert local_part(batch, weights, 1, 0, None) == (batch, weights)
    assert batch.rope_positions_BS is None


def test_dropout_of_probabilities_is_refused() -> None:
    class Alone:
        def size(self) -> int:
            return 1

        def rank(self) -> int:
            return 0

    attention = ContextAttention(Alone(), "p2p", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no dropout"):
        attention(*(torch.randn(1, 4, 1, 8) for _ in range(3)), Visibility(None), None, 0.1)

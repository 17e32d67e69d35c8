"""Tensors put together from boxes of others, and Megatron's fused tensors in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessel.checkpoint import fused
from tessel.checkpoint.stored import Assembled, Cast, PaddedRows, Piece, Reshaped, StoredModel, Transposed
from tessel.errors import TesselError
from tessel.model.config import ModelConfig

HIDDEN, INNER, HEAD = 6, 4, 2


@dataclass
class InMemory:
    """A stored tensor that counts the elements it was asked for."""

    name: str
    tensor: Tensor
    path: Path = Path("somewhere")
    num_read: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, index: tuple[slice, ...] | None = None) -> Tensor:
        if index is not None:
            assert all(0 <= part.start <= part.stop <= size for part, size in zip(index, self.shape, strict=True))
        values = self.tensor if index is None else self.tensor[index]
        self.num_read += values.numel()
        return values


def stored(*shape: int, name: str = "x") -> InMemory:
    return InMemory(name, torch.randn(*shape))


def halves() -> tuple[InMemory, InMemory, Assembled]:
    left, right = stored(4, 3), stored(4, 2)
    pieces = (Piece((0, 0), (4, 3), left, (0, 0)), Piece((0, 3), (4, 2), right, (0, 0)))
    return left, right, Assembled("both", torch.float32, (4, 5), pieces)


def test_assembled_whole_and_box() -> None:
    left, right, both = halves()
    whole = torch.cat([left.tensor, right.tensor], 1)
    assert both.is_whole
    assert torch.equal(both.read(), whole)
    assert torch.equal(both.read((slice(1, 3), slice(2, 5))), whole[1:3, 2:5])


def test_assembled_reads_only_what_the_box_meets() -> None:
    left, right, both = halves()
    assert both.read((slice(0, 2), slice(4, 5))).shape == (2, 1)
    assert (left.num_read, right.num_read) == (0, 2)


def test_a_box_in_one_piece_is_a_view_of_it() -> None:
    left, _, both = halves()
    assert both.read((slice(0, 2), slice(0, 2))).data_ptr() == left.tensor.data_ptr()


def test_assembled_converts() -> None:
    source = stored(3)
    half = Assembled("x", torch.bfloat16, (3,), (Piece((0,), (3,), source, (0,)),))
    assert torch.equal(half.read(), source.tensor.bfloat16())


def test_a_gap_shows() -> None:
    left, _, _ = halves()
    assert not Assembled("x", torch.float32, (4, 5), (Piece((0, 0), (4, 3), left, (0, 0)),)).is_whole


def test_pieces_are_aligned_at_the_last_dims() -> None:
    layers, expert = stored(3, 4, 5), stored(4, 5)
    layer = Assembled("layer", torch.float32, (4, 5), (Piece((0, 0), (4, 5), layers, (2, 0, 0)),))
    assert torch.equal(layer.read((slice(1, 4), slice(0, 2))), layers.tensor[2, 1:4, :2])
    experts = Assembled("experts", torch.float32, (1, 4, 5), (Piece((0, 0, 0), (1, 4, 5), expert, (0, 0)),))
    assert torch.equal(experts.read((slice(0, 1), slice(1, 3), slice(0, 5))), expert.tensor[None, 1:3])


@pytest.mark.parametrize(
    "box", [None, (slice(1, 3), slice(0, 2)), (slice(4, 6), slice(1, 3)), (slice(2, 6), slice(0, 3))]
)
def test_padded_rows_are_copies_of_the_last(box: tuple[slice, ...] | None) -> None:
    source = stored(4, 3)
    whole = torch.cat([source.tensor, source.tensor[-1:].repeat(2, 1)])
    assert torch.equal(PaddedRows(source, 6).read(box), whole if box is None else whole[box])


def test_cast_names_what_does_not_fit() -> None:
    source = InMemory("model.norm.weight", torch.tensor([1.0, 70000.0, -1e9, float("inf")]))
    assert torch.equal(Cast(source, torch.float16).read((slice(0, 1),)), torch.ones(1).half())
    with pytest.raises(TesselError, match="model.norm.weight: 2 values are too large for float16"):
        Cast(source, torch.float16).read()
    assert Cast(source, torch.bfloat16).read().dtype == torch.bfloat16


def formula_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Megatron's formula, as reference/checkpoint-formats.md has it."""
    parts = (q.reshape(groups, -1, HIDDEN), k.reshape(groups, HEAD, HIDDEN), v.reshape(groups, HEAD, HIDDEN))
    return torch.cat(parts, 1).reshape(-1, HIDDEN)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_qkv_is_dealt_out_by_groups(tp: int) -> None:
    heads, groups = 8, 4
    parts = {"q": stored(heads * HEAD, HIDDEN), "k": stored(groups * HEAD, HIDDEN), "v": stored(groups * HEAD, HIDDEN)}
    expected = formula_qkv(*(part.tensor for part in parts.values()), groups).chunk(tp)
    shapes = {name: part.shape for name, part in parts.items()}
    found: dict[str, list[Piece]] = {name: [] for name in parts}
    for rank in range(tp):
        rows = fused.qkv_rows(rank * groups // tp, groups // tp, heads // groups, HEAD)
        plan = fused.fuse(list(parts), rows, (0, 0), (0, HIDDEN))
        made = fused.assembled("qkv", plan, parts, torch.float32)
        assert made.is_whole
        assert torch.equal(made.read(), expected[rank])
        for name, piece in fused.pieces(plan, InMemory("qkv", expected[rank]), shapes):
            found[name].append(piece)
    for name, part in parts.items():
        back = Assembled(name, torch.float32, part.shape, tuple(found[name]))
        assert back.is_whole
        assert torch.equal(back.read(), part.tensor)


def test_a_bias_is_fused_like_its_weight() -> None:
    parts = {"q": stored(8), "k": stored(4), "v": stored(4)}
    plan = fused.fuse(list(parts), fused.qkv_rows(0, 2, 2, HEAD), (0,), (0,))
    q, k, v = (part.tensor for part in parts.values())
    expected = torch.cat([q[:4], k[:2], v[:2], q[4:], k[2:], v[2:]])
    assert torch.equal(fused.assembled("bias", plan, parts, torch.float32).read(), expected)


def test_gate_and_up_out_of_a_stack_of_layers() -> None:
    gate, up = stored(INNER, HIDDEN), stored(INNER, HIDDEN)
    parts = {"gate": gate, "up": up}
    second = fused.fuse(["gate", "up"], fused.gate_up_rows(2, 4), (0, 0), (0, HIDDEN))
    rank = fused.assembled("fc1", second, parts, torch.float32)
    assert torch.equal(rank.read(), torch.cat([gate.tensor[2:], up.tensor[2:]]))
    layers = InMemory("layers", torch.stack([torch.zeros(4, HIDDEN), rank.read()]))
    found = dict(fused.pieces(second, layers, {name: part.shape for name, part in parts.items()}, lead=(1,)))
    assert torch.equal(found["up"].read([(3, 4), (0, HIDDEN)]), up.tensor[3:4])


def test_padding_is_left_out() -> None:
    last = fused.alone("embedding", (4, 0), (4, HIDDEN))
    source = stored(4, HIDDEN)
    ((_, piece),) = fused.pieces(last, source, {"embedding": (5, HIDDEN)})
    assert (piece.start, piece.size) == ((4, 0), (1, HIDDEN))
    assert fused.pieces(fused.alone("embedding", (8, 0), (4, HIDDEN)), source, {"embedding": (5, HIDDEN)}) == []


def test_experts_of_a_grouped_matrix() -> None:
    num = 3
    fc1, fc2 = stored(num, 2 * INNER, HIDDEN), stored(num, HIDDEN, INNER)
    weight1 = torch.stack([matrix.T for matrix in fc1.tensor]).contiguous().view(HIDDEN, num * 2 * INNER)
    weight2 = torch.stack([matrix.T for matrix in fc2.tensor]).contiguous().view(num * INNER, HIDDEN)
    for experts, matrix, is_first in ((fc1, weight1, True), (fc2, weight2, False)):
        made = fused.gemm_of_experts(experts, is_first)
        assert torch.equal(made.read(), matrix)
        back = fused.experts_of_gemm(InMemory("matrix", matrix), num, HIDDEN, is_first)
        assert torch.equal(back.read(), experts.tensor)
        assert torch.equal(back.read((slice(1, 2), slice(2, 4), slice(0, 3))), experts.tensor[1:2, 2:4, :3])


def test_names_and_files_stay_those_of_the_source() -> None:
    source = stored(2, 3, name="weight")
    for made in (Transposed(source), Reshaped(source, (6,)), Cast(source, torch.float16)):
        assert (made.name, made.path) == ("weight", source.path)


def test_dtypes_by_size() -> None:
    config = ModelConfig("llama", 8, 8, 8, 1, 1, 1, 8)
    tensors = {"a": InMemory("a", torch.zeros(2)), "b": InMemory("b", torch.zeros(5, dtype=torch.bfloat16))}
    assert StoredModel("hf", Path(), config, tensors).dtypes == (torch.bfloat16, torch.float32)

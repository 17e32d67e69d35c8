"""Pieces of parameters: what is written and read of them, in checkpoints and in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from tessel.checkpoint import huggingface, tiles
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.safetensors import TensorInfo, read_header
from tessel.checkpoint.tiles import (
    LoadPlans,
    SavePlans,
    SliceReader,
    dealt_out,
    part_of,
    tile_tensor,
    tiled,
    whole_tile,
)
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.layout.tiles import Tile, tile_of
from tessel.layout.topology import Degrees, Topology
from tessel.runtime.team import Team
from tests.checkpoint.pieces import RULES, save
from tests.train.tiny import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TP2 = Topology.of(Degrees(tp=2), 2)


def tp2(name: str, rank: int) -> Tile:
    return tile_of(RULES[name], TP2, TP2.place(rank))


# Pieces


def test_a_part_leaves_the_padding_out() -> None:
    local = torch.arange(31.0 * 8).view(31, 8)
    part = part_of(local, tp2("embed.weight", 1))
    assert (part.start, part.stop, part.shape) == ((31, 0), (61, 8), (61, 8))
    assert torch.equal(part.values, local[:30])
    assert part.values.data_ptr() == local.data_ptr()
    with pytest.raises(ValueError, match=r"\(30, 8\) is no tile of local shape \(31, 8\)"):
        part_of(local[:30], tp2("embed.weight", 1))


def test_a_rank_of_padding_alone_has_nothing_to_write() -> None:
    tile = Tile((4, 2), (4, 0), (4, 2), (2, 2))
    piece = tile_tensor(torch.ones(2, 2), tile)
    assert piece.__create_write_items__("x", piece) == []
    assert piece.__create_chunk_list__() == []


def test_a_piece_answers_what_dcp_asks() -> None:
    local = torch.randn(8, 12)
    piece = tile_tensor(local, tp2("o.weight", 1))
    assert isinstance(piece, Tensor) and piece.shape == (8, 24)
    (item,) = piece.__create_write_items__("x", piece)
    assert item.type is WriteItemType.SHARD and item.tensor_data is not None
    assert (item.index.fqn, item.index.offset) == ("x", torch.Size([0, 12]))
    assert (item.tensor_data.size, item.tensor_data.chunk.sizes) == (torch.Size([8, 24]), torch.Size([8, 12]))
    assert piece.__get_tensor_shard__(item.index).data_ptr() == local.data_ptr()
    with pytest.raises(ValueError, match="held from"):
        piece.__get_tensor_shard__(MetadataIndex("x", torch.Size([0, 0])))
    assert repr(piece) == "TileTensor((8, 24), (0, 12) to (8, 24))"
    with pytest.raises(NotImplementedError, match="only to be saved or loaded"):
        piece + 1


def test_which_entries_of_a_checkpoint_are_pieces() -> None:
    tensors = {
        "model.o.weight": torch.zeros(8, 12),
        "optimizer.exp_avg.o.weight": torch.zeros(8, 12),
        "optimizer.step.o.weight": torch.zeros(()),
        "model.norm.weight": torch.zeros(7),
    }
    found = tiled(tensors, {name: tp2(name, 0) for name in RULES if not name.startswith("experts")})
    assert [name for name, tensor in found.items() if isinstance(tensor, tiles.TileTensor)] == list(tensors)[:2]
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "model.o.weight": (8, 24),
        "optimizer.exp_avg.o.weight": (8, 24),
        "optimizer.step.o.weight": (),
        "model.norm.weight": (7,),
    }


# What DCP's planners do with them


def write(folder: Path, tensors: Mapping[str, Tensor], partial: bool = False) -> None:
    dcp.save(
        dict(tensors), storage_writer=dcp.FileSystemWriter(folder), planner=SavePlans(partial=partial), no_dist=True
    )


def read(folder: Path, tensors: Mapping[str, Tensor]) -> int:
    reader = SliceReader(folder)
    dcp.load(dict(tensors), storage_reader=reader, planner=LoadPlans(), no_dist=True)
    return reader.bytes_read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_only_the_asked_for_elements_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24 * 8).view(24, 8).to(dtype)
    # An odd number of bytes before it, and one that is not stored row by row.
    odd, turned = torch.ones(3, dtype=torch.uint8), values.t().contiguous().t()
    write(tmp_path, {"odd": odd, "model.q.weight": values, "model.turned": turned})
    found = torch.zeros(12, 8, dtype=dtype)
    assert read(tmp_path, {"model.q.weight": tile_tensor(found, tp2("q.weight", 1))}) == found.nbytes
    assert torch.equal(found, values[12:])
    found.zero_()
    assert read(tmp_path, {"model.turned": tile_tensor(found, tp2("q.weight", 0))}) == found.nbytes
    assert torch.equal(found, values[:12])
    whole = torch.zeros(24, 8, dtype=dtype)
    assert read(tmp_path, {"model.turned": whole, "odd": torch.zeros_like(odd)}) == whole.nbytes + 3
    assert torch.equal(whole, values)


def test_the_plain_reader_of_torch_reads_the_same_folder(tmp_path: Path) -> None:
    values = torch.randn(61, 8)
    save(tmp_path, 1, {"model.embed.weight": values, "optimizer.step.embed.weight": torch.tensor(3.0)}, Team())
    found = {"model.embed.weight": torch.zeros(61, 8), "optimizer.step.embed.weight": torch.zeros(())}
    dcp.load(found, checkpoint_id=run_checkpoint.iteration_folder(tmp_path, 1), no_dist=True)
    assert torch.equal(found["model.embed.weight"], values)
    assert found["optimizer.step.embed.weight"] == 3


def test_a_folder_that_torch_wrote_is_read(tmp_path: Path) -> None:
    """As checkpoints of before were written."""
    values = {"model.embed.weight": torch.randn(61, 8), "optimizer.step.embed.weight": torch.tensor(3.0)}
    dcp.save(values, checkpoint_id=tmp_path, no_dist=True)
    found = {name: torch.zeros_like(value) for name, value in values.items()}
    read(tmp_path, found)
    assert all(torch.equal(found[name], values[name]) for name in values)


def test_a_piece_that_is_not_stored_whole_is_refused(tmp_path: Path) -> None:
    half = tile_tensor(torch.ones(12, 8), tp2("q.weight", 0))
    write(tmp_path, {"x": half}, partial=True)
    for wanted in (torch.zeros(24, 8), tile_tensor(torch.zeros(12, 8), tp2("q.weight", 1))):
        with pytest.raises(dcp.CheckpointException, match="it does not hold all of x"):
            read(tmp_path, {"x": wanted})


def test_a_parameter_that_is_not_whole_is_not_saved(tmp_path: Path) -> None:
    half = tile_tensor(torch.ones(12, 8), tp2("q.weight", 0))
    with pytest.raises(dcp.CheckpointException, match="x has 192 elements, and the processes hold 96"):
        write(tmp_path, {"x": half})


def test_a_stored_tensor_that_ends_early_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 1, {"model.q.weight": torch.ones(24, 8)}, Team())
    (path,) = run_checkpoint.iteration_folder(tmp_path, 1).glob("*.distcp")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TesselError, match="iter_0000001 is damaged"):
        run_checkpoint.load_tensors(tmp_path, 1, {"model.q.weight": torch.zeros(24, 8)})


def item_of(name: str, num_elements: int) -> WriteItem:
    size = torch.Size([num_elements])
    chunk = ChunkStorageMetadata(torch.Size([0]), size)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(torch.float32), size=size)
    return WriteItem(index=MetadataIndex(name, torch.Size([0])), type=WriteItemType.SHARD, tensor_data=data)


def test_copies_are_dealt_out_by_bytes() -> None:
    shared = [item_of(name, size) for name, size in (("a", 1), ("b", 10), ("c", 6), ("d", 5))]
    plans = dealt_out([SavePlan(shared), SavePlan([*shared, item_of("own", 8)])])
    assert [[item.index.fqn for item in plan.items] for plan in plans] == [["b", "d"], ["a", "c", "own"]]


def test_values_are_those_of_the_call(tmp_path: Path) -> None:
    """What is saved in the background is copied before training goes on."""
    values = torch.ones(24, 8)

    def change() -> None:
        values.zero_()

    save(tmp_path, 1, {"model.q.weight": values}, Team(), on_copied=change)
    found = torch.zeros(24, 8)
    run_checkpoint.load_tensors(tmp_path, 1, {"model.q.weight": found})
    assert torch.equal(found, torch.ones(24, 8))
    assert not values.any()


# Hugging Face folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(rule.shape, generator=generator) for name, rule in parameters(CONFIG).items()}
    save_file(values, tmp_path / "model.safetensors")
    return tmp_path


def modules_of(rank: int, degree: int, keep: Callable[[str], bool]) -> tuple[nn.Module, dict[str, Tile]]:
    """A part of the model on the meta device, with the parameters that `keep` says."""
    topology = Topology.of(Degrees(tp=degree), degree)
    held = {name: tile_of(rule, topology, topology.place(rank)) for name, rule in parameters(CONFIG).items()}
    part = nn.Module()
    for name in filter(keep, held):
        owner = part
        *path, leaf = name.split(".")
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(held[name].local_shape, device="meta")))
    return part, held


def bytes_read(monkeypatch: pytest.MonkeyPatch, load: Callable[[], None]) -> int:
    """The bytes of all that `load` reads out of safetensors files."""
    counted = []
    plain = TensorInfo.read

    def counting(self: TensorInfo, index: tuple[slice, ...] | None = None) -> Tensor:
        found = plain(self, index)
        counted.append(found.nbytes)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TensorInfo, "read", counting)
        load()
    return sum(counted)


def test_a_tensor_parallel_rank_reads_its_own_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = read_header(folder / "model.safetensors")
    total = sum(info.num_bytes for info in stored.values())
    for rank in range(2):
        part, held = modules_of(rank, 2, lambda name: True)
        count = bytes_read(monkeypatch, lambda part=part, held=held: huggingface.load_into(part, folder, tiles=held))
        own = sum(torch.Size(tile.size).numel() * 4 for tile in held.values())
        assert count == own < 0.51 * total
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter[held[name].local_index()], stored[name].read(held[name].index()))


def test_vocabulary_padding_is_zero(folder: Path) -> None:
    part, held = modules_of(3, 4, lambda name: "embed" in name)
    huggingface.load_into(part, folder, tiles=held)
    (embedding,) = part.parameters()
    padding = held["model.embed_tokens.weight"].local_shape[0] - held["model.embed_tokens.weight"].size[0]
    assert padding > 0
    assert not embedding[-padding:].any() and embedding[:-padding].any(dim=1).all()


def test_a_stage_reads_nothing_of_the_others_and_refuses_a_damaged_folder_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, held = modules_of(0, 1, lambda name: name.startswith("model.layers.0."))
    count = bytes_read(monkeypatch, lambda: huggingface.load_into(part, folder, tiles=held))
    assert count == sum(parameter.nbytes for parameter in part.parameters())
    values = {name: info.read().clone() for name, info in read_header(folder / "model.safetensors").items()}
    del values["model.layers.1.mlp.up_proj.weight"]
    values["model.norm.weight"] = torch.ones(3)
    save_file(values, folder / "model.safetensors")
    part, held = modules_of(0, 1, lambda name: name.startswith("model.layers.0."))
    with pytest.raises(TesselError, match=r"1 missing: model.layers.1.mlp.up_proj.weight; 1 of the wrong shape"):
        huggingface.load_into(part, folder, tiles=held)


@pytest.mark.parametrize("lead", range(4))
def test_slices_of_a_file_are_those_of_the_tensor(lead: int, tmp_path: Path) -> None:
    values = torch.randn(5, 4, 3)
    path = tmp_path / "data"
    path.write_bytes(b"x" * lead + values.numpy().tobytes())
    info = TensorInfo("x", torch.float32, (5, 4, 3), path, lead, values.nbytes)
    assert torch.equal(info.read(), values)
    index = (slice(1, 4), slice(0, 2), slice(1, 3))
    assert torch.equal(info.read(index), values[index])
    assert info.read((slice(5, 5), slice(0, 4), slice(0, 3))).shape == (0, 4, 3)
    assert info.read(whole_tile((5, 4, 3)).index()).is_contiguous()

"""Experts in Hugging Face folders: whichever way they are stored, read by tile, and written for transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tessel.checkpoint.experts import in_memory
from tessel.checkpoint.huggingface import export, load_into
from tessel.checkpoint.names import Place, places_of, renamed, stored_name
from tessel.checkpoint.weights import BinTensor
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.layout.tiles import Tile, tile_of
from tessel.layout.topology import Degrees, Topology
from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
Folder = Callable[..., Path]


def loaded(folder: Path, tiles: dict[str, Tile] | None = None) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder))
    if tiles is not None:
        for name, tile in tiles.items():
            owner, _, leaf = name.rpartition(".")
            held = torch.nn.Parameter(torch.empty(tile.local_shape, device="meta"))
            setattr(model.get_submodule(owner), leaf, held)
    load_into(model, folder, "cpu", tiles)
    return model


def logits_of(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(tokens_BS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_wrote_and_what_it_reads(family: str, tiny_hf_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_hf_folder(family)
    tokens_BS = torch.randint(0, 307, (2, 19))
    expected = logits_of(folder, tokens_BS)
    model = loaded(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BS), expected, rtol=1e-5, atol=1e-5)
    target = tmp_path / "exported"
    export(model.named_parameters(), model.config, target, torch.float32)
    written = load_file(target / "model.safetensors")
    # The names of transformers 4, and of every published model of these families.
    assert written.keys() == load_file(folder / "model.safetensors").keys()
    assert ("model.layers.1.block_sparse_moe.experts.3.w2.weight" in written) == (family == "mixtral")
    torch.testing.assert_close(logits_of(target, tokens_BS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_with_gate_and_up_in_one(family: str, tiny_hf_folder: Folder) -> None:
    """What transformers 5 holds in memory, saved as it is."""
    folder = tiny_hf_folder(family)
    expected = dict(loaded(folder).named_parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert any(name.endswith("gate_up_proj") for name in state)
    save_file(state, folder / "model.safetensors")
    for name, parameter in loaded(folder).named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("fused", [False, True])
def test_each_rank_reads_its_own_experts(fused: bool, tiny_hf_folder: Folder) -> None:
    folder = tiny_hf_folder("qwen2_moe", num_experts=6)
    whole = dict(loaded(folder).named_parameters())
    if fused:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, folder / "model.safetensors")
    config = ModelConfig.from_folder(folder)
    topology = Topology.of(Degrees(ep=3, etp=2), 6)
    for rank in range(6):
        rules = parameters(config)
        tiles = {name: tile_of(rule, topology, topology.place(rank)) for name, rule in rules.items()}
        for name, parameter in loaded(folder, tiles).named_parameters():
            assert torch.equal(parameter, whole[name][tiles[name].index()]), name


def test_a_missing_expert_is_named(tiny_hf_folder: Folder) -> None:
    def without(expert: int) -> Path:
        folder = tiny_hf_folder("qwen3_moe")
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors")
        return folder

    with pytest.raises(
        TesselError, match=r"1 missing: model.layers.1.mlp.experts.up_proj; 4 surplus: .*experts.0.up_proj"
    ):
        loaded(without(2))
    with pytest.raises(TesselError, match=r"experts.up_proj is \(4, 24, 32\) and should be \(5, 24, 32\)"):
        loaded(without(4))


def test_an_expert_of_another_shape_is_not_stacked() -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(2, 4)]
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(2)]
    stored = {name: BinTensor(name, Path("x"), tensor) for name, tensor in zip(names, tensors, strict=True)}
    assert in_memory(stored).keys() == set(names)


def test_names_go_there_and_back() -> None:
    stacked = "model.layers.3.mlp.experts.down_proj"
    for family in FAMILIES:
        assert places_of(stored_name(stacked, family, 7)) == [Place(stacked, 7)]
        router = "model.layers.3.mlp.gate.weight"
        assert places_of(renamed(router, family)) == [Place(router)]
    assert stored_name(stacked, "mixtral", 7) == "model.layers.3.block_sparse_moe.experts.7.w2.weight"
    dense = "model.layers.3.mlp.gate_proj.weight"
    assert places_of(dense) == [Place(dense)]
    assert [place.half for place in places_of("model.layers.3.mlp.experts.gate_up_proj")] == [0, 1]

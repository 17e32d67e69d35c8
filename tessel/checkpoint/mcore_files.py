"""The files of a checkpoint in Megatron's `torch` format, before any tensor is looked at.

What the folders' names leave open is decided by `args`: in mp_rank_00_001 the second number is the
pipeline rank, or the expert-parallel rank where PP is 1. Which layers lie where is read off the files
themselves, whatever flags (--num-layer-list, --noop-layers, ...) dealt them out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tessel.checkpoint import torch_file
from tessel.checkpoint.four_bits import Dequantized, dequantized
from tessel.checkpoint.mcore_names import FINAL_NORM_KEY
from tessel.checkpoint.megatron_folder import model_parallel, places, rank_folders
from tessel.checkpoint.weights import named
from tessel.errors import TesselError
from tessel.layout.stages import Placement, rank_of_stage
from tessel.layout.topology import Place, Topology

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
_DEGREES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_CHUNK = re.compile(r"model(\d+)")
# Beside the weights: a linear's state for 8-bit arithmetic, and buffers that are computed.
_NO_WEIGHTS = ("_extra_state", ".inv_freq", ".local_tokens_per_expert")


@dataclass(frozen=True)
class Dialect:
    """How files name what Megatron-core's names stand for.

    `weights`: a rank's tensors by Megatron-core's keys, out of its file's state; what has none keeps its own.
    `shown`: a key as the files have it. `oldest`: the first checkpoint_version with these names.
    """

    weights: Callable[[Path, Any], Mapping[str, Tensor | Dequantized]]
    shown: Callable[[str], str]
    oldest: float


@dataclass(frozen=True)
class RankFile:
    """What one rank's file holds. `chunks`: its weights by key, for each virtual pipeline chunk."""

    path: Path
    place: Place
    content: Mapping[str, Any]
    args: Mapping[str, Any]
    chunks: tuple[Mapping[str, Tensor | Dequantized], ...]
    version: float

    @property
    def folder(self) -> str:
        return self.path.parent.name


@dataclass(frozen=True)
class ChunkLayers:
    """A chunk of a pipeline rank: its layers by their number in the file -> in the model."""

    pp: int
    chunk: int
    layers: Mapping[int, int]
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class RankFiles:
    """All files of a checkpoint, and how the model is cut in them."""

    topology: Topology
    files: tuple[RankFile, ...]
    chunks: tuple[ChunkLayers, ...]
    placement: Placement
    dialect: Dialect

    @property
    def args(self) -> Mapping[str, Any]:
        return self.files[0].args

    @property
    def num_layers(self) -> int:
        return sum(len(chunk.layers) for chunk in self.chunks)

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees above 1, by tessel's names."""
        found = {name: getattr(self.topology, name) for name in ("tp", "pp", "ep")}
        found["chunks"] = len(self.chunks) // self.topology.pp
        if self.topology.ep > 1 or self.topology.etp != self.topology.tp:
            found["etp"] = self.topology.etp
        return {name: size for name, size in found.items() if size > 1 or name == "etp"}


def open_files(path: Path, dialect: Dialect) -> RankFiles:
    """The rank files in the folder of an iteration.

    Raises:
        TesselError: files are missing, damaged, or of another format or other degrees than they say.
    """
    folders = rank_folders(path)
    if not folders:
        raise TesselError(f"{path} holds no mp_rank_* folder, as Megatron's torch format does. Check the path.")
    first = _read(next(iter(folders.values())), dialect)
    topology = _topology(first, list(folders))
    where = places(topology)
    _check_folders(path, first, topology, set(folders), set(where))
    files = tuple(first if name == first.folder else _read(folders[name], dialect) for name in where)
    files = tuple(replace(file, place=where[file.folder]) for file in files)
    for file in files[1:]:
        wrong = [f"{name} {file.args.get(name)}" for name in _DEGREES if file.args.get(name) != first.args.get(name)]
        if wrong:
            raise TesselError(
                f"{file.path} says {', '.join(wrong)}, unlike {first.folder}: the folders are of different "
                "checkpoints. Take all from the same."
            )
        if len(file.chunks) != len(first.chunks):
            raise TesselError(
                f"{file.path} has {len(file.chunks)} virtual pipeline chunks and {first.folder} {len(first.chunks)}: "
                "the folders are of different checkpoints. Take all from the same."
            )
    chunks, placement = _chunk_layers(files, topology)
    return RankFiles(topology, files, chunks, placement, dialect)


def _read(folder: Path, dialect: Dialect) -> RankFile:
    path = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if path is None:
        raise TesselError(f"{folder} has no {MODEL_FILES[0]}: the checkpoint is not complete. Copy it again.")
    content = torch_file.load(path)
    if not isinstance(content, Mapping):
        raise TesselError(f"{path} holds a {type(content).__name__}, not what Megatron saves. Check the path.")
    args = torch_file.plain(content.get("args") or {})
    if not isinstance(args, Mapping):
        raise TesselError(f"{path}: its args are a {type(args).__name__}, not what Megatron saves. Check the path.")
    numbers = sorted(int(found[1]) for key in content if (found := _CHUNK.fullmatch(str(key))))
    keys = ["model"] if "model" in content else [f"model{number}" for number in numbers]
    if not keys or (numbers and numbers != list(range(len(numbers)))):
        raise TesselError(f"{path} holds no model ({named(map(str, content))}). Take another copy of the checkpoint.")
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < dialect.oldest:
        raise TesselError(
            f"{path} has checkpoint_version {version}, in which q, k and v lie in another order: it is read where the "
            "names are those of that time, and not with Megatron-core's."
        )
    return RankFile(path, Place(), content, args, tuple(dialect.weights(path, content[key]) for key in keys), version)


def _weights(path: Path, state: Any) -> Mapping[str, Tensor | Dequantized]:
    if not isinstance(state, Mapping) or "language_model" in state:
        raise TesselError(f"{path}: its weights have no names of Megatron-core's. Check the path and the format.")
    return dequantized(path, tensors_of(path, state))


def tensors_of(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The weights of a state by their keys, after what stands beside them is left out.

    Raises:
        TesselError: there is something else among them.
    """
    found = {str(key): value for key, value in state.items() if not str(key).endswith(_NO_WEIGHTS)}
    strangers = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if strangers:
        raise TesselError(f"{path}: {named(strangers)} should be tensors, and are none. Take another copy.")
    return found


CORE = Dialect(_weights, str, 2.0)
"""The names of Megatron-core."""


def _topology(first: RankFile, names: list[str]) -> Topology:
    """The degrees by the args; by the folders' names where there are no args."""
    args = first.args
    if not args:
        numbers = [[int(number) for number in name.removeprefix("mp_rank_").split("_")] for name in names]
        tp, pp = (max(row[dim] if dim < len(row) else 0 for row in numbers) + 1 for dim in range(2))
        return model_parallel(tp, pp, 1, tp)
    tp, pp, ep = (args.get(name, 1) for name in _DEGREES)
    if _DEGREES[0] not in args:
        tp = args.get("model_parallel_size", 1)  # its name before checkpoint_version 3
    has_experts = args.get("num_experts") or args.get("num_local_experts")
    etp = (args.get("expert_tensor_parallel_size") if has_experts else None) or tp
    if args.get("moe_tp_extend_ep"):
        raise TesselError(
            f"{first.path} was written with --moe-tp-extend-ep, which is not supported. Convert it without, by the "
            "tool that wrote it."
        )
    for name, size in zip((*_DEGREES, "expert_tensor_parallel_size"), (tp, pp, ep, etp), strict=True):
        if type(size) is not int or not 1 <= size <= 65536:
            raise TesselError(f"{first.path}: args.{name} is {size!r}, and must be a whole number above 0.")
    return model_parallel(tp, pp, ep, etp)


def _check_folders(path: Path, first: RankFile, topology: Topology, there: set[str], wanted: set[str]) -> None:
    missing, surplus = sorted(wanted - there), sorted(there - wanted)
    if not missing and not surplus:
        return
    degrees = f"TP{topology.tp} PP{topology.pp} EP{topology.ep}"
    if surplus:
        raise TesselError(
            f"{path}: the args in {first.folder} say {degrees}, whose folders are {named(sorted(wanted))}; there are "
            f"{named(sorted(there))}. They are not of one checkpoint: take the whole folder again."
        )
    raise TesselError(
        f"{path} lacks {len(missing)} of the {len(wanted)} folders of {degrees}: {named(missing)}. Copy them too."
    )


def _chunk_layers(files: tuple[RankFile, ...], topology: Topology) -> tuple[tuple[ChunkLayers, ...], Placement]:
    """Which layers each chunk holds: chunks in the order of the forward pass, layers numbered on through them."""
    by_stage: dict[int, RankFile] = {}
    for file in files:
        by_stage.setdefault(file.place.pp, file)
    num_chunks = len(files[0].chunks)
    has_v_shape = topology.pp > 1 and num_chunks == 2 and FINAL_NORM_KEY in by_stage[0].chunks[1]
    placement: Placement = "v" if has_v_shape else "loop"
    found, number = [], 0
    num_stages = topology.pp * num_chunks
    for stage in range(num_stages):
        pp, chunk = rank_of_stage(stage, topology.pp, placement), stage // topology.pp
        keys = by_stage[pp].chunks[chunk]
        local = sorted({int(match[1]) for key in keys if (match := _LAYER.match(key))})
        layers = dict(zip(local, range(number, number + len(local)), strict=True))
        found.append(ChunkLayers(pp, chunk, layers, stage == 0, stage == num_stages - 1))
        number += len(local)
    return tuple(found), placement

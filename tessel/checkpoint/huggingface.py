"""Hugging Face folders: weights into a model, a model into a folder that `from_pretrained` opens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessel.checkpoint import companion
from tessel.checkpoint.experts import as_stored, in_memory
from tessel.checkpoint.mapped import as_own, in_family
from tessel.checkpoint.metadata import read_side_files, write_metadata
from tessel.checkpoint.safetensors import write_file
from tessel.checkpoint.stored import StoredModel, StoredTensor
from tessel.checkpoint.weights import SAFETENSORS_FILE, SAFETENSORS_INDEX, named, read_tensors
from tessel.errors import TesselError
from tessel.layout.adapters import is_adapter
from tessel.layout.sharding import parameters
from tessel.layout.tiles import Tile
from tessel.model.config import ModelConfig
from tessel.model.mapping import MAPPING_FILE
from tessel.runtime.files import atomic_folder, require_path

__all__ = [
    "MAX_SHARD_BYTES",
    "export",
    "load_into",
    "read_side_files",
    "read_tensors",
    "require_replaceable",
    "write_metadata",
]

MAX_SHARD_BYTES = 5_000_000_000
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Buffers that old versions of transformers saved; they follow from config.json.
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_into(
    model: nn.Module,
    folder: str | Path,
    device: torch.device | str = "cpu",
    tiles: Mapping[str, Tile] | None = None,
) -> None:
    """Give every parameter of `model` the value it has in a Hugging Face folder.

    Parameters are filled where they are, in their own dtype; those on the meta device are made on
    `device`. Files are memory-mapped and converted tensor by tensor, so that the peak of private
    memory is the model itself and one tensor.

    `tiles`, of every parameter of the whole model by name: `model` is a part of it, its parameters are
    tiles, or DTensors that share a tile out, and only what they hold is read. Vocabulary padding is zero.
    The whole folder must fit all the same.

    A model without a parameter `lm_head.weight` is a tied one; a copy of its embedding under that
    name is then passed over.

    Raises:
        TesselError: no weights, damaged files, tensors missing, surplus or of another shape: all of
            them are named. The model is untouched then.
    """
    # DCP comes along, which takes a second to import.
    from tessel.checkpoint.fill import fill_model
    from tessel.checkpoint.tiles import whole_tile

    own_names = dict(model.named_parameters())
    if tiles is None:
        tiles = {name: whole_tile(tuple(parameter.shape)) for name, parameter in own_names.items()}
    tiles = {name: tile for name, tile in tiles.items() if not is_adapter(name)}
    own = tiles[EMBEDDING].index() if EMBEDDING in own_names else None
    stored = matching(Path(folder), {name: tile.shape for name, tile in tiles.items()}, own)
    fill_model(model, stored, device, tiles)


def open_folder(folder: str | Path) -> StoredModel:
    """The model in a Hugging Face folder, none of its weights read.

    Raises:
        TesselError: no weights, damaged files, or weights that are not those of config.json.
    """
    folder = require_path(folder, "Hugging Face folder")
    config = ModelConfig.from_folder(folder)
    shapes = {name: rule.shape for name, rule in parameters(config).items()}
    stored = matching(folder, shapes, tuple(slice(0, size) for size in shapes[EMBEDDING]))
    tensors = {name: stored[name] for name in shapes}
    return StoredModel("hf", folder, config, tensors, side_files=companion.of_folder(folder))


def matching(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], own: tuple[slice, ...] | None
) -> dict[str, StoredTensor]:
    """The stored tensor of every parameter in `shapes`, after all that could be wrong was looked for.

    `own`: the part of the embedding that this process reads and compares with a copy of it under the head's name.
    """
    files = {name: info for name, info in read_tensors(folder).items() if not name.endswith(_COMPUTED_SUFFIXES)}
    if (folder / MAPPING_FILE).is_file():
        files = in_family(files, ModelConfig.from_folder(folder), shapes)
    stored = in_memory(files)
    if HEAD not in shapes and HEAD in stored:
        _drop_tied_head(folder, stored, own)
    missing = [name for name in shapes if name not in stored]
    if missing == [HEAD]:
        raise TesselError(
            f"{folder} has no {HEAD}, and its config.json says tie_word_embeddings: false. If the model's output "
            'layer is its embedding, write "tie_word_embeddings": true there; else take a complete copy of the weights.'
        )
    surplus = [name for name in stored if name not in shapes]
    both = [(name, shape, stored[name]) for name, shape in shapes.items() if name in stored]
    misshapen = [f"{name} is {info.shape} and should be {shape}" for name, shape, info in both if info.shape != shape]
    unreadable = [
        f"{name} is {str(info.dtype).removeprefix('torch.')}" for name, _, info in both if info.dtype not in _READABLE
    ]
    problems = [
        f"{len(found)} {what}: {named(found)}"
        for what, found in (
            ("missing", missing),
            ("surplus", surplus),
            ("of the wrong shape", misshapen),
            ("of a quantised or integer type, which cannot be trained", unreadable),
        )
        if found
    ]
    if problems:
        raise TesselError(
            f"The weights in {folder} are not those of its config.json; tensors {'; '.join(problems)}. "
            "Take both from the same place."
        )
    return stored


def _drop_tied_head(folder: Path, stored: dict[str, StoredTensor], own: tuple[slice, ...] | None) -> None:
    """Some tools save a tied matrix under both names, or under the head's alone. `own`: what this process reads."""
    head = stored.pop(HEAD)
    if EMBEDDING not in stored:
        stored[EMBEDDING] = head
        return
    embedding = stored[EMBEDDING]
    alike = head.shape == embedding.shape and head.dtype == embedding.dtype
    if alike and own is not None:
        alike = torch.equal(head.read(own), embedding.read(own))
    if not alike:
        raise TesselError(
            f"config.json in {folder} says tie_word_embeddings: true, but {HEAD} differs from {EMBEDDING}. "
            'Write "tie_word_embeddings": false there if the model has an output layer of its own, '
            f"or remove {HEAD} from the file."
        )


def export(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    folder: str | Path,
    dtype: torch.dtype,
    side_files: Mapping[str, bytes] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers opens: safetensors, config.json, generation_config.json, tokenizer.

    `tensors` are names as in memory and whole tensors on any device; they are converted to
    `dtype` and written piece by piece, and at most one shard's worth of them is held. `folder`
    appears whole or not at all, and an older one there is replaced only by a whole one. For
    `side_files` see `read_side_files`.

    Raises:
        TesselError: the disk is full, or `folder` holds something that is no Hugging Face folder.
    """
    folder = Path(folder)
    require_replaceable(folder)
    with atomic_folder(folder) as temporary:
        stored = as_own(as_stored(tensors, config.family), config)
        _write_shards(stored, temporary, dtype, max_shard_bytes)
        write_metadata(temporary, config, dtype, side_files)


def require_replaceable(folder: Path) -> None:
    """Refuse to export over anything but an older Hugging Face folder.

    Raises:
        TesselError: `folder` is a file, or a folder that holds something else.
    """
    if folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise TesselError(
            f"{folder} exists and is no Hugging Face folder, so it is not replaced. Move it away, or choose another."
        )


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    written: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    for number, shard in enumerate(_shards(tensors, dtype, max_shard_bytes)):
        path = folder / f"shard-{number}"  # how many there will be, which their names say, is not known yet
        total_bytes += write_file(path, shard, dtype)
        written.append((path, [name for name, _ in shard]))
    if len(written) == 1:
        written[0][0].rename(folder / SAFETENSORS_FILE)
        return
    file_of: dict[str, str] = {}
    for number, (path, names) in enumerate(written, start=1):
        file_name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / file_name)
        file_of |= dict.fromkeys(names, file_name)
    index: dict[str, Any] = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in order, in groups of at most `max_shard_bytes`; a larger tensor has its own."""
    shard: list[tuple[str, Tensor]] = []
    shard_bytes = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * dtype.itemsize
        if shard and shard_bytes + num_bytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append((name, tensor))
        shard_bytes += num_bytes
    yield shard

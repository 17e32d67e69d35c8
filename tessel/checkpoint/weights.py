"""The weights of a Hugging Face folder, whichever of the four ways they are stored; nothing is read until asked for.

    model.safetensors, model.safetensors.index.json + shards, pytorch_model.bin, pytorch_model.bin.index.json + shards

Looked for in this order, as transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessel.checkpoint import torch_file
from tessel.checkpoint.safetensors import read_header, refuse_impostor
from tessel.checkpoint.stored import StoredTensor
from tessel.errors import TesselError
from tessel.runtime.files import require_path

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (SAFETENSORS_FILE, SAFETENSORS_INDEX, BIN_FILE, BIN_INDEX)
MAX_NAMED = 10


@dataclass(frozen=True)
class BinTensor:
    """A tensor of a .bin file, which torch has mapped already."""

    name: str
    path: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, index: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor, or the box of it that `index` says, memory-mapped."""
        return self.tensor if index is None else self.tensor[index]


def named(names: Iterable[str]) -> str:
    """The first ten of a list in words, and how many there are beyond."""
    found = list(names)
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more


def read_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder by name; call `.read()` on one for its values.

    Raises:
        TesselError: there are no weights, a shard is missing, or a file is damaged or something else.
    """
    folder = require_path(folder, "Hugging Face folder")
    if not folder.is_dir():
        raise TesselError(f"{folder} is a file. Give the folder that holds config.json and the weights.")
    if (folder / SAFETENSORS_FILE).is_file():
        return dict(read_header(folder / SAFETENSORS_FILE))
    if (folder / SAFETENSORS_INDEX).is_file():
        return _read_shards(folder / SAFETENSORS_INDEX, read_header)
    if (folder / BIN_FILE).is_file():
        return dict(read_bin(folder / BIN_FILE))
    if (folder / BIN_INDEX).is_file():
        return _read_shards(folder / BIN_INDEX, read_bin)
    raise TesselError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    looked_for = f"{SAFETENSORS_FILE}, {SAFETENSORS_INDEX}, {BIN_FILE} and {BIN_INDEX}"
    message = f"{folder} holds no weights: looked for {looked_for}."
    for suffix, index in ((".safetensors", SAFETENSORS_INDEX), (".bin", BIN_INDEX)):
        shards = sorted(path.name for path in folder.glob(f"*{suffix}"))
        if any("-of-" in name for name in shards):
            return f"{message} There are shards ({named(shards)}) without their index: download {index} too."
        if shards:
            return f"{message} It has {named(shards)}, which is not a name that transformers gives."
    if (folder / "adapter_config.json").is_file():
        return f"{message} It is an adapter; give the folder of the model that it adapts."
    return message


def _read_shards(index: Path, read: Callable[[Path], Any]) -> dict[str, StoredTensor]:
    """The tensors that an index and its shards hold; the index says which copy of a name counts."""
    file_of = _weight_map(index)
    files = sorted(set(file_of.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise TesselError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} shards that {index.name} names: "
            f"{named(missing)}. Download them too."
        )
    shards: dict[str, dict[str, StoredTensor]] = {name: read(index.parent / name) for name in files}
    absent = [f"{name} (in {file})" for name, file in file_of.items() if name not in shards[file]]
    if absent:
        raise TesselError(
            f"{index.name} promises tensors that its shards do not hold: {named(absent)}. "
            "The files are of different versions: download all of them again."
        )
    tensors = {name: shards[file][name] for name, file in file_of.items()}
    for shard in shards.values():
        for name, tensor in shard.items():
            tensors.setdefault(name, tensor)
    return tensors


def shard_files(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        TesselError: it is damaged, or names files outside its folder.
    """
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    with open(index, "rb") as file:
        refuse_impostor(index, file)
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise TesselError(f"{index}: not valid JSON ({error}). Download the file again.") from error
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not file_of:
        raise TesselError(f'{index} has no "weight_map" from tensor names to files. Download the file again.')
    for name, file_name in file_of.items():
        # A plain name: an index from elsewhere must not make us open files outside its folder.
        plain = isinstance(file_name, str) and file_name not in ("", ".", "..") and not set(file_name) & set("/\\\0")
        if not plain:
            raise TesselError(
                f"{index} says that {name} lies in {file_name!r}, which is not the name of a file in that folder. "
                "Take the model from a source you trust."
            )
    return file_of


def read_bin(path: Path) -> dict[str, BinTensor]:
    """The tensors of a file written by torch.save, without running what a pickle may ask for.

    Raises:
        TesselError: it is damaged, asks for code, or is not a mapping of tensors.
    """
    content = torch_file.load(path)
    strangers = (
        [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
        if isinstance(content, dict)
        else ["its top level"]
    )
    if strangers:
        raise TesselError(
            f"{path} should map names to tensors, and these are none: {named(strangers)}. "
            "Save the model's state_dict() alone in it."
        )
    return {str(name): BinTensor(str(name), path, tensor) for name, tensor in content.items()}

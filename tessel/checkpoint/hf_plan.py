"""A Hugging Face folder as it will be written: which file holds which tensors, under which names.

Where the model came from a Hugging Face folder, by whatever way, its files are laid out as they were
there: the same shards, the same headers, byte for byte. Otherwise tensors are dealt out to shards in
the order of the layers, expert by expert, under the names that transformers 4 and 5 both read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tessel.checkpoint import companion
from tessel.checkpoint.huggingface import EMBEDDING, HEAD, MAX_SHARD_BYTES
from tessel.checkpoint.mapped import joined, own_entries, shape_of
from tessel.checkpoint.metadata import metadata_files
from tessel.checkpoint.names import is_stacked, places_of, renamed, stored_name
from tessel.checkpoint.safetensors import DTYPE_NAMES, new_header, write_stored
from tessel.checkpoint.stored import Assembled, Cast, Piece, PlannedFile, StoredModel, StoredTensor, Target
from tessel.checkpoint.weights import SAFETENSORS_FILE, SAFETENSORS_INDEX
from tessel.model.config import ModelConfig
from tessel.model.mapping import family_names


def plan(model: StoredModel, target: Target, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[PlannedFile]:
    """The files of the weights. Degrees do not matter."""
    parameters: dict[str, StoredTensor] = dict(model.tensors)
    if target.dtype is not None:
        parameters = {
            name: tensor if tensor.dtype == target.dtype else Cast(tensor, target.dtype)
            for name, tensor in parameters.items()
        }
    headers = _as_it_was(model, parameters)
    if headers is None:
        entries = own_entries(_entries(parameters, model.config.family), model.config)
        headers = _new_headers(entries, max_shard_bytes)
    return [_file(name, text, parameters, model.config) for name, text in headers.items()]


def texts(model: StoredModel, target: Target, files: list[PlannedFile]) -> dict[str, bytes]:
    """What stands beside the weights: config.json, tokenizer files, the index of several shards."""
    dtype = target.dtype or model.dtypes[0]
    side = {
        name: content
        for name, content in model.side_files.items()
        if name not in (companion.HEADERS, companion.CONFIG, SAFETENSORS_INDEX)
    }
    found = metadata_files(model.config, dtype, side, model.side_files.get(companion.CONFIG))
    if [file.name for file in files] == [SAFETENSORS_FILE]:
        return found
    file_of = {name: file.name for file in files for name in file.tensors}
    old = model.side_files.get(SAFETENSORS_INDEX)
    if old is not None and _maps(old) == file_of and target.dtype in (None, *model.dtypes):
        return found | {SAFETENSORS_INDEX: old}
    total = sum(math.prod(t.shape) * t.dtype.itemsize for file in files for t in file.tensors.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    return found | {SAFETENSORS_INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _maps(index: bytes) -> Any:
    try:
        return json.loads(index).get("weight_map")
    except (ValueError, AttributeError, RecursionError):
        return None


def _file(name: str, header: str, parameters: Mapping[str, StoredTensor], config: ModelConfig) -> PlannedFile:
    entries = _in_order_of_data(json.loads(header))
    tensors = {stored: _tensor(stored, entries[stored]["shape"], parameters, config) for stored in entries}
    assert all(tensor is not None for tensor in tensors.values()), name
    found = {stored: tensor for stored, tensor in tensors.items() if tensor is not None}

    def write(path: Path) -> str:
        return write_stored(path, header, found.values())

    return PlannedFile(name, found, write)


def _in_order_of_data(header: Mapping[str, Any]) -> dict[str, Any]:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def _tensor(
    stored: str, shape: list[int], parameters: Mapping[str, StoredTensor], config: ModelConfig
) -> StoredTensor | None:
    """The tensor of this name and shape in a Hugging Face folder, out of parameters; None if it is none of theirs."""
    match = None if config.own is None else config.own.mapping.of_stored(stored)
    if match is None:
        return _family_tensor(stored, shape, parameters)
    shapes = [shape[:-2] + shape[-1:-3:-1] if match.rule.transpose else shape]
    if len(match.parts) > 1:
        known = {name: tensor.shape for name, tensor in parameters.items()}
        shapes = [list(shape_of(part, config, known)) for part in match.parts]
    found = [_family_tensor(part, own, parameters) for part, own in zip(match.parts, shapes, strict=True)]
    parts = [tensor for tensor in found if tensor is not None]
    if len(parts) < len(found) or len({part.dtype for part in parts}) > 1:
        return None
    whole = joined(match, parts, config)
    return whole if list(whole.shape) == shape else None


def _family_tensor(stored: str, shape: list[int], parameters: Mapping[str, StoredTensor]) -> StoredTensor | None:
    places = places_of(stored)
    names = [place.name for place in places]
    if names == [HEAD] and HEAD not in parameters:
        names = [EMBEDDING]
    if any(name not in parameters for name in names):
        return None
    sources = [parameters[name] for name in names]
    if len(places) == 1 and places[0].expert is None:
        return sources[0] if list(sources[0].shape) == shape else None
    first = sources[0]
    whole = tuple(shape)
    if places[0].expert is not None:
        if first.shape[1:] != whole or places[0].expert >= first.shape[0]:
            return None
        start = (places[0].expert, *([0] * len(whole)))
        return Assembled(stored, first.dtype, whole, (Piece((0,) * len(whole), whole, first, start),))
    halves = [source.shape for source in sources]
    if len({source.dtype for source in sources}) > 1 or halves[0] != halves[1]:
        return None
    experts, inner, *rest = halves[0]
    if whole != (experts, 2 * inner, *rest):
        return None
    pieces = [
        Piece((0, half * inner, *([0] * len(rest))), (experts, inner, *rest), source, (0,) * len(halves[0]))
        for half, source in enumerate(sources)
    ]
    return Assembled(stored, first.dtype, whole, tuple(pieces))


def _as_it_was(model: StoredModel, parameters: Mapping[str, StoredTensor]) -> dict[str, str] | None:
    """The headers of the files that the model came from, in its dtypes of now; None if they do not fit the model."""
    known = companion.headers_of(model.side_files)
    headers: dict[str, str] = {}
    covered: set[str] = set()
    for file, text in known.items():
        found = _header_now(text, parameters, model.config)
        if found is None or not file.endswith(".safetensors") or set(file) & set("/\\\0"):
            return None
        headers[file], entries = found
        names = [name for stored in entries for name in family_names(model.config.own, stored)]
        covered |= {f"{place.name}:{place.expert}:{place.half}" for name in names for place in places_of(name)}
    wanted = {name: tensor for name, tensor in parameters.items() if not is_stacked(name)}
    if not headers or any(f"{name}:None:None" not in covered for name in wanted):
        return None
    for name, tensor in parameters.items():
        if is_stacked(name):
            by_expert = all(f"{name}:{number}:None" in covered for number in range(tensor.shape[0]))
            half = any(f"{name}:None:{half}" in covered for half in (0, 1))
            if not by_expert and not half and f"{name}:None:None" not in covered:
                return None
    return headers


def _header_now(text: str, parameters: Mapping[str, StoredTensor], config: ModelConfig) -> tuple[str, list[str]] | None:
    """A header and its names: as it was if dtypes are as they were, else with those of now."""
    try:
        header = json.loads(text)
        entries = _in_order_of_data(header)
        shapes = {name: entry["shape"] for name, entry in entries.items()}
        tensors = {name: _tensor(name, shape, parameters, config) for name, shape in shapes.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    whole = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not entries or len(whole) < len(tensors):
        return None
    same, offset = True, 0
    for name, tensor in whole.items():
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        entry = entries[name]
        same = same and entry["dtype"] == DTYPE_NAMES[tensor.dtype] and entry["data_offsets"] == [offset, end]
        offset = end
    if same:
        return text, list(entries)
    metadata = header.get("__metadata__")
    dtypes = {name: (tensor.dtype, tensor.shape) for name, tensor in whole.items()}
    return new_header(dtypes, metadata if isinstance(metadata, dict) else {"format": "pt"}), list(entries)


def _entries(parameters: Mapping[str, StoredTensor], family: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a folder of the family, in the order of the parameters."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in parameters.items():
        if is_stacked(name):
            for number in range(tensor.shape[0]):
                entries[stored_name(name, family, number)] = (tensor.dtype, tensor.shape[1:])
        else:
            entries[renamed(name, family)] = (tensor.dtype, tensor.shape)
    return entries


def _new_headers(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_bytes: int) -> dict[str, str]:
    """Tensors in order, in files of at most `max_shard_bytes`; a larger tensor has its own."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    shard_bytes = 0
    for name, (dtype, shape) in entries.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = (dtype, shape)
        shard_bytes += num_bytes
    names = (
        [SAFETENSORS_FILE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    return {name: new_header(shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)}

"""The way back to Hugging Face: what a checkpoint of another format carries along in `huggingface/`.

    config.json, generation_config.json, tokenizer files    as they were, byte for byte
    model_mapping.yaml                                       where the model has one (model/mapping.py)
    safetensors.json                                         {file: its header's text}: how the weights lay there
    model.safetensors.index.json                             where there were shards

With them a model that went to another format and back is the same files again. `FOLDER` lies in the
iteration's folder, or beside it in the checkpoint's root.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tessel.checkpoint.metadata import read_side_files
from tessel.checkpoint.safetensors import MAX_HEADER_BYTES, header_text
from tessel.checkpoint.weights import SAFETENSORS_FILE, SAFETENSORS_INDEX, shard_files
from tessel.errors import TesselError
from tessel.model.mapping import MAPPING_FILE

FOLDER = "huggingface"
HEADERS = "safetensors.json"
CONFIG = "config.json"


def of_folder(folder: Path) -> dict[str, bytes]:
    """What a Hugging Face folder has for the way back to it, by name, in bytes."""
    files = _texts(folder)
    if (folder / SAFETENSORS_FILE).is_file():
        shards = [SAFETENSORS_FILE]
    elif (folder / SAFETENSORS_INDEX).is_file():
        shards = shard_files(folder / SAFETENSORS_INDEX)
        files[SAFETENSORS_INDEX] = (folder / SAFETENSORS_INDEX).read_bytes()
    else:
        return files
    headers = {name: header_text(folder / name) for name in shards}
    files[HEADERS] = json.dumps(headers, ensure_ascii=False, indent=0).encode()
    return files


def _texts(folder: Path) -> dict[str, bytes]:
    own = [name for name in (CONFIG, MAPPING_FILE) if (folder / name).is_file()]
    return {**{name: (folder / name).read_bytes() for name in own}, **read_side_files(folder, folder)}


def find(*folders: Path) -> Path | None:
    """The companion folder in the first of `folders` that has one with a config.json."""
    return next((folder / FOLDER for folder in folders if (folder / FOLDER / CONFIG).is_file()), None)


def read(folder: Path) -> dict[str, bytes]:
    """What a companion folder holds, as `of_folder` gave it; also takes a Hugging Face folder with or without weights.

    Raises:
        TesselError: a file in it is too large to be what its name says.
    """
    if not (folder / HEADERS).is_file():
        return of_folder(folder)
    files = _texts(folder)
    for name in (HEADERS, SAFETENSORS_INDEX):
        path = folder / name
        if path.is_file():
            if path.stat().st_size > 2 * MAX_HEADER_BYTES:
                raise TesselError(f"{path} has {path.stat().st_size:,} bytes, too many for what it is. Remove it.")
            files[name] = path.read_bytes()
    return files


def write(folder: Path, side_files: Mapping[str, bytes]) -> None:
    """Write them into `folder`, which is made."""
    for name, content in side_files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def headers_of(side_files: Mapping[str, bytes]) -> dict[str, str]:
    """The header of each safetensors file that the model came from; empty where it is not known."""
    try:
        content = json.loads(side_files.get(HEADERS, b"{}"))
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(content, dict) and all(isinstance(text, str) for text in content.values())
    return content if whole else {}

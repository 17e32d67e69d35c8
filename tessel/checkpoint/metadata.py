"""What stands beside the weights in a Hugging Face folder: config.json, generation_config.json, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tessel.errors import TesselError
from tessel.model.config import ModelConfig
from tessel.model.mapping import MAPPING_FILE
from tessel.runtime.files import require_path

GENERATION_CONFIG = "generation_config.json"
# Nothing else is copied: a folder may hold code, weights, or whatever its owner keeps there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATE_FOLDER = "additional_chat_templates"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# They name code that is not copied, and a path that was true elsewhere.
_DROPPED_KEYS = ("auto_map", "_name_or_path")


def read_side_files(tokenizer_source: Path | None, model_source: Path | None = None) -> dict[str, bytes]:
    """The files that go along with weights unchanged, by name: tokenizer, chat templates, generation_config.json.

    `tokenizer_source` is a folder, or its tokenizer.json; None for none. generation_config.json is
    that of `model_source`, or of the tokenizer's folder. A run reads them when it starts, since the
    folder that they came from may be gone when it writes.
    """
    files = {} if tokenizer_source is None else _tokenizer_files(require_path(tokenizer_source, "the tokenizer"))
    for source in (model_source, tokenizer_source):
        if source is not None and (source / GENERATION_CONFIG).is_file():
            files[GENERATION_CONFIG] = (source / GENERATION_CONFIG).read_bytes()
            break
    return files


def _tokenizer_files(source: Path) -> dict[str, bytes]:
    if source.is_file() and source.name not in TOKENIZER_FILES:
        # A single file under a name of its own has no settings around it.
        settings = _json({"tokenizer_class": "PreTrainedTokenizerFast"})
        return {"tokenizer.json": source.read_bytes(), "tokenizer_config.json": settings}
    folder = source.parent if source.is_file() else source
    paths = [folder / name for name in TOKENIZER_FILES] + sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def write_metadata(
    folder: Path, config: ModelConfig, dtype: torch.dtype, side_files: Mapping[str, bytes] | None = None
) -> None:
    """Write everything but the weights into `folder`, which is made if need be; see `metadata_files`."""
    for name, content in metadata_files(config, dtype, side_files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def metadata_files(
    config: ModelConfig,
    dtype: torch.dtype,
    side_files: Mapping[str, bytes] | None = None,
    as_it_was: bytes | None = None,
) -> dict[str, bytes]:
    """Everything but the weights, by name.

    `side_files` are those of `read_side_files`. Without a generation_config.json among them, it is
    made from the ids in config.json, with the tokenizer's end-of-sequence id where that has none.
    `as_it_was`: the config.json that the model came with, which stays where it says the same.
    """
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    hf = config.to_hf()
    files = dict(side_files or {})
    if config.own is not None:
        files[MAPPING_FILE] = config.own.mapping.text
    if as_it_was is not None and _says_the_same(as_it_was, config):
        files["config.json"] = as_it_was
    else:
        files["config.json"] = _json({key: value for key, value in hf.items() if key not in _DROPPED_KEYS})
    if GENERATION_CONFIG not in files:
        ids = {key: hf[key] for key in _TOKEN_IDS if hf.get(key) is not None}
        eos = _tokenizer_eos(files)
        if "eos_token_id" not in ids and eos is not None:
            ids["eos_token_id"] = eos
        files[GENERATION_CONFIG] = _json({"_from_model_config": True, **ids})
    return files


def _says_the_same(content: bytes, config: ModelConfig) -> bool:
    try:
        raw = json.loads(content)
        mapping = None if config.own is None else config.own.mapping
        return "auto_map" not in raw and ModelConfig.from_hf(raw, mapping) == config
    except (ValueError, TypeError, RecursionError, TesselError):
        return False


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _tokenizer_eos(files: Mapping[str, bytes]) -> int | None:
    """Id of the end-of-sequence token that a tokenizer's files name, if they do."""
    settings = _object(files, "tokenizer_config.json")
    eos = settings.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if text is None:
        return None
    for key, entry in (settings.get("added_tokens_decoder") or {}).items():
        if entry.get("content") == text:
            return int(key)
    for entry in _object(files, "tokenizer.json").get("added_tokens") or []:
        if entry.get("content") == text:
            return int(entry["id"])
    return None


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    content = json.loads(files.get(name, b"{}"))
    return content if isinstance(content, dict) else {}

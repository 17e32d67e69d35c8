"""What stands beside the weights in a Hugging Face folder: config.json, generation_config.json, the tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tessel.model.config import ModelConfig
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


def write_metadata(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    tokenizer_source: Path | None = None,
    model_source: Path | None = None,
) -> None:
    """Write everything but the weights into `folder`, which is made if need be.

    `tokenizer_source` is a folder, or its tokenizer.json; None for none. generation_config.json is
    that of `model_source` or of the tokenizer's folder, else it is made from the ids in config.json,
    with the tokenizer's end-of-sequence id where config.json has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hf = replace(config, dtype=str(dtype).removeprefix("torch.")).to_hf()
    _write_json(folder / "config.json", {key: value for key, value in hf.items() if key not in _DROPPED_KEYS})
    if tokenizer_source is not None:
        _copy_tokenizer(require_path(tokenizer_source, "the tokenizer"), folder)
    for source in (model_source, tokenizer_source):
        if source is not None and (source / GENERATION_CONFIG).is_file():
            shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
            return
    ids = {key: hf[key] for key in _TOKEN_IDS if hf.get(key) is not None}
    eos = _tokenizer_eos(folder)
    if "eos_token_id" not in ids and eos is not None:
        ids["eos_token_id"] = eos
    _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **ids})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if source.is_file() and source.name not in TOKENIZER_FILES:
        # A single file under a name of its own has no settings around it.
        shutil.copyfile(source, folder / "tokenizer.json")
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        return
    if source.is_file():
        source = source.parent
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for template in sorted((source / _TEMPLATE_FOLDER).glob("*.jinja")):
        (folder / _TEMPLATE_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / _TEMPLATE_FOLDER / template.name)


def _tokenizer_eos(folder: Path) -> int | None:
    """Id of the end-of-sequence token that a folder's tokenizer files name, if they do."""
    settings = _read_object(folder / "tokenizer_config.json")
    eos = settings.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if text is None:
        return None
    for key, entry in (settings.get("added_tokens_decoder") or {}).items():
        if entry.get("content") == text:
            return int(key)
    tokenizer = _read_object(folder / "tokenizer.json")
    for entry in tokenizer.get("added_tokens") or []:
        if entry.get("content") == text:
            return int(entry["id"])
    return None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}

"""LLaMA-Factory's registry of data sets, dataset_info.json: the names of --input to files and how they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessel.config.nearest import nearest
from tessel.config.preprocess import PreprocessConfig
from tessel.config.preprocess_rules import REGISTRY_HANDLER
from tessel.data.instruct.mapping import MessageColumns, alpaca_columns, message_columns
from tessel.data.readers import check_inputs
from tessel.errors import TesselError, UsageError
from tessel.runtime.log import log

REGISTRY_FILE = "dataset_info.json"
# Handlers by what an entry says of its rows: their format, and whether they are ranked.
_HANDLERS = {
    ("alpaca", False): "AlpacaStyleInstructionHandler",
    ("alpaca", True): "AlpacaStylePairwiseHandler",
    ("sharegpt", False): "SharegptStyleInstructionHandler",
    ("sharegpt", True): "SharegptStylePairwiseHandler",
    ("openai", False): "OpenAIInstructionHandler",
}
# A column that `columns` does not name is none, but for those of ranked answers.
_ALPACA_COLUMNS = ("prompt", "query", "response", "history", "system", "tools")
_MESSAGE_COLUMNS = ("messages", "system", "tools")
_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class DataSet:
    """A data set by its name; `cfg` is what the command line would be for it alone, `files` those of its input."""

    name: str
    cfg: PreprocessConfig
    files: tuple[Path, ...]

    @property
    def is_ranked(self) -> bool:
        """Whether its rows are preferences."""
        return "Pairwise" in (self.cfg.handler_name or "")


def data_sets(cfg: PreprocessConfig) -> list[DataSet]:
    """The data sets that --input names (commas or blanks between them), in that order.

    A name may be a path, of which the last part counts, as in MindSpeed-LLM.

    Raises:
        UsageError: a name is not in the registry, or an entry asks for what is not read here.
        TesselError: the registry or a file cannot be read.
    """
    path = Path(cfg.dataset_dir or "") / REGISTRY_FILE
    registry = _read(path)
    names = [part.split("/")[-1].strip() for arg in cfg.input for part in arg.split(",")]
    found = [_data_set(name, registry, path, cfg) for name in names if name]
    if not found:
        raise UsageError(f"--input names no data set of {path}; it has {', '.join(registry) or 'none'}.")
    if len({one.is_ranked for one in found}) > 1:
        ranked = ", ".join(one.name for one in found if one.is_ranked)
        raise UsageError(f"--input mixes ranked data sets ({ranked}) with others: write each kind by a run of its own.")
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        registry = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TesselError(
            f"--dataset-dir: the registry {path} cannot be read ({error}); {REGISTRY_HANDLER} needs one of "
            "LLaMA-Factory's form."
        ) from error
    if not isinstance(registry, dict):
        raise TesselError(f"--dataset-dir: the registry {path} must be a JSON object of data sets by name.")
    return registry


def _data_set(name: str, registry: Mapping[str, Any], path: Path, cfg: PreprocessConfig) -> DataSet:
    if name not in registry:
        close = nearest(name, registry, similarity=0.5)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {', '.join(registry) or 'none'}."
        raise UsageError(f"--input {name}: there is no data set of this name in {path}. {hint}")
    entry = registry[name]
    where = f"The data set {name} of {path}"
    if not isinstance(entry, dict):
        raise TesselError(f"{where} must be an object with file_name, not {entry!r}.")
    formatting, is_ranked = entry.get("formatting", "alpaca"), bool(entry.get("ranking", False))
    if (formatting, is_ranked) not in _HANDLERS:
        what = f"formatting {formatting!r}{' with ranking' if is_ranked else ''}"
        raise UsageError(f"{where}: {what} is not read; alpaca, sharegpt and (without ranking) openai are.")
    if entry.get("num_samples") is not None:
        log(f"{where}: num_samples is not heeded, as in MindSpeed-LLM; --max-samples takes the first rows of each")
    own = replace(
        cfg,
        input=(_source(entry, where, cfg),),
        handler_name=_HANDLERS[formatting, is_ranked],
        map_keys=_map_keys(entry, formatting, where, cfg.compatible == "mindspeed"),
    )
    return DataSet(name, own, tuple(check_inputs(own.input, None, cfg.compatible, may_skip=cfg.on_error == "skip")))


def _source(entry: Mapping[str, Any], where: str, cfg: PreprocessConfig) -> str:
    """What --input would be for an entry."""
    if entry.get("script_url"):
        raise UsageError(
            f"{where}: script_url is a loading script, which is never run here. Run it by `datasets`, save what it "
            "gives as .parquet, and name that by file_name."
        )
    if entry.get("file_name"):
        if entry.get("split", "train") != "train":
            raise UsageError(f"{where}: split {entry['split']!r} of a file; a file has no splits: leave split out.")
        file = Path(cfg.dataset_dir or "") / str(entry["file_name"])
        if not file.exists():
            raise TesselError(f"{where}: its file_name {file} does not exist. Put it there, or mend the entry.")
        return str(file)
    if entry.get("hf_hub_url") and not entry.get("folder"):
        return f"hub:{entry['hf_hub_url']}:{entry.get('subset') or ''}:{entry.get('split') or ''}"
    raise UsageError(
        f"{where} names no source that is read here: file_name is (a file or folder of --dataset-dir), and hf_hub_url "
        "without folder. Download the data and name it by file_name."
    )


def _map_keys(entry: Mapping[str, Any], formatting: str, where: str, as_mindspeed: bool) -> str | None:
    """The columns and tags of an entry as --map-keys has them."""
    columns, is_alpaca = entry.get("columns"), formatting == "alpaca"
    mapping: dict[str, Any] = {}
    if columns is not None:
        if not isinstance(columns, dict):
            raise UsageError(f"{where}: columns must be an object, not {columns!r}.")
        for name in _MEDIA:
            if columns.get(name):
                raise UsageError(f"{where}: the column {name} holds media, which no verb of tessel trains on.")
        given = {key: value for key, value in columns.items() if key not in _MEDIA}
        mapping = dict.fromkeys(_ALPACA_COLUMNS if is_alpaca else _MESSAGE_COLUMNS, "") | given
    if is_alpaca and as_mindspeed:
        mapping.pop("tools", None)
    if not is_alpaca and "tags" in entry:
        mapping["tags"] = entry["tags"]
    if not mapping:
        return None
    text = json.dumps(mapping, ensure_ascii=False)
    try:
        if is_alpaca:
            alpaca_columns(text)
        else:
            message_columns(text, MessageColumns())
    except UsageError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('--map-keys: ')}") from error
    return text

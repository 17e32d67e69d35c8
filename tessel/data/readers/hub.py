"""Datasets of the Hugging Face Hub, through the library `datasets`, which an extra installs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from tessel.errors import TesselError, UsageError
from tessel.runtime.log import log

_PREFIX = "hub:"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_INSTALL = "pip install 'tessel[datasets]'"


def looks_like_hub(text: str) -> bool:
    """Whether a path that does not exist may be a dataset of the Hub: hub:NAME, or OWNER/NAME."""
    if text.startswith(_PREFIX):
        return True
    # A misspelt file or a folder of one's own is more likely than a dataset of such a name.
    return _NAME.fullmatch(text) is not None and not Path(text).suffix and not Path(text).parent.exists()


def hub_files(text: str) -> list[Path]:
    """The Arrow files of a dataset, `hub:NAME`, `hub:NAME:CONFIG` or `hub:NAME:CONFIG:SPLIT` (train if not given).

    They are downloaded and converted into the cache of `datasets`, once. Code that a repository may
    hold is never run.

    Raises:
        UsageError: the name is none.
        TesselError: the library is missing or too old, or the dataset cannot be had.
    """
    name, config, split = _parse(text)
    datasets = _library(text)
    # It runs no loading script since version 4, whatever it is told.
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TesselError(f"The input {text}: `datasets` cannot load it ({reason}).") from error
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    if not files:
        raise TesselError(f"The input {text}: its split {split} holds nothing.")
    log(f"{text}: {len(dataset):,} rows of the split {split}, in {files[0].parent}")
    return files


def _parse(text: str) -> tuple[str, str | None, str]:
    name, *rest = text.removeprefix(_PREFIX).split(":")
    if not name or len(rest) > 2 or not all(re.fullmatch(r"[\w.-]*", word) for word in rest):
        raise UsageError(f"The input {text}: hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT is expected.")
    config, split = [*rest, "", ""][:2]
    return name, config or None, split or "train"


def _library(text: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise TesselError(
            f"The input {text} does not exist here. To read it as a dataset of the Hub: {_INSTALL}."
        ) from error
    if int(str(datasets.__version__).split(".")[0]) < 4:
        raise TesselError(
            f"The input {text}: datasets {datasets.__version__} may run code of a repository, and 4 or newer "
            f"does not: {_INSTALL} --upgrade."
        )
    return datasets

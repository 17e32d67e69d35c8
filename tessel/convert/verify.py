"""`tessel verify`: two checkpoints of any formats against each other, or one against its manifest."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessel.checkpoint.detect import open_model
from tessel.config.convert import VerifyConfig
from tessel.convert import show
from tessel.convert.compare import compare
from tessel.convert.copies import differing_copies
from tessel.convert.work import MANIFEST, digest_of
from tessel.errors import TesselError
from tessel.runtime.files import require_path
from tessel.runtime.log import log


def verify(cfg: VerifyConfig) -> bool:
    """Say whether they are equal, and in what they are not.

    Raises:
        TesselError: one of them cannot be read.
    """
    found = _of_manifest(Path(cfg.checkpoints[0])) if len(cfg.checkpoints) == 1 else _of_two(cfg)
    if cfg.json:
        print(json.dumps(found, ensure_ascii=False))
    return bool(found["equal"])


def _of_two(cfg: VerifyConfig) -> dict[str, Any]:
    started_s = time.monotonic()
    first = open_model(cfg.checkpoints[0], ckpt_step=cfg.ckpt_step, hf_dir=cfg.hf_dir)
    second = open_model(cfg.checkpoints[1], hf_dir=cfg.hf_dir)
    comparison = compare(first, second, None, cfg.tolerance)
    copies = {model.folder: differing_copies(model, cfg.tolerance) for model in (first, second)}
    unequal = [replace(item, name=f"{folder}/{item.name}") for folder, items in copies.items() for item in items]
    differences = (*comparison.differences, *unequal)
    if not cfg.json:
        for model in (first, second):
            for line in show.source_lines(model):
                log(line.removeprefix("from "))
        for difference in differences:
            log(f"  {difference.name} {difference.what}")
        names = {*first.tensors, *second.tensors}
        how = "equal, bit by bit" if cfg.tolerance is None else f"equal within {cfg.tolerance:g}"
        verdict = how if not differences else f"different: {len(comparison.differences)} of {len(names)} tensors differ"
        if unequal:
            verdict += f"; {len(unequal)} copies of tensors differ from one another in the files of one checkpoint"
        log(f"{verdict} ({len(names)} tensors, {time.monotonic() - started_s:.1f} s)")
    return {
        "equal": not differences,
        "tensors": len({*first.tensors, *second.tensors}),
        "differences": {difference.name: difference.what for difference in differences},
    }


def _of_manifest(folder: Path) -> dict[str, Any]:
    path = require_path(folder, "checkpoint") / MANIFEST
    if not path.is_file():
        raise TesselError(f"{folder} has no {MANIFEST}, so there is nothing to check it against. Give two checkpoints.")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        wanted = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TesselError(f"{path} is damaged ({type(error).__name__}: {error}). Convert again.") from error
    wrong = {}
    for name, (num_bytes, digest) in wanted.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise TesselError(f"{path} names {name!r}, which is not in its folder. Take it from a source you trust.")
        if not file.is_file():
            wrong[name] = "is missing"
        elif file.stat().st_size != num_bytes:
            wrong[name] = f"has {file.stat().st_size:,} bytes instead of {num_bytes:,}"
        elif digest_of(file) != digest:
            wrong[name] = "has another sha256"
    for name, what in wrong.items():
        log(f"  {name} {what}")
    log(f"{len(wanted) - len(wrong)} of {len(wanted)} files are as {MANIFEST} says")
    return {"equal": not wrong, "files": len(wanted), "differences": wrong}

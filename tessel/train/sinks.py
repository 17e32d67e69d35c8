"""Where a run's figures go besides its log: a JSONL file, TensorBoard, Weights & Biases, SwanLab."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tessel.config.run import Logging
from tessel.errors import UsageError
from tessel.runtime.files import atomic_write, disk_errors

TRAIN = "train"
VALIDATION = "validation"
TEST = "test"
# Tags that Megatron writes by iteration alone; all others go by consumed samples as well.
_BY_ITERATION_ONLY = ("decoupled-learning-rate", "iteration-time", "throughput", "skipped-train-samples")


class Sink(Protocol):
    """Takes figures, under Megatron's TensorBoard tags.

    `kind` is "train" for an iteration's figures, "validation" or "test" for an evaluation's.
    """

    def log(self, values: Mapping[str, float], iteration: int, consumed_samples: int, kind: str = TRAIN) -> None:
        """Write one set of figures."""

    def close(self) -> None:
        """Write out what is still held."""


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on the disk as soon as it is logged.

    Keys are `kind`, `iteration`, `consumed_samples` and the tags with underscores (`lm_loss`, `grad_norm`);
    a figure that is not finite is null. A run that goes on from `start_iteration` drops what an earlier one
    wrote after it, and a line cut short by a crash, so each kind of each iteration stands once.
    """

    def __init__(self, path: str | Path, start_iteration: int = 0) -> None:
        self._path = Path(path)
        self._written: set[tuple[str, int]] = set()
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._keep(lambda row: row["iteration"] <= start_iteration)
            self._file = self._path.open("a", encoding="utf-8")

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite the file with the wanted rows alone, if that changes it."""
        before = self._path.read_bytes() if self._path.exists() else b""
        rows = [row for row in map(_parsed, before.split(b"\n")) if row is not None and wanted(row)]
        after = b"".join(_line(row) for row in rows)
        if after != before:
            with atomic_write(self._path) as temporary:
                temporary.write_bytes(after)
        self._written = {(row["kind"], row["iteration"]) for row in rows}

    def log(self, values: Mapping[str, float], iteration: int, consumed_samples: int, kind: str = TRAIN) -> None:
        """Append one line."""
        key = (kind, iteration)
        if key in self._written:  # a final evaluation that a resumed run makes again
            self._file.close()
            self._keep(lambda row: (row["kind"], row["iteration"]) != key)
            self._file = self._path.open("a", encoding="utf-8")
        row: dict[str, Any] = {"kind": kind, "iteration": iteration, "consumed_samples": consumed_samples}
        for tag, value in values.items():
            row[_key(tag)] = value if math.isfinite(value) else None
        with disk_errors(self._path):
            self._file.write(_line(row).decode())
            self._file.flush()
        self._written.add(key)

    def close(self) -> None:
        """Sync to the disk and close."""
        if self._file.closed:
            return
        with disk_errors(self._path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _key(tag: str) -> str:
    return tag.replace(" ", "_").replace("-", "_")


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The row, or None for what is not one: a line that a crash cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int) or not isinstance(row.get("kind"), str):
        return None
    return row


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, also of one that is being written."""
    return [row for row in map(_parsed, Path(path).read_bytes().split(b"\n")) if row is not None]


def check_packages(logging: Logging) -> None:
    """Whether the packages that the flags need are there, without the time that importing them takes.

    Raises:
        UsageError: one is not installed.
    """
    for value, flag, package in (
        (logging.tensorboard_dir, "--tensorboard-dir", "tensorboard"),
        (logging.wandb_project, "--wandb-project", "wandb"),
        (logging.swanlab_project, "--swanlab-project", "swanlab"),
    ):
        if value is not None and importlib.util.find_spec(package) is None:
            raise _not_installed(flag, package)


def _not_installed(flag: str, extra: str) -> UsageError:
    return UsageError(
        f"{flag} needs the package {extra}, which is not installed: pip install 'tessel[{extra}]', or leave {flag} out."
    )


def _require(module: str, flag: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _not_installed(flag, extra) from error


class TensorBoardSink:
    """TensorBoard events under Megatron's tags, by iteration and ("... vs samples") by consumed samples."""

    def __init__(self, logging: Logging, tags_off: frozenset[str] = frozenset()) -> None:
        _require("tensorboard", "--tensorboard-dir", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=logging.tensorboard_dir, max_queue=logging.tensorboard_queue_size)
        self._interval = logging.tensorboard_log_interval
        self._tags_off = tags_off

    def log(self, values: Mapping[str, float], iteration: int, consumed_samples: int, kind: str = TRAIN) -> None:
        """Queue one event for each figure; training figures only every --tensorboard-log-interval iterations."""
        if kind == TRAIN and iteration % self._interval:
            return
        for tag, value in values.items():
            if tag in self._tags_off:
                continue
            self._writer.add_scalar(tag, value, iteration)
            if tag not in _BY_ITERATION_ONLY and not tag.startswith("mem-"):
                self._writer.add_scalar(f"{tag} vs samples", value, consumed_samples)

    def close(self) -> None:
        """Write out the queue."""
        self._writer.close()


class WandbSink:
    """Weights & Biases; figures under the same tags, and "samples vs steps"."""

    def __init__(self, logging: Logging, config: Mapping[str, Any], tags_off: frozenset[str] = frozenset()) -> None:
        wandb = _require("wandb", "--wandb-project", "wandb")
        self._run: Any = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_exp_name,
            entity=logging.wandb_entity,
            dir=logging.wandb_save_dir,
            config=dict(config),
        )
        self._interval = logging.tensorboard_log_interval
        self._tags_off = tags_off

    def log(self, values: Mapping[str, float], iteration: int, consumed_samples: int, kind: str = TRAIN) -> None:
        """Log at step `iteration`; training figures only every --tensorboard-log-interval iterations."""
        if kind == TRAIN and iteration % self._interval:
            return
        kept = {tag: value for tag, value in values.items() if tag not in self._tags_off}
        self._run.log({"samples vs steps": consumed_samples, **kept}, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class SwanlabSink:
    """SwanLab; figures under the same tags."""

    def __init__(self, logging: Logging, config: Mapping[str, Any], tags_off: frozenset[str] = frozenset()) -> None:
        swanlab = _require("swanlab", "--swanlab-project", "swanlab")
        self._run: Any = swanlab.init(project=logging.swanlab_project, config=dict(config))
        self._interval = logging.tensorboard_log_interval
        self._tags_off = tags_off

    def log(self, values: Mapping[str, float], iteration: int, consumed_samples: int, kind: str = TRAIN) -> None:
        """Log at step `iteration`; training figures only every --tensorboard-log-interval iterations."""
        if kind == TRAIN and iteration % self._interval:
            return
        self._run.log({tag: value for tag, value in values.items() if tag not in self._tags_off}, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def build_sinks(
    logging: Logging,
    config: Mapping[str, Any],
    metrics_path: str | Path | None,
    start_iteration: int,
    tags_off: frozenset[str] = frozenset(),
) -> list[Sink]:
    """The sinks that the flags ask for; `metrics_path` (none without --save) is for metrics.jsonl.

    Raises:
        UsageError: a package is not installed; checked before the metrics file is touched.
    """
    sinks: list[Sink] = []
    if logging.tensorboard_dir is not None:
        sinks.append(TensorBoardSink(logging, tags_off))
    if logging.wandb_project is not None:
        sinks.append(WandbSink(logging, config, tags_off))
    if logging.swanlab_project is not None:
        sinks.append(SwanlabSink(logging, config, tags_off))
    if metrics_path is not None:
        sinks.append(MetricsFile(metrics_path, start_iteration))
    return sinks

"""What the folder of a run (--save) holds: checkpoints, configuration, last figures, Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessel.report.checkpoint import model_values, optimizer_text, tensor_entries, tensor_line
from tessel.report.facts import Report, bytes_text, count_text, folder_bytes

METRICS_FILE = "metrics.jsonl"
TRACKER = "latest_checkpointed_iteration.txt"
_MAX_NAMED = 8
# Settings that say most about a run, by section; all of them are in --json.
_SHOWN_SETTINGS = {
    "checkpoint": ("load",),
    "data": ("data_path", "train_data_path", "split"),
    "batch": ("seq_length", "micro_batch_size", "global_batch_size", "train_iters", "train_samples"),
    "optimizer": ("optimizer", "lr"),
    "schedule": ("lr_decay_style",),
    "precision": ("bf16", "fp16", "seed"),
}


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `tessel pretrain --save` wrote."""
    return (folder / TRACKER).is_file() or (folder / METRICS_FILE).is_file()


def run_report(folder: Path, list_tensors: bool = False, ckpt_step: int | None = None) -> Report:
    """The report on a run's folder; of its checkpoints, on that of iteration `ckpt_step` or the latest.

    Raises:
        TesselError: the newest checkpoint's run.json is damaged, or the tracker names none that is there.
    """
    # It imports torch, which --help has no need of.
    from tessel.checkpoint import training as run_checkpoint
    from tessel.checkpoint.detect import open_model
    from tessel.checkpoint.stored import degrees_text

    iterations = run_checkpoint.saved_iterations(folder)
    latest = run_checkpoint.latest_iteration(folder) if ckpt_step is None else ckpt_step
    state: dict[str, Any] = run_checkpoint.read_state(folder, latest) if latest is not None else {}
    last = _last_rows(folder / METRICS_FILE)
    models = sorted(str(entry.parent) for entry in folder.glob("hf*/config.json"))
    config = state.get("config") or {}
    data: dict[str, Any] = {
        "kind": "run",
        "path": str(folder),
        "iterations": iterations,
        "latest_iteration": latest,
        "consumed_train_samples": state.get("consumed_train_samples"),
        "last_metrics": last,
        "hugging_face_folders": models,
        "bytes": folder_bytes(folder),
        "config": config,
    }
    facts = [("checkpoints", _iterations_text(iterations, latest))]
    if latest is not None:
        facts.append(("samples so far", f"{state.get('consumed_train_samples'):,}"))
    tail = []
    if latest is not None and _has_model(run_checkpoint.iteration_folder(folder, latest)):
        stored = open_model(folder, ckpt_step=latest)
        data["checkpoint"] = values = model_values(stored)
        parameters = f"{count_text(values['parameters'])} in {values['tensors']} tensors, {', '.join(values['dtypes'])}"
        facts += [
            ("family", stored.config.family),
            ("parameters", parameters),
            ("saved on", degrees_text(stored.degrees) or "no model parallelism"),
        ]
        facts.append(("optimizer", optimizer_text(values)))
        if list_tensors:
            data["tensor_list"] = list(tensor_entries(stored.tensors))
            tail = [tensor_line(entry) for entry in data["tensor_list"]]
    facts.extend((f"last {kind}", _row_text(row)) for kind, row in last.items())
    facts.append(("Hugging Face", ", ".join(models) or "no folder written yet"))
    facts.append(("on disk", bytes_text(data["bytes"])))
    settings = _settings_text(config)
    if settings:
        facts.append(("settings", settings))
    return Report(f"{folder}: a run of tessel", facts, data, tail)


def _has_model(checkpoint: Path) -> bool:
    from tessel.checkpoint.training import HF_FOLDER

    return (checkpoint / HF_FOLDER / "config.json").is_file()


def _iterations_text(iterations: list[int], latest: int | None) -> str:
    if not iterations:
        return "none"
    dropped = f"{len(iterations) - _MAX_NAMED} earlier, " if len(iterations) > _MAX_NAMED else ""
    return f"{dropped}{', '.join(str(i) for i in iterations[-_MAX_NAMED:])}; the next run goes on from {latest}"


def _last_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each kind: train, validation, test."""
    from tessel.train.sinks import read_metrics

    if not path.is_file():
        return {}
    return {row["kind"]: row for row in read_metrics(path)}


def _row_text(row: dict[str, Any]) -> str:
    hidden = ("kind", "iteration", "consumed_samples")
    values = [f"{key} {_number(value)}" for key, value in row.items() if key not in hidden]
    return f"iteration {row['iteration']}: {', '.join(values)}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _settings_text(config: dict[str, dict[str, Any]]) -> str:
    given = []
    for section, names in _SHOWN_SETTINGS.items():
        for name in names:
            value = config.get(section, {}).get(name)
            if value not in (None, False):
                words = " ".join(str(item) for item in value) if isinstance(value, list) else str(value)
                given.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {words}"))
    return " ".join(given)

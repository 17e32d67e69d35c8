"""A checkpoint of tessel's own runs as a stored model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessel.checkpoint import companion
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.dcp_files import read_folder
from tessel.checkpoint.stored import StoredModel, StoredTensor
from tessel.checkpoint.weights import named
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig

_MODEL, _OPTIMIZER = "model.", "optimizer."


def open_run(folder: Path, ckpt_step: int | None = None) -> StoredModel:
    """The run's checkpoint of iteration `ckpt_step`, or its latest; `folder` may be that of an iteration itself.

    Raises:
        TesselError: there is no such checkpoint, it is damaged, or not whole.
    """
    own = run_checkpoint.iteration_of(folder.absolute())
    if own is not None and own in run_checkpoint.saved_iterations(folder.absolute().parent):
        folder, ckpt_step = folder.absolute().parent, own if ckpt_step is None else ckpt_step
    saved = run_checkpoint.saved_iterations(folder)
    if ckpt_step is not None and ckpt_step not in saved:
        raise TesselError(
            f"--ckpt-step {ckpt_step}: {folder} has no checkpoint of that iteration; "
            f"it has {', '.join(str(iteration) for iteration in saved)}."
        )
    iteration = run_checkpoint.latest_iteration(folder) if ckpt_step is None else ckpt_step
    assert iteration is not None
    path = run_checkpoint.iteration_folder(folder, iteration)
    state = run_checkpoint.read_state(folder, iteration)
    metadata = path / run_checkpoint.HF_FOLDER
    config = ModelConfig.from_folder(metadata)
    stored = read_folder(path).tensors
    tensors = _weights(path, config, stored)
    optimizer = {
        name.removeprefix(_OPTIMIZER): tensor for name, tensor in stored.items() if name.startswith(_OPTIMIZER)
    }
    weights_only = bool(state.get("weights_only"))
    return StoredModel(
        "torch_dcp",
        folder,
        config,
        tensors,
        iteration=None if weights_only else iteration,
        degrees=_degrees(state),
        args=state.get("config") or {},
        optimizer=optimizer,
        state={} if weights_only else _numbers(state, optimizer),
        side_files=companion.read(metadata),
    )


def _weights(path: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    wanted = {name: rule.shape for name, rule in parameters(config).items()}
    found = {name.removeprefix(_MODEL): tensor for name, tensor in stored.items() if name.startswith(_MODEL)}
    missing, surplus = [name for name in wanted if name not in found], [name for name in found if name not in wanted]
    misshapen = [
        f"{name} is {found[name].shape} and should be {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what}: {named(names)}"
        for what, names in (("missing", missing), ("surplus", surplus), ("of the wrong shape", misshapen))
        if names
    ]
    if problems:
        raise TesselError(f"The tensors in {path} are not those of its config.json: {'; '.join(problems)}.")
    return {name: found[name] for name in wanted}


def _numbers(state: Mapping[str, Any], optimizer: Mapping[str, StoredTensor]) -> dict[str, Any]:
    numbers = {
        "consumed_train_samples": state["consumed_train_samples"],
        "opt_param_scheduler": state["scheduler"],
        "grad_scaler": state["scaler"],
        "param_groups": state.get("param_groups", []),
    }
    steps = next((tensor for name, tensor in optimizer.items() if name.startswith("step.")), None)
    return numbers if steps is None else numbers | {"step": int(steps.read())}


def _degrees(state: Mapping[str, Any]) -> dict[str, int]:
    """Of the run that wrote it; the files know whole parameters alone."""
    layout = state.get("layout")
    found = layout if isinstance(layout, dict) else {}
    return {key: found[key] for key in ("tp", "pp", "ep", "etp") if isinstance(found.get(key), int) and found[key] > 1}

"""A stored model as a checkpoint that tessel's runs start from: weights alone, or a run that goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tessel.checkpoint import companion
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.dcp_files import METADATA
from tessel.checkpoint.dcp_write import Other, Part, plan_folder
from tessel.checkpoint.metadata import metadata_files
from tessel.checkpoint.stored import MOMENTS, Cast, PlannedFile, StoredModel, StoredTensor, Target, masters
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.errors import TesselError

STEP = "step"
_MAX_FILE_BYTES = 4 * 2**30


def plan_run(
    source: StoredModel, target: Target, *, with_optimizer: bool = False
) -> tuple[list[PlannedFile], dict[str, bytes]]:
    """The files of tensors and the small files, all below the run's folder. Degrees do not matter.

    `with_optimizer`: the fp32 weights, moments, schedule and counters of a training run go along, and a run of
    tessel goes on from its iteration. Without, it is iteration 0.

    Raises:
        TesselError: the source has no such state.
    """
    iteration = (source.iteration or 0) if with_optimizer else 0
    folder = run_checkpoint.iteration_folder(Path(), iteration).name
    tensors = _with_state(source) if with_optimizer else _weights(source, target)
    plan = plan_folder({f"__0_{number}.distcp": items for number, items in enumerate(_dealt_out(tensors))})
    texts = {METADATA: plan.metadata, run_checkpoint.STATE_FILE: _state(source, iteration, with_optimizer)}
    dtype = target.dtype or source.dtypes[0]
    side = source.side_files
    if companion.CONFIG not in side:
        side = metadata_files(source.config, dtype, side)
    texts |= {f"{run_checkpoint.HF_FOLDER}/{name}": content for name, content in side.items()}
    files = [PlannedFile(f"{folder}/{file.name}", file.tensors, file.write) for file in plan.files]
    named = {f"{folder}/{name}": content for name, content in texts.items()}
    return files, named | {run_checkpoint.TRACKER: f"{iteration}\n".encode()}


def _weights(source: StoredModel, target: Target) -> dict[str, StoredTensor]:
    return {
        f"model.{name}": tensor if target.dtype in (None, tensor.dtype) else Cast(tensor, target.dtype)
        for name, tensor in source.tensors.items()
    }


def _with_state(source: StoredModel) -> dict[str, StoredTensor]:
    if not source.optimizer or "opt_param_scheduler" not in source.state:
        raise TesselError(
            f"{source.folder} has no optimizer's state and schedule to go along. Leave --with-optimizer out."
        )
    tensors = {f"model.{name}": tensor for name, tensor in masters(source).items()}
    step = torch.tensor(float(source.state.get(STEP, source.iteration or 0)))
    for name in source.tensors:
        for kind in MOMENTS:
            tensors[f"optimizer.{kind}.{name}"] = source.optimizer[f"{kind}.{name}"]
        tensors[f"optimizer.{STEP}.{name}"] = LoadedTensor(STEP, source.folder, step)
    return tensors


def _dealt_out(tensors: Mapping[str, StoredTensor]) -> Iterator[Sequence[Part | Other]]:
    """Whole tensors in files of at most some GiB; a larger one has its own."""
    items: list[Part | Other] = []
    num_bytes = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if items and num_bytes + size > _MAX_FILE_BYTES:
            yield items
            items, num_bytes = [], 0
        items.append(Part(name, tensor.shape, (0,) * len(tensor.shape), tensor))
        num_bytes += size
    yield items


def _state(source: StoredModel, iteration: int, with_optimizer: bool) -> bytes:
    state: dict[str, Any] = {
        "iteration": iteration,
        "consumed_train_samples": int(source.state.get("consumed_train_samples", 0)) if with_optimizer else 0,
        "scheduler": dict(source.state.get("opt_param_scheduler", {})) if with_optimizer else {},
        "scaler": _plain(source.state.get("grad_scaler", {})) if with_optimizer else {},
        "param_groups": [_plain(group) for group in source.state.get("param_groups", ())] if with_optimizer else [],
        "identity": {},
        "weights_only": not with_optimizer,
        "save_id": "converted",
    }
    return (json.dumps(state, indent=2) + "\n").encode()


def _plain(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Without what JSON has no place for: a tensor of one number becomes the number."""
    found = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in numbers.items()}
    return {key: value for key, value in found.items() if isinstance(value, bool | int | float | str | list | tuple)}

"""The formats that can be written, each as a plan of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tessel.checkpoint.stored import Format, PlannedFile, StoredModel, Target
from tessel.errors import UsageError


@dataclass(frozen=True)
class Written:
    """A checkpoint to be written: files of tensors, and everything else by name, all below its folder."""

    format: Format
    files: Sequence[PlannedFile]
    texts: Mapping[str, bytes]


def _hf(model: StoredModel, target: Target, _: bool) -> Written:
    from tessel.checkpoint import hf_plan

    files = hf_plan.plan(model, target)
    return Written("hf", files, hf_plan.texts(model, target, files))


def _torch(model: StoredModel, target: Target, with_optimizer: bool) -> Written:
    from tessel.checkpoint.mcore_write import plan_torch

    planned = plan_torch(model, target, with_optimizer=with_optimizer)
    return _in_iteration("torch", planned, {}, model, target)


def _legacy(model: StoredModel, target: Target, _: bool) -> Written:
    from tessel.checkpoint.legacy import plan_legacy

    return _in_iteration("legacy", plan_legacy(model, target), {}, model, target)


def _torch_dist(model: StoredModel, target: Target, with_optimizer: bool) -> Written:
    from tessel.checkpoint.torch_dist_write import plan_torch_dist

    plan = plan_torch_dist(model, target, with_optimizer=with_optimizer)
    return _in_iteration("torch_dist", plan.files, plan.texts, model, target)


def _torch_dcp(model: StoredModel, target: Target, with_optimizer: bool) -> Written:
    from tessel.checkpoint.run_write import plan_run

    return Written("torch_dcp", *plan_run(model, target, with_optimizer=with_optimizer))


def _in_iteration(
    kind: Format, files: Sequence[PlannedFile], texts: Mapping[str, bytes], model: StoredModel, target: Target
) -> Written:
    """Files and texts of Megatron's, which lie in an iteration's folder; the tracker and the way back go along."""
    from tessel.checkpoint import companion
    from tessel.checkpoint.megatron_folder import RELEASE, TRACKER, iteration_name
    from tessel.checkpoint.metadata import metadata_files

    folder = iteration_name(target.iteration)
    side = model.side_files
    if companion.CONFIG not in side:
        side = metadata_files(model.config, target.dtype or model.dtypes[0], side)
    found = {f"{folder}/{name}": text for name, text in texts.items()}
    # Beside the iteration: MindSpeed's second converter takes any entry of an iteration for a rank's folder.
    found |= {f"{companion.FOLDER}/{name}": text for name, text in side.items()}
    found[TRACKER] = RELEASE.encode() if target.iteration is None else str(target.iteration).encode()
    return Written(kind, [replace(file, name=f"{folder}/{file.name}") for file in files], found)


# Each takes the model, the target, and whether the optimizer's state goes along.
Writer = Callable[[StoredModel, Target, bool], Written]
_WRITERS: dict[str, Writer] = {
    "hf": _hf,
    "torch": _torch,
    "torch_dist": _torch_dist,
    "torch_dcp": _torch_dcp,
    "legacy": _legacy,
}
_LACK_OPTIMIZER = {
    "hf": "a Hugging Face folder is weights alone",
    "legacy": "no Megatron of today goes on from it; --to torch is what newer ones read",
}


def written(name: str, model: StoredModel, target: Target, with_optimizer: bool = False) -> Written:
    """The plan of a checkpoint of this format.

    Raises:
        UsageError: degrees that the model or the format does not allow, or an optimizer that it has no place for.
    """
    if with_optimizer and name in _LACK_OPTIMIZER:
        raise UsageError(f"--with-optimizer does not go with --to {name}: {_LACK_OPTIMIZER[name]}.")
    return _WRITERS[name](model, target, with_optimizer)

"""`tessel convert`: a checkpoint in another format or layout, streamed, and proved before it is put in place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tessel
from tessel.checkpoint.adapters import base_of, check_asked, merged, open_adapter
from tessel.checkpoint.detect import format_of, open_model
from tessel.checkpoint.stored import MASTER, MOMENTS, Cast, StoredModel, StoredTensor, masters, name_of
from tessel.config.convert import ConvertConfig, MergeConfig
from tessel.convert import show
from tessel.convert.compare import Comparison, compare
from tessel.convert.copies import differing_copies
from tessel.convert.plan import Plan, casts, plan_for, require_apart, require_no_overflow
from tessel.convert.work import MANIFEST, Work, begin
from tessel.errors import TesselError, UsageError
from tessel.layout.adapters import groups_of
from tessel.runtime.files import require_writable
from tessel.runtime.log import log


def convert(cfg: ConvertConfig) -> None:
    """Write `cfg.load` to `cfg.save` as `cfg` says, and prove it.

    Raises:
        UsageError: what was asked for cannot be.
        TesselError: the source is damaged, the destination exists, the disk is full, or the proof fails.
    """
    load, save = Path(cfg.load), Path(cfg.save)
    source = open_model(load, ckpt_step=cfg.ckpt_step, hf_dir=cfg.hf_dir)
    if cfg.lora_load is not None:
        source = _with_adapter(source, cfg)
    plan = plan_for(cfg, source)
    _check_optimizer(cfg, source)
    if source.optimizer and not cfg.with_optimizer:
        log("the optimizer's state stays behind: --load of tessel pretrain takes it, and --with-optimizer does here")
    for line in (*show.source_lines(source), show.target_line(plan, save), *casts(source, plan.target.dtype)):
        log(line)
    if cfg.dry_run:
        for line in show.plan_lines(plan, source):
            log(line)
        return
    require_apart(load, save)
    _require_free_place(save, cfg.force)
    require_no_overflow(source, plan.target.dtype)
    with begin(save, plan.identity(source)) as work:
        seconds = _write(work, plan, cfg.workers)
        comparison = _prove(cfg, work, source, plan)
        work.publish(_manifest(source, plan, comparison), save)
    log(f"done: {save} ({len(work.files)} files; {MANIFEST} has the sha256 of each), written in {seconds:.1f} s")


def merge(cfg: MergeConfig) -> None:
    """Write a model with an adapter in its weights, as a Hugging Face folder.

    Raises:
        TesselError: the adapter does not say beside which model it was trained, and --load does not either.
    """
    load = cfg.load or base_of(cfg.lora_load)
    if load is None:
        raise TesselError(f"--lora-load {cfg.lora_load} does not name its model. Give it with --load.")
    convert(
        ConvertConfig(
            load=load,
            save=cfg.save,
            to="hf",
            hf_dir=cfg.hf_dir,
            params_dtype=cfg.params_dtype,
            force=cfg.force,
            lora_load=cfg.lora_load,
            lora_r=cfg.lora_r,
            lora_alpha=cfg.lora_alpha,
            lora_target_modules=cfg.lora_target_modules,
        )
    )


def _with_adapter(source: StoredModel, cfg: ConvertConfig) -> StoredModel:
    assert cfg.lora_load is not None
    adapter = open_adapter(cfg.lora_load, source.config)
    targets = cfg.lora_target_modules
    check_asked(adapter, cfg.lora_r, cfg.lora_alpha, None if targets is None else groups_of(targets))
    log(f"{adapter.describe()}: merged in fp32, and rounded to the weights' dtype")
    return merged(source, adapter)


def _check_optimizer(cfg: ConvertConfig, source: StoredModel) -> None:
    if cfg.with_optimizer and (not source.optimizer or source.iteration is None):
        raise UsageError(f"--with-optimizer: {source.folder} has no optimizer's state. Leave it out.")
    if cfg.with_optimizer and cfg.degrees.release:
        raise UsageError("--with-optimizer and --release contradict each other: a release is weights alone.")


def _expected(source: StoredModel, result: StoredModel, dtype: torch.dtype | None) -> StoredModel:
    """What the result's weights and states are to be: a run of tessel has the fp32 weights as its weights."""
    own = masters(source)
    tensors: Mapping[str, StoredTensor] = own if result.format == "torch_dcp" else source.tensors
    if dtype is not None and result.format != "torch_dcp":
        tensors = {name: Cast(tensor, dtype) for name, tensor in tensors.items()}
    states: dict[str, StoredTensor] = {
        name: Cast(tensor, torch.float32) for name, tensor in source.optimizer.items() if name.startswith(MOMENTS)
    }
    states |= {f"{MASTER}{name}": tensor for name, tensor in own.items()}
    return _with_state(replace(source, tensors=tensors, optimizer=states), result)


def _with_state(model: StoredModel, result: StoredModel) -> StoredModel:
    """The states among the weights: moments, and fp32 weights where the result has them apart."""
    has_masters = any(name.startswith(MASTER) for name in result.optimizer)
    kinds = (*MOMENTS, MASTER) if has_masters else MOMENTS
    states = {name: tensor for name, tensor in model.optimizer.items() if name.startswith(kinds)}
    return replace(model, tensors={**model.tensors, **states})


def _require_free_place(save: Path, force: bool) -> None:
    require_writable(save.absolute().parent, "the folder of --save,")
    if not save.exists() or (save.is_dir() and not any(save.iterdir())):
        return
    if not force:
        raise TesselError(f"--save {save} exists. Choose another folder, or pass --force to replace it.")
    if not save.is_dir() or (format_of(save) is None and not (save / MANIFEST).is_file()):
        raise TesselError(f"--save {save} holds no checkpoint, so it is not replaced. Move it away, or choose another.")


def _write(work: Work, plan: Plan, workers: int) -> float:
    started_s = time.monotonic()
    work.write(list(plan.files), workers)
    work.write_texts(dict(plan.texts))
    if work.num_kept:
        log(f"went on from a conversion that was stopped: {work.num_kept} of {len(plan.files)} files were whole")
    return time.monotonic() - started_s


def _prove(cfg: ConvertConfig, work: Work, source: StoredModel, plan: Plan) -> Comparison | None:
    if cfg.verify == "none":
        log("nothing was verified, as --verify none asks")
        return None
    started_s = time.monotonic()
    result = open_model(work.folder)
    if plan.target.nf4:
        log("the result opens; its values were not compared: four bits round them")
        return None
    if cfg.with_optimizer:
        comparison = compare(_expected(source, result, plan.target.dtype), _with_state(result, result), None, None)
    else:
        comparison = compare(source, result, plan.target.dtype, None)
    num_copies = len(result.copies)
    if differences := [*comparison.differences, *differing_copies(result)]:
        lines = [f"{d.name} {d.what}" for d in differences[:10]]
        raise TesselError(
            f"The result is not the source: {'; '.join(lines)}; {len(differences)} tensors in all. "
            "Nothing was put in place. If the source did not change meanwhile, please report it."
        )
    also = f", and {num_copies} copies of them on other ranks" if num_copies else ""
    log(
        f"verified: {len(comparison.digests)} tensors read back and equal by sha256{also}, in "
        f"{time.monotonic() - started_s:.1f} s"
    )
    if cfg.verify == "logits":
        from tessel.convert.logits import largest_difference

        log(f"logits of a fixed prompt differ by {largest_difference(source, result):g} at most, in fp32")
    return comparison


def _manifest(source: StoredModel, plan: Plan, comparison: Comparison | None) -> dict[str, Any]:
    found: Mapping[str, Any] = {
        "made_by": f"tessel {tessel.__version__}",
        "format": plan.format,
        "family": source.config.family,
        "options": dict(plan.options),
        "source": {
            "folder": str(source.folder),
            "format": source.format,
            "iteration": source.iteration,
            "dtypes": [name_of(dtype) for dtype in source.dtypes],
            "guessed": list(source.guessed),
            "left_out": list(source.left_out),
        },
        "tensors": {} if comparison is None else comparison.digests,
    }
    return dict(found)

"""What a conversion will write: computed first, shown by --dry-run, and then carried out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from tessel.checkpoint import formats
from tessel.checkpoint.stored import Format, PlannedFile, StoredModel, Target, name_of
from tessel.config.convert import ConvertConfig, numbers_of
from tessel.errors import TesselError, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Plan:
    """`files` have the tensors, `texts` is the rest, by name below the folder; `options` say how, as JSON has it."""

    format: Format
    files: tuple[PlannedFile, ...]
    texts: Mapping[str, bytes]
    target: Target
    options: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(size_of(file) for file in self.files)

    def identity(self, source: StoredModel) -> str:
        """A digest of what would be written out of which files; the same for a conversion that is begun again."""
        paths = {tensor.path for tensor in source.tensors.values()}
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
        files = [
            (file.name, [(key, name_of(t.dtype), list(t.shape)) for key, t in file.tensors.items()])
            for file in self.files
        ]
        content = [
            stats,
            files,
            dict(self.options),
            {name: sha256(text).hexdigest() for name, text in self.texts.items()},
        ]
        return sha256(json.dumps(content).encode()).hexdigest()


def size_of(file: PlannedFile) -> int:
    """Bytes of the tensors in a file."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in file.tensors.values())


def plan_for(cfg: ConvertConfig, source: StoredModel) -> Plan:
    """The plan of a conversion.

    Raises:
        UsageError: degrees that the model or the format does not allow.
    """
    to = cfg.to or ("torch" if source.format == "hf" else "hf")
    target = target_of(cfg, source)
    if target.nf4 and (to != "torch" or cfg.with_optimizer or target.grouped_gemm):
        raise UsageError(
            "--qlora-nf4 is for weights alone, in the torch format: give --to torch, without --with-optimizer and "
            "--moe-grouped-gemm."
        )
    written = formats.written(to, source, target, cfg.with_optimizer)
    shown = replace(target, dtype=None)
    options = {**vars(shown), "to": to, "dtype": cfg.params_dtype}
    options["with_optimizer"] = cfg.with_optimizer
    return Plan(written.format, tuple(written.files), written.texts, target, options)


def target_of(cfg: ConvertConfig, source: StoredModel) -> Target:
    """The flags as a writer takes them."""
    degrees = cfg.degrees
    pp, layers = degrees.pipeline_model_parallel_size, source.config.num_hidden_layers
    noops = numbers_of("--noop-layers", degrees.noop_layers) or ()
    ends = (degrees.decoder_first_pipeline_num_layers, degrees.decoder_last_pipeline_num_layers)
    if degrees.num_layer_list is not None and ends != (None, None):
        raise UsageError(
            "--num-layer-list says the layers of every stage: leave it out, or leave out "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."
        )
    num_chunks = 2 if degrees.schedules_method == "dualpipev" else 1
    per_stage = degrees.num_layers_per_virtual_pipeline_stage
    if per_stage is not None:
        num_chunks, rest = divmod(layers + len(noops), pp * per_stage)
        if rest or not num_chunks or num_chunks < 2 <= pp:
            raise UsageError(
                f"--num-layers-per-virtual-pipeline-stage {per_stage}: {layers + len(noops)} layers on {pp} pipeline "
                f"stages are {(layers + len(noops)) / pp:g} each, which must be a multiple of it, and at least two."
            )
        if pp < 2:
            raise UsageError(
                "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of 2 or more."
            )
    if degrees.expert_model_parallel_size > 1 and not source.config.num_experts:
        raise UsageError(
            f"--expert-model-parallel-size {degrees.expert_model_parallel_size}: the model has no experts; leave it "
            "out."
        )
    return Target(
        tp=degrees.tensor_model_parallel_size,
        pp=pp,
        ep=degrees.expert_model_parallel_size,
        etp=degrees.expert_tensor_parallel_size,
        num_chunks=num_chunks,
        layer_list=numbers_of("--num-layer-list", degrees.num_layer_list),
        first=degrees.decoder_first_pipeline_num_layers,
        last=degrees.decoder_last_pipeline_num_layers,
        noop_layers=noops,
        placement="v" if degrees.schedules_method == "dualpipev" else "loop",
        flavour=degrees.flavour,  # type: ignore[arg-type]
        vocab_divisor=degrees.make_vocab_size_divisible_by,
        dtype=None if cfg.params_dtype is None else DTYPES[cfg.params_dtype],
        iteration=_iteration(cfg, source),
        transformer_engine=degrees.transformer_impl == "transformer_engine",
        grouped_gemm=degrees.moe_grouped_gemm,
        nf4=degrees.qlora_nf4,
    )


def _iteration(cfg: ConvertConfig, source: StoredModel) -> int | None:
    if cfg.degrees.release or cfg.degrees.flavour == "pai":
        return None
    return source.iteration if cfg.with_optimizer else 1


def casts(source: StoredModel, dtype: torch.dtype | None) -> tuple[str, ...]:
    """What is said of a change of dtype; nothing where there is none."""
    if dtype is None:
        return ()
    found: dict[torch.dtype, int] = {}
    for tensor in source.tensors.values():
        if tensor.dtype != dtype:
            found[tensor.dtype] = found.get(tensor.dtype, 0) + 1
    lines = []
    for old, count in found.items():
        if _MANTISSA_BITS.get(old, 99) > _MANTISSA_BITS[dtype] or torch.finfo(old).max > torch.finfo(dtype).max:
            lines.append(
                f"DOWN-CAST: {count} tensors are stored as {name_of(old)} and become {name_of(dtype)}, as "
                "--params-dtype asks; the way back does not bring their digits back"
            )
        else:
            lines.append(
                f"{count} tensors are stored as {name_of(old)} and become {name_of(dtype)}, which holds them all"
            )
    return tuple(lines)


def require_no_overflow(source: StoredModel, dtype: torch.dtype | None) -> None:
    """Refuse a cast to fp16 that would make finite values infinite.

    Raises:
        TesselError: names each tensor with how many of its values are too large.
    """
    if dtype is not torch.float16:
        return
    from tessel.checkpoint.stored import blocks

    lost: list[str] = []
    for name, tensor in source.tensors.items():
        if tensor.dtype is torch.float16:
            continue
        count = sum(int((torch.isinf(block.to(dtype)) & torch.isfinite(block)).sum()) for block in blocks(tensor))
        if count:
            lost.append(f"{name} ({count:,} values)")
    if lost:
        more = f" and {len(lost) - 10} more tensors" if len(lost) > 10 else ""
        raise TesselError(
            f"--params-dtype fp16: values too large for it (its largest is 65,504) in {', '.join(lost[:10])}{more}. "
            "Use --params-dtype bf16, or leave it out."
        )


def require_apart(load: Path, save: Path) -> None:
    """Refuse to write into the source, or over it.

    Raises:
        UsageError: one folder lies in the other.
    """
    source, target = load.resolve(), save.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(f"--save {save} and --load {load} lie one in the other: choose a --save beside it.")

"""What the MindSpore engine takes, found out before MindSpore is imported; the rest is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import metadata

from tessel.config.layout import Launch, Layout
from tessel.config.run import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    Logging,
    ModelShape,
    Optimizer,
    Precision,
    RunConfig,
    Runtime,
    Schedule,
)
from tessel.config.schema import flag_of, options
from tessel.config.tokenizer import Tokenizer
from tessel.errors import TesselError, UsageError
from tessel.model.config import ModelConfig
from tessel.runtime import ascend

FAMILIES = ("qwen2", "qwen3", "llama")
OLDEST, TOO_NEW = (2, 8), (2, 11)
_INSTALL = "pip install 'tessel[mindspore]'"
_INSTEAD = "leave it out, or take --ai-framework pytorch"

_WHOLE_SECTIONS = (Batch, Optimizer, Schedule, Data, Tokenizer, Checkpoint, Evaluation, Logging, Launch, Runtime)
_TAKEN_IN_PART: dict[type, set[str]] = {
    ModelShape: {f.name for f in fields(ModelShape)} - {"attention_dropout", "hidden_dropout"},
    Precision: {f.name for f in fields(Precision)} - {"fp16", "z_loss_coeff"},
    Layout: {
        "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "num_layer_list",
        "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "noop_layers",
    },
}  # fmt: skip
_TAKEN = {f.name for section in _WHOLE_SECTIONS for f in fields(section)}.union(
    *_TAKEN_IN_PART.values(), ("recompute_granularity", "manual_gc", "manual_gc_interval")
) - {"max_restarts"}

# Flags that make the same numbers in another way, or in less memory -> what is done instead.
_IDLE = {
    "use_distributed_optimizer": "every replica holds the optimizer's whole state",
    "data_parallel_sharding_strategy": "every replica holds the optimizer's whole state",
    "overlap_grad_reduce": "gradients are summed after the last backward",
    "overlap_param_gather": "there are no parameters to gather",
    "tp_comm_overlap": "communication does not overlap with computation",
    "attention_backend": "attention is written out on a CPU, and the fused operator on an NPU",
    "recompute_method": "--recompute-granularity full recomputes every layer by itself",
    "recompute_num_layers": "--recompute-granularity full recomputes every layer by itself",
}
_REMEDIES = {
    "fp16": "take --bf16 on an Ascend NPU, or --fp32",
    "max_restarts": "start again by hand: the run goes on from its last checkpoint",
    "num_layers_per_virtual_pipeline_stage": "leave it out: every process has one pipeline stage",
    "num_virtual_stages_per_pipeline_rank": "leave it out: every process has one pipeline stage",
}


def check(verb: str, cfg: RunConfig, given: frozenset[str]) -> list[str]:
    """Lines on flags of `given` that do nothing here.

    Raises:
        UsageError: a flag, a value or a verb that the engine lacks.
        TesselError: MindSpore is not installed, or not of a version that will do.
    """
    if verb != "pretrain":
        raise UsageError(f"--ai-framework mindspore is for tessel pretrain; tessel {verb} takes pytorch.")
    refusals = list(_refusals(cfg, given))
    if refusals:
        raise UsageError(f"The MindSpore engine does not have {'; '.join(refusals)}.")
    check_installed()
    if cfg.precision.bf16 and device_target(cfg) == "CPU":
        raise UsageError("--bf16: MindSpore computes in fp32 alone on a CPU. Take --fp32, or an Ascend NPU.")
    return [f"{flag_of(name)} changes nothing with MindSpore: {why}" for name, why in _IDLE.items() if name in given]


def _refusals(cfg: RunConfig, given: frozenset[str]) -> Iterator[str]:
    for option in options(RunConfig):
        value: object = cfg
        for part in (*option.path, option.name):
            value = getattr(value, part)
        if option.name not in given or value == option.default or option.name in _TAKEN | _IDLE.keys():
            continue
        shown = "" if value is True else f" {value}"
        if (option.name, value) in (("recompute_granularity", "full"), ("pipeline_schedule", "1f1b")):
            continue
        yield f"{option.flag}{shown} ({_REMEDIES.get(option.name, _INSTEAD)})"
    if cfg.kernels.recompute_granularity == "selective":
        yield "--recompute-granularity selective (leave it out, or take full)"
    if ":" in cfg.launch.nnodes:
        yield f"--nnodes {cfg.launch.nnodes} (give a number of machines)"
    if cfg.runtime.device.partition(":")[0] == "cuda":
        yield f"--device {cfg.runtime.device} (take cpu or npu, or --ai-framework pytorch)"


def check_installed() -> None:
    """MindSpore of a version that will do, and NumPy of one that goes with it.

    Raises:
        TesselError: says what to install.
    """
    try:
        found = metadata.version("mindspore")
    except metadata.PackageNotFoundError as error:
        raise TesselError(f"--ai-framework mindspore needs MindSpore, which is not installed: {_INSTALL}") from error
    if not OLDEST <= _release(found) < TOO_NEW:
        raise TesselError(
            f"MindSpore {found} is installed, and the engine needs {'.'.join(map(str, OLDEST))} to before "
            f"{'.'.join(map(str, TOO_NEW))}: {_INSTALL}"
        )
    numpy = metadata.version("numpy")
    if _release(numpy)[0] > 1:
        raise TesselError(f"NumPy {numpy} is installed, and MindSpore needs one before 2: pip install 'numpy<2'")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_model(config: ModelConfig) -> None:
    """The engine has this kind of model.

    Raises:
        UsageError: it has not.
    """
    if config.family not in FAMILIES or config.num_experts:
        raise UsageError(
            f"The MindSpore engine has no {config.family} models: it trains dense {', '.join(FAMILIES)}. Take "
            "--ai-framework pytorch for this one."
        )


def device_target(cfg: RunConfig) -> str:
    """MindSpore's name for the device that --device asks for."""
    kind = cfg.runtime.device.partition(":")[0]
    if kind == "auto":
        return "Ascend" if ascend.has_devices() else "CPU"
    return "CPU" if kind == "cpu" else "Ascend"


def for_the_host(cfg: RunConfig) -> RunConfig:
    """`cfg` as torch sees it, which has batches, counts and checkpoints in host memory and shares out no state."""
    layout = replace(
        cfg.layout, use_distributed_optimizer=False, data_parallel_sharding_strategy=None, tp_comm_overlap=False
    )
    return replace(cfg, layout=layout, runtime=replace(cfg.runtime, device="cpu"))

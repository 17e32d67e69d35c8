"""The best layout as a file that `tessel pretrain --config` takes: what was planned, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tessel import __version__
from tessel.config.verbs import PlanConfig
from tessel.layout.search import Found

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def yaml_of(best: Found, cfg: PlanConfig, has_experts: bool) -> str:
    """YAML with the names of the flags."""
    topology = best.choice.topology
    lines = [
        f"# tessel {__version__} plan --model {cfg.model} --devices {cfg.devices}: {topology.describe()}",
        f"# predicted: {best.memory.peak / 2**30:.1f} GiB on the fullest device, {best.cost.step_s:.3g} s a step",
    ]
    lines += [f"{name}: {json.dumps(value)}" for name, value in _values(best, cfg, has_experts).items()]
    return "\n".join(lines) + "\n"


def _values(best: Found, cfg: PlanConfig, has_experts: bool) -> dict[str, Any]:
    choice = best.choice
    topology = choice.topology
    values: dict[str, Any] = _model(cfg.model) | {
        "seq_length": choice.seq_length,
        "global_batch_size": choice.global_batch_size,
        "micro_batch_size": choice.micro_batch_size,
        "fp32" if cfg.fp32 else "bf16": True,
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "context_parallel_size": topology.cp,
        "data_parallel_sharding_strategy": choice.sharding_strategy,
    }
    if choice.sequence_parallel:
        values["sequence_parallel"] = True
    if len(set(choice.layers)) > 1:
        values["num_layer_list"] = ",".join(map(str, choice.layers))
    if choice.num_chunks > 1:
        values["num_virtual_stages_per_pipeline_rank"] = choice.num_chunks
    if has_experts:
        values["expert_model_parallel_size"] = topology.ep
        values["expert_tensor_parallel_size"] = topology.etp
    return values | _recompute(choice.recompute, has_experts)


def _model(model: str) -> dict[str, str]:
    """Where the model is, if it is a folder: its weights, or its shape alone."""
    path = Path(model).expanduser()
    if not path.exists():
        return {}
    folder = path if path.is_dir() else path.parent
    has_weights = any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)
    return {"load" if has_weights else "init_from_config": str(folder)}


def _recompute(recompute: str, has_experts: bool) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "mlp":
        modules = ["mlp", "moe"] if has_experts else ["mlp"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {} if recompute == "none" else {"recompute_granularity": "selective"}

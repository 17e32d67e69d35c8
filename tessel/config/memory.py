"""How a run saves memory: a section of a frozen dataclass, as in `run.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")
STATE_DTYPES = ("fp32", "bf16", "8bit")


@dataclass(frozen=True)
class Memory:
    """Memory. `Kernels` says which activations are recomputed as a whole."""

    recompute_modules: tuple[str, ...] | None = option(
        None,
        "what --recompute-granularity selective recomputes in each layer; core_attn if not given",
        choices=RECOMPUTE_MODULES,
        nargs="+",
        metavar="MODULE",
    )
    recompute_activation_function: bool = option(
        False, "recompute the activation inside the MLP, not keeping its output"
    )
    recompute_activation_function_num_layers: int | None = option(
        None, "so many layers, after those that are recomputed as a whole; all if not given"
    )
    cpu_offloading: bool = option(False, "keep activations in host memory between forward and backward")
    cpu_offloading_num_layers: int | None = option(None, "those of the first so many layers of each pipeline stage")
    swap_attention: bool = option(False, "keep the activations of every layer's attention in host memory")
    optimizer_cpu_offload: bool = option(False, "keep the optimizer's state in host memory and step on the CPU")
    optimizer_offload_fraction: float = option(1.0, "share of the parameters for --optimizer-cpu-offload")
    overlap_cpu_optimizer_d2h_h2d: bool = option(False, "copy while the CPU steps, with --optimizer-cpu-offload")
    no_pin_cpu_grads: bool = option(False, "--optimizer-cpu-offload: gradients come into ordinary host memory")
    no_pin_cpu_params: bool = option(False, "--optimizer-cpu-offload: weights and state lie in ordinary host memory")
    swap_optimizer: bool = option(
        False, "keep the optimizer's state in host memory between steps, and step on the device"
    )
    use_precision_aware_optimizer: bool = option(
        False, "let the two options below choose the precision of Adam's state"
    )
    exp_avg_dtype: str = option("fp32", "precision of the first moment; 8bit is blockwise", choices=STATE_DTYPES)
    exp_avg_sq_dtype: str = option("fp32", "precision of the second moment; 8bit is blockwise", choices=STATE_DTYPES)

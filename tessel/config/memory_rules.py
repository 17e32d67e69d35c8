"""The static rules of how a run saves memory. As in `rules.py`, each function checks one matter."""

from __future__ import annotations

from collections.abc import Callable

from tessel.config.run import RunConfig
from tessel.errors import UsageError


def check_recomputed_modules(cfg: RunConfig) -> None:
    """What is recomputed inside layers."""
    kernels, memory = cfg.kernels, cfg.memory
    granularity = "selective" if kernels.recompute_activations else kernels.recompute_granularity
    modules = memory.recompute_modules or ()
    if modules and granularity != "selective":
        raise UsageError(
            f"--recompute-modules {' '.join(modules)} is for --recompute-granularity selective, and that is "
            f"{granularity or 'not given'}: give selective, or leave --recompute-modules out."
        )
    if memory.recompute_activation_function_num_layers is not None and not memory.recompute_activation_function:
        raise UsageError(
            f"--recompute-activation-function-num-layers {memory.recompute_activation_function_num_layers} is for "
            "--recompute-activation-function: add that, or leave it out."
        )
    if memory.recompute_activation_function and granularity == "full" and kernels.recompute_method == "uniform":
        raise UsageError(
            "--recompute-activation-function is for layers that are not recomputed as a whole, and --recompute-method "
            "uniform recomputes all of them: take block, or leave one of the two out."
        )
    by_output = [f"--recompute-modules {name}" for name in modules if name in ("layernorm", "moe_act")]
    if memory.recompute_activation_function:
        by_output.append("--recompute-activation-function")
    if kernels.compile and by_output:
        raise UsageError(
            f"{by_output[0]} does not go with --compile, which recomputes such operations by itself: leave one of "
            "them out."
        )


def check_offloading(cfg: RunConfig) -> None:
    """Activations in host memory."""
    kernels, memory = cfg.kernels, cfg.memory
    if memory.cpu_offloading and memory.cpu_offloading_num_layers is None:
        raise UsageError("--cpu-offloading needs --cpu-offloading-num-layers: of how many layers, from the first on.")
    if memory.cpu_offloading_num_layers is not None and memory.swap_attention:
        raise UsageError(
            "--cpu-offloading-num-layers and --swap-attention both move the activations of attention to host memory: "
            "keep one of them."
        )
    if memory.swap_attention and kernels.recompute_granularity == "full":
        raise UsageError(
            "--swap-attention keeps what --recompute-granularity full does not keep: leave one of them out, or take "
            "--recompute-granularity selective --recompute-modules mlp."
        )
    if memory.swap_attention and kernels.compile:
        raise UsageError(
            "--swap-attention does not go with --compile, which takes a layer as a whole: take "
            "--cpu-offloading-num-layers instead, or leave --compile out."
        )


def check_optimizer_memory(cfg: RunConfig) -> None:
    """Where the optimizer's state lies, and in which precision."""
    memory = cfg.memory
    if not 0 <= memory.optimizer_offload_fraction <= 1:
        raise UsageError(
            f"--optimizer-offload-fraction is {memory.optimizer_offload_fraction}: it must be from 0 to 1."
        )
    if memory.optimizer_offload_fraction != 1 and not memory.optimizer_cpu_offload:
        raise UsageError(
            f"--optimizer-offload-fraction {memory.optimizer_offload_fraction} is for --optimizer-cpu-offload: add "
            "that, or leave it out."
        )
    if memory.swap_optimizer and memory.optimizer_cpu_offload:
        raise UsageError(
            "--swap-optimizer steps on the device and --optimizer-cpu-offload on the CPU, both with the state in host "
            "memory: keep one of them."
        )
    given = {"--exp-avg-dtype": memory.exp_avg_dtype, "--exp-avg-sq-dtype": memory.exp_avg_sq_dtype}
    for flag, dtype in given.items():
        if dtype != "fp32" and not memory.use_precision_aware_optimizer:
            raise UsageError(f"{flag} {dtype} needs --use-precision-aware-optimizer: add it, or leave {flag} out.")
        if dtype != "fp32" and cfg.optimizer.optimizer != "adam":
            raise UsageError(
                f"{flag} {dtype} is about Adam's state, and --optimizer is {cfg.optimizer.optimizer}: leave it out, or "
                "take --optimizer adam."
            )


MEMORY_RULES: tuple[Callable[[RunConfig], None], ...] = (
    check_recomputed_modules,
    check_offloading,
    check_optimizer_memory,
)

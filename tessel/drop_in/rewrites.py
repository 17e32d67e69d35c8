"""Flags of other suites that mean a flag of tessel: what stands in their place.

A rewrite is used where a suite's command line is run or migrated. The verbs themselves do not know
them: there, `config.megatron` refuses the flag and names the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rewrite:
    """What becomes of a flag."""

    meaning: str
    """For the table of flags: what stands in its place, or why nothing does."""
    result: Callable[[Sequence[str]], Sequence[str]]
    """Its values -> arguments of the verb."""
    is_dropped: bool = False
    """Whether nothing stands in its place."""


def _same_as(*arguments: str) -> Rewrite:
    return Rewrite(" ".join(arguments), lambda _: arguments)


def _renamed(flag: str) -> Rewrite:
    return Rewrite(flag, lambda values: (flag, *values))


def _dropped(reason: str) -> Rewrite:
    return Rewrite(reason, lambda _: (), is_dropped=True)


def _interpolation(values: Sequence[str]) -> Sequence[str]:
    """A factor of 1, as Pai's scripts have it, is no interpolation."""
    if list(values) == ["1"]:
        return ()
    return ("--rope-scaling-type", "linear", "--rope-scaling-factor", *values)


def _mask_type(values: Sequence[str]) -> Sequence[str]:
    return () if list(values) in (["causal"], ["general"]) else ("--attention-mask-type", *values)


def _rows(reason: str, flags: str) -> dict[str, Rewrite]:
    return {flag: _dropped(reason) for flag in flags.split()}


_TRAINING: dict[str, Rewrite] = {
    **dict.fromkeys(("--npu-deterministic", "--use-deter-comp"), _same_as("--deterministic-mode")),
    "--o2-optimizer": _same_as(
        "--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"
    ),
    "--o2-gradient": _same_as("--grad-reduce-in-bf16"),
    "--hierarchical-context-parallel-sizes": Rewrite(
        "--ulysses-degree-in-cp with the first of them", lambda sizes: ("--ulysses-degree-in-cp", *sizes[:1])
    ),
    "--quant-states": _same_as(
        "--use-precision-aware-optimizer", "--exp-avg-dtype", "8bit", "--exp-avg-sq-dtype", "8bit"
    ),
    "--checkpoint-activations": _same_as("--recompute-activations"),
    "--recompute-norm": _same_as("--recompute-granularity", "selective", "--recompute-modules", "layernorm"),
    "--moe-tp-extend-ep": _same_as("--expert-tensor-parallel-size", "1"),
    "--seq-aux": _same_as("--moe-router-load-balancing-type", "seq_aux_loss"),
    "--topk-softmax-in-fp32": _same_as("--moe-router-dtype", "fp32"),
    "--router-gating-in-fp32": _same_as("--moe-router-dtype", "fp32"),
    "--fsdp2-config-path": _same_as("--data-parallel-sharding-strategy", "optim_grads_params"),
    "--shared-expert-gate": _renamed("--moe-shared-expert-gate"),
    "--routed-scaling-factor": _renamed("--moe-router-topk-scaling-factor"),
    "--shared-moe-ffn-hidden-size": _renamed("--moe-shared-expert-intermediate-size"),
    "--batch-size": _renamed("--micro-batch-size"),
    "--warmup": _renamed("--lr-warmup-fraction"),
    "--model-parallel-size": _renamed("--tensor-model-parallel-size"),
    "--intermediate-size": _renamed("--ffn-hidden-size"),
    "--most-recent-k": _renamed("--keep-last-k"),
    "--train-data": _renamed("--train-data-path"),
    "--valid-data": _renamed("--valid-data-path"),
    "--rotary-seq-len-interpolation-factor": Rewrite("--rope-scaling-type linear, unless it is 1", _interpolation),
    "--attention-mask-type": Rewrite("masks follow from --reset-attention-mask and from packing", _mask_type, True),
    **_rows("the family is read from config.json", "--model-type --model-type-hf"),
    **_rows("the kernels of --compile and --attention-backend stand for it", "--jit-compile"),
    **_rows("code from a model's folder is never run", "--trust-remote-code"),
}
_USE: dict[str, Rewrite] = {
    "--inference-prompt-type": _renamed("--prompt-type"),
    **_rows("every process has the answers", "--broadcast"),
}
_EVALUATION: dict[str, Rewrite] = {
    **_USE,
    **_rows("answers are greedy, as those of the suites", "--temperature --top-p --top-k --greedy --do-sample"),
}


def _direction(meaning: str) -> Rewrite:
    """A flag that `drop_in.conversion` reads together with others."""
    return Rewrite(meaning, lambda _: ())


_CONVERSION: dict[str, Rewrite] = {
    "--load-model-type": _direction("with --save-model-type: hf to mg is --to torch, mg to hf is --to hf"),
    "--save-model-type": _direction("mg is --to torch, hf and save_huggingface_* are --to hf"),
    "--use-mcore-models": _direction("--to torch; without it --to legacy"),
    "--loader": _direction("with --saver: llama2_hf to megatron is --to legacy"),
    "--saver": _direction("with --loader: llama2_hf to megatron is --to legacy"),
    "--cvt-type": _direction("hf2mg is --to torch, mg2hf is --to hf"),
    "--mg-dir": _direction("--save, and --load with --cvt-type mg2hf"),
    "--mcore2hf": _direction("--to hf"),
    "--target-ckpt-format": _renamed("--to"),
    "--dryrun": _same_as("--dry-run"),
    "--target-tp-size": _renamed("--tensor-model-parallel-size"),
    "--target-pp-size": _renamed("--pipeline-model-parallel-size"),
    "--target-params-dtype": _renamed("--params-dtype"),
    "--moe-tp-extend-ep": _same_as("--expert-tensor-parallel-size", "1"),
    "--lora-dir": _renamed("--lora-load"),
    "--save-to-legacy": _same_as("--to", "legacy"),
}

REWRITES: Mapping[str, Mapping[str, Rewrite]] = {
    "pretrain": _TRAINING,
    "convert": _CONVERSION,
    "generate": _USE,
    "chat": _USE,
    "evaluate": _EVALUATION,
}
"""Verb -> flag -> what becomes of it."""

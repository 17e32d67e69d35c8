"""Flags that save memory: what contradicts what, and what other suites call it."""

import pytest

from tessel.config.megatron import MEGATRON
from tessel.config.parser import Parsed, parse
from tessel.config.run import RunConfig
from tessel.config.validate import advice, validate
from tessel.errors import UsageError

BASE = "--load model --data-path data --seq-length 16 --lr 1e-2 --train-iters 100".split()


def read(line: str) -> Parsed:
    return parse(RunConfig, [*BASE, *line.split()], "tessel pretrain", MEGATRON)


SELECTIVE = "--recompute-granularity selective"
FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
PRECISE = "--use-precision-aware-optimizer"
BROKEN = {
    "--recompute-modules mlp": "--recompute-modules mlp is for .* selective, and that is not given",
    f"{FULL} block --recompute-modules mlp moe": "mlp moe is for .* selective, and that is full: give",
    f"{SELECTIVE} --recompute-modules mla_up_proj": "must be one of core_attn, layernorm, mlp, moe, moe_act",
    "--recompute-activation-function-num-layers 2": "num-layers 2 is for --recompute-activation-function: add that",
    "--recompute-activation-function --recompute-activation-function-num-layers 0": "is 0: it must be at least 1",
    f"{FULL} uniform --recompute-activation-function": "--recompute-method uniform recomputes all of them: take block",
    f"{SELECTIVE} --recompute-modules mlp layernorm --compile": "layernorm does not go with --compile",
    "--recompute-activation-function --compile": "--recompute-activation-function does not go with --compile",
    "--cpu-offloading": "--cpu-offloading needs --cpu-offloading-num-layers",
    "--cpu-offloading-num-layers 0": "--cpu-offloading-num-layers is 0: it must be at least 1",
    "--cpu-offloading-num-layers 2 --swap-attention": "both move the activations of attention",
    f"--swap-attention {FULL} block": "or take --recompute-granularity selective --recompute-modules mlp",
    "--swap-attention --compile": "take --cpu-offloading-num-layers instead, or leave --compile out",
    "--optimizer-cpu-offload --optimizer-offload-fraction 1.5": "is 1.5: it must be from 0 to 1",
    "--optimizer-offload-fraction 0.5": "fraction 0.5 is for --optimizer-cpu-offload: add",
    "--optimizer-cpu-offload --swap-optimizer": "both with the state in host memory: keep one of them",
    "--exp-avg-dtype bf16": "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer: add it",
    "--exp-avg-sq-dtype 8bit": "--exp-avg-sq-dtype 8bit needs --use-precision-aware-optimizer: add it",
    f"{PRECISE} --exp-avg-dtype fp8": "--exp-avg-dtype is 'fp8': it must be one of fp32, bf16, 8bit",
    f"{PRECISE} --exp-avg-sq-dtype bf16 --optimizer sgd": "is about Adam's state, and --optimizer is sgd: leave it out",
    "--main-grads-dtype bf16": "--main-grads-dtype bf16 is not supported yet: only fp32",
    "--main-params-dtype fp16": "--main-params-dtype fp16 is not supported yet: only fp32",
    "--recompute-norm": "use --recompute-granularity selective --recompute-modules layernorm",
    "--quant-states fp8": "use --use-precision-aware-optimizer --exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit",
    "--fine-grained-activation-offloading": "not supported yet: this way to save memory .* --cpu-offloading",
}


@pytest.mark.parametrize("line", BROKEN)
def test_broken_rules(line: str) -> None:
    with pytest.raises(UsageError, match=BROKEN[line]):
        validate(read(line).value)


@pytest.mark.parametrize(
    "line",
    [
        f"{SELECTIVE} --recompute-modules core_attn mlp layernorm",
        "--recompute-activations --recompute-modules layernorm --recompute-activation-function",
        f"{FULL} block --recompute-activation-function --recompute-activation-function-num-layers 3",
        f"{FULL} uniform --cpu-offloading --cpu-offloading-num-layers 2",
        f"{SELECTIVE} --recompute-modules mlp --swap-attention",
        "--cpu-offloading-num-layers 2 --compile",
        "--optimizer-cpu-offload --optimizer-offload-fraction 0 --no-pin-cpu-grads --no-pin-cpu-params",
        f"{PRECISE} --optimizer-cpu-offload --exp-avg-dtype bf16 --exp-avg-sq-dtype 8bit",
        f"{PRECISE} --swap-optimizer --optimizer sgd",
    ],
)
def test_what_goes_together(line: str) -> None:
    validate(read(line).value)


def test_megatrons_and_mindspeeds_further_flags_are_accepted_with_reasons() -> None:
    parsed = read(
        "--reuse-fp32-param --use-torch-optimizer-for-cpu-offload --swap-optimizer-times 16 --main-grads-dtype fp32"
    )
    assert parsed.notes == (
        "accepted without effect: --reuse-fp32-param (weights are held once, in fp32); "
        "--use-torch-optimizer-for-cpu-offload (the optimizer is torch's on every device); "
        "--swap-optimizer-times (one parameter's state after the other); --main-grads-dtype (always so)",
    )


def test_settings_of_an_offload_that_is_not_there_are_told() -> None:
    parsed = read("--overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --save out")
    told = advice(validate(parsed.value), parsed.given)
    assert told == [
        "--overlap-cpu-optimizer-d2h-h2d does nothing without --optimizer-cpu-offload",
        "--no-pin-cpu-grads does nothing without --optimizer-cpu-offload",
    ]

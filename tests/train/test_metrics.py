"""Log lines against those that Megatron-LM itself printed, and averages over several iterations."""

from __future__ import annotations

import math
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tessel.config.run import Logging
from tessel.train.flops import flops_per_token, num_matmul_parameters
from tessel.train.metrics import (
    StepMetrics,
    TrainingLog,
    datetime_line,
    evaluation_lines,
    evaluation_values,
    saved_line,
    saving_line,
    tensorboard_tags_off,
    timer_lines,
)

# Printed by Megatron-LM core_v0.12.1 with --log-params-norm --log-num-zeros-in-grad.
_MEGATRON_LINES = [
    (
        " [2026-11-21 02:58:46] iteration        1/      30 | consumed samples:            8 | elapsed time per "
        "iteration (ms): 224.9 | learning rate: 6.000000E-04 | global batch size:     8 | lm loss: 6.341899E+00 | "
        "loss scale: 1.0 | grad norm: 0.969 | num zeros: 11776.0 | params norm: 35.011 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 |",
        30,
        {
            "iteration": 1,
            "consumed_samples": 8,
            "global_batch_size": 8,
            "elapsed_s": 0.22491,
            "losses": {"lm loss": 6.341899},
            "learning_rate": 6e-4,
            "grad_norm": 0.96912,
            "num_zeros": 11776,
            "params_norm": 35.01061,
        },
    ),
    (
        " [2026-11-21 02:59:32] iteration        2/      20 | consumed samples:            8 | elapsed time per "
        "iteration (ms): 156.6 | learning rate: 2.000000E-03 | global batch size:     4 | lm loss: 6.355407E+00 | "
        "loss scale: 1.0 | grad norm: 1.738 | num zeros: 19776.0 | params norm: 45.038 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 |",
        20,
        {
            "iteration": 2,
            "consumed_samples": 8,
            "global_batch_size": 4,
            "elapsed_s": 0.1566,
            "losses": {"lm loss": 6.355407},
            "learning_rate": 2e-3,
            "grad_norm": 1.7384,
            "num_zeros": 19776.0,
            "params_norm": 45.0375,
        },
    ),
    (
        " [2026-11-21 03:00:02] iteration        1/      40 | consumed samples:            8 | elapsed time per "
        "iteration (ms): 300.5 | learning rate: 0.000000E+00 | global batch size:     8 | loss scale: 2147483648.0 | "
        "params norm: 35.000 | number of skipped iterations:   1 | number of nan iterations:   0 |",
        40,
        {
            "iteration": 1,
            "consumed_samples": 8,
            "global_batch_size": 8,
            "elapsed_s": 0.3005,
            "losses": {"lm loss": 6.3},
            "learning_rate": 0.0,
            "loss_scale": 2.0**31,
            "skipped": True,
            "params_norm": 35.0,
        },
    ),
]


def _step(**changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "iteration": 1,
        "consumed_samples": 8,
        "global_batch_size": 8,
        "num_tokens": 512,
        "elapsed_s": 0.25,
        "losses": {"lm loss": 6.0},
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
    }
    return StepMetrics(**values | changes)


@pytest.mark.parametrize(("line", "train_iters", "figures"), _MEGATRON_LINES, ids=["first", "later", "skipped"])
def test_the_log_line_is_megatrons_up_to_its_last_field(line: str, train_iters: int, figures: dict[str, Any]) -> None:
    step = StepMetrics(num_tokens=512, **figures)
    log = TrainingLog(train_iters)
    log.add(step)
    now = datetime.fromisoformat(line[2:21])
    assert log.line(step, now=now) == f"{line} tokens/s: {512 / figures['elapsed_s']:.1f} |"


def test_optional_fields_stand_where_megatron_has_them() -> None:
    log = TrainingLog(train_iters=10, log_throughput=True, flops_per_token=1e9, peak_flops=4e12, num_devices=2)
    step = _step(decoupled_learning_rate=5e-5, grad_norm=None)
    log.add(step)
    assert log.line(step, peak_memory_bytes=3 * 2**29, now=datetime(2026, 1, 2, 3, 4, 5)) == (
        " [2026-01-02 03:04:05] iteration        1/      10 | consumed samples:            8 | elapsed time per "
        "iteration (ms): 250.0 | throughput per GPU (TFLOP/s/GPU): 1.0 | learning rate: 1.000000E-03 | "
        "decoupled learning rate: 5.000000E-05 | global batch size:     8 | lm loss: 6.000000E+00 | loss scale: 1.0 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 | tokens/s: 2048.0 | MFU: 25.6% | "
        "peak memory: 1.50 GiB |"
    )


def test_the_share_of_time_that_went_into_waiting_for_data() -> None:
    log = TrainingLog(10)
    for wait_s in (0.004, 0.001):
        log.add(_step(data_wait_s=wait_s))
    assert log.line(_step()).endswith(" tokens/s: 2048.0 | data wait: 1.00% |")
    log.add(_step(data_wait_s=0.0))
    assert log.line(_step()).endswith(" data wait: 0.00% |")
    log.add(_step())
    assert "data wait" not in log.line(_step())


def test_a_line_averages_over_the_iterations_that_were_not_skipped() -> None:
    log = TrainingLog(10)
    steps = [
        _step(losses={"lm loss": 6.1}, elapsed_s=0.1),
        _step(losses={"lm loss": 7.0}, skipped=True, elapsed_s=0.2),
        _step(losses={"lm loss": math.nan}, skipped=True, elapsed_s=0.2),
        _step(losses={"lm loss": 5.7}, elapsed_s=0.3, learning_rate=9e-4, grad_norm=2.0),
    ]
    for step in steps:
        log.add(step)
    line = log.line(steps[-1])
    average = float(np.float32(6.1) + np.float32(5.7)) / 2
    for part in (
        f"| lm loss: {average:.6E} |",
        "(ms): 200.0 |",
        "learning rate: 9.000000E-04 |",
        "grad norm: 2.000 |",
        "skipped iterations:   2 |",
        "nan iterations:   1 |",
        f"tokens/s: {4 * 512 / 0.8:.1f} |",
    ):
        assert part in line

    log.add(_step(losses={"lm loss": 3.0}))
    line = log.line(_step())
    for part in ("| lm loss: 3.000000E+00 |", "(ms): 250.0 |", "skipped iterations:   0 |", "nan iterations:   0 |"):
        assert part in line


def test_a_loss_that_is_not_a_number_has_no_field_as_in_megatron() -> None:
    log = TrainingLog(10)
    step = _step(losses={"lm loss": math.nan, "z_loss": 0.5})
    log.add(step)
    line = log.line(step)
    assert "lm loss" not in line
    assert "| z_loss: 5.000000E-01 |" in line


@pytest.mark.parametrize(
    ("where", "loss", "line"),
    [
        (
            "iteration 30 on validation set",
            6.23926012,
            " validation loss at iteration 30 on validation set | lm loss value: 6.239260E+00 | "
            "lm loss PPL: 5.124792E+02 | ",
        ),
        ("iteration 10", 25.0, " validation loss at iteration 10 | lm loss value: 2.500000E+01 | "
         "lm loss PPL: 4.851652E+08 | "),
    ],
)  # fmt: skip
def test_evaluation_lines_are_megatrons(where: str, loss: float, line: str) -> None:
    rule, middle, last = evaluation_lines(where, {"lm loss": loss})
    assert middle == line
    assert rule == last == "-" * (len(line) + 1)


def test_other_lines_are_megatrons() -> None:
    assert saving_line(10, "out", "torch_dcp") == "saving checkpoint at iteration      10 to out in torch_dcp format"
    assert saved_line(10, "out") == ("  successfully saved checkpoint from iteration      10 to out [ t 1/1, p 1/1 ]")
    assert saved_line(10, "out", 2, 4).endswith("to out [ t 1/2, p 1/4 ]")
    assert timer_lines({"save-checkpoint": (17332.361, 17332.558)}) == (
        "(min, max) time across ranks (ms):\n    save-checkpoint ................................: (17332.36, 17332.56)"
    )
    assert datetime_line("after training is done", datetime(2026, 1, 2, 3, 4, 5)) == (
        "[after training is done] datetime: 2026-01-02 03:04:05 "
    )


def test_the_figures_of_an_iteration() -> None:
    values = _step(num_zeros=3.0, params_norm=2.0, decoupled_learning_rate=1e-4).values()
    assert values == {
        "learning-rate": 1e-3,
        "decoupled-learning-rate": 1e-4,
        "batch-size": 8,
        "lm loss": 6.0,
        "loss-scale": 1.0,
        "grad-norm": 1.0,
        "num-zeros": 3.0,
        "params-norm": 2.0,
        "skipped": 0,
        "iteration-time": 0.25,
        "tokens": 512,
    }
    skipped = _step(skipped=True, grad_norm=None).values()
    assert skipped["skipped"] == 1
    assert not {"lm loss", "grad-norm", "num-zeros"} & skipped.keys()


def test_the_figures_of_an_evaluation() -> None:
    assert evaluation_values({"lm loss": 2.0}) == {
        "lm loss validation": 2.0,
        "lm loss validation ppl": pytest.approx(math.exp(2.0)),
    }
    assert set(evaluation_values({"lm loss": 2.0}, "test")) == {"lm loss test", "lm loss test ppl"}


def test_logging_flags_choose_tags() -> None:
    off = tensorboard_tags_off(Logging())
    assert {"iteration-time", "throughput", "world-size", "lm loss validation ppl"} <= off
    assert not {"learning-rate", "loss-scale", "lm loss"} & off
    on = tensorboard_tags_off(
        Logging(
            log_timers_to_tensorboard=True,
            log_validation_ppl_to_tensorboard=True,
            log_world_size_to_tensorboard=True,
            log_memory_to_tensorboard=True,
            no_log_learning_rate_to_tensorboard=True,
            no_log_loss_scale_to_tensorboard=True,
        )
    )
    assert on == {"learning-rate", "loss-scale", "skipped", "tokens"}


def _qwen2_half_billion(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "has_experts": lambda layer: False,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 0,
        "shared_expert_intermediate_size": 0,
    }
    return SimpleNamespace(**values | changes)


def test_flops_of_a_mixture_are_those_of_the_experts_that_see_a_token() -> None:
    # Qwen3-30B-A3B: 3 353 032 704 active parameters, among them embedding, norms and routers.
    mixture = {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
        "num_key_value_heads": 4, "has_experts": lambda layer: True, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }  # fmt: skip
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    rest = 151936 * 2048 + norms + 48 * 128 * 2048
    assert num_matmul_parameters(_qwen2_half_billion(**mixture)) + rest == 3_353_032_704


def test_flops_are_those_of_the_model_card() -> None:
    # Qwen2.5-0.5B: 0.36 B parameters without the embedding, and the tied head's 136 M.
    num_parameters = num_matmul_parameters(_qwen2_half_billion())
    assert num_parameters == 24 * (896 * (2 * 896 + 2 * 128) + 3 * 896 * 4864) + 151936 * 896
    flops = flops_per_token(_qwen2_half_billion(), 4096)
    assert flops.causal == 6 * num_parameters + 6 * 24 * 896 * 4096
    assert flops.palm == 6 * num_parameters + 12 * 24 * 896 * 4096


@pytest.mark.parametrize("head_dim", [64, 128])
def test_causal_flops_are_megatrons(head_dim: int) -> None:
    config = _qwen2_half_billion(head_dim=head_dim)
    # Megatron-LM core_v0.12.1's transformer_flops for a dense SwiGLU model, term by term.
    layers, hidden, seq_length = 24, 896, 2048
    ratio = head_dim * 14 / hidden
    attention = 12 * layers * hidden * hidden * (1 + 2 / 14 + seq_length / hidden / 2) * ratio
    expected = 12 * layers * hidden * 4864 * 1.5 + attention + 3 * 2 * hidden * 151936
    assert flops_per_token(config, seq_length).causal == pytest.approx(expected, rel=1e-12)

"""What a run prints: Megatron-LM's log lines, and the figures behind them.

A log line is Megatron's, character for character, up to its last field; tokens/s, MFU and peak
memory follow. Names of figures are Megatron's TensorBoard tags ("lm loss", "grad-norm", ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from tessel.config.run import Logging

LM_LOSS = "lm loss"
GIB_BYTES = 2**30
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True)
class StepMetrics:
    """The figures of one iteration, after its update and the scheduler's step.

    `losses` are logged losses by name; a skipped iteration's are counted as NaN where they are not finite,
    and else ignored. `grad_norm`, `num_zeros` and `params_norm` are None where not measured; `learning_rate`
    is the one that the next update will use. `router` are figures of a mixture of experts, by name.
    `data_wait_s` is what of `elapsed_s` went into waiting for samples.
    """

    iteration: int
    consumed_samples: int
    global_batch_size: int
    num_tokens: int
    elapsed_s: float
    losses: Mapping[str, float]
    learning_rate: float
    loss_scale: float = 1.0
    skipped: bool = False
    decoupled_learning_rate: float | None = None
    grad_norm: float | None = None
    num_zeros: float | None = None
    params_norm: float | None = None
    router: Mapping[str, float] = field(default_factory=dict)
    data_wait_s: float | None = None

    def values(self) -> dict[str, float]:
        """The figures under Megatron's tags; losses are left out of a skipped iteration."""
        values = {
            "learning-rate": self.learning_rate,
            "decoupled-learning-rate": self.decoupled_learning_rate,
            "batch-size": self.global_batch_size,
            **({} if self.skipped else {**self.losses, **self.router}),
            "loss-scale": self.loss_scale,
            "grad-norm": self.grad_norm,
            "num-zeros": self.num_zeros,
            "params-norm": self.params_norm,
            "skipped": int(self.skipped),
            "iteration-time": self.elapsed_s,
            "tokens": self.num_tokens,
        }
        return {tag: value for tag, value in values.items() if value is not None}


@dataclass
class TrainingLog:
    """Gathers iterations until a line is due, as Megatron's training_log does.

    Losses are averaged over the iterations that were not skipped; the counts of skipped and NaN
    iterations start anew with each line; every other figure is the last iteration's.

    `flops_per_token` (see `flops`) and `peak_flops` (per second, of one device) give throughput and MFU.
    """

    train_iters: int
    log_throughput: bool = False
    flops_per_token: float | None = None
    peak_flops: float | None = None
    num_devices: int = 1
    _loss_sums: dict[str, np.float32] = field(default_factory=dict, init=False)
    _router_sums: dict[str, np.float32] = field(default_factory=dict, init=False)
    _num_advanced: int = field(default=0, init=False)
    _num_skipped: int = field(default=0, init=False)
    _num_nan: int = field(default=0, init=False)
    _elapsed_s: float = field(default=0.0, init=False)
    _num_tokens: int = field(default=0, init=False)
    _data_wait_s: float | None = field(default=None, init=False)

    def add(self, step: StepMetrics) -> None:
        """Take in one iteration."""
        self._elapsed_s += step.elapsed_s
        self._num_tokens += step.num_tokens
        if step.data_wait_s is not None:
            self._data_wait_s = (self._data_wait_s or 0.0) + step.data_wait_s
        if step.skipped:
            self._num_skipped += 1
            self._num_nan += any(not math.isfinite(loss) for loss in step.losses.values())
            return
        self._num_advanced += 1
        # fp32, as in Megatron, so that an average over many iterations rounds alike.
        for sums, figures in ((self._loss_sums, step.losses), (self._router_sums, step.router)):
            for name, figure in figures.items():
                sums[name] = sums.get(name, np.float32(0)) + np.float32(figure)

    def line(self, step: StepMetrics, *, peak_memory_bytes: int | None = None, now: datetime | None = None) -> str:
        """The line for everything added since the last one, of which `step` is the last; starts anew."""
        num_iters = max(1, self._num_advanced + self._num_skipped)
        tokens_per_s = self._num_tokens / self._elapsed_s if self._elapsed_s else 0.0
        flops = tokens_per_s * self.flops_per_token / self.num_devices if self.flops_per_token else None
        line = format_line(
            step,
            train_iters=self.train_iters,
            elapsed_s_per_iteration=self._elapsed_s / num_iters,
            losses={name: float(total) / max(1, self._num_advanced) for name, total in self._loss_sums.items()},
            num_skipped=self._num_skipped,
            num_nan=self._num_nan,
            throughput_tflops=flops / 1e12 if flops is not None and self.log_throughput else None,
            now=now or datetime.now(),
        )
        mfu = flops / self.peak_flops if flops is not None and self.peak_flops else None
        router = {name: float(total) / max(1, self._num_advanced) for name, total in self._router_sums.items()}
        self._loss_sums = dict.fromkeys(self._loss_sums, np.float32(0))
        self._router_sums.clear()
        self._num_advanced = self._num_skipped = self._num_nan = self._num_tokens = 0
        data_wait = self._data_wait_s / self._elapsed_s if self._data_wait_s is not None and self._elapsed_s else None
        self._elapsed_s, self._data_wait_s = 0.0, None
        return line + format_router(router) + format_speed(tokens_per_s, mfu, peak_memory_bytes, data_wait)


def format_line(
    step: StepMetrics,
    *,
    train_iters: int,
    elapsed_s_per_iteration: float,
    losses: Mapping[str, float],
    num_skipped: int,
    num_nan: int,
    throughput_tflops: float | None,
    now: datetime,
) -> str:
    """Megatron's log line. A loss that is not positive (none since the last line, or NaN) is left out, as there."""
    line = f" [{now.strftime(TIME_FORMAT)}] iteration {step.iteration:8d}/{train_iters:8d} |"
    line += f" consumed samples: {step.consumed_samples:12d} |"
    line += f" elapsed time per iteration (ms): {elapsed_s_per_iteration * 1000.0:.1f} |"
    if throughput_tflops is not None:
        line += f" throughput per GPU (TFLOP/s/GPU): {throughput_tflops:.1f} |"
    line += f" learning rate: {step.learning_rate:.6E} |"
    if step.decoupled_learning_rate is not None:
        line += f" decoupled learning rate: {step.decoupled_learning_rate:.6E} |"
    line += f" global batch size: {step.global_batch_size:5d} |"
    for name, loss in losses.items():
        if loss > 0.0:
            line += f" {name}: {loss:.6E} |"
    line += f" loss scale: {step.loss_scale:.1f} |"
    if step.grad_norm is not None:
        line += f" grad norm: {step.grad_norm:.3f} |"
    if step.num_zeros is not None:
        line += f" num zeros: {float(step.num_zeros)} |"
    if step.params_norm is not None:
        line += f" params norm: {step.params_norm:.3f} |"
    line += f" number of skipped iterations: {num_skipped:3d} |"
    line += f" number of nan iterations: {num_nan:3d} |"
    return line


def format_router(figures: Mapping[str, float]) -> str:
    """The figures of a mixture of experts, after Megatron's last field: it prints them only beside TensorBoard."""
    return "".join(f" {name}: {figure:.6E} |" for name, figure in figures.items())


def format_speed(
    tokens_per_s: float, mfu: float | None, peak_memory_bytes: int | None, data_wait: float | None = None
) -> str:
    """What tessel adds to the line.

    tokens/s over all devices, MFU (causal FLOPs), peak memory and the share of time spent waiting for data, both of
    this process.
    """
    text = f" tokens/s: {tokens_per_s:.1f} |"
    if mfu is not None:
        text += f" MFU: {mfu * 100.0:.1f}% |"
    if peak_memory_bytes is not None:
        text += f" peak memory: {peak_memory_bytes / GIB_BYTES:.2f} GiB |"
    if data_wait is not None:
        text += f" data wait: {data_wait * 100.0:.2f}% |"
    return text


def perplexity(loss: float) -> float:
    """exp(loss), with Megatron's bound at exp(20)."""
    return math.exp(min(20, loss))


def evaluation_lines(
    where: str, losses: Mapping[str, float], suffix: str = "", figures: Mapping[str, float] | None = None
) -> list[str]:
    """Megatron's three lines; `where` is "iteration 10", "iteration 30 on validation set" or "... on test set".

    `suffix` tells several validation sets apart, such as "-0". `figures` follow the losses.
    """
    line = f" validation{suffix} loss at {where} | "
    for name, loss in losses.items():
        line += f"{name} value: {loss:.6E} | {name} PPL: {perplexity(loss):.6E} | "
    for name, figure in (figures or {}).items():
        line += f"{name} value: {figure:.6E} | "
    rule = "-" * (len(line) + 1)
    return [rule, line, rule]


def evaluation_values(losses: Mapping[str, float], split: str = "validation") -> dict[str, float]:
    """An evaluation's figures under Megatron's tags ("lm loss validation", "lm loss validation ppl")."""
    values: dict[str, float] = {}
    for name, loss in losses.items():
        values[f"{name} {split}"] = loss
        values[f"{name} {split} ppl"] = perplexity(loss)
    return values


def saving_line(iteration: int, folder: object, checkpoint_format: str) -> str:
    """What Megatron prints before it saves."""
    return f"saving checkpoint at iteration {iteration:7d} to {folder} in {checkpoint_format} format"


def saved_line(iteration: int, folder: object, tp: int = 1, pp: int = 1) -> str:
    """What Megatron prints after it has saved, on the first of `tp` and of `pp` ranks."""
    return f"  successfully saved checkpoint from iteration {iteration:7d} to {folder} [ t 1/{tp}, p 1/{pp} ]"


def timer_lines(times_ms: Mapping[str, tuple[float, float]]) -> str:
    """Megatron's timers: name -> (fastest, slowest) over ranks, in milliseconds."""
    text = "(min, max) time across ranks (ms):"
    for name, (fastest_ms, slowest_ms) in times_ms.items():
        text += f"\n    {(name + ' ').ljust(48, '.')}: ({fastest_ms:.2f}, {slowest_ms:.2f})"
    return text


def datetime_line(event: str, now: datetime | None = None) -> str:
    """Megatron's mark of an event, such as "after training is done"; it ends in a space, as there."""
    return f"[{event}] datetime: {(now or datetime.now()).strftime(TIME_FORMAT)} "


def tensorboard_tags_off(logging: Logging) -> frozenset[str]:
    """Tags that the logging flags leave out of TensorBoard (and its likes)."""
    off = {"skipped", "tokens"}
    if logging.no_log_learning_rate_to_tensorboard:
        off |= {"learning-rate"}
    if logging.no_log_loss_scale_to_tensorboard:
        off |= {"loss-scale"}
    if not logging.log_timers_to_tensorboard:
        off |= {"iteration-time", "throughput"}
    if not logging.log_memory_to_tensorboard:
        off |= {"mem-max-allocated-bytes"}
    if not logging.log_world_size_to_tensorboard:
        off |= {"world-size"}
    if not logging.log_validation_ppl_to_tensorboard:
        off |= {f"{LM_LOSS} {split} ppl" for split in ("validation", "test")}
    return frozenset(off)

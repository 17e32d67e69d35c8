"""Learning rate and weight decay over a run: pure functions of the samples trained on.

The rules are those of Megatron-LM's OptimizerParamScheduler. A schedule's clock is `step_samples`:
it advances by the global batch size with every update, and stands still when one is skipped, so
that a batch size that grows does not stretch the curve. The curve is evaluated after the clock
has advanced: the first update uses the rate at 0, which is `init_lr` where there is a warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tessel.config.run import RunConfig
from tessel.errors import TesselError, UsageError

LR_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
WEIGHT_DECAY_STYLES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up from `init_lr` to `max_lr`, then a decay to `min_lr`, which is kept.

    `warmup_steps`, `decay_steps` and `wsd_decay_steps` are in samples; `decay_steps` includes the
    warm-up. `warmup_steps` is a float where the warm-up was given as a fraction. `wsd_decay_steps`
    is the length of the last part of style WSD.

    Raises:
        UsageError: values that make no curve.
    """

    init_lr: float
    max_lr: float
    min_lr: float
    warmup_steps: float
    decay_steps: int
    style: str
    wsd_decay_steps: int | None = None
    wsd_style: str = "exponential"

    def __post_init__(self) -> None:
        if self.style not in LR_STYLES:
            raise UsageError(f"--lr-decay-style {self.style} is not one of {', '.join(LR_STYLES)}.")
        if not 0.0 <= self.min_lr <= self.max_lr:
            raise UsageError(f"--min-lr {self.min_lr} must lie between 0 and --lr {self.max_lr}.")
        if self.init_lr > self.max_lr:
            raise UsageError(f"--lr-warmup-init {self.init_lr} must not exceed --lr {self.max_lr}.")
        if self.decay_steps <= 0:
            raise UsageError(
                f"The learning rate decays over {self.decay_steps} samples; --lr-decay-iters or --lr-decay-samples "
                "(by default the length of the run) must be positive."
            )
        if not self.warmup_steps < self.decay_steps:
            raise UsageError(
                f"The warm-up takes {self.warmup_steps:g} samples and the whole decay {self.decay_steps}; shorten "
                "--lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction, or lengthen --lr-decay-iters."
            )
        if self.style == "WSD":
            self._check_wsd()

    def _check_wsd(self) -> None:
        if not self.wsd_decay_steps:
            raise UsageError(
                "--lr-decay-style WSD needs the length of its last part: give --lr-wsd-decay-iters "
                "(or --lr-wsd-decay-samples with --train-samples)."
            )
        if self.wsd_style not in WSD_STYLES:
            raise UsageError(f"--lr-wsd-decay-style {self.wsd_style} is not one of {', '.join(WSD_STYLES)}.")

    def lr(self, step_samples: int, max_lr: float | None = None, min_lr: float | None = None) -> float:
        """The learning rate after `step_samples` samples; `max_lr` and `min_lr` replace the schedule's own."""
        max_lr = self.max_lr if max_lr is None else max_lr
        min_lr = self.min_lr if min_lr is None else min_lr
        if self.warmup_steps > 0 and step_samples <= self.warmup_steps:
            return self.init_lr + (max_lr - self.init_lr) * float(step_samples) / float(self.warmup_steps)
        if self.style == "constant":
            return max_lr
        if step_samples > self.decay_steps:
            return min_lr
        if self.style == "inverse-square-root":
            warmup_steps = max(self.warmup_steps, 1)
            return max(min_lr, max_lr * warmup_steps**0.5 / max(step_samples, 1) ** 0.5)
        return min_lr + self._remaining(step_samples) * (max_lr - min_lr)

    def _remaining(self, step_samples: int) -> float:
        """How much of the way from `min_lr` up to `max_lr` is left, after the warm-up: 1 to 0."""
        if self.style == "WSD":
            assert self.wsd_decay_steps is not None
            into_decay = step_samples - (self.decay_steps - self.wsd_decay_steps)
            return 1.0 if into_decay <= 0 else _wsd_remaining(self.wsd_style, into_decay / self.wsd_decay_steps)
        ratio = float(step_samples - self.warmup_steps) / float(self.decay_steps - self.warmup_steps)
        return 1.0 - ratio if self.style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1.0)


def _wsd_remaining(style: str, ratio: float) -> float:
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":
        return 2.0 * math.pow(0.5, ratio) - 1.0
    return 1.0 - math.sqrt(ratio)


@dataclass(frozen=True)
class WeightDecaySchedule:
    """Weight decay that grows from `start` to `end` over `incr_steps` samples.

    Raises:
        UsageError: values that make no curve.
    """

    start: float
    end: float
    incr_steps: int
    style: str = "constant"

    def __post_init__(self) -> None:
        if self.style not in WEIGHT_DECAY_STYLES:
            raise UsageError(f"--weight-decay-incr-style {self.style} is not one of {', '.join(WEIGHT_DECAY_STYLES)}.")
        if not 0.0 <= self.start <= self.end:
            raise UsageError(
                f"--start-weight-decay {self.start} must lie between 0 and --end-weight-decay {self.end}: "
                "weight decay can only grow."
            )
        if self.style == "constant" and self.start != self.end:
            raise UsageError(
                f"--start-weight-decay {self.start} and --end-weight-decay {self.end} differ, but "
                "--weight-decay-incr-style is constant; choose linear or cosine."
            )

    def weight_decay(self, step_samples: int) -> float:
        """The weight decay after `step_samples` samples."""
        if step_samples > self.incr_steps or self.style == "constant":
            return self.end
        ratio = float(step_samples) / float(self.incr_steps)
        grown = ratio if self.style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0)
        return self.start + grown * (self.end - self.start)


def build_schedules(cfg: RunConfig, train_iters: int | None = None) -> tuple[LearningRateSchedule, WeightDecaySchedule]:
    """The schedules of a run, as Megatron's get_optimizer_param_scheduler derives them.

    Iterations count for one global batch each. `train_iters` stands in for --train-iters where the
    run has neither it nor --train-samples.

    Raises:
        UsageError: a field is missing, or the values make no curve.
    """
    if cfg.optimizer.lr is None:
        raise UsageError("--lr is not given: training needs a peak learning rate.")
    schedule = cfg.schedule
    run_steps, decay_steps, wsd_decay_steps, warmup_steps = _lengths_samples(cfg, train_iters)
    if schedule.lr_warmup_fraction is not None:
        warmup_steps = schedule.lr_warmup_fraction * decay_steps
    learning_rate = LearningRateSchedule(
        init_lr=schedule.lr_warmup_init,
        max_lr=float(cfg.optimizer.lr),
        min_lr=schedule.min_lr,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        style=schedule.lr_decay_style,
        wsd_decay_steps=wsd_decay_steps,
        wsd_style=schedule.lr_wsd_decay_style,
    )
    return learning_rate, _weight_decay_schedule(cfg, run_steps)


def _lengths_samples(cfg: RunConfig, train_iters: int | None) -> tuple[int, int, int | None, float]:
    """Samples in the run, the decay, WSD's last part and the warm-up (other than by fraction)."""
    schedule, batch = cfg.schedule, cfg.batch
    if batch.train_samples and not batch.train_iters:
        decay_samples = schedule.lr_decay_samples
        return (
            batch.train_samples,
            batch.train_samples if decay_samples is None else decay_samples,
            schedule.lr_wsd_decay_samples,
            schedule.lr_warmup_samples,
        )
    num_iters = batch.train_iters or train_iters
    if not num_iters:
        raise UsageError("Neither --train-iters nor --train-samples is given: say how long to train.")
    batch_size = batch.global_batch_size or batch.micro_batch_size
    decay_iters = num_iters if schedule.lr_decay_iters is None else schedule.lr_decay_iters
    wsd_iters = schedule.lr_wsd_decay_iters
    return (
        num_iters * batch_size,
        decay_iters * batch_size,
        None if wsd_iters is None else wsd_iters * batch_size,
        schedule.lr_warmup_iters * batch_size,
    )


def _weight_decay_schedule(cfg: RunConfig, run_steps: int) -> WeightDecaySchedule:
    optimizer = cfg.optimizer
    if optimizer.weight_decay_incr_style == "constant":
        if {optimizer.start_weight_decay, optimizer.end_weight_decay} - {None, optimizer.weight_decay}:
            raise UsageError(
                "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine; for a "
                "constant weight decay give --weight-decay."
            )
        return WeightDecaySchedule(optimizer.weight_decay, optimizer.weight_decay, run_steps)
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if start is None or end is None:
        raise UsageError(
            f"--weight-decay-incr-style {optimizer.weight_decay_incr_style} needs both --start-weight-decay and "
            "--end-weight-decay."
        )
    return WeightDecaySchedule(start, end, run_steps, optimizer.weight_decay_incr_style)


# Megatron's keys of the saved state -> what the value is called to the user. `num_steps` is state
# proper and never contradicts; the rest is what the command line gives anew on every start.
_CHECKED_KEYS = {
    "max_lr": "learning rate (--lr)",
    "min_lr": "minimum learning rate (--min-lr)",
    "lr_warmup_steps": "length of the warm-up in samples",
    "lr_decay_steps": "length of the decay in samples (from --train-iters, --lr-decay-iters or their --*-samples)",
    "lr_decay_style": "decay style (--lr-decay-style)",
    "start_wd": "weight decay at the start (--weight-decay or --start-weight-decay)",
    "end_wd": "weight decay at the end (--weight-decay or --end-weight-decay)",
    "wd_incr_steps": "length of the weight-decay increment in samples (from --train-iters or --train-samples)",
    "wd_incr_style": "weight-decay increment style (--weight-decay-incr-style)",
}


class Scheduler:
    """Both schedules and their clock, `num_steps` (samples of the updates made so far).

    On resuming, the saved values and the command line's must agree, unless `override` (the command
    line wins) or `use_checkpoint` (the checkpoint wins) is set; as in Megatron, WSD's last part and
    `init_lr` are not saved and always come from the command line.

    Raises:
        UsageError: both flags are set.
    """

    def __init__(
        self,
        learning_rate: LearningRateSchedule,
        weight_decay: WeightDecaySchedule,
        *,
        override: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        if override and use_checkpoint:
            raise UsageError(
                "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other: "
                "give one of them."
            )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.num_steps = 0
        self._override = override
        self._use_checkpoint = use_checkpoint

    def advance(self, num_samples: int) -> None:
        """Move the clock by the global batch size of an update that was made (not of a skipped one)."""
        self.num_steps += num_samples

    def apply(self, param_groups: Iterable[dict[str, Any]]) -> None:
        """Set `lr` and `weight_decay` of an optimizer's groups to their present values.

        A group's `max_lr` and `min_lr` replace the schedule's where they are there (--decoupled-lr);
        `wd_mult` multiplies the weight decay.
        """
        weight_decay = self.weight_decay.weight_decay(self.num_steps)
        for group in param_groups:
            group["lr"] = self.learning_rate.lr(self.num_steps, group.get("max_lr"), group.get("min_lr"))
            group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, under Megatron's keys."""
        return {"num_steps": self.num_steps, **self._values()}

    def _values(self) -> dict[str, Any]:
        return {
            "max_lr": self.learning_rate.max_lr,
            "min_lr": self.learning_rate.min_lr,
            "lr_warmup_steps": self.learning_rate.warmup_steps,
            "lr_decay_steps": self.learning_rate.decay_steps,
            "lr_decay_style": self.learning_rate.style,
            "start_wd": self.weight_decay.start,
            "end_wd": self.weight_decay.end,
            "wd_incr_steps": self.weight_decay.incr_steps,
            "wd_incr_style": self.weight_decay.style,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the clock, and the values by the rule in force.

        Raises:
            TesselError: the command line contradicts the checkpoint and neither flag is set.
        """
        own = self._values()
        values = own if self._override else {key: state[key] for key in own}
        if not self._override and not self._use_checkpoint:
            differing = [key for key in own if own[key] != state[key]]
            if differing:
                raise TesselError(
                    "The schedule contradicts the checkpoint: "
                    + "; ".join(f"{_CHECKED_KEYS[key]} is {own[key]}, saved {state[key]}" for key in differing)
                    + ". Give --override-opt-param-scheduler to use the new values, or "
                    "--use-checkpoint-opt-param-scheduler to keep the saved ones."
                )
        self.num_steps = state["num_steps"]
        self.learning_rate = replace(
            self.learning_rate,
            max_lr=values["max_lr"],
            min_lr=values["min_lr"],
            warmup_steps=values["lr_warmup_steps"],
            decay_steps=values["lr_decay_steps"],
            style=values["lr_decay_style"],
        )
        self.weight_decay = WeightDecaySchedule(
            values["start_wd"], values["end_wd"], values["wd_incr_steps"], values["wd_incr_style"]
        )

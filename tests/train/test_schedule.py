"""Learning rate and weight decay against megatron-core's own scheduler, over whole curves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tessel.config.run import Batch, Optimizer, RunConfig, Schedule
from tessel.errors import TesselError, UsageError
from tessel.train.schedule import (
    LR_STYLES,
    WSD_STYLES,
    LearningRateSchedule,
    Scheduler,
    WeightDecaySchedule,
    build_schedules,
)


@pytest.fixture(scope="module")
def megatron() -> Any:
    """megatron-core's module of schedules."""
    return pytest.importorskip("megatron.core.optimizer_param_scheduler", reason="megatron-core is not installed")


class _Groups:
    """All that Megatron's scheduler asks of an optimizer."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups


def _groups() -> list[dict[str, Any]]:
    return [{"wd_mult": 1.0}, {"wd_mult": 0.0}, {"wd_mult": 1.0, "max_lr": 5e-4, "min_lr": 2e-5}]


def _theirs(megatron: Any, rate: LearningRateSchedule, decay: WeightDecaySchedule, groups: Any, **flags: bool) -> Any:
    flags = {"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": False} | flags
    return megatron.OptimizerParamScheduler(
        _Groups(groups),
        init_lr=rate.init_lr,
        max_lr=rate.max_lr,
        min_lr=rate.min_lr,
        lr_warmup_steps=rate.warmup_steps,
        lr_decay_steps=rate.decay_steps,
        lr_decay_style=rate.style,
        start_wd=decay.start,
        end_wd=decay.end,
        wd_incr_steps=decay.incr_steps,
        wd_incr_style=decay.style,
        wsd_decay_steps=rate.wsd_decay_steps,
        lr_wsd_decay_style=rate.wsd_style,
        **flags,
    )


def _rate(style: str = "cosine", **changes: Any) -> LearningRateSchedule:
    values: dict[str, Any] = {
        "init_lr": 0.0,
        "max_lr": 3e-3,
        "min_lr": 1e-4,
        "warmup_steps": 40,
        "decay_steps": 400,
        "style": style,
        "wsd_decay_steps": 120 if style == "WSD" else None,
    }
    return LearningRateSchedule(**values | changes)


_CONSTANT_WD = WeightDecaySchedule(0.1, 0.1, 440)
_STYLES = [(style, "exponential") for style in LR_STYLES if style != "WSD"] + [("WSD", wsd) for wsd in WSD_STYLES]


@pytest.mark.parametrize(("style", "wsd_style"), _STYLES)
@pytest.mark.parametrize(("warmup", "init_lr"), [(0, 0.0), (40, 0.0), (40, 1e-5), (33.3, 0.0)])
@pytest.mark.parametrize("increments", [(8,), (4, 7, 12)], ids=["even", "uneven"])
def test_curves_equal_megatrons(
    megatron: Any, style: str, wsd_style: str, warmup: float, init_lr: float, increments: tuple[int, ...]
) -> None:
    rate = _rate(style, warmup_steps=warmup, init_lr=init_lr, wsd_style=wsd_style)
    decay = WeightDecaySchedule(0.01, 0.1, 440, "cosine")
    theirs, ours = _groups(), _groups()
    reference = _theirs(megatron, rate, decay, theirs)
    scheduler = Scheduler(rate, decay)
    seen = set()
    for step in range(80):  # well past the end of both curves
        scheduler.apply(ours)
        assert [(g["lr"], g["weight_decay"]) for g in ours] == [(g["lr"], g["weight_decay"]) for g in theirs]
        seen.add(ours[0]["lr"])
        increment = increments[step % len(increments)]
        scheduler.advance(increment)
        reference.step(increment)
    assert len(seen) > 1 or (style == "constant" and warmup == 0)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_weight_decay_equals_megatrons(megatron: Any, style: str) -> None:
    decay = WeightDecaySchedule(0.2 if style == "constant" else 0.01, 0.2, 300, style)
    theirs, ours = _groups(), _groups()
    reference, scheduler = _theirs(megatron, _rate(), decay, theirs), Scheduler(_rate(), decay)
    for _ in range(60):
        scheduler.apply(ours)
        assert [g["weight_decay"] for g in ours] == [g["weight_decay"] for g in theirs]
        assert ours[1]["weight_decay"] == 0.0
        scheduler.advance(8)
        reference.step(8)


def test_a_skipped_update_does_not_move_the_clock() -> None:
    scheduler = Scheduler(_rate(), _CONSTANT_WD)
    groups = _groups()
    scheduler.advance(8)
    scheduler.apply(groups)
    before = groups[0]["lr"]
    scheduler.apply(groups)
    assert groups[0]["lr"] == before == _rate().lr(8)


def _config(batch: dict[str, Any], schedule: dict[str, Any], optimizer: dict[str, Any] | None = None) -> RunConfig:
    return RunConfig(
        batch=Batch(**batch),
        schedule=Schedule(**schedule),
        optimizer=Optimizer(**{"lr": 3e-3, "weight_decay": 0.1} | (optimizer or {})),
    )


def test_iterations_become_samples() -> None:
    rate, decay = build_schedules(
        _config(
            {"global_batch_size": 8, "train_iters": 30},
            {"lr_decay_style": "cosine", "lr_warmup_iters": 5, "min_lr": 3e-4},
        )
    )
    assert (rate.warmup_steps, rate.decay_steps, decay.incr_steps) == (40, 240, 240)
    # The first lines of a run of Megatron-LM with these flags.
    assert [f"{rate.lr(8 * step):.6E}" for step in (1, 2)] == ["6.000000E-04", "1.200000E-03"]


def test_a_warm_up_by_fraction_is_of_the_decay() -> None:
    rate, decay = build_schedules(
        _config(
            {"global_batch_size": 6, "train_iters": 24},
            {"lr_warmup_fraction": 0.1, "lr_decay_iters": 40, "lr_warmup_iters": 0},
            {"lr": 2e-3},
        )
    )
    assert (rate.warmup_steps, rate.decay_steps, decay.incr_steps) == (24.0, 240, 144)
    assert rate.lr(6) == 5e-4


def test_a_run_by_samples_takes_the_flags_in_samples() -> None:
    rate, decay = build_schedules(
        _config(
            {"global_batch_size": 12, "train_samples": 240, "rampup_batch_size": (4, 4, 60)},
            {
                "lr_decay_style": "WSD",
                "lr_wsd_decay_style": "linear",
                "lr_wsd_decay_samples": 80,
                "lr_warmup_samples": 24,
                "min_lr": 1e-4,
            },
            {"lr": 2e-3},
        )
    )
    assert (rate.warmup_steps, rate.decay_steps, rate.wsd_decay_steps, decay.incr_steps) == (24, 240, 80, 240)
    assert f"{rate.lr(4):.6E}" == "3.333333E-04"


def test_the_number_of_iterations_may_come_from_elsewhere() -> None:
    cfg = _config({"global_batch_size": 8}, {})
    assert build_schedules(cfg, train_iters=10)[0].decay_steps == 80
    with pytest.raises(UsageError, match="--train-iters nor --train-samples"):
        build_schedules(cfg)


def _saved(**changes: Any) -> dict[str, Any]:
    scheduler = Scheduler(_rate(**changes), _CONSTANT_WD)
    scheduler.advance(96)
    return scheduler.state_dict()


def test_the_state_is_megatrons(megatron: Any) -> None:
    reference = _theirs(megatron, _rate(), _CONSTANT_WD, _groups())
    reference.step(96)
    assert _saved() == reference.state_dict()


def test_an_equal_schedule_goes_on_where_it_was() -> None:
    scheduler = Scheduler(_rate(), _CONSTANT_WD)
    scheduler.load_state_dict(_saved())
    assert scheduler.num_steps == 96
    assert scheduler.learning_rate == _rate()


def test_a_contradiction_names_both_values_and_both_flags() -> None:
    scheduler = Scheduler(_rate(max_lr=1e-3), _CONSTANT_WD)
    with pytest.raises(TesselError) as error:
        scheduler.load_state_dict(_saved())
    for part in ("--lr", "0.001", "0.003", "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"):
        assert part in str(error.value)
    assert scheduler.num_steps == 0


@pytest.mark.parametrize("override", [True, False])
def test_the_flags_choose_a_side_as_in_megatron(megatron: Any, override: bool) -> None:
    mine = _rate("linear", max_lr=1e-3, min_lr=1e-5, warmup_steps=16, decay_steps=800)
    decay = WeightDecaySchedule(0.2, 0.2, 800)
    theirs, ours = _groups(), _groups()
    reference = _theirs(
        megatron,
        mine,
        decay,
        theirs,
        override_opt_param_scheduler=override,
        use_checkpoint_opt_param_scheduler=not override,
    )
    scheduler = Scheduler(mine, decay, override=override, use_checkpoint=not override)
    reference.load_state_dict(dict(_saved()))
    scheduler.load_state_dict(_saved())
    for _ in range(50):
        scheduler.advance(8)
        reference.step(8)
        scheduler.apply(ours)
        assert [(g["lr"], g["weight_decay"]) for g in ours] == [(g["lr"], g["weight_decay"]) for g in theirs]
    assert scheduler.learning_rate.max_lr == (1e-3 if override else 3e-3)


def test_both_flags_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="contradict each other"):
        Scheduler(_rate(), _CONSTANT_WD, override=True, use_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "square"}, "--lr-decay-style square"),
        ({"min_lr": 0.5}, "--min-lr 0.5 must lie between 0 and --lr 0.003"),
        ({"init_lr": 0.5}, "--lr-warmup-init 0.5"),
        ({"decay_steps": 0}, "decays over 0 samples"),
        ({"warmup_steps": 400}, "warm-up takes 400 samples"),
        ({"style": "WSD", "wsd_decay_steps": None}, "--lr-wsd-decay-iters"),
        ({"style": "WSD", "wsd_decay_steps": 9, "wsd_style": "odd"}, "--lr-wsd-decay-style odd"),
    ],
)
def test_values_that_make_no_curve_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(_rate(), **changes)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"lr": None}, "--lr is not given"),
        ({"weight_decay_incr_style": "linear", "start_weight_decay": 0.1}, "needs both"),
        ({"start_weight_decay": 0.05}, "need --weight-decay-incr-style"),
        (
            {"weight_decay_incr_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "can only grow",
        ),
    ],
)
def test_optimizer_flags_that_make_no_curve_are_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_schedules(_config({"train_iters": 10}, {}, optimizer))


def test_weight_decay_values_that_make_no_curve_are_refused() -> None:
    with pytest.raises(UsageError, match="--weight-decay-incr-style odd"):
        WeightDecaySchedule(0.1, 0.2, 10, "odd")
    with pytest.raises(UsageError, match="choose linear or cosine"):
        WeightDecaySchedule(0.1, 0.2, 10, "constant")

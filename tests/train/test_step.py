"""One optimizer step: which positions the model sees, and fp16 sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tessel.config.run import Optimizer
from tessel.data.loader import MicroBatch
from tessel.model.transformer import Transformer
from tessel.parallel.peers import Peers
from tessel.parallel.runner import PlainRunner
from tessel.train.gradients import Gradients
from tessel.train.optimizer import build_optimizer, parameter_groups
from tessel.train.scaler import ConstantScaler, DynamicScaler
from tessel.train.step import TrainStep, evaluation_sums
from tests.train.tiny import CONFIG, build_model


def build_step(model: Transformer, **options: object) -> TrainStep:
    optimizer_config = Optimizer(lr=1e-3)
    groups = parameter_groups(model.named_parameters(), CONFIG, optimizer_config)
    defaults = {
        "scaler": None,
        "clip_grad": 0.0,
        "per_token_loss": False,
        "z_loss_coeff": 0.0,
        "count_zeros": False,
        "skip_not_finite": False,
    }
    optimizer = build_optimizer(groups, optimizer_config)
    gradients = Gradients(dict(model.named_parameters()))
    return TrainStep(PlainRunner(model), optimizer, gradients, Peers(), **(defaults | options))  # type: ignore[arg-type]


def micro_batch(positions_S: Tensor, segments_S: Tensor | None = None, mask: float = 1.0) -> MicroBatch:
    tokens_BS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(3))
    return MicroBatch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, 1),
        loss_mask_BS=torch.full((2, 16), mask),
        positions_BS=positions_S.expand(2, 16),
        segments_BS=None if segments_S is None else segments_S.expand(2, 16),
    )


RESET = torch.cat([torch.arange(6), torch.arange(10)])
PLAIN = torch.arange(16)
SEGMENTS = (torch.arange(16) >= 6).int()


def test_reset_positions_alone_leave_rope_as_it_is() -> None:
    model = build_model()
    plain, reset = micro_batch(PLAIN), micro_batch(RESET)
    assert evaluation_sums(PlainRunner(model), [reset]) == evaluation_sums(PlainRunner(model), [plain])
    expected = build_step(build_model())([plain])
    assert build_step(model)([reset]) == expected


def test_a_segment_cannot_tell_where_its_positions_start() -> None:
    model = build_model()
    plain, reset = (evaluation_sums(PlainRunner(model), [micro_batch(p, SEGMENTS)])[0] for p in (PLAIN, RESET))
    assert reset == pytest.approx(plain, rel=1e-6)
    assert abs(reset - evaluation_sums(PlainRunner(model), [micro_batch(PLAIN)])[0]) > 1e-3


@pytest.mark.parametrize(("per_token_loss", "skipped"), [(True, True), (False, False)])
def test_fp16_sums_of_the_loss_per_token_overflow_before_they_are_divided(per_token_loss: bool, skipped: bool) -> None:
    """Megatron divides by the number of tokens after the backward pass, so the largest loss scale is smaller."""
    batches = [micro_batch(PLAIN), micro_batch(RESET)]
    model = build_model()
    result = build_step(model)(batches)
    assert result.grad_norm is not None and not result.skipped
    # Twice the largest mean gradient fits below the bound; the sum over 64 tokens does not.
    options = {"per_token_loss": per_token_loss, "largest_gradient": 2 * result.grad_norm * 2**10}
    scaled = build_step(build_model(), scaler=DynamicScaler(2.0**10), **options)(batches)
    assert scaled.skipped == skipped


def test_a_loss_scale_leaves_no_trace_in_the_gradient() -> None:
    batches = [micro_batch(PLAIN), micro_batch(RESET, SEGMENTS)]
    for per_token_loss in (True, False):
        plain_model, scaled_model = build_model(), build_model()
        plain = build_step(plain_model, per_token_loss=per_token_loss)(batches)
        step = build_step(scaled_model, per_token_loss=per_token_loss, scaler=ConstantScaler(2.0**10))
        scaled = step(batches)
        assert scaled.loss == pytest.approx(plain.loss, rel=1e-6)
        assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)


@pytest.mark.parametrize(("skip_not_finite", "skipped"), [(True, True), (False, False)])
def test_an_overflow_under_a_fixed_loss_scale_stops_unless_told_to_skip(skip_not_finite: bool, skipped: bool) -> None:
    """As in Megatron, where only the dynamic scale turns the check off: a fixed one would overflow for ever."""
    step = build_step(
        build_model(), scaler=ConstantScaler(2.0**10), largest_gradient=1.0, skip_not_finite=skip_not_finite
    )
    result = step([micro_batch(PLAIN)])
    assert result.skipped == skipped
    assert result.is_finite == skipped
    assert result.grad_norm == (None if skipped else math.inf)


def test_a_loss_that_is_not_finite_lowers_the_loss_scale_where_it_is_skipped() -> None:
    model = build_model()
    with torch.no_grad():
        model.head_weight[0, 0] = math.inf
    scaler = DynamicScaler(initial_scale=8.0, hysteresis=1)
    result = build_step(model, scaler=scaler, skip_not_finite=True)([micro_batch(PLAIN)])
    assert result.skipped
    assert not math.isfinite(result.loss)
    assert scaler.scale == 4.0

"""Loss scales for fp16 gradients, by Megatron-LM's rules. State is plain numbers."""

from __future__ import annotations

from typing import Protocol

from tessel.config.run import Precision
from tessel.errors import UsageError


class GradScaler(Protocol):
    """What the loss is multiplied by before the backward pass, and gradients divided by after it."""

    scale: float

    @property
    def inverse_scale(self) -> float:
        """What gradients are multiplied by."""

    def update(self, found_inf: bool) -> None:
        """Take note of one iteration: whether any gradient was infinite or NaN."""

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""


class ConstantScaler:
    """A scale that never changes: an overflow stops the run (--no-check-for-nan-in-loss-and-grad: is skipped)."""

    def __init__(self, scale: float) -> None:
        if not scale > 0:
            raise UsageError(f"--loss-scale {scale} must be positive.")
        self.scale = float(scale)

    @property
    def inverse_scale(self) -> float:
        """What gradients are multiplied by."""
        return 1.0 / self.scale

    def update(self, found_inf: bool) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, float]:
        """Nothing is kept: the scale comes from the command line."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing is taken."""


class DynamicScaler:
    """A scale that backs off on overflow and grows when there has been none for a while.

    After `hysteresis` overflows the scale is multiplied by `backoff_factor` on that and every further
    overflow, down to `min_scale`. After `growth_interval` clean iterations in a row it is multiplied by
    `growth_factor`, and the count of `hysteresis` starts anew (clean iterations alone do not reset it).

    Raises:
        UsageError: a value out of its range.
    """

    def __init__(
        self,
        initial_scale: float = 2.0**32,
        min_scale: float = 1.0,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
    ) -> None:
        if not 0.0 < min_scale <= initial_scale:
            raise UsageError(
                f"--min-loss-scale {min_scale} must be positive and not exceed --initial-loss-scale {initial_scale}."
            )
        if growth_interval <= 0 or hysteresis <= 0:
            raise UsageError(
                f"--loss-scale-window {growth_interval} and --hysteresis {hysteresis} must both be positive."
            )
        self.scale = float(initial_scale)
        self.min_scale = float(min_scale)
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self._num_clean = 0
        self._overflows_left = hysteresis

    @property
    def inverse_scale(self) -> float:
        """What gradients are multiplied by."""
        return 1.0 / self.scale

    def update(self, found_inf: bool) -> None:
        """Take note of one iteration: whether any gradient was infinite or NaN."""
        if found_inf:
            self._num_clean = 0
            self._overflows_left -= 1
            if self._overflows_left <= 0:
                self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            return
        self._num_clean += 1
        if self._num_clean == self.growth_interval:
            self._num_clean = 0
            self._overflows_left = self.hysteresis
            self.scale *= self.growth_factor

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers, under Megatron's keys."""
        return {
            "scale": self.scale,
            "growth_tracker": self._num_clean,
            "hysteresis_tracker": self._overflows_left,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self.scale = float(state["scale"])
        self._num_clean = int(state["growth_tracker"])
        self._overflows_left = int(state["hysteresis_tracker"])


def build_scaler(precision: Precision) -> GradScaler | None:
    """--loss-scale with --fp16 or --bf16: constant; --fp16 without it: dynamic; otherwise none (logged as 1.0)."""
    if not (precision.fp16 or precision.bf16):
        return None
    if precision.loss_scale:
        return ConstantScaler(precision.loss_scale)
    if not precision.fp16:
        return None
    return DynamicScaler(
        precision.initial_loss_scale, precision.min_loss_scale, precision.loss_scale_window, precision.hysteresis
    )

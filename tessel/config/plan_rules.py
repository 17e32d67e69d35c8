"""The static rules of `tessel plan`."""

from __future__ import annotations

import re

from tessel.config.schema import flag_of, options, read
from tessel.config.verbs import PlanConfig
from tessel.errors import UsageError

_DEVICES = re.compile(r"(\d+)\s*[x*]\s*(\d+(?:\.\d+)?)\s*(?:g|gb|gib)", re.IGNORECASE)


def devices_of(text: str) -> tuple[int, float]:
    """(number of devices, GiB of each) of a text such as `8x80GB`. Makers' GB of device memory are GiB.

    Raises:
        UsageError: it is no such text.
    """
    found = _DEVICES.fullmatch(text.strip())
    if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
        raise UsageError(
            f"--devices is {text!r}: it must be a number of devices and the memory of one, such as 8x80GB."
        )
    return int(found[1]), float(found[2])


def validate_plan(cfg: PlanConfig) -> PlanConfig:
    """Check the flags of `tessel plan` by themselves.

    Raises:
        UsageError: a rule is broken.
    """
    for o in options(PlanConfig):
        value = read(cfg, o)
        if o.kind is int and value is not None and value < 1:
            raise UsageError(f"{flag_of(o.name)} is {value}: it must be at least 1.")
    if cfg.fp32 and cfg.bf16:
        raise UsageError("--fp32 and --bf16 contradict each other: keep one of them.")
    if cfg.rates is not None and cfg.device_kind is not None:
        raise UsageError(
            f"--rates {cfg.rates} and --device-kind {cfg.device_kind} both say how fast devices are: keep one."
        )
    devices_of(cfg.devices)
    return cfg

"""How fast devices compute and talk: a table of known ones, and one's own from a file.

Only ratios matter for the order of layouts; for step times, measure your own and give them as a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tessel.config.nearest import nearest
from tessel.errors import UsageError


@dataclass(frozen=True)
class Rates:
    """Of one device. Links are for one direction.

    `matmul_tflops` is what large matrix products in 16 bits reach, and `half_rate_size` the smallest dimension of
    one at half of it. `attention_tflops` is of causal attention, useful operations alone, over forward and backward.
    `latency_us` is of a collective, and `hop_us` what each rank of a ring adds to it.
    """

    matmul_tflops: float
    attention_tflops: float
    memory_gb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    half_rate_size: float = 253.0
    latency_us: float = 15.0
    hop_us: float = 1.0


# H100: 798 TFLOP/s for products of 8192^3 and 640 where the smallest dimension is 1024 (so half at 253); attention
#   at 560 forward and 430 backward, head dimension 128; copies at 3.0 TB/s: bottom-up roofline of measured rates for
#   one card. H200: the same, copies at 4.3 TB/s.
# A100: peak 312 TFLOP/s, at the same share of it; 1.7 TB/s reachable of 2.0.
# 910B: 4,672 tokens/s of Llama2-7B are published as 69 % of peak by the whole-square count, so the peak is 313.
# Links: data sheets (NVLink 4: 450 GB/s a direction, NVLink 3: 300; HCCS 196; 400 and 200 Gbit/s networks), at 80 %.
KNOWN: dict[str, Rates] = {
    "H100": Rates(798, 460, 3000, 360, 40),
    "H200": Rates(798, 460, 4300, 360, 40),
    "A100": Rates(252, 150, 1700, 240, 20),
    "910B": Rates(252, 130, 1300, 156, 20),
}
_BY_MEMORY_GB = ((140, "H200"), (79, "H100"), (60, "910B"), (0, "A100"))


def known_rates(kind: str) -> Rates:
    """The rates of a device by its name, in any case.

    Raises:
        UsageError: it is not in the table.
    """
    by_name = {name.lower(): rates for name, rates in KNOWN.items()}
    if kind.lower() not in by_name:
        near = nearest(kind.lower(), by_name)
        raise UsageError(
            f"--device-kind {kind} is not known; {'nearest' if near else 'known'}: "
            f"{', '.join(name for name in KNOWN if not near or name.lower() in near)}. Give --rates FILE for others."
        )
    return by_name[kind.lower()]


def likely_kind(memory_gb: float) -> str:
    """The device of the table that has about so much memory."""
    return next(name for least_gb, name in _BY_MEMORY_GB if memory_gb >= least_gb)


def rates_from(values: Mapping[str, Any], path: str) -> Rates:
    """The rates that a file gives, by the names of the fields.

    Raises:
        UsageError: a name is unknown, missing, or its value is no number above 0.
    """
    names = {f.name for f in fields(Rates)}
    needed = {"matmul_tflops", "attention_tflops", "memory_gb_per_s", "node_gb_per_s", "network_gb_per_s"}
    unknown, missing = sorted(map(str, set(values) - names)), sorted(needed - set(values))
    if unknown or missing:
        wrong = f"unknown {', '.join(unknown)}" if unknown else f"{', '.join(missing)} missing"
        raise UsageError(f"--rates {path}: {wrong}; it holds {', '.join(f.name for f in fields(Rates))}.")
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise UsageError(f"--rates {path}: {name} is {value!r}: it must be a number above 0.")
    return Rates(**values)

"""What `tessel selftest` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option
from tessel.config.verbs import DEVICES
from tessel.errors import UsageError

PARTS = ("kernels", "collectives", "memory", "training", "speed")


@dataclass(frozen=True, kw_only=True)
class SelftestConfig:
    """What to test."""

    device: str = option("auto", "what to test", choices=DEVICES)
    parts: tuple[str, ...] = option(PARTS, "only these parts", nargs="+", choices=PARTS)
    model: str | None = option(
        None,
        "time the matrix products and the attention of this model: a Hugging Face folder, its config.json, or a name "
        "such as Qwen2.5-7B; Qwen2.5-0.5B on a CPU and Qwen2.5-7B elsewhere if not given",
        metavar="DIR|NAME",
    )
    output: str | None = option(None, "JSON to write: the report, as it can be sent to others", metavar="FILE")
    markdown: tuple[str, ...] = option(
        (), "test nothing: print docs/SUPPORT.md as it follows from these reports", nargs="+", metavar="FILE"
    )


def validate_selftest(cfg: SelftestConfig) -> SelftestConfig:
    """Check the flags of `tessel selftest` by themselves.

    Raises:
        UsageError: flags that contradict each other.
    """
    if cfg.markdown and cfg.output is not None:
        raise UsageError("--markdown prints and --output writes a report of tests: keep one of them.")
    return cfg

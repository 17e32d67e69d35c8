"""Flags of training that a suite itself sets aside beside others: tessel calls them a contradiction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tessel.drop_in.arguments import Arguments
from tessel.drop_in.flags import fields


@dataclass(frozen=True)
class Aside:
    """A flag, in any spelling, and what it does nothing beside."""

    flag: str
    is_idle: Callable[[Arguments], bool]
    reason: str


def _is_single(flag: str) -> Callable[[Arguments], bool]:
    return lambda arguments: arguments.value(flag) in (None, "1")


def _is_full(arguments: Arguments) -> bool:
    return arguments.value("--recompute-granularity") == "full"


def _is_hybrid(arguments: Arguments) -> bool:
    return (
        arguments.value("--context-parallel-algo") == "hybrid_cp_algo"
        or arguments.value("--cp-comm-type") == "a2a+p2p"
        or arguments.has("--hierarchical-context-parallel-sizes")
    )


_ASIDE = (
    Aside("--sequence-parallel", _is_single("--tensor-model-parallel-size"), "--tensor-model-parallel-size is 1"),
    Aside("--tp-comm-overlap", lambda arguments: not arguments.has("--sequence-parallel"), "no --sequence-parallel"),
    Aside("--swap-attention", _is_full, "--recompute-granularity full keeps no attention to move"),
    Aside("--recompute-method", lambda arguments: not _is_full(arguments), "no --recompute-granularity full"),
    Aside("--recompute-num-layers", lambda arguments: not _is_full(arguments), "no --recompute-granularity full"),
    Aside(
        "--is-instruction-dataset",
        lambda arguments: arguments.has("--is-pairwise-dataset"),
        "--is-pairwise-dataset says what the data is",
    ),
    Aside("--ulysses-degree-in-cp", lambda arguments: not _is_hybrid(arguments), "no hybrid_cp_algo"),
)


def set_aside(suite: str, arguments: Arguments) -> tuple[Arguments, list[str]]:
    """`arguments` without flags that do nothing in the suite either, and a remark on each."""
    del suite
    remarks = []
    for aside in _ASIDE:
        given = [flag for flag in fields("pretrain")[aside.flag].spellings if arguments.has(flag)]
        if given and aside.is_idle(arguments):
            arguments = arguments.without(*given)
            remarks.append(f"{' '.join(given)} left out, as by the suite: {aside.reason}")
    if _is_full(arguments):
        for flag, value in (("--recompute-method", "uniform"), ("--recompute-num-layers", "1")):
            if not arguments.has(flag):
                arguments = arguments.plus(flag, value)
                remarks.append(f"--recompute-granularity full without {flag}: {value}")
    return arguments, remarks

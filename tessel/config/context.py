"""Flags of context parallelism: MindSpeed's names for Megatron's, and what goes with what."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tessel.config.layout import Layout
from tessel.errors import UsageError

if TYPE_CHECKING:
    from tessel.config.run import RunConfig

# --context-parallel-algo -> --cp-comm-type
COMM_TYPES = {
    "megatron_cp_algo": "p2p",
    "ulysses_cp_algo": "a2a",
    "hybrid_cp_algo": "a2a+p2p",
    "kvallgather_cp_algo": "allgather",
}


def comm_type_of(layout: Layout) -> str | None:
    """How a sequence is shared: --cp-comm-type, or what --context-parallel-algo calls so; None if neither is given."""
    if layout.context_parallel_algo is not None:
        return COMM_TYPES[layout.context_parallel_algo]
    return layout.cp_comm_type


def resolved_context(layout: Layout) -> Layout:
    """The same with `cp_comm_type` in Megatron's words; a ring, where a sequence is shared and nothing is said."""
    default = "p2p" if layout.context_parallel_size > 1 else None
    return replace(layout, cp_comm_type=comm_type_of(layout) or default)


def check_context_parallel(cfg: RunConfig) -> None:
    """One way of sharing a sequence, and what it can do."""
    layout = cfg.layout
    cp, algo, inner = layout.context_parallel_size, layout.context_parallel_algo, layout.ulysses_degree_in_cp
    if algo is not None and layout.cp_comm_type not in (None, COMM_TYPES[algo]):
        raise UsageError(
            f"--context-parallel-algo {algo} means --cp-comm-type {COMM_TYPES[algo]}, and {layout.cp_comm_type} is "
            "given: keep one of them."
        )
    if inner is not None and comm_type_of(layout) != "a2a+p2p":
        raise UsageError(
            f"--ulysses-degree-in-cp {inner} is for --cp-comm-type a2a+p2p: add that, or leave --ulysses-degree-in-cp "
            "out."
        )
    if inner is not None and cp % inner:
        fits = ", ".join(str(n) for n in range(1, cp + 1) if cp % n == 0)
        raise UsageError(
            f"--ulysses-degree-in-cp {inner} does not divide --context-parallel-size {cp}: use one of {fits}."
        )
    if cp > 1 and cfg.model.attention_dropout > 0:
        raise UsageError(
            f"--attention-dropout is {cfg.model.attention_dropout}: attention that --context-parallel-size {cp} shares "
            "out has no dropout of its probabilities. Give --attention-dropout 0."
        )

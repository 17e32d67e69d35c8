"""What is recorded of some steps of a run: a section of a frozen dataclass, as in `run.py`.

Flags are Megatron-LM's and MindSpeed-LLM's; which steps they mean is as in MindSpeed-LLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option

ALL_RANKS = -1
LAST_STEP = -1


@dataclass(frozen=True)
class Profiling:
    """Profiling."""

    profile: bool = option(False, "record some iterations: a Chrome trace of each rank, and a table of its time")
    profile_step_start: int = option(10, "first iteration that is recorded, counted from 1; 0 is 1 too")
    profile_step_end: int = option(12, "the iteration before which recording ends; -1: it goes on to the last")
    profile_ranks: tuple[int, ...] = option((0,), "ranks that record; -1: all", nargs="+", metavar="RANK")
    profile_with_cpu: bool = option(False, "record the host's operators beside the accelerator's kernels")
    profile_with_stack: bool = option(
        False, "record where in the source each operator is called", aliases=("--pytorch-profiler-collect-callstack",)
    )
    profile_with_memory: bool = option(False, "record what each operator allocates")
    profile_record_shapes: bool = option(
        False, "record the shapes of each operator's inputs", aliases=("--pytorch-profiler-collect-shapes",)
    )
    profile_save_path: str | None = option(
        None, "where traces and tables are written; profile/ in --save, or ./profile", metavar="DIR"
    )

    @property
    def first_step(self) -> int:
        """The first iteration that is recorded, counted from 1."""
        return max(self.profile_step_start, 1)

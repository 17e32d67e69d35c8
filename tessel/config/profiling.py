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

    profile_level: str = option(
        "level0",
        "how much an NPU's profiler records: level0 is operators, level1 and level2 AI Cores' counters, too",
        choices=("level_none", "level0", "level1", "level2"),
    )
    profile_export_type: str = option("text", "what an NPU's profiler writes", choices=("text", "db"))
    profile_data_simplification: bool = option(False, "an NPU's profiler leaves no raw data behind")

    @property
    def of_one_vendor(self) -> list[str]:
        """The flags given that are for one vendor's profiler alone, as on the command line."""
        found = [] if self.profile_level == "level0" else [f"--profile-level {self.profile_level}"]
        found += [] if self.profile_export_type == "text" else [f"--profile-export-type {self.profile_export_type}"]
        return found + ["--profile-data-simplification"] * self.profile_data_simplification

    @property
    def first_step(self) -> int:
        """The first iteration that is recorded, counted from 1."""
        return max(self.profile_step_start, 1)

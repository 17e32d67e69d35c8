"""The static rules of what is recorded. As in `rules.py`, each function checks one matter."""

from __future__ import annotations

from tessel.config.profiling import ALL_RANKS, LAST_STEP
from tessel.config.run import RunConfig
from tessel.errors import UsageError


def check_profiling(cfg: RunConfig) -> None:
    """Which steps and ranks are recorded."""
    section, train_iters = cfg.profiling, cfg.batch.train_iters
    start, end = section.profile_step_start, section.profile_step_end
    if not section.profile:
        return
    if start < 0:
        raise UsageError(f"--profile-step-start is {start}: iterations count from 1.")
    if end != LAST_STEP and end <= section.first_step:
        raise UsageError(
            f"--profile-step-end {end} must be more than --profile-step-start {start}, so that one iteration at least "
            "is recorded; -1 goes on to the last."
        )
    if train_iters is not None and section.first_step > train_iters:
        raise UsageError(
            f"--profile-step-start {start} is beyond --train-iters {train_iters}: nothing would be recorded. "
            "Give --profile-step-start and --profile-step-end within the run."
        )
    wrong = [rank for rank in section.profile_ranks if rank < ALL_RANKS]
    if wrong:
        raise UsageError(f"--profile-ranks {wrong[0]} is no rank: they count from 0, and -1 means all.")

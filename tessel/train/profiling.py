"""A record of some iterations: a Chrome trace of each rank that is asked for, and a short table of its time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from tessel.config.profiling import ALL_RANKS, LAST_STEP, Profiling
from tessel.config.run import RunConfig
from tessel.errors import TesselError, UsageError
from tessel.runtime import device as devices
from tessel.runtime.log import log, warn_once
from tessel.runtime.world import World

_ITERATION = "iteration "
_NUM_OPERATORS = 10
_LONGEST_NAME = 56
# The first that fits a name counts. Names are those of torch's operators and of the libraries' kernels.
_KINDS = (
    ("communication", r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|send_?recv|broadcast|c10d::|gloo:"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("matrix products", r"^aten::(add)?(mm|bmm|mv)$|baddbmm|_grouped_mm|gemm|matmul|nvjet|cutlass|xmma"),
    ("optimizer", r"optimizer|adam|_foreach_|multi_tensor"),
    ("copies", r"copy|memcpy|memset|aten::cat$|aten::_to"),
)
_OTHER = "other operators"


@dataclass(frozen=True)
class Operator:
    """What one operator or kernel took by itself over the whole record."""

    name: str
    num_calls: int
    seconds: float
    allocated_bytes: int = 0

    @property
    def kind(self) -> str:
        """The group that it is counted in."""
        name = self.name.lower()
        return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), _OTHER)


class Profiler:
    """Records the iterations of a run that `Profiling` names, where this rank is one of those asked for."""

    def __init__(self, cfg: RunConfig, device: torch.device, world: World, done: int) -> None:
        """`done`: iterations that the run has done already.

        Raises:
            UsageError: a rank is named that the run does not have.
            TesselError: the folder for the record cannot be made.
        """
        section = cfg.profiling
        self._section = section
        self._device = device
        self._rank = world.rank
        self._profile: profile | None = None
        self._vendors: Any = None
        self._recorded: list[int] = []
        self._started_s = 0.0
        self._is_wanted = section.profile and (
            ALL_RANKS in section.profile_ranks or world.rank in section.profile_ranks
        )
        if not section.profile:
            return
        beyond = [rank for rank in section.profile_ranks if rank >= world.world_size]
        if beyond:
            raise UsageError(f"--profile-ranks {beyond[0]}: the run's ranks are 0 to {world.world_size - 1}.")
        if self._is_past(done + 1):
            warn_once(f"--profile: the run goes on with iteration {done + 1}, and those to be recorded are done")
        self._folder = _folder(cfg)
        self._vendor_profiler, why = devices.vendor_profiler(device)
        if self._vendor_profiler is None and section.of_one_vendor:
            warn_once(f"{' '.join(section.of_one_vendor)}: {why}; a Chrome trace and a table are written")
        if self._is_wanted:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TesselError(f"--profile-save-path {self._folder}: {error.strerror}.") from error
            if self._vendor_profiler is not None:
                log(f"--profile: {why}, under {self._folder}")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that ends within the iterations to be recorded leaves what there is; one that fails, nothing."""
        if self._is_recording:
            self._stop(is_kept=error is None)

    @contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """Around iteration `number`, counted from 1."""
        if not self._is_wanted or number < self._section.first_step or self._is_past(number):
            yield
            return
        if not self._is_recording:
            self._start()
        with record_function(f"{_ITERATION}{number}"):
            yield
        self._recorded.append(number)
        if self._is_past(number + 1):
            self._stop(is_kept=True)

    @property
    def _is_recording(self) -> bool:
        return self._profile is not None or self._vendors is not None

    def _is_past(self, number: int) -> bool:
        end = self._section.profile_step_end
        return end != LAST_STEP and number >= end

    def _start(self) -> None:
        section = self._section
        devices.synchronize(self._device)
        if self._vendor_profiler is not None:
            self._vendors = self._vendor_profiler(
                self._folder,
                f"rank-{self._rank}",
                level=section.profile_level,
                export_type=section.profile_export_type,
                data_simplification=section.profile_data_simplification,
                with_cpu=section.profile_with_cpu,
                with_stack=section.profile_with_stack,
                with_memory=section.profile_with_memory,
                record_shapes=section.profile_record_shapes,
            )
            self._vendors.start()
            return
        self._profile = profile(
            activities=_activities(section, self._device),
            record_shapes=section.profile_record_shapes,
            profile_memory=section.profile_with_memory,
            with_stack=section.profile_with_stack,
        )
        self._profile.start()
        self._started_s = time.perf_counter()

    def _stop(self, *, is_kept: bool) -> None:
        recorded, self._profile = self._profile, None
        vendors, self._vendors = self._vendors, None
        devices.synchronize(self._device)
        if recorded is None:
            vendors.stop(is_kept=is_kept)
            return
        seconds = time.perf_counter() - self._started_s
        recorded.stop()
        if is_kept and self._recorded:
            self._write(recorded, seconds)

    def _write(self, recorded: profile, seconds: float) -> None:
        first, last = self._recorded[0], self._recorded[-1]
        path = self._folder / f"rank-{self._rank}-iterations-{first}-{last}.json.gz"
        title = f"profile of rank {self._rank}, iterations {first} to {last}"
        lines = [f"{title}: {path}", *table(operators(recorded), seconds, len(self._recorded))]
        self._recorded = []
        try:
            recorded.export_chrome_trace(str(path))
            path.with_name(path.name.replace(".json.gz", ".txt")).write_text("\n".join(lines) + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:
            warn_once(f"{title} could not be written to {path}: {error}")
        for line in lines:
            log(line)


def _folder(cfg: RunConfig) -> Path:
    if cfg.profiling.profile_save_path is not None:
        return Path(cfg.profiling.profile_save_path)
    return Path(cfg.checkpoint.save or ".") / "profile"


def _activities(section: Profiling, device: torch.device) -> list[ProfilerActivity]:
    """The accelerator's kernels, and the host's operators where they are asked for, or where there is nothing else."""
    found = [] if device.type == "cpu" else [a for a in supported_activities() if a != ProfilerActivity.CPU]
    if device.type != "cpu" and not found:
        warn_once(
            f"--profile: torch.profiler does not see {devices.KINDS[device.type]} kernels here; the host's part follows"
        )
    return [*found, ProfilerActivity.CPU] if section.profile_with_cpu or not found else found


def operators(recorded: profile) -> list[Operator]:
    """What was recorded, by name, the longest first: kernels if there are any, else the host's operators."""
    averages = [average for average in recorded.key_averages() if not average.key.startswith(_ITERATION)]
    kernels = [a for a in averages if a.device_type != DeviceType.CPU and not a.is_user_annotation]
    if kernels:
        rows = [Operator(a.key, a.count, a.self_device_time_total / 1e6, a.self_device_memory_usage) for a in kernels]
    else:
        rows = [Operator(a.key, a.count, a.self_cpu_time_total / 1e6, a.self_cpu_memory_usage) for a in averages]
    return sorted(rows, key=lambda row: -row.seconds)


def table(rows: Sequence[Operator], seconds: float, num_iterations: int) -> list[str]:
    """Where the time of `num_iterations` iterations went, which took `seconds`: by kind, then the longest operators."""
    kinds: dict[str, tuple[float, int]] = {}
    for row in rows:
        spent, calls = kinds.get(row.kind, (0.0, 0))
        kinds[row.kind] = (spent + row.seconds, calls + row.num_calls)
    # Kernels of several streams run at a time, so that their sum may be more than what went by.
    rest = max(seconds - sum(row.seconds for row in rows), 0.0)
    is_memory_known = any(row.allocated_bytes for row in rows)

    def line(name: str, spent: float, calls: int | None, allocated_bytes: int | None = None) -> str:
        short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
        text = f"  {short:<{_LONGEST_NAME}} {spent * 1e3 / num_iterations:10.3f} {spent / seconds:7.1%}"
        text += f" {calls / num_iterations:10.1f}" if calls is not None else " " * 11
        if is_memory_known:
            text += " " * 12 if allocated_bytes is None else f" {allocated_bytes / 2**20 / num_iterations:12.3f}"
        return text.rstrip()

    head = f"  {'':<{_LONGEST_NAME}} {'ms':>10} {'share':>7} {'calls':>10}" + (
        f" {'MiB':>12}" if is_memory_known else ""
    )
    ordered = sorted(kinds.items(), key=lambda item: -item[1][0])
    return [
        head + "  of one iteration",
        *(line(kind, spent, calls) for kind, (spent, calls) in ordered),
        line("outside of them", rest, None),
        line("all", seconds, None),
        *(line(row.name, row.seconds, row.num_calls, row.allocated_bytes) for row in rows[:_NUM_OPERATORS]),
    ]

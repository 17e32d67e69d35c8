"""Host memory that this process holds; and what to say when memory of any kind has run out."""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tessel.errors import TesselError

_SAMPLE_INTERVAL_S = 0.05
# What torch and the vendors' runtimes write, each in exceptions of its own.
_SHORTAGE = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


@contextmanager
def shortage_named(doing: str, remedy: str) -> Iterator[None]:
    """Memory that runs out inside, on a device or the host, is an error that says when, how much, and what helps.

    Raises:
        TesselError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not _SHORTAGE.search(told):
            raise
        raise TesselError(f"Memory ran out {doing} ({told or 'no more is known'}). {remedy}") from error


def resident_bytes() -> int:
    """Private memory of this process now: RssAnon + RssShmem.

    File-backed pages don't count: a memory-mapped checkpoint can be dropped at any time. Where the
    system does not tell (outside Linux), the peak resident set.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    kibibytes = 0
    for line in status.read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kibibytes += int(line.split()[1])
    return kibibytes * 1024


class PeakSampler:
    """The largest `resident_bytes` since the last reset, sampled by a thread that dies with the process.

    Linux keeps a high-water mark only of the whole resident set, file-backed pages included, so
    the private part has to be sampled. One sample takes tens of microseconds.
    """

    def __init__(self) -> None:
        self._peak_bytes = 0
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        self._peak_bytes = resident_bytes()
        if self._thread is None:
            self._thread = threading.Thread(target=self._sample, name="memory sampler", daemon=True)
            self._thread.start()

    def peak_bytes(self) -> int:
        self._peak_bytes = max(self._peak_bytes, resident_bytes())
        return self._peak_bytes

    def _sample(self) -> None:
        while True:
            time.sleep(_SAMPLE_INTERVAL_S)
            self.peak_bytes()

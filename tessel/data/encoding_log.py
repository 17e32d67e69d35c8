"""What preprocessing says while it works, and of the rows that it leaves out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tessel.data.encoding import Encoded
from tessel.runtime.log import Progress, log, progress, voice

# So many rows are named; all are counted.
_NAMED_ROWS = 20


class EncodingLog:
    """Progress in bytes of the input, with tokens a second; rows that were passed over, with their number."""

    def __init__(self, bar: Progress, log_interval: int | None) -> None:
        self._bar = bar
        self._log_interval = log_interval
        self._start_s = time.monotonic()
        self._num_documents = 0
        self._num_tokens = 0
        self._num_bytes = 0
        self._num_skipped = 0
        self._num_noted = 0

    def advance(self, num_bytes: int, encoded: Sequence[Encoded]) -> None:
        """A block of so many bytes of the input is done."""
        before = self._num_documents
        self._num_bytes += num_bytes
        self._num_documents += len(encoded[0].sequences_per_document)
        self._num_tokens += sum(len(part.tokens) for part in encoded)
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        speed = f"{self._num_tokens / elapsed_s:,.0f} tokens/s"
        self._bar.advance(num_bytes, speed)
        every = self._log_interval
        if every is not None and self._num_documents // every > before // every and voice.is_heard:
            print(
                f"{self._num_documents // every * every:,} documents: {self._num_documents / elapsed_s:,.0f} "
                f"documents/s, {speed}, {self._num_bytes / elapsed_s / 1e6:,.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def skip(self, where: str, reason: str) -> None:
        """A row was passed over."""
        self._num_skipped += 1
        if self._num_skipped <= _NAMED_ROWS:
            log(f"skipped {where}: {reason}")

    def note(self, where: str, reason: str) -> None:
        """A row was left out or changed by the rules of its format."""
        self._num_noted += 1
        if self._num_noted <= _NAMED_ROWS:
            log(f"{where}: {reason}")

    def end(self, num_long: int) -> None:
        """All is done; `num_long` samples were left out for their length."""
        for number, what in ((self._num_skipped, "skipped"), (self._num_noted, "left out or changed")):
            if number:
                more = f" ({number - _NAMED_ROWS:,} of them not named)" if number > _NAMED_ROWS else ""
                log(f"{number:,} rows were {what}{more}")
        if num_long:
            log(f"{num_long:,} were left out, being longer than --seq-length allows")


@contextmanager
def encoding_log(total_bytes: int, log_interval: int | None) -> Iterator[EncodingLog]:
    """Show progress: a bar on a terminal, otherwise sparse lines; with `log_interval`, a line for so many documents."""
    with progress("tokenizing (bytes)", total_bytes) as bar:
        yield EncodingLog(bar, log_interval)

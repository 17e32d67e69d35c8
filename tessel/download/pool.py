"""Many files at once, with one progress display; a failure of one leaves the others going."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tessel.download.checksums import Digest
from tessel.download.http import Refused
from tessel.download.record import Record
from tessel.download.remote import Listing, RemoteFile, inside, named
from tessel.download.transfer import INCOMPLETE, Line, Retries, fetch
from tessel.errors import TesselError
from tessel.runtime.files import is_disk_full
from tessel.runtime.log import progress

_JOIN_S = 1.0
_Outcome = tuple[RemoteFile, Digest | BaseException]


def fetch_all(
    listing: Listing, files: Sequence[RemoteFile], folder: Path, record: Record, workers: int, retries: Retries
) -> None:
    """Bring `files` into `folder`, and each one into the record as soon as it is whole.

    Ctrl-C leaves what came, to be continued.

    Raises:
        TesselError: some could not be had (which, and why), or the disk is full.
    """
    total_bytes = sum(file.expected.size or 0 for file in files)
    stop, waiting, outcomes = threading.Event(), queue.SimpleQueue[RemoteFile](), queue.SimpleQueue[_Outcome]()
    for file in sorted(files, key=lambda file: -(file.expected.size or 0)):
        waiting.put(_continued(file, folder, record))
    # Before the first byte: what a killed process leaves is only continued where the record says what it is.
    record.save()
    failed: dict[str, BaseException] = {}
    with progress("downloading (MB)", total_bytes / 1e6 if total_bytes else None) as display:
        lock = threading.Lock()

        def advance(num_bytes: int) -> None:
            with lock:
                display.advance(num_bytes / 1e6)

        def work() -> None:
            while not stop.is_set():
                try:
                    file = waiting.get_nowait()
                except queue.Empty:
                    return
                line = Line(listing.headers, stop, advance, partial(record.remember, file.path), retries)
                try:
                    outcomes.put((file, fetch(file, inside(folder, file.path, file.source), line)))
                except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                    outcomes.put((file, error))

        # Daemons: a read that hangs must not keep the program from ending at Ctrl-C.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(files)))]
        for thread in threads:
            thread.start()
        try:
            for _ in files:
                file, outcome = outcomes.get()
                if isinstance(outcome, Digest):
                    record.finish(file.path, outcome, file.source, _checked(file))
                    continue
                failed[file.path] = outcome
                if not isinstance(outcome, TesselError) or is_disk_full(outcome):
                    raise outcome
        finally:
            stop.set()
            deadline_s = time.monotonic() + _JOIN_S
            for thread in threads:
                thread.join(max(0.0, deadline_s - time.monotonic()))
            record.save()
    if failed:
        raise TesselError(_failures(listing, failed, len(files)))


def _continued(file: RemoteFile, folder: Path, record: Record) -> RemoteFile:
    """Note that `file` is wanted. Half of another version, or of unknown origin, is put away first."""
    incomplete = inside(folder, file.path + INCOMPLETE, file.source)
    known = record.get(file.path)
    if record.continues(file):
        file = replace(file, validator=known.validator if known is not None else None)
    else:
        incomplete.unlink(missing_ok=True)
    record.plan(file)
    return file


def _checked(file: RemoteFile) -> str:
    """Against what a file was found right."""
    expected = file.expected
    if expected.sha256 is not None:
        return f"sha256 of {expected.sha256_says or expected.says}"
    if expected.git_sha1 is not None:
        return f"git hash of {expected.says}"
    return f"size of {expected.says}" if expected.size is not None else "nothing"


def _failures(listing: Listing, failed: dict[str, BaseException], num_files: int) -> str:
    texts: dict[str, list[str]] = {}
    for path, error in sorted(failed.items()):
        text = (listing.refused(error.status) if isinstance(error, Refused) else None) or str(error)
        texts.setdefault(text, []).append(path)
    lines = [
        text if num_files == 1 or text.startswith((f"{paths[0]}:", f"{paths[0]} ")) else f"{named(paths)}: {text}"
        for text, paths in texts.items()
    ]
    if num_files > 1:
        others = "" if len(failed) == num_files else " The others did; run the same command again for these."
        lines.append(f"{len(failed)} of {num_files} files did not come.{others}")
    return "\n".join(lines)

"""The folder that a conversion writes in until it is whole: a killed one leaves it, and the next one goes on there.

It lies beside the destination as `.NAME.converting`. Its journal says which conversion it is of, and the
sha256 of each file that was finished. A file is written under another name and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any

from tessel.checkpoint.stored import PlannedFile
from tessel.convert.plan import size_of
from tessel.errors import TesselError
from tessel.runtime.files import disk_errors, publish_folder, require_free
from tessel.runtime.log import progress

MANIFEST = "MANIFEST.json"
_JOURNAL = "JOURNAL"


class Work:
    """The unfinished folder of a conversion to `save`. Use `begin`."""

    def __init__(self, folder: Path, journal: IO[str], done: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.files = done
        self.num_kept = 0
        self._journal = journal

    def write(self, planned: list[PlannedFile], workers: int) -> None:
        """Write what is not there yet, `workers` files at a time.

        Raises:
            TesselError: the disk is full, or a source is damaged.
        """
        left = [file for file in planned if not self._is_done(file)]
        self.num_kept = len(planned) - len(left)
        num_bytes = sum(size_of(file) for file in left)
        require_free(self.folder.parent, num_bytes, "the result")
        with progress("writing", num_bytes) as bar, ThreadPoolExecutor(workers) as writers:
            if workers == 1:
                for file in left:
                    self._note(file, self._write(file))
                    bar.advance(size_of(file))
                return
            futures = {writers.submit(self._write, file): file for file in left}
            try:
                for done in as_completed(futures):
                    self._note(futures[done], done.result())
                    bar.advance(size_of(futures[done]))
            except BaseException:
                writers.shutdown(wait=True, cancel_futures=True)
                raise

    def write_texts(self, texts: dict[str, bytes]) -> None:
        """Write the small files, which need no journal."""
        for name, content in texts.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.files[name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}

    def _is_done(self, file: PlannedFile) -> bool:
        """Whether an earlier start finished the file, and it is still what it was."""
        path, noted = self.folder / file.name, self.files.get(file.name)
        if noted is None or not path.is_file() or path.stat().st_size != noted["bytes"]:
            return False
        return digest_of(path) == noted["sha256"]

    def _write(self, file: PlannedFile) -> str:
        path = self.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.writing")
        digest = file.write(unfinished)
        unfinished.rename(path)
        return digest

    def _note(self, file: PlannedFile, digest: str) -> None:
        self.files[file.name] = {"bytes": (self.folder / file.name).stat().st_size, "sha256": digest}
        self._journal.write(json.dumps({"name": file.name, **self.files[file.name]}) + "\n")
        self._journal.flush()

    def publish(self, manifest: dict[str, Any], save: Path) -> None:
        """Write the manifest and make the folder `save`, whole; what was there is replaced."""
        names = {Path(name) for name in self.files}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            # Left over by a start that was killed in the middle of a file.
            if path.is_file() and path.relative_to(self.folder) not in names:
                path.unlink()
        files = dict(sorted(self.files.items()))
        text = json.dumps({**manifest, "files": files}, indent=1, ensure_ascii=False)
        (self.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        publish_folder(self.folder, save)


@contextmanager
def begin(save: Path, identity: str) -> Iterator[Work]:
    """The work folder of a conversion: that of an earlier start of the same one, or a new one.

    After an error of this conversion, such as a full disk, it is removed; a start that is killed or
    interrupted leaves it for the next.

    Raises:
        TesselError: another process is writing there, or the disk is full.
    """
    folder = save.absolute().parent / f".{save.absolute().name}.converting"
    with disk_errors(save):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise TesselError(f"{folder.parent} takes no folders, so --save {save} cannot be there.") from error
        with open(folder / _JOURNAL, "a+", encoding="utf-8") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TesselError(
                    f"Another process is converting to {save}: wait for it, or choose another."
                ) from error
            done = _done_before(journal, identity)
            if done is None:
                _clear(folder)
                journal.seek(0)
                journal.truncate()
                journal.write(json.dumps({"identity": identity}) + "\n")
                journal.flush()
            try:
                yield Work(folder, journal, done or {})
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise


def _done_before(journal: IO[str], identity: str) -> dict[str, dict[str, Any]] | None:
    """What an earlier start of the same conversion finished; None if there was none."""
    journal.seek(0)
    done: dict[str, dict[str, Any]] = {}
    first = True
    for line in journal:
        try:
            entry = json.loads(line)
            if first and entry["identity"] != identity:
                return None
            if not first:
                done[entry["name"]] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
        except (ValueError, KeyError, TypeError):
            return None if first else done
        first = False
    return None if first else done


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == _JOURNAL:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def digest_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file_digest(file, sha256).hexdigest()

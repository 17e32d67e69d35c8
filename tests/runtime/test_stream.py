"""Files written front to back: what they hold, their hash, and disks that do not do all."""

from __future__ import annotations

import errno
import os
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from tessel.runtime import stream
from tessel.runtime.stream import Stream


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_BUFFER_BYTES", 4096)


# Of sizes below, at and above a buffer's, and more than all buffers hold.
PARTS = [bytes([number]) * size for number, size in enumerate([0, 1, 4095, 4096, 5000, 0, 70_000, 17])]


def check(path: Path, parts: list[bytes]) -> None:
    content = b"".join(parts)
    with Stream(path) as file:
        for part in parts:
            assert file.write(part) == len(part)
        assert file.tell() == len(content)
    assert path.read_bytes() == content
    assert file.digest() == sha256(content).hexdigest()


@pytest.mark.parametrize("num_more", [0, -sum(map(len, PARTS)) % 4096])  # the last buffer in part, and whole
def test_what_was_written_is_there(num_more: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from before" * 20_000)
    check(path, [*PARTS, bytes(num_more)])
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_an_empty_file(tmp_path: Path) -> None:
    with Stream(tmp_path / "file") as file:
        pass
    assert (tmp_path / "file").read_bytes() == b"" and file.digest() == sha256().hexdigest()


def test_bytes_may_change_once_they_are_given(tmp_path: Path) -> None:
    own = bytearray(b"a" * 10_000)
    with Stream(tmp_path / "file") as file:
        file.write(memoryview(own))
        own[:] = b"b" * 10_000
    assert (tmp_path / "file").read_bytes() == b"a" * 10_000


def test_file_systems_without_direct_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, written = os.open, os.write
    monkeypatch.setattr(stream, "_DIRECT", os.O_DSYNC)  # a flag that can be seen, whatever the disk does

    def refuse(path: str, flags: int, mode: int = 0) -> int:
        if flags & os.O_DSYNC == os.O_DSYNC:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(stream.os, "open", refuse)
        check(tmp_path / "at once", PARTS)

    count = [0]

    def stop(descriptor: int, data: memoryview) -> int:
        """As if the second write had to be of other sizes."""
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, data[:3000] if count[0] == 1 else data)

    monkeypatch.setattr(stream.os, "write", stop)
    monkeypatch.setattr(stream, "_DIRECT", os.O_APPEND)  # a flag that can be taken back
    check(tmp_path / "later", PARTS)
    assert count[0] > 3


def test_an_error_of_the_disk_arrives_and_nothing_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = threading.active_count()
    monkeypatch.setattr(stream.os, "write", full)
    for size in (10, 100_000):  # at the end, and before it
        with pytest.raises(OSError, match="No space left"), Stream(tmp_path / "file") as file:
            file.write(bytes(size))
    with pytest.raises(KeyError), Stream(tmp_path / "file") as file:
        file.write(bytes(100))
        raise KeyError
    assert threading.active_count() == before


def test_zipfile_writes_to_it(tmp_path: Path) -> None:
    with Stream(tmp_path / "a.zip") as file, zipfile.ZipFile(file, "w") as archive:
        for number, part in enumerate(PARTS):
            archive.writestr(str(number), part)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        assert [archive.read(str(number)) for number in range(len(PARTS))] == PARTS

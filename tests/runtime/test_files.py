"""Files appear whole or not at all; wrong paths and full disks are explained."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tessel.errors import TesselError
from tessel.runtime import files


def test_atomic_write_leaves_the_new_content_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    for text in ("first", "second"):
        with files.atomic_write(target) as temporary:
            assert temporary.parent == target.parent
            temporary.write_text(text)
        assert target.read_text() == text
    assert [entry.name for entry in target.parent.iterdir()] == ["file.json"]


def test_atomic_write_keeps_the_old_content_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ValueError, match="interrupted"), files.atomic_write(target) as temporary:
        temporary.write_text("half")
        raise ValueError("interrupted")
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_written_files_can_be_read_by_others_as_the_umask_says(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    with files.atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("x")
    with files.atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inside").write_text("x")
    (tmp_path / "plain_folder").mkdir()
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain_folder").stat().st_mode


def test_atomic_folder_replaces_a_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("a", "b"):
        with files.atomic_folder(target) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()] == ["sub/b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_atomic_folder_keeps_the_old_folder_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ValueError, match="interrupted"), files.atomic_folder(target) as temporary:
        (temporary / "new").write_text("half")
        raise ValueError("interrupted")
    assert [entry.name for entry in target.iterdir()] == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_an_error_to_read(tmp_path: Path, wrapped: bool) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(TesselError, match=r"The disk is full: writing .*file failed with .* MiB free. Free some space"):  # noqa: SIM117
        with files.atomic_write(tmp_path / "file"):
            if wrapped:
                raise RuntimeError("writer failed") from full
            raise full
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_always_full(tmp_path: Path) -> None:
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(TesselError, match="The disk is full"), files.disk_errors(tmp_path), device.open("w") as out:
        out.write("x")
        out.flush()


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("x")
    for write in (files.atomic_write, files.atomic_folder):
        with pytest.raises(TesselError, match=r"taken/new cannot be written \(.* at .*taken\)"), write(taken / "new"):
            raise AssertionError("the block must not be entered")
    with pytest.raises(TesselError, match="cannot be written .no.. Choose another"), files.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_require_writable_looks_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.require_writable(tmp_path / "not" / "yet", "--save")
    assert not (tmp_path / "not").exists()
    taken = tmp_path / "taken"
    taken.write_text("x")
    with pytest.raises(TesselError, match="--save .*taken is a file"):
        files.require_writable(taken, "--save")
    with pytest.raises(TesselError, match="--save .*taken/out lies below .*taken, which is a file"):
        files.require_writable(taken / "out", "--save")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(TesselError, match=r"--save .*out: .* cannot be written to"):
        files.require_writable(tmp_path / "out", "--save")


def test_require_free_names_what_is_lacking(tmp_path: Path) -> None:
    files.require_free(tmp_path / "not" / "yet", 1, "A checkpoint")
    with pytest.raises(TesselError, match=r"A checkpoint needs .* MiB in .*, and .* MiB are free"):
        files.require_free(tmp_path, 2**70, "A checkpoint")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("modle", r"--load: .*modle does not exist\. .* holds model.*: is it one of those\?"),
        ("modle/config.json", r"holds model.*: is it one of those\?"),
        ("entirely-else", r"holds model, tokenizer, but no entirely-else\."),
        ("empty/file", r"empty is empty\."),
    ],
)
def test_require_path_names_what_is_near(tmp_path: Path, asked: str, answer: str) -> None:
    if asked.startswith("empty"):
        (tmp_path / "empty").mkdir()
    else:
        (tmp_path / "model").mkdir()
        (tmp_path / "tokenizer").mkdir()
    with pytest.raises(TesselError, match=answer):
        files.require_path(tmp_path / asked, "--load")
    assert files.require_path(tmp_path, "--load") == tmp_path

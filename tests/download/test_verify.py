"""`tessel download --verify`: what has changed in a folder since, without the network."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.download.record import RECORD_NAME
from tests.download.conftest import Run
from tests.download.server import HTML, Hub, Repository, pointer_to

CONTENT = random.Random(4).randbytes(3_000_000)
FILES = {"config.json": b"{}", "model.safetensors": CONTENT, "sub/vocab.txt": b"vocab"}


@pytest.fixture
def folder(hub: Hub, tessel: Run, tmp_path: Path) -> Path:
    hub.repositories["acme/tiny"] = Repository(dict(FILES))
    assert tessel("acme/tiny")[0] == 0
    hub.requests.clear()
    return tmp_path / "tiny"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_untouched_folder_is_as_recorded(folder: Path, hub: Hub, tessel: Run) -> None:
    (folder / "notes.txt").write_text("mine")
    status, out, err = tessel("--verify", folder)
    assert status == 0, err
    assert out == f"{folder}: 3 files, 3.0 MB: all as recorded; 1 further files are not on record\n"
    assert not hub.requests


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: its sha256 is "),
        (
            lambda folder: (folder / "config.json").write_text("{} "),
            "config.json: it has 3 bytes and the record says 2",
        ),
        (lambda folder: (folder / "sub/vocab.txt").unlink(), "sub/vocab.txt: it is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(HTML), "model.safetensors: it is a web page"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(pointer_to(CONTENT)),
            "model.safetensors: it is a git-lfs pointer, not the file itself",
        ),
    ],
    ids=["flipped bit", "another size", "missing", "page", "pointer"],
)
def test_what_has_changed_is_named_and_the_same_download_mends_it(
    damage: Callable[[Path], object], words: str, folder: Path, hub: Hub, tessel: Run
) -> None:
    damage(folder)
    status, _, err = tessel("--verify", folder)
    assert status == 1
    assert words in err
    assert err.count("tessel: error: ") == 2
    assert "Run the same tessel download again to mend it" in err
    assert tessel("acme/tiny")[0] == 0
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert len(hub.asked("/resolve/")) == 1
    assert tessel("--verify", folder)[0] == 0


def test_a_folder_without_a_record_but_with_a_list(tessel: Run, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"aaa")
    (folder / "sub" / "b.bin").write_bytes(b"bbb")
    status, _, err = tessel("--verify", folder)
    assert status == 1
    assert f"has no {RECORD_NAME} and no SHA256SUMS, so there is nothing to check it against" in err
    lines = [
        f"{hashlib.sha256(b'aaa').hexdigest()}  a.bin",
        f"SHA256 (sub/b.bin) = {hashlib.sha256(b'bbb').hexdigest()}",
    ]
    (folder / "SHA256SUMS").write_text("# made by sha256sum\n\n" + "\n".join(lines) + "\n")
    status, out, _ = tessel("--verify", folder)
    assert status == 0
    assert "2 files, 6 bytes: all as recorded" in out
    flip(folder / "sub" / "b.bin")
    status, _, err = tessel("--verify", folder)
    assert status == 1
    assert f"sub/b.bin: its sha256 is {hashlib.sha256(b'bbc').hexdigest()} and {folder}/SHA256SUMS says" in err


def test_a_clone_without_lfs_is_recognised_without_any_record(tessel: Run, tmp_path: Path) -> None:
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "model.safetensors").write_bytes(pointer_to(CONTENT))
    status, _, err = tessel("--verify", "clone")
    assert status == 1
    assert "model.safetensors: it is a git-lfs pointer" in err


def test_a_list_that_contradicts_the_record(folder: Path, tessel: Run, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text(f"{'0' * 64}  config.json\n")
    status, _, err = tessel("--verify", folder, "--sha256sums", sums)
    assert status == 1
    assert f"config.json: {sums} says {'0' * 64} and the record of its download" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense\n", "line 1 is not one of sha256sum"),
        (f"{'0' * 64}  ../../etc/passwd\n", "would leave the folder"),
        (f"{'0' * 64}  /etc/passwd\n", "would leave the folder"),
        (f"{'0' * 64}  a\n{'1' * 64}  a\n", "gives a two different hashes"),
        ("", "lists no file"),
        ("\udcff", "cannot be read as a list"),
    ],
)
def test_lists_that_are_none(text: str, words: str, folder: Path, tessel: Run, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_bytes(text.encode(errors="surrogateescape"))
    status, _, err = tessel("--verify", folder, "--sha256sums", sums)
    assert status == 1
    assert words in err


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"[]",
        b'{"tessel_download": 2, "files": {}}',
        b'{"tessel_download": 1, "files": []}',
        b'{"tessel_download": 1, "files": {"a": {"source": "x", "size": "1"}}}',
        b'{"tessel_download": 1, "files": {"a": 3}}',
        b'{"tessel_download": 1, "files": {"../a": {"source": "x"}}}',
    ],
)
def test_a_damaged_record(content: bytes, folder: Path, tessel: Run) -> None:
    (folder / RECORD_NAME).write_bytes(content)
    for arguments in (["--verify", folder], ["acme/tiny"]):
        status, _, err = tessel(*arguments)
        assert status == 1
        assert RECORD_NAME in err
    (folder / RECORD_NAME).unlink()
    assert tessel("acme/tiny")[0] == 0
    assert json.loads((folder / RECORD_NAME).read_text())["files"]["config.json"]["checked"] == "what was there"


def test_paths_that_are_wrong(folder: Path, tessel: Run) -> None:
    for arguments, words in (
        (["--verify", f"{folder}_"], "holds tiny: is it one of those?"),
        (["--verify", folder / "config.json"], "is a file. Give the folder"),
        (["--verify", folder, "--sha256sums", "sums"], "--sha256sums: sums does not exist"),
    ):
        status, _, err = tessel(*arguments)
        assert status == 1
        assert words in err

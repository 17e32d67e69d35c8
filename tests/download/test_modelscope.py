"""Repositories of ModelScope, by its HTTP API."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tessel.download import modelscope
from tests.download.conftest import Run
from tests.download.server import HTML, Hub, Repository

NAME = "acme/tiny"
LARGE = random.Random(2).randbytes(30_000)
FILES = {"config.json": b"{}", "model.safetensors": LARGE, "a/b/c.txt": b"c", "a/d.txt": b"d", "z.txt": b"z"}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def tiny(hub: Hub) -> Repository:
    hub.repositories[NAME] = Repository(dict(FILES))
    return hub.repositories[NAME]


def test_a_model_comes_whole(tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = ["disconnect:9000"]
    status, out, err = tessel(NAME, "--source", "modelscope")
    assert status == 0, err
    assert f"{NAME} (master) from {hub.url}: 5 files" in out
    assert "checked: 5 by the sha256 of ModelScope" in out
    assert contents(tmp_path / "tiny") == FILES
    assert [each.headers.get("range") for each in hub.asked("FilePath=model.safetensors")] == [None, "bytes=9000-"]
    assert tessel("--verify", "tiny")[0] == 0


def test_a_model_with_more_files_than_a_list_holds(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelscope, "_MOST_LISTED", 6)
    assert tessel(NAME, "--source", "modelscope")[0] == 0
    assert contents(tmp_path / "tiny") == FILES
    assert len(hub.asked("repo/files")) > 1
    monkeypatch.setattr(modelscope, "_MOST_LISTED", 2)
    status, _, err = tessel(NAME, "--source", "modelscope")
    assert status == 1
    assert "ModelScope lists no more of them" in err


def test_a_dataset_comes_page_by_page(hub: Hub, tessel: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelscope, "_PAGE_SIZE", 2)
    hub.repositories[NAME] = Repository(dict(FILES), kind="dataset")
    assert tessel(NAME, "--source", "modelscope", "--repo-type", "dataset", "--local-dir", "d")[0] == 0
    assert contents(tmp_path / "d") == FILES
    assert len(hub.asked("repo/tree")) == 4


def test_a_file_that_comes_damaged_twice(tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = ["corrupt"] * 2
    status, _, err = tessel(NAME, "--source", "modelscope")
    assert status == 1
    assert "model.safetensors came damaged twice: its sha256 is" in err
    assert "and ModelScope says" in err
    assert "model.safetensors" not in contents(tmp_path / "tiny")


def test_a_token_opens_what_is_closed(tiny: Repository, hub: Hub, tessel: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.gated, hub.token = True, "ms_secret"
    status, _, err = tessel(NAME, "--source", "modelscope")
    assert status == 1
    assert "MODELSCOPE_API_TOKEN" in err
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    assert tessel(NAME, "--source", "modelscope")[0] == 0


def test_refusals_say_what_to_do(
    tiny: Repository, hub: Hub, tessel: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.repositories["acme/evil"] = Repository({"../evil": b"x"})
    hub.plain["/api/v1/models/acme/page/repo/files"] = HTML
    for arguments, words in (
        (["acme/none"], "has no model acme/none with a revision master, or hides it."),
        ([NAME, "--revision", "v9"], f"{NAME} has no revision v9 on ModelScope"),
        (["acme/evil"], "which would leave the folder"),
        (["acme/page"], "does not answer as ModelScope does"),
    ):
        status, _, err = tessel(*arguments, "--source", "modelscope")
        assert status == 1, err
        assert words in err
    status, _, err = tessel("tiny", "--source", "modelscope")
    assert status == 2
    assert "which is OWNER/NAME" in err
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    status, _, err = tessel(NAME, "--source", "modelscope")
    assert status == 1
    assert "http://127.0.0.1:9 cannot be reached" in err
    assert not list(tmp_path.iterdir())

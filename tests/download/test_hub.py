"""Repositories of the Hugging Face hub: what comes is what the hub has, through every kind of failure."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessel.download.record import RECORD_NAME
from tests.download.conftest import Run
from tests.download.server import HTML, Hub, Repository, git_sha1, pointer_to

NAME = "acme/tiny"
LARGE = random.Random(0).randbytes(50_000)
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model-00001-of-00002.safetensors": LARGE,
    "model-00002-of-00002.safetensors": LARGE[::-1],
    "tokenizer/merges.txt": b"a b\n" * 100,
    "README.md": b"<!DOCTYPE html> is how this card begins",
    "empty.txt": b"",
}
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def tiny(hub: Hub) -> Repository:
    repository = Repository(dict(FILES))
    hub.repositories[NAME] = repository
    return repository


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the record."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD_NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_repository_comes_whole_and_is_on_record(tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    status, out, err = tessel(NAME)
    assert status == 0, err
    assert contents(tmp_path / "tiny") == FILES
    assert f"{NAME} at {tiny.commit[:7]} (main) from {hub.url}: 6 files, 100.5 kB" in out
    assert "checked: 4 by the git hash of the hub, 2 by the sha256 of the hub" in out
    record = json.loads((tmp_path / "tiny" / RECORD_NAME).read_text())["files"]
    assert record.keys() == FILES.keys()
    for path, content in FILES.items():
        assert record[path]["sha256"] == hashlib.sha256(content).hexdigest()
        assert (record[path]["size"], record[path]["source"]) == (len(content), f"hf:{NAME}@{tiny.commit}")


def test_the_server_is_a_hub_to_the_hubs_own_client(tiny: Repository, hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    HfApi(endpoint=hub.url).snapshot_download(NAME, local_dir=tmp_path / "theirs", cache_dir=tmp_path / "cache")
    theirs = {name: each for name, each in contents(tmp_path / "theirs").items() if not name.startswith(".cache/")}
    assert theirs == FILES


def test_what_is_there_is_not_fetched_again(tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    assert tessel(NAME)[0] == 0
    hub.requests.clear()
    status, out, _ = tessel(NAME)
    assert status == 0
    assert "6 of them are here" in out
    assert not hub.asked("/resolve/")


def test_a_newer_version_of_the_same_size_replaces_what_was_there(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    assert tessel(NAME)[0] == 0
    tiny.files["config.json"] = FILES["config.json"].replace(b"2", b"3")
    tiny.files[FIRST] = LARGE[::-1]
    hub.requests.clear()
    assert tessel(NAME)[0] == 0
    assert contents(tmp_path / "tiny") == tiny.files
    assert len(hub.asked("/resolve/")) == 2


def test_files_of_another_tool_are_taken_over_if_they_are_right(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / FIRST).write_bytes(LARGE)
    (folder / "config.json").write_bytes(b'{"model_type": "qwen3"}')
    status, out, _ = tessel(NAME)
    assert status == 0
    assert "1 that lay there are right" in out
    assert contents(folder) == FILES
    assert not hub.asked(FIRST)
    assert len(hub.bytes_asked("config.json")) == 1


def test_include_and_exclude_choose(tiny: Repository, tessel: Run, tmp_path: Path) -> None:
    assert tessel(NAME, "--include", "*.safetensors", "tokenizer/", "--exclude", "*00002-of*")[0] == 0
    assert sorted(contents(tmp_path / "tiny")) == [FIRST, "tokenizer/merges.txt"]
    status, _, err = tessel(NAME, "--include", "config.jsn")
    assert status == 2
    assert "--include config.jsn matches none of the 6 files; there are config.json" in err
    assert tessel(NAME, "--exclude", "*")[0] == 2


def test_a_dataset_at_a_branch(hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.repositories["acme/text"] = Repository({"data/train.parquet": LARGE}, kind="dataset", branches=("main", "v2"))
    status, out, err = tessel("acme/text", "--repo-type", "dataset", "--revision", "v2", "--local-dir", "d")
    assert status == 0, err
    assert "(v2)" in out
    assert contents(tmp_path / "d") == {"data/train.parquet": LARGE}


@pytest.mark.parametrize("has_hashes", [True, False], ids=["sizes and hashes", "names alone"])
def test_a_mirror_without_a_tree(
    has_hashes: bool, tiny: Repository, tessel: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.has_tree = False
    if not has_hashes:
        monkeypatch.setattr("tests.download.server._sibling", lambda repository, path: {"rfilename": path})
    status, out, err = tessel(NAME)
    assert status == 0, err
    assert "2 by the sha256 of the hub" in out
    assert contents(tmp_path / "tiny") == FILES


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_broken_connection_is_continued(
    ranges: bool, tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.ranges = ranges
    hub.faults[FIRST] = ["disconnect:20000", "status:503"]
    assert tessel(NAME)[0] == 0
    assert contents(tmp_path / "tiny") == FILES
    on_cdn = [each.headers.get("range") for each in hub.asked("/cdn/") if FIRST in each.path]
    assert on_cdn == [None, "bytes=20000-", "bytes=20000-"]


def test_too_many_broken_connections_leave_what_came_for_the_next_command(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.faults[FIRST] = ["disconnect:10000"] * 3
    status, _, err = tessel(NAME)
    assert status == 1
    assert "the connection ended after 30,000 of 50,000 bytes" in err
    assert "run the same command again" in err
    assert "1 of 6 files did not come" in err
    there = contents(tmp_path / "tiny")
    assert there.pop(FIRST + ".incomplete") == LARGE[:30_000]
    assert there == {path: content for path, content in FILES.items() if path != FIRST}
    assert tessel("--verify", "tiny")[0] == 1

    hub.requests.clear()
    assert tessel(NAME)[0] == 0
    assert contents(tmp_path / "tiny") == FILES
    assert [each.headers.get("range") for each in hub.asked("/cdn/")] == ["bytes=30000-"]


def test_a_line_that_breaks_often_is_borne_with_as_long_as_much_comes(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    tiny.files = {FIRST: random.Random(5).randbytes(6_000_000)}
    hub.faults[FIRST] = ["disconnect:1100000"] * 5
    assert tessel(NAME)[0] == 0
    assert contents(tmp_path / "tiny") == tiny.files


def test_half_of_another_version_is_not_continued(tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.faults[FIRST] = ["disconnect:10000"] * 3
    assert tessel(NAME)[0] == 1
    tiny.files[FIRST] = LARGE[1000:] + b"x" * 1000
    hub.requests.clear()
    assert tessel(NAME)[0] == 0
    assert contents(tmp_path / "tiny")[FIRST] == tiny.files[FIRST]
    assert [each.headers.get("range") for each in hub.asked("/cdn/")] == [None]


def test_a_half_that_was_damaged_here_is_found_out_and_fetched_anew(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.faults[FIRST] = ["disconnect:10000"] * 3
    assert tessel(NAME)[0] == 1
    half = tmp_path / "tiny" / (FIRST + ".incomplete")
    half.write_bytes(b"?" + half.read_bytes()[1:])
    assert tessel(NAME)[0] == 0
    assert contents(tmp_path / "tiny") == FILES


def test_a_file_that_comes_damaged_is_fetched_once_more(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.faults[FIRST] = ["corrupt"]
    hub.faults["config.json"] = ["corrupt"]
    assert tessel(NAME)[0] == 0
    assert contents(tmp_path / "tiny") == FILES


@pytest.mark.parametrize(("path", "what"), [(FIRST, "sha256"), ("config.json", "git hash")])
def test_a_file_that_comes_damaged_twice_never_gets_its_name(
    path: str, what: str, tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.faults[path] = ["corrupt"] * 2
    status, _, err = tessel(NAME)
    assert status == 1
    assert f"{path} came damaged twice: its {what} is " in err
    assert "Nothing of it was kept" in err
    there = contents(tmp_path / "tiny")
    assert path not in there
    assert path + ".incomplete" not in there


@pytest.mark.parametrize("path", [FIRST, "config.json"])
@pytest.mark.parametrize(
    ("fault", "words"), [("html", "sends a web page, not the file"), ("pointer", "sends a git-lfs pointer")]
)
def test_a_page_or_a_pointer_instead_of_a_file_is_named(
    path: str, fault: str, words: str, tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.faults[path] = [fault] * 5
    status, _, err = tessel(NAME, "--include", path)
    assert status == 1
    assert f"{path}: " in err
    assert words in err
    assert contents(tmp_path / "tiny") == {}


def test_a_pointer_that_the_repository_itself_holds_is_named(hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository({"model.safetensors": pointer_to(LARGE), "page.json": HTML})
    status, _, err = tessel(NAME)
    assert status == 1
    assert "model.safetensors: " in err
    assert "git-lfs pointer" in err
    assert "page.json: " in err
    assert "web page" in err
    assert contents(tmp_path / "tiny") == {}


def test_another_size_than_the_hub_says_is_refused_at_once(tiny: Repository, hub: Hub, tessel: Run) -> None:
    hub.faults[FIRST] = ["other"]
    status, _, err = tessel(NAME, "--include", FIRST)
    assert status == 1
    assert "has 50,004 bytes and the hub says 50,000" in err


def test_credentials_stay_with_the_hub(
    tiny: Repository, hub: Hub, tessel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    tiny.gated = True
    tiny.gated_files = frozenset({"config.json", FIRST})
    assert tessel(NAME)[0] == 0
    assert {each.headers.get("authorization") for each in hub.asked("/resolve/")} == {"Bearer hf_secret"}
    assert {each.headers.get("authorization") for each in hub.asked("/cdn/")} == {None}


def test_refusals_say_what_to_do(tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.repositories["acme/locked"] = Repository({"a": b"a"}, gated=True)
    hub.repositories["acme/half"] = Repository({"a": b"a", "b": b"b"}, gated_files=frozenset({"a"}))
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "tiny_checkpoint").mkdir()
    for arguments, words in (
        (["acme/nothing"], f"{hub.url} has no model acme/nothing, or hides it. Check the spelling; for a dataset give"),
        (["acme/tiny_checkpont"], f"On this machine {tmp_path}/acme holds tiny_checkpoint."),
        (
            ["acme/locked"],
            f"acme/locked is gated or private: accept its terms at {hub.url}/acme/locked, and set HF_TOKEN",
        ),
        (["acme/half"], "a: acme/half is gated or private"),
        ([NAME, "--revision", "mian"], f"{NAME} has no revision mian. It has main. Give --revision"),
        ([NAME, "--repo-type", "dataset"], f"no dataset {NAME}, or hides it. Check the spelling; for a model give"),
        (["./tiny_model"], "REPO: tiny_model does not exist."),
    ):
        status, _, err = tessel(*arguments)
        assert status == 1, err
        assert words in err
    assert not (tmp_path / "nothing").exists()
    status, _, err = tessel("./acme")
    assert status == 2
    assert "REPO is acme, which is on this machine: there is nothing to fetch" in err


def test_a_folder_that_is_called_as_the_repository_is_continued(tiny: Repository, tessel: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert tessel(NAME, "--local-dir", NAME)[0] == 0
    assert contents(tmp_path / NAME) == FILES


def test_no_hub_at_all(hub: Hub, tessel: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, _, err = tessel(NAME)
    assert status == 1
    assert "http://127.0.0.1:9 cannot be reached" in err
    assert "HF_ENDPOINT" in err
    monkeypatch.setenv("HF_ENDPOINT", "127.0.0.1:9")
    status, _, err = tessel(NAME)
    assert status == 2
    assert "it must begin with https://" in err
    hub.plain["/api/models/acme/tiny"] = HTML
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    status, _, err = tessel(NAME)
    assert status == 1
    assert "does not answer as the hub does" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, err = tessel(NAME)
    assert status == 1
    assert "switched off by HF_HUB_OFFLINE" in err


@pytest.mark.parametrize("path", ["../evil.py", "/etc/evil", "a/../../evil", "a\\..\\evil"])
def test_a_repository_cannot_write_outside_of_its_folder(path: str, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository({path: b"evil", "config.json": b"{}"})
    status, _, err = tessel(NAME, "--local-dir", "deep/er")
    assert status == 1
    assert "which would leave the folder" in err
    assert not list(tmp_path.iterdir())


def test_a_list_of_hashes_is_heeded(tiny: Repository, tessel: Run, tmp_path: Path) -> None:
    listed = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items() if path != "README.md"}
    sums = tmp_path / "sums"
    sums.write_text("".join(f"{value}  ./{path}\n" for path, value in listed.items()))
    status, out, err = tessel(NAME, "--sha256sums", sums)
    assert status == 0, err
    assert f"5 files agree with {sums}; it does not list README.md" in out

    sums.write_text(f"{'0' * 64} *config.json\n")
    status, _, err = tessel(NAME, "--sha256sums", sums, "--local-dir", "other")
    assert status == 1
    assert f"and {sums} says {'0' * 64}" in err
    assert not (tmp_path / "other" / "config.json").exists()

    sums.write_text(f"{'0' * 64} *{FIRST}\n")
    status, _, err = tessel(NAME, "--sha256sums", sums, "--local-dir", "third")
    assert status == 1
    assert "speak of different versions" in err


def test_a_list_of_hashes_that_comes_with_the_repository(tiny: Repository, tessel: Run) -> None:
    tiny.files["SHA256SUMS"] = f"{'0' * 64}  {FIRST}\n".encode()
    status, _, err = tessel(NAME)
    assert status == 1
    assert f"{FIRST}: its sha256 is {hashlib.sha256(LARGE).hexdigest()} and tiny/SHA256SUMS says {'0' * 64}" in err


def test_a_full_disk(tiny: Repository, tessel: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from tessel.download import transfer

    def full(self: object, piece: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transfer._Partial, "write", full)
        status, _, err = tessel(NAME)
    assert status == 1
    assert "The disk is full: writing tiny/" in err
    assert not (tmp_path / "tiny" / FIRST).exists()
    with monkeypatch.context() as patch:
        patch.setattr("tessel.runtime.files.free_bytes", lambda path: 1000)
        status, _, err = tessel(NAME)
    assert status == 1
    assert "0 MiB are free" in err
    assert tessel(NAME)[0] == 0


def test_two_downloads_do_not_meet_in_a_folder(tiny: Repository, tessel: Run, tmp_path: Path) -> None:
    from tessel.download.record import alone

    (tmp_path / "tiny").mkdir()
    with alone(tmp_path / "tiny"):
        status, _, err = tessel(NAME)
    assert status == 1
    assert "Another tessel download is writing to tiny" in err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_an_interrupted_process_and_the_same_command_again(
    sent: signal.Signals, tiny: Repository, hub: Hub, tmp_path: Path
) -> None:
    """As a user does it: a process of its own, ended while the server is silent in the middle of a file."""
    hub.faults[FIRST] = ["stall:20000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tessel", "download", NAME, "--include", FIRST]
    # A shell lets its background jobs ignore Ctrl-C, and their children with them.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    half = tmp_path / "tiny" / (FIRST + ".incomplete")
    try:
        deadline = time.monotonic() + 60
        while not (half.exists() and half.stat().st_size == 20_000) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    if sent == signal.SIGINT:
        assert process.returncode == 130, err
        assert err.endswith("tessel: interrupted\n")
    assert half.read_bytes() == LARGE[:20_000]
    assert not (tmp_path / "tiny" / FIRST).exists()
    hub.requests.clear()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "tiny") == {FIRST: LARGE}
    assert [each.headers.get("range") for each in hub.asked("/cdn/") if FIRST in each.path] == ["bytes=20000-"]


def test_large_files_are_asked_for_in_parts(
    tiny: Repository, hub: Hub, tessel: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessel.download.http.MAX_PART_BYTES", 20_000)
    assert tessel(NAME, "--include", FIRST)[0] == 0
    assert contents(tmp_path / "tiny") == {FIRST: LARGE}
    asked = [each.headers.get("range") for each in hub.asked("/cdn/")]
    assert asked == ["bytes=0-19999", "bytes=20000-39999", "bytes=40000-"]


def test_the_servers_git_hash_is_gits() -> None:
    # `printf hello | git hash-object --stdin`
    assert git_sha1(b"hello") == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"

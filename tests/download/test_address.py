"""The address of one file: continued by ranges, checked, unpacked."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import pytest

from tessel.download.record import RECORD_NAME
from tests.download.conftest import Run
from tests.download.server import HTML, Hub, Repository, pointer_to

CONTENT = random.Random(1).randbytes(50_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(hub: Hub) -> str:
    hub.plain["/data.jsonl"] = CONTENT
    return f"{hub.url}/data.jsonl"


def test_a_file_comes_into_this_folder(url: str, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    status, out, err = tessel(url)
    assert status == 0, err
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT
    assert "not checked, since nothing says what it should be (--sha256)" in out
    entry = json.loads((tmp_path / RECORD_NAME).read_text())["files"]["data.jsonl"]
    assert (entry["size"], entry["sha256"], entry["source"]) == (50_000, SHA256, f"url:{url}")
    hub.requests.clear()
    status, out, _ = tessel(url)
    assert status == 0
    assert not hub.requests
    assert tessel("--verify", ".")[0] == 0


@pytest.mark.parametrize("given", [False, True], ids=["without --sha256", "with --sha256"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_broken_connection_is_continued(
    given: bool, ranges: bool, url: str, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.ranges = ranges
    hub.faults["data.jsonl"] = ["disconnect:20000"]
    status, _, err = tessel(url, *(["--sha256", SHA256.upper()] if given else []))
    assert status == 0, err
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT
    assert hub.bytes_asked("data.jsonl") == ["all", "bytes=20000-"]


@pytest.mark.parametrize("heeded", [True, False], ids=["If-Range heeded", "If-Range ignored"])
def test_the_next_command_continues_unless_the_file_has_changed(
    heeded: bool, url: str, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    half = tmp_path / "data.jsonl.incomplete"
    hub.conditions = heeded
    for changed in (False, True):
        hub.faults["data.jsonl"] = ["disconnect:10000"] * 3
        assert tessel(url)[0] == 1
        assert half.read_bytes() == hub.plain["/data.jsonl"][:30_000]
        if changed:
            hub.plain["/data.jsonl"] = CONTENT[::-1]
        hub.requests.clear()
        assert tessel(url)[0] == 0
        assert hub.bytes_asked("data.jsonl")[0] == "bytes=30000-"
        assert (tmp_path / "data.jsonl").read_bytes() == hub.plain["/data.jsonl"]
        (tmp_path / "data.jsonl").unlink()


def test_a_file_whose_server_tells_no_version_starts_again(url: str, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.validators["/data.jsonl"] = ""
    hub.faults["data.jsonl"] = ["disconnect:10000"] * 3
    assert tessel(url)[0] == 1
    hub.requests.clear()
    assert tessel(url)[0] == 0
    assert hub.bytes_asked("data.jsonl") == ["all"]
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT


def test_a_whole_file_that_only_lacks_its_name(url: str, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    """As after a kill between the last byte and the renaming."""
    hub.faults["data.jsonl"] = ["disconnect:10000"] * 3
    assert tessel(url)[0] == 1
    (tmp_path / "data.jsonl.incomplete").write_bytes(CONTENT)
    hub.requests.clear()
    assert tessel(url)[0] == 0
    assert hub.bytes_asked("data.jsonl") == ["bytes=50000-"]
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT


def test_an_answer_without_a_length(url: str, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.faults["data.jsonl"] = ["unsized"]
    assert tessel(url)[0] == 0
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT


def test_a_wrong_hash(url: str, tessel: Run, tmp_path: Path) -> None:
    status, _, err = tessel(url, "--sha256", "0" * 64)
    assert status == 1
    assert f"data.jsonl came damaged twice: its sha256 is {SHA256} and --sha256 says {'0' * 64}" in err
    assert [each.name for each in tmp_path.iterdir()] == [RECORD_NAME]
    status, _, err = tessel("--verify", ".")
    assert status == 1
    assert "data.jsonl: its download did not end" in err


def test_a_file_that_nothing_is_known_of_is_not_replaced(url: str, tessel: Run, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"mine")
    status, _, err = tessel(url)
    assert status == 1
    assert "is there already" in err
    assert (tmp_path / "data.jsonl").read_bytes() == b"mine"
    assert tessel(url, "--sha256", SHA256)[0] == 0
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", HTML, "sends a web page, not the file"),
        ("train.parquet", b"\n <html>", "sends a web page"),
        ("no_suffix", HTML, "sends a web page"),
        ("model.safetensors", pointer_to(CONTENT), "sends a git-lfs pointer"),
        ("page.html", HTML, None),
    ],
)
def test_a_page_or_a_pointer_under_the_name_of_a_file(
    name: str, content: bytes, words: str | None, hub: Hub, tessel: Run, tmp_path: Path
) -> None:
    hub.plain[f"/{name}"] = content
    status, _, err = tessel(f"{hub.url}/{name}", "--local-dir", "d")
    if words is None:
        assert status == 0
        assert (tmp_path / "d" / name).read_bytes() == content
        return
    assert status == 1
    assert f"{name}: 127.0.0.1:" in err
    assert words in err
    assert [each.name for each in (tmp_path / "d").iterdir()] == [RECORD_NAME]


@pytest.mark.parametrize(
    ("address", "command"),
    [
        ("{hub}/Qwen/Qwen2.5-7B/tree/main/config.json", "Qwen/Qwen2.5-7B --include 'config.json'"),
        ("https://huggingface.co/Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("https://hf-mirror.com/Qwen/Qwen3-8B/tree/v1", "Qwen/Qwen3-8B --revision v1"),
        (
            "https://huggingface.co/datasets/lsb/enwiki/blob/main/data/train%2D0.parquet",
            "lsb/enwiki --repo-type dataset --include 'data/train-0.parquet'",
        ),
        ("https://www.modelscope.cn/Qwen/Qwen3-1.7B-Base.git", "Qwen/Qwen3-1.7B-Base --source modelscope"),
        (
            "https://www.modelscope.cn/models/Qwen/Qwen2.5-7B/file/view/master/config.json",
            "Qwen/Qwen2.5-7B --source modelscope --include 'config.json'",
        ),
    ],
)
def test_the_address_of_a_hubs_page_is_answered_with_the_command_that_was_meant(
    address: str, command: str, hub: Hub, tessel: Run
) -> None:
    status, _, err = tessel(address.format(hub=hub.url))
    assert status == 2
    assert "is a page of the hub, not a file" in err
    assert err.endswith(f"tessel download {command}\n")
    assert not hub.requests


def test_the_address_of_a_hubs_file_is_one(hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.repositories["acme/tiny"] = Repository({"model.safetensors": CONTENT})
    assert tessel(f"{hub.url}/acme/tiny/resolve/main/model.safetensors?download=true", "--sha256", SHA256)[0] == 0
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT


def test_refusals_say_what_to_do(hub: Hub, tessel: Run) -> None:
    hub.faults["locked"] = ["status:403"]
    hub.faults["down"] = ["status:502"] * 3
    hub.plain |= {"/locked": b"x", "/down": b"x", "/empty": b""}
    for arguments, status, words in (
        ([f"{hub.url}/nothing.bin"], 1, f"{hub.url}/nothing.bin answers with HTTP status 404: there is no such file."),
        ([f"{hub.url}/locked?key=secret"], 1, "HTTP status 403: it wants a login or a permission."),
        ([f"{hub.url}/down"], 1, "cannot be fetched: HTTP status 502."),
        ([f"{hub.url}/empty"], 1, "is empty. Check the address."),
        ([f"{hub.url}/folder/"], 2, "ends with no file's name"),
        (["http://127.0.0.1:9/file"], 1, "http://127.0.0.1:9/file cannot be fetched: "),
        (["http://127.0.0.1:bad/file"], 2, "is no web address"),
        (["http:///file"], 2, "it names no host"),
        ([f"{hub.url}/x", "--include", "*"], 2, "--include is for repositories"),
        ([f"{hub.url}/x", "--unpack"], 2, "--unpack: x is none of .zip, .tar"),
        ([f"{hub.url}/x", "--sha256", "12"], 2, "it must be 64 hexadecimal digits"),
        (["acme/tiny", "--unpack"], 2, "--unpack is for an http(s) address: acme/tiny is a repository"),
        (["acme/tiny", "--workers", "0"], 2, "--workers is 0"),
        ([], 2, "needs REPO"),
        (["acme/tiny", "--verify", "."], 2, "leave out acme/tiny"),
    ):
        found, _, err = tessel(*arguments)
        assert found == status, err
        assert words in err
        assert "secret" not in err


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("file:///etc/passwd", "HTTP status 302"),
        ("ftp://127.0.0.1/x", "sends on to ftp://127.0.0.1/x, which is no web"),
    ],
)
def test_a_redirect_out_of_the_web_is_refused(
    to: str, words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, tessel: Run
) -> None:
    from tests.download import server

    def redirect(self: server._Handler, path: str) -> None:
        self._send(302, b"", {"Location": to})

    hub.plain["/file"] = b"x"
    monkeypatch.setattr(server._Handler, "_plain", redirect)
    status, _, err = tessel(f"{hub.url}/file")
    assert status == 1
    assert words in err


def test_an_address_as_people_paste_it(hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.plain["/数据 1.txt"] = b"x"
    assert tessel(f"{hub.url}/数据 1.txt")[0] == 0
    assert (tmp_path / "数据 1.txt").read_bytes() == b"x"
    assert tessel(f"{hub.url}/%E6%95%B0%E6%8D%AE%201.txt", "--local-dir", "d")[0] == 0
    assert (tmp_path / "d" / "数据 1.txt").read_bytes() == b"x"


def packed(**files: bytes) -> bytes:
    """A .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_an_archive_is_unpacked_once_and_its_files_are_on_record(hub: Hub, tessel: Run, tmp_path: Path) -> None:
    hub.plain["/data.tgz"] = packed(**{"data/a.txt": b"a" * 1000, "data/deep/b.txt": b"b"})
    arguments = [f"{hub.url}/data.tgz", "--local-dir", "d", "--unpack"]
    status, out, err = tessel(*arguments)
    assert status == 0, err
    assert "unpacked: 2 files, 1.0 kB" in out
    assert (tmp_path / "d" / "data" / "a.txt").read_bytes() == b"a" * 1000
    status, out, _ = tessel(*arguments)
    assert status == 0
    assert "was unpacked before: 2 files" in out
    assert tessel("--verify", "d")[0] == 0
    (tmp_path / "d" / "data" / "a.txt").write_bytes(b"a" * 999 + b"b")
    status, _, err = tessel("--verify", "d")
    assert status == 1
    assert "data/a.txt: its sha256 is" in err

"""The commands of docs/DOWNLOAD.md run as they stand, against a hub of our own."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

from tests.download.conftest import Run
from tests.download.server import Hub, Repository
from tests.download.test_address import packed


def test_every_command_runs_as_it_stands(repository: Path, hub: Hub, tessel: Run, tmp_path: Path) -> None:
    model = {"config.json": b"{}", "merges.txt": b"a b", "model.safetensors": bytes(5000), "old.bin": bytes(50)}
    hub.repositories |= {
        "Qwen/Qwen2.5-0.5B": Repository(model),
        "tatsu-lab/alpaca": Repository({"data/train.parquet": bytes(3000)}, kind="dataset"),
    }
    archive = packed(**{"inner/a.txt": b"a"})
    hub.plain |= {"/corpus.jsonl": b'{"text": "a"}\n', "/data.tgz": archive}
    (tmp_path / "some-folder").mkdir()
    (tmp_path / "some-folder" / "a").write_bytes(b"a")
    (tmp_path / "some-list").write_text(f"{hashlib.sha256(b'a').hexdigest()}  a\n")

    text = (repository / "docs" / "DOWNLOAD.md").read_text()
    text = text.replace("https://example.com", hub.url).replace("SHA256_OF_DATA", hashlib.sha256(archive).hexdigest())
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)).splitlines()
    lines = [line for line in lines if line]
    assert len(lines) >= 9
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["tessel", "download"]
        status, out, err = tessel(*words[2:])
        assert status == 0, f"{line}\n{out}\n{err}"
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir() if path.name[0] != ".") == [
        "config.json",
        "merges.txt",
    ]
    assert (tmp_path / "alpaca" / "data" / "train.parquet").stat().st_size == 3000
    assert (tmp_path / "from-modelscope" / "model.safetensors").read_bytes() == bytes(5000)
    assert (tmp_path / "data" / "inner" / "a.txt").read_bytes() == b"a"


def test_the_help_lists_the_flags_that_the_document_names(repository: Path, tessel: Run) -> None:
    status, out, _ = tessel("--help")
    assert status == 0
    named = set(re.findall(r"--[a-z][a-z0-9-]+", (repository / "docs" / "DOWNLOAD.md").read_text())) - {"--load"}
    assert named
    assert named <= set(re.findall(r"--[a-z][a-z0-9-]+", out))

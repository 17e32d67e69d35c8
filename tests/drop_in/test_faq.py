"""Each failure of docs/FAQ.md, brought about: it cannot happen, or an error names cause and remedy."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.drop_in import devices
from tessel.drop_in.arguments import Arguments
from tessel.drop_in.commands import Command

RUN = "--seq-length 32 --train-iters 1 --lr 1e-5 --global-batch-size 1"


@pytest.fixture
def folder(
    tmp_path: Path,
    tiny_hf_folder: Callable[..., Path],
    tiny_tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with a model, an empty folder, an empty text, and half a dataset."""
    monkeypatch.chdir(tmp_path)
    tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder).rename("model")
    Path("empty").mkdir()
    Path("empty.jsonl").touch()
    Path("half_text_document.bin").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"pretrain --load nowhere --data-path x {RUN}", "--load: nowhere does not exist"),
        (f"pretrain --load empty --data-path x {RUN}", "--load empty holds no weights that can be read: looked for"),
        (f"pretrain --load model --data-path none_text_document {RUN}", "none_text_document.idx does not exist"),
        (f"pretrain --load model --data-path half_text_document {RUN}", "half_text_document.idx does not exist"),
        (
            "preprocess --input empty.jsonl --output-prefix out --tokenizer-name-or-path model",
            "empty.jsonl is empty: there is no text to tokenize",
        ),
        (
            f"pretrain --load model --data-path x {RUN} --nproc-per-node 3 --pipeline-model-parallel-size 3",
            "2 layers cannot be dealt out evenly to 3 pipeline stages: use --pipeline-model-parallel-size 1, 2",
        ),
        (
            f"pretrain --load model --data-path x {RUN} --nproc-per-node 3 --pipeline-model-parallel-size 2",
            "does not divide the number of processes 3. Start 2 or 4 processes",
        ),
        (
            "drop-in mindspeed convert_ckpt.py --model-type-hf chatglm3 --load-dir model --save-dir out",
            "chatglm3 is not a family that tessel knows by name",
        ),
        ("drop-in pai run_mcore_qwen.sh dsw", "run_mcore_qwen.sh needs 25 arguments, and 1 are given: 1. ENV = 'dsw'"),
    ],
)
def test_errors_name_cause_and_remedy(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert folder.exists()
    assert main(line.split()) in (1, 2)
    assert message in capsys.readouterr().err


def test_more_processes_than_devices_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_count", lambda: 2)
    command = Command("pretrain", Arguments.read(["--nproc-per-node", "8"]))
    placed, remarks = devices.placed(command)
    assert placed.arguments.value("--device") == "cpu"
    assert remarks == ["8 processes, and 2 devices: on the CPU"]
    enough = Command("pretrain", Arguments.read(["--nproc-per-node", "2"]))
    assert devices.placed(enough) == (enough, [])


def test_scripts_mend_their_surroundings(repository: Path, tmp_path: Path) -> None:
    script = 'source "$LIB"; device_environment; logged name echo said; echo "at $MASTER_ADDR"'
    environment = {"PATH": "/usr/bin:/bin", "LIB": str(repository / "drop_in" / "lib.sh"), "MASTER_ADDR": "locahost"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "logs" / "name.log").read_text() == "said\n"
    assert "at localhost" in done.stdout
    assert "MASTER_ADDR is locahost: localhost is meant" in done.stderr


def test_packages_that_do_not_build_are_not_needed(repository: Path) -> None:
    needed = (repository / "pyproject.toml").read_text() + (repository / "constraints.txt").read_text()
    assert not re.search(r"antlr4|transformers_stream_generator|word2number", needed.replace("-", "_"))

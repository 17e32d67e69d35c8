"""Each failure of docs/FAQ.md, brought about: it cannot happen, or an error names cause and remedy."""

from __future__ import annotations

import re
import socket
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
        (
            "drop-in mindspeed convert_ckpt_v2.py --model-type-hf baichuan2 --load-dir model --save-dir out",
            "baichuan2 is not a family that tessel knows by name",
        ),
        (
            "drop-in modellink convert_ckpt.py --loader grok1_hf --saver megatron --load-dir model --save-dir out",
            "docs/MIGRATION.md says how to bring it",
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


def test_a_port_that_is_held_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "text.jsonl").write_text('{"text": "a few words"}\n' * 99)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        line = (
            f"pretrain --load model --data-path text.jsonl {RUN} --nproc-per-node 2 --device cpu --master-port {port}"
        )
        assert main(line.replace("batch-size 1", "batch-size 2").split()) == 1
    said = capsys.readouterr().err
    assert f"cannot meet at 127.0.0.1:{port}" in said and "end it, or give another --master-port" in said


def test_a_checkpoint_of_another_split_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    line = f"drop-in mindspeed convert_ckpt.py --use-mcore-models --load-dir model --save-dir mg {cut}"
    assert main(line.split()) == 0
    assert (folder / "mg" / "iter_0000001" / "mp_rank_01_001").exists()
    line = "--task greedy --prompt the --max-new-tokens 2 --device cpu"
    assert main(["drop-in", "mindspeed", "inference.py", "--load", "mg", *line.split()]) == 0
    assert capsys.readouterr().out


def shell(repository: Path, folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script that has sourced what the suites' scripts share."""
    environment = {"PATH": "/usr/bin:/bin", "LIB": str(repository / "drop_in" / "lib.sh")} | variables
    return subprocess.run(
        ["bash", "-c", f'source "$LIB"; {script}'],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_scripts_mend_their_surroundings(repository: Path, tmp_path: Path) -> None:
    done = shell(repository, tmp_path, 'logged name echo said; echo "at $MASTER_ADDR"', MASTER_ADDR="locahost")
    assert (tmp_path / "logs" / "name.log").read_text() == "said\n"
    assert "at localhost" in done.stdout
    assert "MASTER_ADDR is locahost: localhost is meant" in done.stderr


@pytest.mark.parametrize("place", ["cann", "ascend-toolkit"])
def test_scripts_source_the_vendors_environment(repository: Path, tmp_path: Path, place: str) -> None:
    show = "device_environment; echo ${CANN:-none} ${ATB:-none}"
    done = shell(repository, tmp_path, show, ASCEND_ROOT=str(tmp_path))
    assert done.stdout == "none none\n" and f"no set_env.sh under {tmp_path}" in done.stderr
    for folder, line in ((place, 'CANN=$UNSET"there"'), ("nnal/atb", "ATB=too")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "set_env.sh").write_text(f"{line}\n")
    done = shell(repository, tmp_path, show, ASCEND_ROOT=str(tmp_path))
    assert done.stdout == "there too\n" and not done.stderr


def test_packages_that_do_not_build_are_not_needed(repository: Path) -> None:
    needed = (repository / "pyproject.toml").read_text() + (repository / "constraints.txt").read_text()
    assert not re.search(r"antlr4|transformers_stream_generator|word2number", needed.replace("-", "_"))


# Row of the page, by its beginning -> the test that brings it about.
ROWS = {
    "checkpoint path not found": "drop_in/test_faq.py:errors_name_cause_and_remedy",
    'dataset "out of range": wrong prefix': "drop_in/test_faq.py:errors_name_cause_and_remedy",
    'dataset "out of range": nothing in it': "drop_in/test_faq.py:errors_name_cause_and_remedy",
    "dataset does not exist": "drop_in/test_faq.py:errors_name_cause_and_remedy",
    "the script does not start: `set_env.sh`": "drop_in/test_faq.py:scripts_source_the_vendors_environment",
    "the script does not start: processes": "drop_in/test_faq.py:a_port_that_is_held_is_named",
    "no log file": "drop_in/test_faq.py:scripts_mend_their_surroundings",
    "wheels of": "drop_in/test_faq.py:packages_that_do_not_build_are_not_needed",
    "`--save: command not found`": "drop_in/test_migrate.py:a_comment_does_not_cut_a_command_in_two",
    "a comment after a backslash": "drop_in/test_migrate.py:a_comment_does_not_cut_a_command_in_two",
    "the number of layers": "drop_in/test_faq.py:errors_name_cause_and_remedy",
    '"Invalid device ID"': "drop_in/test_faq.py:more_processes_than_devices_run_on_the_cpu",
    "TP x PP does not divide": "drop_in/test_faq.py:errors_name_cause_and_remedy",
    "TP or PP differ": "drop_in/test_faq.py:a_checkpoint_of_another_split_is_read",
    "a host named `locahost`": "drop_in/test_faq.py:scripts_mend_their_surroundings",
    "weights fetched from a page's address": "download/test_address.py:a_page_or_a_pointer_under_the_name_of_a_file",
    "hashes compared by eye": "download/test_verify.py:what_has_changed_is_named_and_the_same_download_mends_it",
    "out of memory": "runtime/test_memory.py:a_run_that_needs_too_much_says_what_helps",
    "a family is not known": "drop_in/test_faq.py:errors_name_cause_and_remedy",
    "fp8 in Pai's script": "drop_in/test_pai.py:25_wrong_arguments_are_25_clear_messages",
    "a wrong argument of Pai's 25": "drop_in/test_pai.py:25_wrong_arguments_are_25_clear_messages",
}


def test_every_row_of_the_page_has_a_test(repository: Path) -> None:
    page = (repository / "docs" / "FAQ.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS)
    for row, (beginning, place) in zip(rows, ROWS.items(), strict=True):
        assert row.startswith(beginning)
        path, _, name = place.partition(":")
        assert f"def test_{name}(" in (repository / "tests" / path).read_text(encoding="utf-8")

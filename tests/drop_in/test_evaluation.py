"""evaluation.py and Pai's lm_eval on tiny models: what they print is what the suites print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.evaluate.subjects import subjects_of
from tests.evaluate.sets import write_letter_set
from tests.runtime.launched import free_port

HARNESS = "pai/LM-Evaluation-Harness-240310"


@pytest.fixture
def model(tiny_hf_folder: Callable[..., Path], tiny_tokenizer_folder: Path) -> Path:
    return tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, max_position_embeddings=4096, eos_token_id=305)


def test_evaluation_prints_the_suites_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DATA_PATH is mmlu/test, as in the guides; the solved questions are in mmlu/dev."""
    data = write_letter_set(tmp_path / "mmlu", "mmlu", ("anatomy", "virology"), number=3)
    line = f"--task mmlu --task-data-path {data} --load {model} --max-new-tokens 1 --no-chat-template --device cpu"
    assert not main(["drop-in", "mindspeed", "evaluation.py", *line.split(), "--num-layers", "2"])
    whole, head, *rows = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"mmlu acc = (\d)/6=([\d.]+)", whole)
    assert found is not None
    assert float(found[2]) == int(found[1]) / 6
    assert head.split() == ["subject", "question_n", "acc"]
    assert [row.split()[:3] for row in rows] == [["0", "anatomy", "3"], ["1", "virology", "3"], ["2", "total", "6"]]
    assert rows[-1].split()[3] == f"{int(found[1]) / 6:.6f}"


def folders(root: Path, whole: bool = False) -> Path:
    """Pai's folder of the harness, with the questions beside it: of a subject of each set, or a few of all."""
    for task, subject in (("cmmlu", "agronomy"), ("ceval", "accountant")):
        write_letter_set(root / task, task, tuple(subjects_of(task)) if whole else (subject,), number=2 if whole else 3)
    (root / "harness").mkdir()
    return root / "harness"


def guide(model: Path) -> list[str]:
    """The guide's arguments; --num_fewshot keeps it short."""
    line = f"--model hf --model_args pretrained={model},trust_remote_code=True --tasks cmmlu,ceval-valid"
    return [*line.split(), "--batch_size", "16", "--num_fewshot", "1", "--device", "cpu"]


def test_without_the_harness_the_same_questions_are_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders(tmp_path))
    monkeypatch.setattr("tessel.drop_in.use._has_harness", lambda: False)
    assert not main(["drop-in", "pai", "lm_eval", *guide(model)])
    said = capsys.readouterr()
    assert "agronomy" in said.out and "accountant" in said.out
    assert "trust_remote_code is left out" in said.err and "lm-eval is not installed" in said.err


@pytest.mark.slow
def test_the_installed_harness_asks_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'tessel[harness]')")
    monkeypatch.chdir(folders(tmp_path, whole=True))
    assert not main(["drop-in", "pai", "lm_eval", *guide(model)])
    out = capsys.readouterr().out
    assert re.search(r"\|cmmlu +\|", out) and re.search(r"\|ceval-valid *\|", out)
    assert "agronomy" in out and "accountant" in out


@pytest.mark.slow
def test_the_guides_line_in_two_processes(model: Path, repository: Path, tmp_path: Path) -> None:
    """`accelerate launch` in the harness's folder, whose package has the installed one's name."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'tessel[harness]')")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder = folders(tmp_path, whole=True)
    (folder / "lm_eval").symlink_to(repository / "drop_in" / HARNESS / "lm_eval")
    # Without --multi_gpu it starts one process on a machine without devices.
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {free_port()} -m lm_eval"
    done = subprocess.run(
        [sys.executable, *launch.split(), *guide(model), "--limit", "2"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = Counter(re.findall(r"^\|(cmmlu|ceval-valid) *\|", done.stdout, re.MULTILINE))
    assert rows == {"cmmlu": 2, "ceval-valid": 2}, "told once: in the table of tasks and in that of groups"
    assert "trust_remote_code is left out" in done.stderr

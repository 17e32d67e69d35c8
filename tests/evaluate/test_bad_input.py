"""Folders and flags that are wrong are explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.config.evaluate import EvaluateConfig, validate_evaluate
from tessel.config.verbs import Loading
from tessel.errors import TesselError, UsageError
from tessel.evaluate import passages, programs, worked
from tessel.evaluate.questions import read_letter_questions, read_letter_set, set_files
from tests.evaluate.sets import write_csv, write_json_lines, write_letter_set


def test_subjects_that_are_missing(tmp_path: Path) -> None:
    folder = write_letter_set(tmp_path, "mmlu", ("anatomy", "virology"), number=2)
    subjects, note = read_letter_set("mmlu", str(folder), 5)
    assert [subject.name for subject in subjects] == ["anatomy", "virology"]
    assert note.startswith("55 of 57 subjects are not in")
    with pytest.raises(UsageError, match=r"--subjects anatomi: not in .*; nearest: anatomy"):
        read_letter_set("mmlu", str(folder), 5, ["anatomi"])
    (tmp_path / "dev/virology_dev.csv").unlink()
    with pytest.raises(TesselError, match=r"Solved questions are missing in .*dev for virology.*--num-fewshot 0"):
        read_letter_set("mmlu", str(folder), 5)
    with pytest.raises(TesselError, match="has 5 solved questions in dev/, fewer than --num-fewshot 6"):
        read_letter_set("mmlu", str(folder), 6, ["anatomy"])


def test_a_folder_above_the_split_will_do_and_an_empty_one_will_not(tmp_path: Path) -> None:
    write_letter_set(tmp_path, "ceval", ("accountant",), number=2)
    assert read_letter_set("ceval", str(tmp_path), 1)[0][0].category == "other"
    (tmp_path / "empty").mkdir()
    with pytest.raises(TesselError, match="has no CSV files"):
        read_letter_set("ceval", str(tmp_path / "empty"), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("what?,1,2,3,4\n", r"line 1: 5 columns, where there must be 6"),
        ("what?,1,2,3,4,E\n", r"line 1: the answer is 'E', and must be A, B, C or D"),
        ('what?,1,2,3,4,A\n"open,1,2,3,4,A\n', r"not CSV"),
        ("", "has no questions"),
        ("id,question,A,B,C,D\n0,what?,1,2,3,4\n", "needs question, A, B, C, D and answer"),
    ],
)
def test_malformed_csv(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(TesselError, match=message):
        read_letter_questions(tmp_path / "bad.csv")


def test_cells_are_text(tmp_path: Path) -> None:
    write_csv(tmp_path / "anatomy_test.csv", [["nan?", "None", "", "1.0", "TRUE", "B"]], None)
    (question,) = read_letter_questions(tmp_path / "anatomy_test.csv")
    assert question.choices == ("None", "", "1.0", "TRUE") and question.answer == "B"
    (tmp_path / "latin.csv").write_bytes("é?,1,2,3,4,A\n".encode("latin-1"))
    with pytest.raises(TesselError, match="is not UTF-8"):
        read_letter_questions(tmp_path / "latin.csv")


def test_files_that_are_not_of_the_set(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match=r"has no \*test\*\.jsonl"):
        worked.read_gsm8k(str(tmp_path), 0)
    path = write_json_lines(tmp_path / "test.jsonl", [{"question": "q"}])
    with pytest.raises(TesselError, match=r"test\.jsonl, line 1, has no field 'answer'"):
        worked.read_gsm8k(str(tmp_path), 0)
    path.write_text("{\n")
    with pytest.raises(TesselError, match="line 1, is not JSON"):
        worked.read_gsm8k(str(tmp_path), 0)
    write_json_lines(path, [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(TesselError, match="train.jsonl is missing"):
        worked.read_gsm8k(str(tmp_path), 5)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(TesselError, match="is no task of BIG-Bench Hard"):
        worked.read_bbh(str(tmp_path), 3)
    (tmp_path / "x.json").write_text(json.dumps({"examples": [{"input": "i", "target": "t"}]}))
    with pytest.raises(TesselError, match="has 1 examples, and --num-fewshot 3 leaves none to ask"):
        worked.read_bbh(str(tmp_path), 3)
    write_json_lines(tmp_path / "dev.jsonl", [{"question": "q", "passage": "p", "answer": "maybe"}])
    with pytest.raises(TesselError, match="the answer is 'maybe', and must be true or false"):
        passages.read_boolq(str(tmp_path))
    row = {"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "endings": ["d"], "label": ""}
    write_json_lines(tmp_path / "val.jsonl", [row])
    with pytest.raises(TesselError, match="label '' is none of its endings"):
        passages.read_hellaswag(str(tmp_path))
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(TesselError, match="no whole gzip file"):
        programs.read_human_eval(str(tmp_path))
    with pytest.raises(TesselError, match="does not exist"):
        set_files(str(tmp_path / "nowhere"), "*.json", "x")


def test_a_label_that_is_no_option(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "sat-math.jsonl", [{"question": "q", "options": ["(A)1", "(B)2"], "label": "C"}])
    with pytest.raises(TesselError, match="label 'C' is none of its 2 options"):
        passages.read_agieval(str(tmp_path), with_cloze=False)
    labels: list[Any] = ["A B", ["A", "。"], [], "B"]
    write_json_lines(
        tmp_path / "sat-math.jsonl",
        [{"question": "q", "options": ["(A)1", "(B)2"], "label": label} for label in labels],
    )
    (subject,), _ = passages.read_agieval(str(tmp_path), with_cloze=False)
    assert [question.answer for question in subject.questions] == ["AB", "A", "", "B"]


LOADING = Loading(load="somewhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvaluateConfig(loading=LOADING), "needs --task NAME"),
        (lambda: EvaluateConfig(loading=LOADING, task=("mmul",), data_path="x"), "nearest: mmlu"),
        (lambda: EvaluateConfig(loading=LOADING, task=("mmlu", "ceval")), "one command evaluates one"),
        (lambda: EvaluateConfig(loading=LOADING, task=("mmlu",)), "needs --data-path DIR"),
        (lambda: EvaluateConfig(loading=Loading(), task=("mmlu",), data_path="x"), "No model is named"),
        (lambda: EvaluateConfig(loading=LOADING, task=("humaneval",), data_path="x"), "--allow-code-execution"),
        (lambda: EvaluateConfig(loading=LOADING, task=("gsm8k",), rule="choice", data_path="x"), "use --rule generate"),
        (lambda: EvaluateConfig(loading=LOADING, task=("boolq",), num_fewshot=2, data_path="x"), "prompt is fixed"),
        (lambda: EvaluateConfig(loading=LOADING, task=("mmlu",), prompt_type="qwen", data_path="x"), "--rule generate"),
        (lambda: EvaluateConfig(loading=LOADING, task=("mmlu",), limit=0, data_path="x"), "must be at least 1"),
        (lambda: EvaluateConfig(loading=LOADING, task=("mmlu",), data_dir=("mmlu=x",)), "belongs to --harness"),
        (lambda: EvaluateConfig(loading=LOADING, task=("x",), harness=True, data_path="y"), "--data-dir TASK=DIR"),
        (lambda: EvaluateConfig(loading=LOADING, task=("x",), harness=True, rule="choice"), "--rule does nothing"),
        (
            lambda: EvaluateConfig(loading=LOADING, task=("x",), harness=True, subjects=("y",)),
            "--subjects does nothing",
        ),
        (lambda: EvaluateConfig(loading=LOADING, task=("x",), harness=True, prompt_type="qwen"), "template alone"),
        (lambda: EvaluateConfig(loading=LOADING, compare="x"), "needs --output DIR"),
    ],
)
def test_flags_that_contradict(make: Callable[[], EvaluateConfig], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate_evaluate(make())

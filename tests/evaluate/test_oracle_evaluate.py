"""MindSpeed-LLM's own evaluations: every question gets the answer that it gave there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.evaluate.subjects import subjects_of

FOLDERS = {"mmlu": "mmlu/data/test", "ceval": "ceval/val", "cmmlu": "cmmlu/test"}


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["mmlu", "ceval", "cmmlu", "mmlu_chat"])
def test_every_answer_is_that_of_mindspeed_llm(case: str, shared: Path, tmp_path: Path) -> None:
    wanted = json.loads((shared / f"oracle/evaluate/{case}.json").read_text())
    task = wanted["task"]
    assert main(
        [
            "evaluate",
            *("--load", str(shared / f"oracle/evaluate/hf/{wanted['hf']}")),
            *("--tokenizer-name-or-path", str(shared / "data/tokenizers/qwen2.5")),
            *("--task", task, "--rule", "generate", "--data-path", str(shared / "data/eval" / FOLDERS[task])),
            *("--subjects", *wanted["subjects"], "--max-eval-samples", str(wanted["first_questions"])),
            *("--output", str(tmp_path), "--device", "cpu"),
            *wanted["flags"],
        ]
    ) in (None, 0)
    titles = {name: title for name, (_, title) in subjects_of(task).items()} if task == "cmmlu" else {}
    answers: dict[str, list[list[str]]] = {}
    for line in (tmp_path / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers.setdefault(titles.get(row["subject"], row["subject"]), []).append([row["answer"], row["prediction"]])
    assert answers == {name: part["answers"] for name, part in wanted["results"].items()}
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results["total"]["correct"], results["total"]["questions"]] == wanted["total"]

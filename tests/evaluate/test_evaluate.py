"""`tessel evaluate`: results, going on, comparing, and each set in its layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.cli import main
from tests.evaluate.sets import rows, write_gsm8k, write_json_lines, write_letter_set

MakeFolder = Callable[..., Path]


@pytest.fixture
def model(tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path) -> Path:
    return tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, max_position_embeddings=2048, eos_token_id=305)


def evaluate(model: Path, task: str, data: Path, *more: str) -> int | None:
    return main(["evaluate", "--load", str(model), "--task", task, "--data-path", str(data), "--device", "cpu", *more])


def questions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def test_results_are_figures_of_the_questions(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_letter_set(tmp_path / "mmlu", "mmlu", ("anatomy", "virology", "my_own"), number=7)
    output = tmp_path / "out"
    assert not evaluate(model, "mmlu", data, "--output", str(output), "--limit", "17", "--num-fewshot", "2")
    asked = questions(output)
    assert [(row["subject"], row["index"]) for row in asked] == [
        (name, i) for name, n in (("anatomy", 6), ("my_own", 6), ("virology", 5)) for i in range(n)
    ]
    for row in asked:
        assert row["prediction"] == max(row["scores"], key=row["scores"].get)
        assert row["correct"] == (row["prediction"] == row["answer"])
        assert row["answer"] == rows(7, ("anatomy", "virology", "my_own").index(row["subject"]))[row["index"]][5]
    results = json.loads((output / "results.json").read_text())
    correct = sum(row["correct"] for row in asked)
    total = results["total"]
    assert (results["task"], results["rule"], total["correct"], total["questions"]) == ("mmlu", "choice", correct, 17)
    accuracy = correct / 17
    assert total["accuracy"] == accuracy
    assert total["stderr"] == pytest.approx((accuracy * (1 - accuracy) / 16) ** 0.5)
    parts = results["subjects"]
    assert total["macro_accuracy"] == pytest.approx(sum(part["accuracy"] for part in parts.values()) / 3)
    assert {name: part["category"] for name, part in parts.items()} == {
        "anatomy": "stem", "virology": "other", "my_own": "other",
    }  # fmt: skip
    table = list(csv.reader((output / "results.csv").open()))
    assert [row[0] for row in table] == ["subject", *parts, "total"]
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "total" in said.out and "times fewer" in said.err and "are not in" in said.err


def test_an_interrupted_run_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_letter_set(tmp_path / "cmmlu", "cmmlu", ("agronomy", "arts"), number=5)
    output = tmp_path / "out"
    assert not evaluate(model, "cmmlu", data, "--output", str(output))
    whole = (output / "questions.jsonl").read_text()
    (output / "questions.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4]) + '{"subject": "ar')
    assert not evaluate(model, "cmmlu", data, "--output", str(output))
    assert "4 of 10 questions are answered" in capsys.readouterr().err
    now = questions(output)
    assert [(row["subject"], row["prediction"]) for row in now] == [
        (row["subject"], row["prediction"]) for row in map(json.loads, whole.splitlines())
    ]
    assert evaluate(model, "cmmlu", data, "--output", str(output), "--num-fewshot", "3") == 2
    assert "num_fewshot 5, and this one has 3" in capsys.readouterr().err
    assert evaluate(model, "cmmlu", data, "--output", str(output), "--limit", "4") == 2
    assert "6 questions that are not asked now" in capsys.readouterr().err


def test_two_runs_are_compared(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_letter_set(tmp_path / "ceval", "ceval", ("accountant",))
    first, second = tmp_path / "first", tmp_path / "second"
    assert not evaluate(model, "ceval", data, "--output", str(first))
    assert not evaluate(model, "ceval", data, "--output", str(second), "--num-fewshot", "0", "--compare", str(first))
    found = json.loads((second / "comparison.json").read_text())
    own, other = ([row["correct"] for row in questions(folder)] for folder in (second, first))
    assert found["only_first"] == sum(a and not b for a, b in zip(own, other, strict=True))
    assert found["difference"] == pytest.approx((sum(own) - sum(other)) / 12)
    assert "McNemar" in capsys.readouterr().out
    assert not main(["evaluate", "--output", str(first), "--compare", str(second)])
    assert main(["evaluate", "--output", str(first), "--compare", str(tmp_path)]) == 1
    assert "not what tessel evaluate --output made" in capsys.readouterr().err


def folder_of(task: str, root: Path) -> Path:
    """A small set in the layout of the real one."""
    if task == "gsm8k":
        return write_gsm8k(root)
    if task == "bbh":
        root.mkdir()
        examples = [{"input": f"Is {i} even?", "target": "(A)" if i % 2 else "yes"} for i in range(6)]
        (root / "even.json").write_text(json.dumps({"examples": examples}))
        return root
    content: list[dict[str, Any]] = {
        "boolq": [{"question": f"is it {i}", "passage": "It is a number.", "answer": i > 1} for i in range(4)],
        "hellaswag": [
            {
                "ctx_a": "A man",
                "ctx_b": "he",
                "activity_label": "Going",
                "endings": ["goes.", "is [x] gone."],
                "label": i,
            }
            for i in (0, 1, 1)
        ],
        "agieval": [
            {"passage": None, "question": f"{i}?", "options": ["(A)one", "(B)two"], "label": "B"} for i in range(3)
        ],
        "human_eval": [
            {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"}
        ],
    }[task]
    name = {"boolq": "dev", "hellaswag": "hellaswag_val", "agieval": "sat-math", "human_eval": "HumanEval"}[task]
    return write_json_lines(root / f"{name}.jsonl", content).parent


@pytest.mark.parametrize(
    ("task", "number", "flags"),
    [
        ("boolq", 4, []),
        ("hellaswag", 3, []),
        ("agieval", 3, []),
        ("agieval", 3, ["--rule", "generate"]),
        ("gsm8k", 6, ["--max-new-tokens", "5"]),
        ("bbh", 3, ["--max-new-tokens", "5"]),
        ("human_eval", 1, ["--allow-code-execution", "--max-new-tokens", "5"]),
    ],
)
def test_each_set_in_its_layout(task: str, number: int, flags: list[str], model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert not evaluate(model, task, folder_of(task, tmp_path / "data"), "--output", str(output), *flags)
    found = questions(output)
    assert len(found) == number
    assert all(("scores" in row) == ("text" not in row) for row in found)
    if task == "hellaswag":
        assert "accuracy_norm" in json.loads((output / "results.json").read_text())["total"]


def test_prompts_longer_than_the_context_are_cut_and_counted(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, max_position_embeddings=100)
    data = write_letter_set(tmp_path / "mmlu", "mmlu", ("anatomy",), number=3)
    for rule in ("choice", "generate"):
        assert not evaluate(model, "mmlu", data, "--rule", rule)
        assert "3 texts are longer than the context and lost their beginning" in capsys.readouterr().err

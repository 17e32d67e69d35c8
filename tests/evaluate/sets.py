"""Small sets of questions in the layouts of the real ones."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

WORDS = "river stone copper planet window seven letter engine cloud garden music paper winter oxygen bridge".split()
CHINESE = "水的沸点是多少下列哪一项正确中国历史朝代数学函数植物细胞经济政策法律条文"


def rows(number: int, seed: int, chinese: bool = False) -> list[list[str]]:
    """Question, A, B, C, D, answer."""
    draw = random.Random(seed)

    def text(length: int) -> str:
        return "".join(draw.choices(CHINESE, k=length)) if chinese else " ".join(draw.choices(WORDS, k=length))

    return [
        [f"{text(draw.randint(3, 9))}?", *(text(draw.randint(1, 4)) for _ in range(4)), draw.choice("ABCD")]
        for _ in range(number)
    ]


def write_csv(path: Path, content: list[list[str]], header: list[str] | None) -> None:
    """A CSV file; with a header, rows are numbered, as C-Eval's and CMMLU's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        if header is not None:
            out.writerow(header)
        out.writerows([str(i), *row] if header is not None else row for i, row in enumerate(content))


def write_letter_set(root: Path, task: str, subjects: tuple[str, ...], number: int = 12) -> Path:
    """A folder of a set; returns that of its questions."""
    split, suffix = {"mmlu": ("test", "_test"), "ceval": ("val", "_val"), "cmmlu": ("test", "")}[task]
    header = None
    if task != "mmlu":
        question, answer = ("Question", "Answer") if task == "cmmlu" else ("question", "answer")
        header = ["" if task == "cmmlu" else "id", question, "A", "B", "C", "D", answer]
    for seed, subject in enumerate(subjects):
        dev = f"{subject}_dev.csv" if suffix else f"{subject}.csv"
        write_csv(root / split / f"{subject}{suffix}.csv", rows(number, seed, task != "mmlu"), header)
        write_csv(root / "dev" / dev, rows(5, 100 + seed, task != "mmlu"), header)
    return root / split


def write_json_lines(path: Path, content: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path


def write_gsm8k(root: Path, number: int = 6) -> Path:
    """train.jsonl and test.jsonl."""
    draw = random.Random(7)
    for name, count in (("train", 8), ("test", number)):
        content = []
        for _ in range(count):
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            content.append({"question": f"{a} and {b} make?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"})
        write_json_lines(root / f"{name}.jsonl", content)
    return root

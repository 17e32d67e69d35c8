"""GSM8K and BIG-Bench Hard: answers that the model writes.

GSM8K's prompt, stop strings and ways to find the number are lm-evaluation-harness 0.4.13's (task gsm8k), with the
first solved problems of train.jsonl; BIG-Bench Hard's are the "Q: ... A: ..." of its authors without reasoning, with
the first examples of each file, which are not asked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tessel.errors import TesselError
from tessel.evaluate.items import TextItem
from tessel.evaluate.questions import Question, Subject, read_json_lines, set_files

_GSM8K_STOP = ("Question:", "</s>", "<|im_end|>")
_MARKED = re.compile(r"####\s*(-?[0-9.,]+)")
_SAID = re.compile(r"[Tt]he answer is:?\s*\$?(-?[0-9][0-9.,]*)")
_NUMBER = re.compile(r"-?[$0-9.,]*[0-9][$0-9.,]*")


def read_gsm8k(folder: str, num_shots: int) -> list[Subject]:
    """The problems of test.jsonl, one subject; solved ones from train.jsonl beside it.

    Raises:
        TesselError: a file is missing or damaged, or has too few solved problems.
    """
    path = set_files(folder, "*test*.jsonl", "GSM8K, with test.jsonl and train.jsonl")[0]
    shots: tuple[Question, ...] = ()
    if num_shots:
        solved = path.with_name("train.jsonl")
        if not solved.is_file():
            raise TesselError(f"{solved} is missing, and has the solved problems. Put it there, or --num-fewshot 0.")
        shots = _gsm8k_questions(solved)[:num_shots]
        if len(shots) < num_shots:
            raise TesselError(
                f"{solved} has {len(shots)} problems, fewer than --num-fewshot {num_shots}: ask for fewer."
            )
    return [Subject("gsm8k", "gsm8k", "mathematics", _gsm8k_questions(path), shots)]


def _gsm8k_questions(path: Path) -> tuple[Question, ...]:
    rows = read_json_lines(path, "question", "answer")
    return tuple(Question(i, row["question"], (), row["answer"]) for i, row in enumerate(rows))


def gsm8k_item(subject: Subject, question: Question, max_new_tokens: int | None) -> TextItem:
    """The number after ####, else after "the answer is", else the last one."""
    solved = "".join(f"Question: {shot.text}\nAnswer: {shot.answer}\n\n" for shot in subject.shots)
    answer = number_of(question.answer)

    def judge(text: str) -> tuple[str, bool]:
        found = number_of(text)
        return found, found != "" and found == answer

    return TextItem(
        (subject.name, question.index),
        f"{solved}Question: {question.text}\nAnswer:",
        answer,
        judge,
        max_new_tokens or 256,
        _GSM8K_STOP,
    )


def number_of(text: str) -> str:
    """The number that a solution comes to, without commas, dollar signs and zeros after the point; else empty."""
    found = _MARKED.findall(text)[:1] or _SAID.findall(text)[:1] or _NUMBER.findall(text)[-1:]
    number = "".join(found).translate(str.maketrans("", "", "$,")).rstrip(".")
    return number.rstrip("0").rstrip(".") if "." in number else number


def read_bbh(folder: str, num_shots: int) -> list[Subject]:
    """A subject for each .json of BIG-Bench Hard.

    Raises:
        TesselError: a file is no task of it, or has no more examples than are shown.
    """
    subjects = []
    for path in set_files(folder, "*.json", "BIG-Bench Hard, such as bbh"):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["examples"]
            pairs = [(str(row["input"]), str(row["target"])) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise TesselError(
                f'{path} is no task of BIG-Bench Hard, {{"examples": [{{"input", "target"}}, ...]}} ({error}). Mend or '
                "remove it."
            ) from error
        if len(pairs) <= num_shots:
            raise TesselError(f"{path} has {len(pairs)} examples, and --num-fewshot {num_shots} leaves none to ask.")
        questions = tuple(Question(i, text, (), answer) for i, (text, answer) in enumerate(pairs))
        name = path.stem
        subjects.append(Subject(name, name.replace("_", " "), "bbh", questions[num_shots:], questions[:num_shots]))
    return subjects


def bbh_item(subject: Subject, question: Question, max_new_tokens: int | None) -> TextItem:
    """The first line must be the answer; brackets and the final full stop do not count."""
    solved = "".join(f"Q: {shot.text}\nA: {shot.answer}\n\n" for shot in subject.shots)

    def judge(text: str) -> tuple[str, bool]:
        line = text.strip().split("\n")[0].strip()
        return line, _bare(line) == _bare(question.answer)

    return TextItem(
        (subject.name, question.index),
        f"{solved}Q: {question.text}\nA:",
        question.answer,
        judge,
        max_new_tokens or 64,
        ("\n\n", "\nQ:"),
    )


def _bare(answer: str) -> str:
    answer = answer.strip().rstrip(".").lower()
    option = re.match(r"^\(([a-z])\)", answer)
    return option.group(1) if option else answer

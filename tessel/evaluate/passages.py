"""BoolQ, HellaSwag and AGIEval: answers to choose from that are more than a letter.

Prompts and scores of --rule choice are lm-evaluation-harness 0.4.13's (its tasks boolq, hellaswag, agieval_*);
AGIEval's are the zero-shot prompts of its authors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tessel.errors import TesselError
from tessel.evaluate.items import ChoiceItem, TextItem
from tessel.evaluate.questions import Question, Subject, read_json_lines, set_files

# ----------------------------------------------------------------------------------------- BoolQ


def read_boolq(folder: str) -> list[Subject]:
    """The yes-or-no questions of *dev*.jsonl (else of any .jsonl), one subject."""
    path = set_files(folder, "*dev*.jsonl", "BoolQ, with dev.jsonl")[0]
    questions = []
    for index, row in enumerate(read_json_lines(path, "question", "passage")):
        answer = row.get("answer", row.get("label"))
        if answer not in (True, False, 0, 1):
            raise TesselError(
                f"{path}, question {index}: the answer is {answer!r}, and must be true or false. Mend it."
            )
        questions.append(Question(index, str(row["question"]), ("no", "yes"), ("no", "yes")[bool(answer)], row))
    return [Subject("boolq", "boolq", "reading", tuple(questions))]


def boolq_item(subject: Subject, question: Question) -> ChoiceItem:
    """ "no" against "yes"."""
    passage = (question.more or {})["passage"]
    context = f"{passage}\nQuestion: {question.text}?\nAnswer:"
    return ChoiceItem((subject.name, question.index), context, question.choices, (" no", " yes"), (question.answer,))


# ----------------------------------------------------------------------------------------- HellaSwag


def read_hellaswag(folder: str) -> list[Subject]:
    """The beginnings with four endings of *val*.jsonl, one subject."""
    path = set_files(folder, "*val*.jsonl", "HellaSwag, with hellaswag_val.jsonl")[0]
    questions = []
    for index, row in enumerate(read_json_lines(path, "ctx_a", "ctx_b", "activity_label", "endings", "label")):
        endings = row["endings"]
        if not isinstance(endings, list) or str(row["label"]) not in [str(i) for i in range(len(endings))]:
            raise TesselError(
                f"{path}, question {index}: label {row['label']!r} is none of its endings. Is this a split without "
                "answers? Take another."
            )
        text = _cleaned(f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}")
        choices = tuple(_cleaned(ending) for ending in endings)
        questions.append(Question(index, text, choices, str(row["label"])))
    return [Subject("hellaswag", "hellaswag", "commonsense", tuple(questions))]


def _cleaned(text: str) -> str:
    """Without the marks of WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag_item(subject: Subject, question: Question) -> ChoiceItem:
    """Each ending, by its log-probability and by that of a character."""
    return ChoiceItem(
        (subject.name, question.index),
        question.text,
        tuple(str(i) for i in range(len(question.choices))),
        tuple(f" {choice}" for choice in question.choices),
        (question.answer,),
        tuple(len(choice) for choice in question.choices),
    )


# ----------------------------------------------------------------------------------------- AGIEval

_AGIEVAL_LETTERS = "ABCDEFG"
_CLOZE = ("math", "gaokao-mathcloze")
_CHINESE = ("gaokao-", "jec-qa-", "logiqa-zh")
_MAX_CLOZE_TOKENS = 256


def read_agieval(folder: str, with_cloze: bool) -> tuple[list[Subject], str]:
    """A subject for each .jsonl, and a note on those without answers to choose from, left out unless `with_cloze`."""
    subjects, left_out = [], []
    for path in set_files(folder, "*.jsonl", "AGIEval, such as data/v1"):
        if path.stem in _CLOZE and not with_cloze:
            left_out.append(path.stem)
            continue
        rows = read_json_lines(path, "question", "options", "label")
        where = str(path)
        questions = tuple(_agieval_question(i, row, f"{where}, question {i}") for i, row in enumerate(rows))
        language = "chinese" if _is_chinese(path.stem) else "english"
        subjects.append(Subject(path.stem, path.stem, language, questions))
    note = f"{', '.join(left_out)}: nothing to choose from, so left out (--rule generate has them)" if left_out else ""
    return subjects, note


def _is_chinese(name: str) -> bool:
    return name.startswith(_CHINESE) and name != "gaokao-english"


def _agieval_question(index: int, row: Mapping[str, Any], where: str) -> Question:
    if not row["options"]:
        return Question(index, str(row["question"]), (), str(row.get("answer", "")), row)
    # The set has labels such as "A B D", one with a full stop among its letters, and a question with none, which nobody
    # answers rightly.
    label = "".join(re.findall(r"[^\W\d_]", "".join(row["label"] or ())))
    if not set(label) <= set(_AGIEVAL_LETTERS[: len(row["options"])]):
        raise TesselError(f"{where}: label {row['label']!r} is none of its {len(row['options'])} options. Mend it.")
    return Question(index, str(row["question"]), tuple(row["options"]), label, row)


def agieval_context(subject: Subject, question: Question) -> str:
    """The zero-shot prompt of AGIEval's authors."""
    passage = (question.more or {}).get("passage") or ""
    chinese = _is_chinese(subject.name)
    if not question.choices:
        return f"问题：{question.text}\n答案：" if chinese else f"Q: {question.text}\nA: The answer is"
    last = _AGIEVAL_LETTERS[len(question.choices) - 1]
    options = " ".join(question.choices)
    if chinese:
        return f"{passage}问题：{question.text} 选项：{options}\n答案：从A到{last}, 我们应选择"
    return f"{passage}Q: {question.text} Answer Choices: {options}\nA: Among A through {last}, the answer is"


def agieval_item(subject: Subject, question: Question) -> ChoiceItem:
    """Each option, by its log-probability and by that of a character; any of several right ones is right."""
    return ChoiceItem(
        (subject.name, question.index),
        agieval_context(subject, question),
        tuple(_AGIEVAL_LETTERS[: len(question.choices)]),
        tuple(f" {choice}" for choice in question.choices),
        tuple(question.answer),
        tuple(len(choice) for choice in question.choices),
    )


def agieval_text_item(subject: Subject, question: Question, max_new_tokens: int | None) -> TextItem:
    """The first line of what the model writes: its letters, or where there is nothing to choose from the whole."""

    def judge(text: str) -> tuple[str, bool]:
        line = text.strip().split("\n")[0].strip()
        if not question.choices:
            return line, _plain(line) == _plain(question.answer)
        letters = "".join(dict.fromkeys(re.findall(rf"[{_AGIEVAL_LETTERS}](?![a-z])", line)))
        prediction = letters if len(question.answer) > 1 else letters[:1]
        return prediction, sorted(prediction) == sorted(question.answer)

    return TextItem(
        (subject.name, question.index),
        agieval_context(subject, question),
        question.answer,
        judge,
        max_new_tokens or (_MAX_CLOZE_TOKENS if not question.choices else 16),
        ("\n",) if not question.choices else (),
    )


def _plain(answer: str) -> str:
    """Without what does not change a short answer in mathematics: blanks, dollar signs, the final full stop."""
    return re.sub(r"[\s$]", "", answer).rstrip(".。")

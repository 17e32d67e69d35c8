"""MMLU, C-Eval and CMMLU: questions with four answers, and a letter for each.

By --rule choice a prompt is lm-evaluation-harness 0.4.13's, character for character, and so is the score: the
log-probability of " A" to " D" after it. By --rule generate it is MindSpeed-LLM's, and the letter is read from what
the model writes by that suite's patterns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tessel.data.instruct.dialogue import ASSISTANT, USER, Dialogue, Message
from tessel.evaluate.questions import LETTERS, Question, Subject

_ANSWER = {"mmlu": "Answer:", "ceval": "答案：", "cmmlu": "答案："}
_DESCRIPTION = {
    "mmlu": "The following are multiple choice questions (with answers) about {title}.\n\n",
    "ceval": "以下是中国关于{title}的单项选择题，请选出其中的正确答案。\n\n",
    "cmmlu": "以下是关于{title}的单项选择题，请直接给出正确答案的选项。\n\n",
}

# ----------------------------------------------------------------------------------------- by log-probability


def choice_context(task: str, subject: Subject, question: Question, num_shots: int) -> str:
    """What stands before " A" to " D"."""
    shots = [f"{_asked(task, shot)} {shot.answer}\n\n" for shot in subject.shots[:num_shots]]
    return "".join([_DESCRIPTION[task].format(title=subject.title), *shots, _asked(task, question)])


def _asked(task: str, question: Question) -> str:
    return f"{question.text.strip()}{_options(question)}\n{_ANSWER[task]}"


def _options(question: Question) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))


# ----------------------------------------------------------------------------------------- by text, plain


def text_prompt(task: str, subject: Subject, question: Question, num_shots: int) -> str:
    """MindSpeed-LLM's prompt of a base model, made from the dev files instead of its stored ones."""
    shots = subject.shots[:num_shots]
    asked = f"{question.text}{_options(question)}"
    if task == "mmlu":
        head = f"The following are multiple choice questions (with answers) about  {subject.name.replace('_', ' ')}.\n"
        solved = [f"{_without_blank_lines(s.text)}{_options(s)}\nAnswer: {s.answer}" for s in shots]
        return f"{head}{chr(10).join(solved)}\n\n{asked}\nAnswer:"
    if task == "ceval":
        solved = [f"问：{s.text}{_options(s)}\n答：{s.answer}" for s in shots]
        return "\n\n".join(["请从下列选择题中选择正确的选项。", *solved, f"问：{asked}\n答："])
    head = f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n "
    solved = [f"{s.text}{_options(s)}\n答案： {s.answer}\n" for s in shots]
    return f"{head}{''.join(solved)}\n\n{asked}\n答案： "


def _without_blank_lines(text: str) -> str:
    return re.sub(r"\n+", "\n", text).rstrip("\n")


# ----------------------------------------------------------------------------------------- by text, as turns

_TURNS = {
    "en": ("The following are multiple choice questions (with answers) about {title}.\n\n", "\nAnswer: "),
    "zh": ("以下是中国关于{title}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案："),
}


def language_of(task: str) -> str:
    """The language of a set."""
    return "en" if task == "mmlu" else "zh"


def dialogue(task: str, subject: Subject, question: Question, num_shots: int, language: str, seed: int) -> Dialogue:
    """MindSpeed-LLM's prompt of a chat model: solved questions drawn from the dev file, each a turn."""
    head, asked = _TURNS[language]
    title = subject.title if task == "cmmlu" and language == "zh" else subject.name
    messages = []
    for shot in drawn(subject.shots, num_shots, seed):
        messages += [Message(USER, f"{shot.text}{_options(shot)}{asked}"), Message(ASSISTANT, shot.answer)]
    messages.append(Message(USER, f"{question.text}{_options(question)}{asked}"))
    messages[0] = Message(USER, head.format(title=title) + messages[0].content)
    return Dialogue(tuple(messages), "")


def drawn(shots: Sequence[Question], number: int, seed: int) -> list[Question]:
    """`number` of some questions in the order in which a pandas frame's `sample` with this seed gives them."""
    places = np.random.RandomState(seed).choice(len(shots), size=min(number, len(shots)), replace=False)
    return [shots[place] for place in places]


# ----------------------------------------------------------------------------------------- the letter in a text


def letter_of(task: str, text: str, in_turns: bool) -> str:
    """The answer that a text gives; empty where there is none."""
    if task == "mmlu":
        text = text.lstrip()
        match = re.match(r".*([A-D])\.", text) or re.match(r"([A-D])", text)
        return match.group(1) if match else ""
    if task == "ceval":
        return next((letter for letter in text.strip() if letter.isupper()), "") if in_turns else text.strip()
    for pattern in CHINESE_PATTERNS:
        if match := re.search(pattern, text.strip(), re.DOTALL):
            last = match.group(0)[-1]
            if last in LETTERS:
                return last
    return ""


# In this order, each with the end of what it finds as the letter. Most are common to evaluations of Chinese sets.
_L = "([ABCD])"
CHINESE_PATTERNS = tuple(
    pattern.replace("LETTER", _L)
    for pattern in (
        *(rf"{start}\s*LETTER" for start in ("答案是?", r"答案是?\s*：", r"答案是?\s*:", "答案应该?是", "答案应该?选")),
        *(rf"{start}\s*LETTER" for start in ("答案为", "答案选", "选择?", "故选?")),
        *(rf"只有选?项?\s?LETTER\s?{end}" for end in ("是?对", "是?错", "不?正确", "错误")),
        *(rf"{start}选?项?的?是\s?LETTER" for start in ("说法不?对", "说法不?正确", "说法错误")),
        r"LETTER\s?是正确的",
        r"LETTER\s?是正确答案",
        r"选项\s?LETTER\s?正确",
        r"所以答\s?LETTER",
        *(rf"{start}\s?([ABCD][.。$]?$)" for start in ("所以", "所有")),
        r"[\s，：:,]LETTER[。，,\.]?$",
        r"[\s，,：:][故即]LETTER[。\.]?$",
        r"[\s，,：:]因此LETTER[。\.]?$",
        r"[是为。]\s?LETTER[。\.]?$",
        *(rf"{start}\s?LETTER[。\.]?$" for start in ("因此", "显然")),
        *(rf"{start}\s?(\S+)(?:。|$)" for start in ("答案是", "答案应该是", "答案为")),
        *(
            rf"[Tt]he {what}:?\s+\(?LETTER\)?"
            for what in (
                "answer is",
                "answer is option",
                "correct answer is",
                "correct answer is option",
                "answer to the question is",
            )
        ),
        r"^选项\s?LETTER",
        r"^LETTER\s?选?项",
        r"(\s|^)[ABCD][\s。，,：:\.$]",
        r"(\s|^)[ABCD](\s|$)",
        r"1.\s?(.*?)$",
        r"1.\s?LETTER[.。$]?$",
        r"LETTER:",
        "[ABCD]",
    )
)

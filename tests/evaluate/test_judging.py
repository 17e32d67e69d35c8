"""Prompts, answers found in texts, programs, and the paired test."""

from __future__ import annotations

import math

import pytest

from tessel.evaluate.compare import binomial_p
from tessel.evaluate.letters import choice_context, letter_of
from tessel.evaluate.passages import agieval_context, boolq_item, hellaswag_item
from tessel.evaluate.programs import run_program
from tessel.evaluate.questions import Question, Subject
from tessel.evaluate.worked import bbh_item, gsm8k_item, number_of

SHOT = Question(0, "One? ", ("a", "b", "c", "d"), "B")
ASKED = Question(3, "Two?", ("e", "f", "g", "h"), "C")


def test_prompts_of_log_probabilities() -> None:
    anatomy = Subject("anatomy", "解剖学", "stem", (ASKED,), (SHOT,))
    shot, asked = "One?\nA. a\nB. b\nC. c\nD. d\n答案： B\n\n", "Two?\nA. e\nB. f\nC. g\nD. h\n答案："
    head = "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
    assert choice_context("cmmlu", anatomy, ASKED, 1) == head + shot + asked
    head = "以下是中国关于解剖学的单项选择题，请选出其中的正确答案。\n\n"
    assert choice_context("ceval", anatomy, ASKED, 0) == head + asked
    english = Subject("world_religions", "world religions", "humanities", (ASKED,))
    assert choice_context("mmlu", english, ASKED, 0) == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "Two?\nA. e\nB. f\nC. g\nD. h\nAnswer:"
    )


def test_prompts_of_other_sets() -> None:
    question = Question(0, "is it", ("no", "yes"), "yes", {"passage": "It is."})
    assert boolq_item(Subject("boolq", "", "", ()), question).context == "It is.\nQuestion: is it?\nAnswer:"
    ending = hellaswag_item(Subject("hellaswag", "", "", ()), Question(0, "A man", ("goes", "is"), "1"))
    assert (ending.continuations, ending.right, ending.lengths) == ((" goes", " is"), ("1",), (4, 2))
    options = Question(0, "x?", ("(A)1", "(B)2", "(C)3"), "A", {"passage": "P. "})
    assert agieval_context(Subject("lsat-ar", "", "", ()), options) == (
        "P. Q: x? Answer Choices: (A)1 (B)2 (C)3\nA: Among A through C, the answer is"
    )
    assert agieval_context(Subject("logiqa-zh", "", "", ()), options) == (
        "P. 问题：x? 选项：(A)1 (B)2 (C)3\n答案：从A到C, 我们应选择"
    )
    solved = Question(0, "1+1?", (), "2\n#### 2")
    item = gsm8k_item(Subject("gsm8k", "", "", (), (solved,)), Question(0, "2+2?", (), "#### 4"), None)
    assert item.prompt == "Question: 1+1?\nAnswer: 2\n#### 2\n\nQuestion: 2+2?\nAnswer:"
    assert item.judge("so\n#### 4.00") == ("4", True) and item.judge("") == ("", False)
    hyper = bbh_item(Subject("hyperbaton", "", "", ()), Question(0, "q", (), "(A)"), None)
    assert hyper.judge(" (a).\nQ: more")[1] and not hyper.judge("(B)")[1]


@pytest.mark.parametrize(
    ("task", "text", "letter"),
    [
        ("mmlu", " B", "B"),
        ("mmlu", "The answer is C. So", "C"),
        ("mmlu", "The", ""),
        ("ceval", " D ", "D"),
        ("ceval", "D.", "D."),
        ("cmmlu", "答案是：A", "A"),
        ("cmmlu", "因此选择 C。", "C"),
        ("cmmlu", "不知道", ""),
    ],
)
def test_the_letter_in_a_text(task: str, text: str, letter: str) -> None:
    assert letter_of(task, text, in_turns=False) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5*3=15\n#### 1,500", "1500"),
        ("The answer is $12.50.", "12.5"),
        ("7 apples, then 9", "9"),
        ("-3", "-3"),
        ("none.", ""),
    ],
)
def test_the_number_in_a_solution(text: str, number: str) -> None:
    assert number_of(text) == number


def test_programs_run_within_limits() -> None:
    assert run_program("assert 1 + 1 == 2") == "passed"
    assert run_program("assert 1 + 1 == 3, 'no'") == "AssertionError: no"
    assert run_program("import sys; sys.exit(0)").startswith("ended with status 0 before")
    assert run_program("while True: pass", timeout_s=0.5) == "timed out"
    assert run_program("x = bytearray(5 << 30)") == "MemoryError"
    assert "File too large" in run_program("open('f', 'wb').write(bytes(32 << 20))")
    assert (
        run_program("import os; assert set(os.environ) <= {'PATH', 'HOME', 'OMP_NUM_THREADS', 'LC_CTYPE'}") == "passed"
    )


def test_the_paired_test_is_the_exact_binomial() -> None:
    assert binomial_p(0, 0) == binomial_p(3, 3) == 1.0
    assert binomial_p(5, 0) == pytest.approx(2 / 32)
    wanted = 2 * sum(math.comb(12, k) for k in range(3)) / 2**12
    assert binomial_p(10, 2) == binomial_p(2, 10) == pytest.approx(wanted)
    assert 0 < binomial_p(4000, 3800) < 0.05

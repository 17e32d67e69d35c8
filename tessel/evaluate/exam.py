"""The questions of `tessel evaluate`: read from the user's folder, and written as prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tessel.config.evaluate import LETTER_TASKS, EvaluateConfig
from tessel.data.instruct.render import render_prompt, renderer_for
from tessel.data.tokenizer import Tokenizer
from tessel.evaluate import letters, passages, programs, worked
from tessel.evaluate.items import ChoiceItem, TextItem
from tessel.evaluate.questions import LETTERS, Question, Subject, check_subjects, limited, read_letter_set

Item = ChoiceItem | TextItem


@dataclass(frozen=True)
class Exam:
    """Items in the order of subjects and questions; subject -> category; what to tell the user."""

    items: tuple[Item, ...]
    categories: dict[str, str]
    notes: tuple[str, ...]


def make_exam(cfg: EvaluateConfig, tokenizer: Tokenizer) -> Exam:
    """The questions that a checked configuration asks for.

    Raises:
        TesselError, UsageError: a file or subject is missing or damaged; see the readers.
    """
    subjects, notes = read_subjects(cfg)
    subjects = limited(subjects, cfg.limit, cfg.max_eval_samples)
    make = _maker(cfg, tokenizer)
    items = tuple(make(subject, question) for subject in subjects for question in subject.questions)
    return Exam(items, {subject.name: subject.category for subject in subjects}, notes)


def read_subjects(cfg: EvaluateConfig) -> tuple[list[Subject], tuple[str, ...]]:
    """The subjects in the folder, and notes."""
    (task,), folder, shots = cfg.task, cfg.data_path or "", cfg.num_fewshot or 0
    if task in LETTER_TASKS:
        subjects, note = read_letter_set(task, folder, shots, cfg.subjects)
        return subjects, (note,) if note else ()
    if task == "agieval":
        subjects, note = passages.read_agieval(folder, with_cloze=cfg.rule == "generate")
        return _only(subjects, cfg), (note,) if note else ()
    readers: dict[str, Callable[[], list[Subject]]] = {
        "boolq": lambda: passages.read_boolq(folder),
        "hellaswag": lambda: passages.read_hellaswag(folder),
        "gsm8k": lambda: worked.read_gsm8k(folder, shots),
        "bbh": lambda: worked.read_bbh(folder, shots),
        "human_eval": lambda: programs.read_human_eval(folder),
    }
    return _only(readers[task](), cfg), ()


def _only(subjects: Sequence[Subject], cfg: EvaluateConfig) -> list[Subject]:
    """Those of --subjects."""
    if not cfg.subjects:
        return list(subjects)
    found = {subject.name: subject for subject in subjects}
    check_subjects(cfg.subjects, found, cfg.data_path or "")
    return [found[name] for name in sorted(set(cfg.subjects))]


def _maker(cfg: EvaluateConfig, tokenizer: Tokenizer) -> Callable[[Subject, Question], Item]:
    (task,), most = cfg.task, cfg.max_new_tokens
    if task in LETTER_TASKS:
        if cfg.rule == "choice":
            return partial(_letter_choice, task, cfg.num_fewshot or 0)
        return _letter_text(cfg, tokenizer)
    if task == "agieval" and cfg.rule == "generate":
        return partial(passages.agieval_text_item, max_new_tokens=most)
    makers: dict[str, Callable[[Subject, Question], Item]] = {
        "boolq": passages.boolq_item,
        "hellaswag": passages.hellaswag_item,
        "agieval": passages.agieval_item,
        "gsm8k": partial(worked.gsm8k_item, max_new_tokens=most),
        "bbh": partial(worked.bbh_item, max_new_tokens=most),
        "human_eval": partial(programs.human_eval_item, max_new_tokens=most),
    }
    return makers[task]


def _letter_choice(task: str, num_shots: int, subject: Subject, question: Question) -> ChoiceItem:
    context = letters.choice_context(task, subject, question, num_shots)
    continuations = tuple(f" {letter}" for letter in LETTERS)
    return ChoiceItem((subject.name, question.index), context, LETTERS, continuations, (question.answer,))


def _letter_text(cfg: EvaluateConfig, tokenizer: Tokenizer) -> Callable[[Subject, Question], TextItem]:
    (task,), shots = cfg.task, cfg.num_fewshot or 0
    in_turns = cfg.prompt_type is not None or cfg.prompt_type_path is not None
    renderer = renderer_for(tokenizer, cfg.prompt_type, cfg.prompt_type_path) if in_turns else None
    language = cfg.eval_language or letters.language_of(task)

    def make(subject: Subject, question: Question) -> TextItem:
        def judge(text: str) -> tuple[str, bool]:
            prediction = letters.letter_of(task, text, in_turns)
            return prediction, prediction == question.answer

        prompt: str | tuple[int, ...]
        if renderer is None:
            prompt = letters.text_prompt(task, subject, question, shots)
        else:
            turns = letters.dialogue(task, subject, question, shots, language, cfg.seed)
            prompt = tuple(render_prompt(turns, renderer))
        # C-Eval's text must be the letter and nothing else.
        most = cfg.max_new_tokens or (1 if task == "ceval" and not in_turns else 4)
        return TextItem((subject.name, question.index), prompt, question.answer, judge, most)

    return make

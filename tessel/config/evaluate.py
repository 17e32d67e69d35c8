"""What `tessel evaluate` is asked to do, and its rules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from tessel.config.field import option
from tessel.config.generate_rules import check_loading
from tessel.config.layout import Launch
from tessel.config.nearest import nearest
from tessel.config.run import ModelShape
from tessel.config.tokenizer import Tokenizer
from tessel.config.verbs import Loading
from tessel.errors import UsageError

LETTER_TASKS = ("mmlu", "ceval", "cmmlu")
CHOICE_TASKS = (*LETTER_TASKS, "boolq", "hellaswag", "agieval")
TEXT_TASKS = (*LETTER_TASKS, "agieval", "gsm8k", "bbh", "human_eval")
TASKS = tuple(dict.fromkeys((*CHOICE_TASKS, *TEXT_TASKS)))
_ALIASES = {"c-eval": "ceval", "ceval-valid": "ceval", "humaneval": "human_eval"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation."""

    help_sections: ClassVar[frozenset[str]] = frozenset({"loading", "launch", "tokenizer"})

    task: tuple[str, ...] = option((), f"set of questions: {', '.join(TASKS)}; or --harness", nargs="+", metavar="NAME")
    data_path: str | None = option(None, "folder of the set's files", metavar="DIR", aliases=("--task-data-path",))
    rule: str = option(
        "auto",
        "choice: the likeliest answer; generate: what the model writes; auto: choice where there are answers",
        choices=("auto", "choice", "generate"),
    )
    num_fewshot: int | None = option(
        None, "solved questions before each one; 5 if not given (bbh: 3), of sets that have some"
    )
    subjects: tuple[str, ...] = option((), "of the set's subjects, these alone", nargs="+", metavar="NAME")
    limit: int | None = option(None, "most questions in all, dealt evenly over the subjects")
    max_eval_samples: int | None = option(None, "most questions of each subject")
    output: str | None = option(
        None, "folder for results.json, results.csv, questions.jsonl and a chart; a run that is cut short goes on here",
        metavar="DIR",
    )  # fmt: skip
    batch_size: int = option(16, "questions that are computed together", aliases=("--evaluation-batch-size",))
    max_new_tokens: int | None = option(None, "most tokens of an answer, with --rule generate")
    prompt_type: str | None = option(
        None, "solved questions are turns in this template, with --rule generate; hf: the tokenizer's", metavar="NAME"
    )
    prompt_type_path: str | None = option(None, "templates.json with --prompt-type in it", metavar="FILE")
    hf_chat_template: bool = option(False, "the same as --prompt-type hf")
    no_chat_template: bool = option(False, "plain prompts (the default)")
    eval_language: str | None = option(
        None, "language of the prompts of --prompt-type; the set's own if not given", choices=("en", "zh")
    )
    seed: int = option(42, "seed of which solved questions --prompt-type shows")
    allow_code_execution: bool = option(False, "run the programs that the model writes for human_eval")
    suite_table: bool = option(False, "print the figures as MindSpeed-LLM's evaluation.py does")
    compare: str | None = option(
        None, "folder of another --output: compare with it, question by question, by a paired test", metavar="DIR"
    )
    harness: bool = option(False, "--task names tasks of lm-evaluation-harness (pip install tessel[harness])")
    data_dir: tuple[str, ...] = option(
        (),
        "with --harness, folders to read sets from: of mmlu, ceval-valid, cmmlu, or of a single task such as gsm8k",
        nargs="+",
        metavar="TASK=DIR",
    )
    loading: Loading
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    launch: Launch = field(default_factory=Launch)
    model: ModelShape = field(default_factory=ModelShape)


def validate_evaluate(cfg: EvaluateConfig) -> EvaluateConfig:
    """Check the flags; one task, its rule and its number of solved questions are filled in.

    Raises:
        UsageError: a rule is broken.
    """
    if cfg.compare is not None and (cfg.output is None or cfg.harness):
        raise UsageError("--compare DIR needs --output DIR, the folder that it is compared with, and no --harness.")
    if not cfg.task:
        if cfg.compare is not None:
            return cfg
        raise UsageError(f"tessel evaluate needs --task NAME: {', '.join(TASKS)}; or --output DIR --compare DIR.")
    check_loading(cfg.loading)
    _check_numbers(cfg)
    if cfg.harness:
        return _for_harness(cfg)
    if cfg.data_dir:
        raise UsageError("--data-dir TASK=DIR belongs to --harness; without it, the folder is --data-path DIR.")
    cfg = _with_rule(replace(cfg, task=(_task_of(cfg.task),)))
    if cfg.data_path is None:
        raise UsageError(f"--task {cfg.task[0]} needs --data-path DIR with the set's files: nothing is downloaded.")
    return _check_prompts(cfg)


def _for_harness(cfg: EvaluateConfig) -> EvaluateConfig:
    if cfg.data_path is not None:
        raise UsageError("--harness reads the folders of --data-dir TASK=DIR: give that instead of --data-path.")
    names = [
        name
        for name in ("subjects", "max_eval_samples", "max_new_tokens", "eval_language", "suite_table")
        if getattr(cfg, name)
    ]
    if names or cfg.rule != "auto":
        name = (names or ["rule"])[0].replace("_", "-")
        raise UsageError(f"--{name} does nothing with --harness, whose tasks say that themselves: leave it out.")
    if cfg.prompt_type not in (None, "hf") or cfg.prompt_type_path is not None:
        raise UsageError("--harness knows the tokenizer's own template alone: give --prompt-type hf, or none.")
    prompt_type = "hf" if cfg.hf_chat_template else cfg.prompt_type
    tasks = tuple(name for word in cfg.task for name in word.split(",") if name)
    return replace(cfg, task=tasks, prompt_type=prompt_type)


def _task_of(words: tuple[str, ...]) -> str:
    if len(words) > 1:
        raise UsageError(f"--task names {len(words)} sets, and one command evaluates one: run it once for each.")
    name = _ALIASES.get(words[0].lower(), words[0].lower())
    if name not in TASKS:
        near = nearest(name, TASKS)
        remedy = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(TASKS)}, and others with --harness"
        raise UsageError(f"--task {words[0]} is unknown; {remedy}.")
    return name


def _with_rule(cfg: EvaluateConfig) -> EvaluateConfig:
    (task,) = cfg.task
    rule = cfg.rule
    if rule == "auto":
        rule = "choice" if task in CHOICE_TASKS else "generate"
    if task not in (CHOICE_TASKS if rule == "choice" else TEXT_TASKS):
        other = "generate" if rule == "choice" else "choice"
        raise UsageError(f"--rule {rule} is not there for --task {task}: use --rule {other}.")
    if task == "human_eval" and not cfg.allow_code_execution:
        raise UsageError(
            "--task human_eval runs programs that the model has written: allow that with --allow-code-execution, on a "
            "machine that has nothing to lose."
        )
    return replace(cfg, rule=rule)


def _check_prompts(cfg: EvaluateConfig) -> EvaluateConfig:
    (task,) = cfg.task
    if cfg.hf_chat_template:
        if cfg.prompt_type not in (None, "hf"):
            raise UsageError("--hf-chat-template and --prompt-type name two templates: keep one of them.")
        cfg = replace(cfg, prompt_type="hf")
    has_template = cfg.prompt_type is not None or cfg.prompt_type_path is not None
    if has_template and (cfg.rule == "choice" or task not in LETTER_TASKS):
        raise UsageError(
            f"--prompt-type writes solved questions as turns for --rule generate of {', '.join(LETTER_TASKS)}: give "
            "--rule generate, or leave it out."
        )
    fixed = task in ("boolq", "hellaswag", "agieval", "human_eval")
    if cfg.num_fewshot is not None and fixed:
        raise UsageError(f"--num-fewshot is not there for --task {task}, whose prompt is fixed: leave it out.")
    if cfg.num_fewshot is None and not fixed:
        cfg = replace(cfg, num_fewshot=3 if task == "bbh" else 5)
    return cfg


def _check_numbers(cfg: EvaluateConfig) -> None:
    for name in ("limit", "max_eval_samples", "batch_size", "max_new_tokens"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
    if cfg.num_fewshot is not None and cfg.num_fewshot < 0:
        raise UsageError(f"--num-fewshot is {cfg.num_fewshot}: it must not be negative.")

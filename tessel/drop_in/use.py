"""inference.py and evaluation.py in terms of `tessel generate`, `tessel chat` and `tessel evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tessel.drop_in.arguments import Arguments
from tessel.drop_in.commands import Command, Translation
from tessel.errors import UsageError

_DEMOS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling")
_PROMPT = "how are you?"
_GENERATION_DEFAULTS = {"--top-p": "0.95", "--top-k": "50", "--temperature": "0.7"}
_PRECISIONS = ("--bf16", "--fp16", "--fp32")
_DTYPES = {"bfloat16": "--bf16", "float16": "--fp16"}
_OF_DIALOGUES = ("--history-turns",)


def generation(suite: str, arguments: Arguments) -> Translation:
    """inference.py: the tasks that are asked for, or its demonstrations on its own prompt."""
    del suite
    remarks = ["sampling is the suite's where not given: top-p 0.95, top-k 50, temperature 0.7"]
    tasks = arguments.values("--task") or (*_DEMOS, "chat")
    if not arguments.has("--task") and not _has_template(arguments):
        tasks = _DEMOS
        remarks.append("no chat: neither --prompt-type nor the tokenizer's folder says how dialogues are written")
    rest = _with_precision(arguments.without("--task", "--max-length"))
    for flag, value in _GENERATION_DEFAULTS.items():
        if not rest.has(flag):
            rest = rest.plus(flag, value)
    commands = []
    for task in tasks:
        if task == "chat":
            commands.append(Command("chat", rest))
            continue
        own = rest.without(*_OF_DIALOGUES)
        prompt = () if own.has("--prompt") or own.has("--prompt-file") else ("--prompt", _PROMPT)
        commands.append(Command("generate", own.plus("--task", task, *prompt)))
    return Translation(tuple(commands), tuple(remarks))


def evaluation(suite: str, arguments: Arguments) -> Translation:
    """evaluation.py: each task by what the model writes, as the suite judges it; --rule choice is tessel's own."""
    del suite
    arguments = _with_precision(arguments)
    tasks = arguments.values("--task")
    folders = arguments.values("--task-data-path")
    rest = arguments.without("--task", "--task-data-path")
    if not rest.has("--rule"):
        rest = rest.plus("--rule", "generate")
    commands = []
    for index, task in enumerate(tasks or ("",)):
        words = ["--task", task] if task else []
        if folders:
            words += ["--data-path", folders[min(index, len(folders) - 1)]]
        commands.append(Command("evaluate", rest.plus(*words)))
    return Translation(tuple(commands), ("answers are judged by what the model writes; --rule choice by likelihood",))


def harness(suite: str, arguments: Arguments) -> Translation:
    """`lm_eval --model hf` of the harness that Pai bundles: each task by likelihood, on a folder of its name nearby.

    Raises:
        UsageError: another kind of model, or no folder of questions.
    """
    del suite
    if arguments.value("--model") not in (None, "hf"):
        raise UsageError(f"--model {arguments.value('--model')}: tessel evaluates local models, --model hf.")
    model = dict(part.partition("=")[::2] for part in (arguments.value("--model-args") or "").split(","))
    if not model.get("pretrained"):
        raise UsageError("--model_args needs pretrained=DIR, the model's folder.")
    remarks = ["trust_remote_code is left out: code of a model's folder is never run"] * ("trust_remote_code" in model)
    commands = []
    for task in (arguments.value("--tasks") or "").split(","):
        words = ["--load", model["pretrained"], "--task", task, "--rule", "choice", "--data-path", _questions(task)]
        if arguments.has("--batch-size"):
            words += ["--batch-size", *arguments.values("--batch-size")]
        commands.append(Command("evaluate", _with_precision(Arguments.read(words))))
    return Translation(tuple(commands), tuple(remarks))


def _questions(task: str) -> str:
    """The folder of a task's questions: of its name, here or beside this folder."""
    name = task.removesuffix("-valid")
    found = next((str(path) for path in (Path(name), Path("..") / name) if path.is_dir()), None)
    if not task or found is None:
        raise UsageError(f"--tasks {task!r}: there is no folder {name} here or beside this one with its questions.")
    return found


def _with_precision(arguments: Arguments) -> Arguments:
    """The precision that the model is stored in, where none is given."""
    if any(arguments.has(flag) for flag in _PRECISIONS):
        return arguments
    config = _json(arguments.value("--load"), "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return arguments.plus(_DTYPES[dtype]) if dtype in _DTYPES else arguments


def _has_template(arguments: Arguments) -> bool:
    """Whether there is a template for dialogues."""
    if arguments.has("--prompt-type") or arguments.has("--inference-prompt-type"):
        return True
    folder = arguments.value("--tokenizer-name-or-path") or arguments.value("--load") or ""
    return (Path(folder) / "chat_template.jinja").exists() or "chat_template" in _json(folder, "tokenizer_config.json")


def _json(folder: str | None, name: str) -> dict[str, Any]:
    """An object in a folder; an empty one where it cannot be read, which a verb will say in its own words."""
    try:
        content = json.loads((Path(folder or "") / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

"""inference.py and evaluation.py in terms of `tessel generate`, `tessel chat` and `tessel evaluate`."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from tessel.drop_in.arguments import Arguments
from tessel.drop_in.commands import Command, Translation
from tessel.errors import TesselError, UsageError

_DEMOS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling")
_PROMPT = "how are you?"
_GENERATION_DEFAULTS = {"--top-p": "0.95", "--top-k": "50", "--temperature": "0.7"}
_PRECISIONS = ("--bf16", "--fp16", "--fp32")
_DTYPES: dict[str | None, str] = {"bfloat16": "--bf16", "float16": "--fp16", "float32": "--fp32"}
_OF_THE_HARNESS = {
    "--model": "",
    "--model-args": "",
    "--tasks": "",
    "--trust-remote-code": "",
    "--log-samples": "",
    "--batch-size": "--batch-size",
    "--num-fewshot": "--num-fewshot",
    "--limit": "--limit",
    "--output-path": "--output",
    "--device": "--device",
    "--apply-chat-template": "--hf-chat-template",
}
"""Flag of lm_eval -> that of `tessel evaluate`; "": it is read here, or done anyway."""
_MODEL_ARGS = ("pretrained", "trust_remote_code", "dtype")
_OF_DIALOGUES = ("--history-turns",)


def generation(suite: str, arguments: Arguments) -> Translation:
    """inference.py: the tasks that are asked for, or its demonstrations on its own prompt."""
    del suite
    remarks = ["sampling is the suite's where not given: top-p 0.95, top-k 50, temperature 0.7"]
    tasks = arguments.values("--task") or (*_DEMOS, "chat")
    if not arguments.has("--task") and not _has_template(arguments):
        tasks = _DEMOS
        remarks.append("no chat: neither --prompt-type nor the tokenizer's folder says how dialogues are written")
    rest, said = _of_one_replica(_with_precision(arguments.without("--task", "--max-length")))
    remarks += said
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


def _of_one_replica(arguments: Arguments) -> tuple[Arguments, list[str]]:
    """As many processes as one model is cut for: the suites' others write the same texts once more."""
    degrees = [
        arguments.value(flag) or "1" for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size")
    ]
    number = arguments.value("--nproc-per-node")
    if number is None or not all(word.isdecimal() for word in (number, *degrees)):
        return arguments, []
    needed = math.prod(map(int, degrees))
    if int(number) <= needed or arguments.value("--nnodes") not in (None, "1"):
        return arguments, []
    remark = f"{needed} of {number} processes: a text is written once, and the model is cut for so many"
    return arguments.without("--nproc-per-node").plus("--nproc-per-node", str(needed)), [remark]


def evaluation(suite: str, arguments: Arguments) -> Translation:
    """evaluation.py: each task by what the model writes, as the suite judges it; --rule choice is tessel's own."""
    del suite
    arguments = _with_precision(arguments)
    tasks = arguments.values("--task")
    folders = arguments.values("--task-data-path")
    rest = arguments.without("--task", "--task-data-path")
    if not rest.has("--rule"):
        rest = rest.plus("--rule", "generate")
    rest = rest.plus("--suite-table")
    commands = []
    for index, task in enumerate(tasks or ("",)):
        words = ["--task", task] if task else []
        if folders:
            words += ["--data-path", folders[min(index, len(folders) - 1)]]
        commands.append(Command("evaluate", rest.plus(*words)))
    return Translation(tuple(commands), ("answers are judged by what the model writes; --rule choice by likelihood",))


def harness(suite: str, arguments: Arguments) -> Translation:
    """`lm_eval --model hf` of the harness that Pai bundles, on a folder of each task's name nearby.

    The installed harness does it; where there is none, tessel's own rule, whose prompts and scores are the same.

    Raises:
        UsageError: another kind of model, no folder of questions, or a setting that has no place here.
    """
    del suite
    _check_harness(arguments)
    if arguments.value("--model") not in (None, "hf"):
        raise UsageError(f"--model {arguments.value('--model')}: tessel evaluates local models, --model hf.")
    model = dict(part.partition("=")[::2] for part in (arguments.value("--model-args") or "").split(","))
    if not model.get("pretrained"):
        raise UsageError("--model_args needs pretrained=DIR, the model's folder.")
    remarks = []
    if "trust_remote_code" in model or arguments.has("--trust-remote-code"):
        remarks.append("trust_remote_code is left out: code of a model's folder is never run")
    tasks = (arguments.value("--tasks") or "").split(",")
    words = ["--load", model["pretrained"]]
    for flag, own in _OF_THE_HARNESS.items():
        if own and arguments.has(flag) and arguments.value(flag) != "auto":
            words += [
                own,
                *(value.partition(":")[0] if own == "--device" else value for value in arguments.values(flag)),
            ]
    if model.get("dtype") in _DTYPES:
        words.append(_DTYPES[model["dtype"]])
    rest = _with_precision(Arguments.read(words))
    if _has_harness():
        folders = [f"{task}={_questions(task)}" for task in tasks]
        return Translation(
            (Command("evaluate", rest.plus("--harness", "--task", *tasks, "--data-dir", *folders)),), tuple(remarks)
        )
    remarks.append("lm-eval is not installed (pip install tessel[harness]): tessel asks the same questions by itself")
    commands = []
    for task in tasks:
        words = ["--task", task, "--rule", "choice", "--data-path", _questions(task)]
        commands.append(Command("evaluate", rest.plus(*words)))
    return Translation(tuple(commands), tuple(remarks))


def _has_harness() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def _check_harness(arguments: Arguments) -> None:
    wrong = [given.flag for given in arguments.given if given.flag not in _OF_THE_HARNESS]
    model = dict(part.partition("=")[::2] for part in (arguments.value("--model-args") or "").split(","))
    wrong += [f"--model_args {name}" for name in model if name and name not in _MODEL_ARGS]
    if wrong:
        raise UsageError(
            f"lm_eval {wrong[0]} has no place here: tessel takes {', '.join(_OF_THE_HARNESS)}, and "
            f"{', '.join(_MODEL_ARGS)} in --model-args. tessel evaluate --harness has more."
        )


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
    flag = _DTYPES.get(_stored_dtype(arguments))
    return arguments if flag is None else arguments.plus(flag)


def _stored_dtype(arguments: Arguments) -> str | None:
    """The name of the dtype of most weights; None where there are none, which a verb will say in its own words."""
    load = arguments.value("--load")
    if load is None or not Path(load).exists():
        return None
    from tessel.generate.engine import find_model

    try:
        source = find_model(load, arguments.value("--hf-dir") or arguments.value("--hf-cfg-dir"))
    except TesselError:
        return None
    if source.stored is not None:
        return str(source.stored.dtypes[0]).removeprefix("torch.")
    config = _json(source.folder, "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if isinstance(dtype, str) else None


def _has_template(arguments: Arguments) -> bool:
    """Whether there is a template for dialogues."""
    if arguments.has("--prompt-type") or arguments.has("--inference-prompt-type"):
        return True
    folder = arguments.value("--tokenizer-name-or-path") or arguments.value("--load") or ""
    return (Path(folder) / "chat_template.jinja").exists() or "chat_template" in _json(folder, "tokenizer_config.json")


def _json(folder: str | Path | None, name: str) -> dict[str, Any]:
    """An object in a folder; an empty one where it cannot be read, which a verb will say in its own words."""
    try:
        content = json.loads((Path(folder or "") / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

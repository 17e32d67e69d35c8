"""pretrain_gpt.py and posttrain_gpt.py in terms of `tessel pretrain`."""

from __future__ import annotations

from pathlib import Path

from tessel.config.run import ModelShape
from tessel.config.schema import convert, options
from tessel.drop_in.arguments import Arguments, Given
from tessel.drop_in.aside import set_aside
from tessel.drop_in.commands import Command, Translation
from tessel.errors import TesselError

_FORMATS = {"mindspeed": "torch", "modellink": "torch", "pai": "torch_dist"}
"""What a suite saves by itself."""

_MAY_DIFFER = ("--norm-epsilon", "--layernorm-epsilon", "--rotary-base")
"""Shape flags that the suites' scripts are known to have wrong; others that contradict a model are errors."""


def training(suite: str, arguments: Arguments) -> Translation:
    """Train as the suite's program would: from the same start, on the same data, with its own format beside hf/."""
    remarks: list[str] = []
    for step in (_start, _data, _model, _machines, _saving, set_aside):
        arguments, said = step(suite, arguments)
        remarks += said
    if not arguments.has("--attention-dropout") or not arguments.has("--hidden-dropout"):
        remarks.append("dropout is 0 where --attention-dropout and --hidden-dropout are not given; the suite's is 0.1")
    return Translation((Command("pretrain", arguments),), tuple(remarks))


def _start(suite: str, arguments: Arguments) -> tuple[Arguments, list[str]]:
    """An empty --load is a random start, of the shape beside the tokenizer."""
    del suite
    if arguments.value("--load") or arguments.has("--init-from-config"):
        return arguments, []
    arguments = arguments.without("--load")
    folder = _tokenizer_folder(arguments)
    if folder is None or not (folder / "config.json").exists():
        return arguments, []
    remark = f"no checkpoint is given: the start is random, of the shape in {folder / 'config.json'}"
    return arguments.plus("--init-from-config", str(folder)), [remark]


def _data(suite: str, arguments: Arguments) -> tuple[Arguments, list[str]]:
    """A dataset's file in place of its prefix is taken for the prefix."""
    del suite
    given, remarks = [], []
    for item in arguments.given:
        if item.flag.endswith("data-path"):
            values = tuple(_prefix(value) for value in item.values)
            if values != item.values:
                remarks.append(f"{item.flag} names a file: its prefix is taken")
            item = Given(item.flag, values)
        given.append(item)
    return Arguments(tuple(given)), remarks


def _prefix(path: str) -> str:
    stem = path.removesuffix(".bin").removesuffix(".idx")
    return stem if Path(f"{stem}.idx").exists() else path


def _model(suite: str, arguments: Arguments) -> tuple[Arguments, list[str]]:
    """Where config.json says something else than a flag that scripts have wrong, config.json counts."""
    del suite
    folder = _model_folder(arguments)
    if folder is None:
        return arguments, []
    from tessel.model.config import ModelConfig
    from tessel.model.shape import contradictions

    config = ModelConfig.from_folder(folder)
    remarks = []
    for flag in _MAY_DIFFER:
        value = arguments.value(flag)
        if value is None:
            continue
        option = next(o for o in options(ModelShape) if flag in o.spellings)
        shape = ModelShape(**{option.name: convert(option, value, flag)})
        wrong = contradictions(config, shape, {option.name})
        if wrong:
            arguments = arguments.without(flag)
            remarks.append(f"{wrong[0]}: the model counts")
    return arguments, remarks


def _machines(suite: str, arguments: Arguments) -> tuple[Arguments, list[str]]:
    """--no-shared-storage, which scripts have for several machines, says nothing on one."""
    del suite
    is_alone = arguments.has("--nproc-per-node") and arguments.value("--nnodes") in (None, "1")
    if not is_alone or not arguments.has("--no-shared-storage"):
        return arguments, []
    return arguments.without("--no-shared-storage"), ["--no-shared-storage is left out: this is one machine"]


def _saving(suite: str, arguments: Arguments) -> tuple[Arguments, list[str]]:
    """The suite's own format, too, so that its other programs can read what was trained."""
    if not arguments.has("--save") or arguments.has("--ckpt-format"):
        return arguments, []
    if arguments.has("--lora-r") or arguments.has("--lora-load"):
        return arguments, ["of adapters the adapters alone are saved, as peft has them; --lora-load takes the folder"]
    name = _FORMATS[suite]
    if arguments.has("--no-shared-storage"):
        remark = f"with --no-shared-storage each machine keeps its part of a checkpoint: in no {name}, but in torch_dcp"
        return arguments, [remark]
    return arguments.plus("--ckpt-format", name), [f"checkpoints are saved in the suite's format {name}, and hf/ last"]


def _model_folder(arguments: Arguments) -> Path | None:
    """The first folder with a config.json among those that the flags name, or beside the checkpoint in them."""
    names = [arguments.value(flag) for flag in ("--load", "--init-from-config", "--hf-dir")]
    return next((found for name in names if name and (found := config_folder(name)) is not None), None)


def config_folder(name: str) -> Path | None:
    """The folder with the config.json of a model in any format; None where there is none."""
    folder = Path(name)
    if (folder / "config.json").exists():
        return folder
    if not folder.is_dir():
        return None
    from tessel.checkpoint.detect import companion_folder

    try:
        found = companion_folder(folder)
    except TesselError:  # no checkpoint: the verb says so
        return None
    return found if found is not None and (found / "config.json").exists() else None


def _tokenizer_folder(arguments: Arguments) -> Path | None:
    name = arguments.value("--tokenizer-name-or-path") or arguments.value("--tokenizer-model")
    if name is None:
        return None
    return Path(name) if Path(name).is_dir() else Path(name).parent

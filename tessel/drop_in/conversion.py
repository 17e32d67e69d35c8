"""The suites' converters in terms of `tessel convert`."""

from __future__ import annotations

from pathlib import Path

from tessel.drop_in.arguments import Arguments
from tessel.drop_in.commands import Command, Translation
from tessel.errors import UsageError

_DIRECTIONS = (
    "--load-model-type",
    "--save-model-type",
    "--loader",
    "--saver",
    "--cvt-type",
    "--mg-dir",
    "--mcore2hf",
    "--use-mcore-models",
    "--target-ckpt-format",
)
_OTHER_FAMILIES = (
    "baichuan", "baichuan2", "bloom", "bloom_3b", "chatglm3", "deepseek2", "deepseek2-lite", "deepseek3", "deepseek32",
    "gemma", "gemma2", "glm4", "glm45-moe", "grok1", "hunyuan", "internlm2", "minicpm", "minicpm-moe", "minicpm3",
    "phi3.5", "phi3.5-moe", "plm", "qwen", "qwen3-next", "seed-oss", "bailing_mini", "magistral",
)  # fmt: skip
_RESULT = {"mindspeed": "mg2hf", "modellink": "mg2hg", "pai": "mg2hf"}
"""Folder that the first converter makes in the original model's."""


def first_converter(suite: str, arguments: Arguments) -> Translation:
    """convert_ckpt.py of MindSpeed-LLM and ModelLink."""
    _check_family(arguments)
    is_mcore = arguments.has("--use-mcore-models")
    return _converted(suite, arguments, _is_to_hf(arguments), "torch" if is_mcore else "legacy", "v1")


def second_converter(suite: str, arguments: Arguments) -> Translation:
    """convert_ckpt_v2.py of MindSpeed-LLM, and its convert_param.py."""
    _check_family(arguments)
    if arguments.has("--cvt-type"):
        arguments = _with_folders(arguments)
    return _converted(suite, arguments, _is_to_hf(arguments), "torch", "v2")


def distributed_converter(suite: str, arguments: Arguments) -> Translation:
    """impl/convert.py of Pai-Megatron-Patch's distributed_checkpoints_convertor."""
    to = arguments.value("--target-ckpt-format") or "torch_dist"
    return _converted(suite, arguments, arguments.has("--mcore2hf"), to, "pai")


def _is_to_hf(arguments: Arguments) -> bool:
    wanted = arguments.value("--save-model-type") or ""
    return wanted == "hf" or wanted.startswith("save_huggingface") or arguments.value("--cvt-type") == "mg2hf"


def _with_folders(arguments: Arguments) -> Arguments:
    """--hf-dir and --mg-dir of convert_param.py as --load-dir and --save-dir."""
    hf, mg = arguments.value("--hf-dir") or "", arguments.value("--mg-dir") or ""
    rest = arguments.without("--hf-dir", "--mg-dir")
    if arguments.value("--cvt-type") == "mg2hf":
        return rest.plus("--load-dir", mg, "--save-dir", hf)
    return rest.plus("--load-dir", hf, "--save-dir", mg)


def _converted(suite: str, arguments: Arguments, is_to_hf: bool, megatron: str, flavour: str) -> Translation:
    remarks = []
    rest = arguments.without(*_DIRECTIONS)
    if is_to_hf and flavour == "v1":
        rest, said = _beside_the_original(suite, rest)
        remarks += said
    elif is_to_hf:
        rest = rest.plus("--to", "hf")
    else:
        rest = rest.plus("--to", megatron)
        if megatron == "torch":
            rest = rest.plus("--flavour", flavour)
    if flavour == "v1" and not arguments.has("--params-dtype"):
        remarks.append(
            "without --params-dtype the suite writes fp16; here tensors keep the dtype that they are stored in"
        )
    return Translation((Command("convert", rest),), tuple(remarks))


def _beside_the_original(suite: str, arguments: Arguments) -> tuple[Arguments, list[str]]:
    """The suites' --save-dir is the original model, and the result a folder in it."""
    save = arguments.value("--save-dir")
    if save is None:
        return arguments.plus("--to", "hf"), []
    result = str(Path(save) / _RESULT[suite])
    rest = arguments.without("--save-dir").plus("--to", "hf", "--save", result)
    if (Path(save) / "config.json").exists() and not arguments.has("--hf-dir") and not arguments.has("--hf-cfg-dir"):
        rest = rest.plus("--hf-dir", save)
    return rest, [f"the model is written to {result}, as by the suite"]


def _check_family(arguments: Arguments) -> None:
    names = {
        arguments.value("--model-type-hf") or "",
        (arguments.value("--loader") or "").removesuffix("_hf"),
        arguments.value("--model-name") or "",
    }
    for name in sorted(names & set(_OTHER_FAMILIES)):
        raise UsageError(
            f"{name} is not a family that tessel knows by name. If it computes what a Llama or a Qwen does under other "
            "names, docs/MIGRATION.md says how to bring it."
        )

"""What a checkpoint in one of Megatron's formats, or of a run, holds; and how two checkpoints of any formats differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessel.report.facts import Report, bytes_text, count_text, folder_bytes

if TYPE_CHECKING:
    from tessel.checkpoint.stored import StoredModel, StoredTensor

_MAX_NAMED = 8
_STATE_NUMBERS = ("consumed_train_samples", "step", "num_floating_point_operations_so_far")


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a checkpoint in one of Megatron's formats."""
    from tessel.checkpoint.detect import format_of

    return format_of(folder) in ("torch", "torch_dist", "legacy")


def checkpoint_report(model: StoredModel, list_tensors: bool) -> Report:
    """The report on an opened checkpoint; its weights are read for `list_tensors` alone."""
    data = model_values(model)
    config = model.config
    data |= {
        "kind": f"{model.format} checkpoint",
        "path": str(model.folder),
        "family": config.family,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "experts": config.num_experts,
        "tokenizer": any(name.startswith("tokenizer") for name in model.side_files),
        "guessed": list(model.guessed),
        "notes": list(model.notes),
        "left_out": list(model.left_out),
        "bytes": folder_bytes(model.folder),
    }
    tail = []
    if list_tensors:
        data["tensor_list"] = list(tensor_entries(model.tensors))
        tail = [tensor_line(entry) for entry in data["tensor_list"]]
    return Report(f"{model.folder}: a checkpoint in the {model.format} format", _facts(model, data), data, tail)


def model_values(model: StoredModel) -> dict[str, Any]:
    """What is true of a checkpoint of any format: parameters, dtypes, iteration, degrees, optimizer."""
    from tessel.checkpoint.stored import name_of

    kinds: dict[str, int] = {}
    for name in model.optimizer:
        kinds[name.partition(".")[0]] = kinds.get(name.partition(".")[0], 0) + 1
    return {
        "format": model.format,
        "iteration": model.iteration,
        "degrees": dict(model.degrees),
        "parameters": sum(math.prod(tensor.shape) for tensor in model.tensors.values()),
        "tensors": len(model.tensors),
        "dtypes": [name_of(dtype) for dtype in model.dtypes],
        "layers_by_file": _layers_by_file(model),
        "optimizer": kinds,
        "state": {key: model.state[key] for key in _STATE_NUMBERS if key in model.state},
        "schedule": {key: _plain(value) for key, value in dict(model.state.get("opt_param_scheduler") or {}).items()},
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _facts(model: StoredModel, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    from tessel.checkpoint.stored import degrees_text

    config = model.config
    iteration = "a release: weights alone" if model.iteration is None else str(model.iteration)
    facts = [
        ("family", config.family),
        ("parameters", f"{count_text(data['parameters'])} in {data['tensors']} tensors, {', '.join(data['dtypes'])}"),
        ("iteration", iteration),
        ("degrees", degrees_text(model.degrees) or "one rank"),
        ("layers", f"{config.num_hidden_layers}, hidden size {config.hidden_size}, MLP {config.intermediate_size}"),
        (
            "vocabulary",
            f"{config.vocab_size} rows, output layer {'tied' if config.tie_word_embeddings else 'of its own'}",
        ),
    ]
    if config.num_experts:
        facts.append(("experts", f"{config.num_experts}, {config.num_experts_per_tok} of them see a token"))
    facts += [("stage", f"{name}: layers {_numbers(layers)}") for name, layers in data["layers_by_file"].items()]
    facts.append(("optimizer", optimizer_text(data)))
    facts.append(("tokenizer", "travels along" if data["tokenizer"] else "none"))
    facts.append(("on disk", bytes_text(data["bytes"])))
    for label, lines in (("guessed", model.guessed), ("note", model.notes), ("left out", model.left_out)):
        facts += [(label, line) for line in lines]
    return facts


def optimizer_text(data: Mapping[str, Any]) -> str:
    """Which states there are, and the counters."""
    if not data["optimizer"]:
        return "none"
    text = ", ".join(f"{kind} of {count} tensors" for kind, count in data["optimizer"].items())
    numbers = [f"{key} {value:,}" for key, value in data["state"].items() if isinstance(value, int | float)]
    return "; ".join([text, *numbers])


def _layers_by_file(model: StoredModel) -> dict[str, list[int]]:
    """Of the torch and legacy formats: the layers in the first tensor-parallel rank's file of each stage."""
    if model.format not in ("torch", "legacy"):
        return {}
    folders: dict[int, set[str]] = {}
    for name, tensor in model.tensors.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is not None and name.endswith("input_layernorm.weight"):
            folders.setdefault(layer, set()).update(path.parent.name for path in _paths(tensor))
    found: dict[str, list[int]] = {}
    for layer, names in folders.items():
        found.setdefault(min(names), []).append(layer)
    return dict(sorted(found.items()))


def _paths(tensor: StoredTensor) -> set[Path]:
    from tessel.checkpoint.stored import Assembled

    if isinstance(tensor, Assembled):
        return {path for piece in tensor.pieces for path in _paths(piece.source)}
    return {tensor.path}


def _numbers(numbers: list[int]) -> str:
    """`0-3, 8-11`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def tensor_entries(tensors: Mapping[str, StoredTensor]) -> Iterator[dict[str, Any]]:
    """Name, shape, dtype and norm of each, which is read for it."""
    from tessel.checkpoint.stored import name_of
    from tessel.convert.compare import norm_of

    for name, tensor in tensors.items():
        dtype = name_of(tensor.dtype)
        yield {"name": name, "shape": list(tensor.shape), "dtype": dtype, "norm": norm_of(tensor)}


def tensor_line(entry: Mapping[str, Any]) -> str:
    """A tensor in a line, with its norm."""
    return f"    {entry['name']}  {entry['shape']}  {entry['dtype']}  norm {entry['norm']:.6g}"


def diff_report(first: StoredModel, second: StoredModel) -> Report:
    """In what two checkpoints differ: configuration, layout, counters, and each tensor that is not the same.

    Both are read whole.
    """
    from tessel.convert.compare import compare

    settings = dict(_config_differences(first, second))
    comparison = compare(first, second, None, None)
    differences = {difference.name: difference.what for difference in comparison.differences}
    data = {
        "kind": "difference",
        "first": {"path": str(first.folder), **model_values(first)},
        "second": {"path": str(second.folder), **model_values(second)},
        "settings": {name: list(values) for name, values in settings.items()},
        "equal_tensors": len(comparison.digests),
        "different_tensors": differences,
    }
    facts = [(name, f"{one} in the first, {other} in the second") for name, (one, other) in settings.items()]
    facts.append(("tensors", f"{len(comparison.digests)} equal, {len(differences)} different"))
    tail = [f"    {name} {what}" for name, what in differences.items()]
    return Report(f"{first.folder} against {second.folder}", facts, data, tail)


def _config_differences(first: StoredModel, second: StoredModel) -> Iterable[tuple[str, tuple[Any, Any]]]:
    for name in ("format", "iteration"):
        if getattr(first, name) != getattr(second, name):
            yield name, (getattr(first, name), getattr(second, name))
    if dict(first.degrees) != dict(second.degrees):
        from tessel.checkpoint.stored import degrees_text

        yield "degrees", tuple(degrees_text(model.degrees) or "one rank" for model in (first, second))  # type: ignore[misc]
    for field in fields(first.config):
        one, other = getattr(first.config, field.name), getattr(second.config, field.name)
        if field.compare and one != other:
            yield field.name, (one, other)
    for name in _STATE_NUMBERS:
        one, other = first.state.get(name, 0), second.state.get(name, 0)
        if one != other:
            yield name, (one, other)

"""What a Hugging Face folder or a safetensors file holds: config.json and the headers, no weights are read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tessel.checkpoint.names import places_of
from tessel.data.tokenizer import HuggingFaceTokenizer, has_tokenizer
from tessel.errors import TesselError
from tessel.layout.sharding import parameters, pattern_of
from tessel.model.config import ModelConfig
from tessel.model.mapping import MAPPING_FILE, family_names
from tessel.report.checkpoint import tensor_line
from tessel.report.facts import Report, bytes_text, count_text, folder_bytes

if TYPE_CHECKING:
    from tessel.checkpoint.stored import StoredTensor

_MAX_NAMED = 5


class TensorFact(NamedTuple):
    """A stored tensor: name, shape, and dtype in the names of safetensors (BF16, F32, ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float | None = None


def model_report(folder: Path, list_tensors: bool) -> Report:
    """The report on a folder with a config.json; with or without weights.

    Raises:
        TesselError: config.json or a weights file is damaged, or a shard is missing.
    """
    raw = _read_json(folder / "config.json")
    config, refusal = _supported(folder)
    tensors = stored_tensors(folder)
    data: dict[str, Any] = {
        "kind": "Hugging Face model",
        "path": str(folder),
        "family": config.family if config is not None else raw.get("model_type"),
        "not_supported": refusal,
        "bytes": folder_bytes(folder),
        "tokenizer": _tokenizer_values(folder),
        "chat_template": _has_chat_template(folder),
        **_shape_values(config, raw),
        **_weight_values(tensors, config),
    }
    if list_tensors:
        tensors = None if tensors is None else _with_norms(tensors, read_tensors_of(folder))
        data["tensor_list"] = [_entry(tensor) for tensor in tensors or []]
    tail = _tensor_lines(tensors or [], list_tensors)
    return Report(f"{folder}: a Hugging Face model", _facts(data), data, tail)


def weights_report(path: Path, list_tensors: bool) -> Report:
    """The report on a single .safetensors file."""
    tensors = _of_safetensors(path)
    num_bytes = path.stat().st_size
    data: dict[str, Any] = {"kind": "safetensors file", "path": str(path), "bytes": num_bytes}
    data |= _weight_values(tensors, None)
    if list_tensors:
        from tessel.checkpoint.safetensors import read_header

        tensors = _with_norms(tensors, read_header(path))
        data["tensor_list"] = [_entry(tensor) for tensor in tensors]
    facts = [("parameters", _parameter_text(data)), ("size", bytes_text(num_bytes))]
    return Report(f"{path}: weights", facts, data, _tensor_lines(tensors, list_tensors))


def is_model(folder: Path) -> bool:
    """Whether a folder has a config.json that describes a model; beside a tokenizer it may hold little."""
    path = folder / "config.json"
    if not path.is_file() or not has_tokenizer(folder):
        return path.is_file()
    return "hidden_size" in _read_json(path) or (folder / MAPPING_FILE).is_file()


def stored_tensors(folder: Path) -> list[TensorFact] | None:
    """The tensors that a folder's weights files hold; None where it has no such files.

    Raises:
        TesselError: a shard or an index is missing, or a file is damaged.
    """
    # They import torch, which --help has no need of.
    from tessel.checkpoint.safetensors import DTYPE_NAMES
    from tessel.checkpoint.weights import read_tensors

    if not any(folder.glob("*.safetensors*")) and not any(folder.glob("pytorch_model*.bin*")):
        return None
    return [TensorFact(t.name, t.shape, DTYPE_NAMES.get(t.dtype, str(t.dtype))) for t in read_tensors(folder).values()]


def read_tensors_of(folder: Path) -> Mapping[str, StoredTensor]:
    """The stored tensors of a folder by name."""
    from tessel.checkpoint.weights import read_tensors

    return read_tensors(folder)


def _with_norms(tensors: Iterable[TensorFact], stored: Mapping[str, StoredTensor]) -> list[TensorFact]:
    """The same with the norm of each, which is read for it."""
    from tessel.convert.compare import norm_of

    return [tensor._replace(norm=norm_of(stored[tensor.name])) for tensor in tensors]


def _entry(tensor: TensorFact) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, "norm": tensor.norm}


def _of_safetensors(path: Path) -> list[TensorFact]:
    from tessel.checkpoint.safetensors import DTYPE_NAMES, read_header

    return [TensorFact(info.name, info.shape, DTYPE_NAMES[info.dtype]) for info in read_header(path).values()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TesselError(f"{path}: not valid JSON ({error}). Download the file again.") from error
    if not isinstance(content, dict):
        raise TesselError(f"{path}: a JSON object is expected. Download the file again.")
    return content


def _supported(folder: Path) -> tuple[ModelConfig | None, str | None]:
    """The configuration, or why tessel cannot train the model."""
    try:
        return ModelConfig.from_folder(folder), None
    except TesselError as error:
        return None, str(error)


def _shape_values(config: ModelConfig | None, raw: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "attention_heads": "num_attention_heads",
        "key_value_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocabulary": "vocab_size",
        "tied": "tie_word_embeddings",
        "max_position_embeddings": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "sliding_window": "sliding_window",
    }
    source: Any = raw.get if config is None else lambda name: getattr(config, name)
    values = {key: source(name) for key, name in names.items()}
    if values["head_dim"] is None and values["hidden_size"] and values["attention_heads"]:
        values["head_dim"] = values["hidden_size"] // values["attention_heads"]
    values["rope_scaling"] = dict(config.rope_scaling) if config is not None and config.rope_scaling else None
    values |= _expert_values(config)
    values["declared_dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    return values


def _expert_values(config: ModelConfig | None) -> dict[str, Any]:
    """Of a mixture of experts: how many there are, and the parameters that a token goes through."""
    if config is None or not config.num_experts:
        return {"experts": None}
    table = parameters(config)
    idle = sum(math.prod(rule.shape) for rule in table.values() if rule.is_expert)
    unused = idle * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    return {
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "layers_without_experts": list(config.dense_layers),
        "active_parameters": sum(math.prod(rule.shape) for rule in table.values()) - unused,
    }


def _weight_values(tensors: list[TensorFact] | None, config: ModelConfig | None) -> dict[str, Any]:
    """Counts of what is stored; without weights, of what config.json describes."""
    values: dict[str, Any] = {"weights": tensors is not None, "missing_tensors": [], "surplus_tensors": []}
    if tensors is not None:
        values["tensors"] = len(tensors)
        values["parameters"] = sum(math.prod(tensor.shape) for tensor in tensors)
        values["dtypes"] = dict(Counter(tensor.dtype for tensor in tensors))
    elif config is not None:
        values["parameters"] = sum(math.prod(rule.shape) for rule in parameters(config).values())
    if tensors is not None and config is not None:
        names = [name for tensor in tensors for name in family_names(config.own, tensor.name)]
        stored = {place.name for name in names for place in places_of(name)}
        wanted = set(parameters(config))
        # A tied head is often stored all the same.
        may_be_extra = {"lm_head.weight"} if config.tie_word_embeddings else set()
        values["missing_tensors"] = sorted(wanted - stored)
        values["surplus_tensors"] = sorted(stored - wanted - may_be_extra)
    return values


def _tokenizer_values(folder: Path) -> dict[str, Any] | None:
    if not has_tokenizer(folder):
        return None
    tokenizer = HuggingFaceTokenizer(folder)
    return {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "pad": tokenizer.pad, "max_id": tokenizer.max_id}


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return settings.is_file() and bool(_read_json(settings).get("chat_template"))


def _parameter_text(data: Mapping[str, Any]) -> str:
    if "parameters" not in data:
        return "not known"
    text = count_text(data["parameters"])
    if not data["weights"]:
        return f"{text} by config.json; there are no weights here"
    dtypes = ", ".join(
        f"{dtype} ({count})" if len(data["dtypes"]) > 1 else dtype for dtype, count in data["dtypes"].items()
    )
    return f"{text} in {data['tensors']} tensors, {dtypes}"


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("family", str(data["family"])), ("parameters", _parameter_text(data))]
    if data["not_supported"]:
        facts.append(("not supported", data["not_supported"]))
    if data["layers"] is None:  # another family's names, such as n_layer
        return [*facts, ("tokenizer", _tokenizer_text(data)), ("on disk", bytes_text(data["bytes"]))]
    facts.append(("layers", f"{data['layers']}, hidden size {data['hidden_size']}, MLP {data['intermediate_size']}"))
    if data["experts"]:
        facts.append(("experts", _expert_text(data)))
    heads = f"{data['attention_heads']} heads of {data['head_dim']}, {data['key_value_heads']} for keys and values"
    facts.append(("attention", heads + (f", window {data['sliding_window']}" if data["sliding_window"] else "")))
    scaling = f", scaling {json.dumps(data['rope_scaling'])}" if data["rope_scaling"] else ""
    facts.append(("positions", f"{data['max_position_embeddings']}, RoPE theta {data['rope_theta']}{scaling}"))
    facts.append(("vocabulary", f"{data['vocabulary']} rows, output layer {'tied' if data['tied'] else 'of its own'}"))
    facts.append(("tokenizer", _tokenizer_text(data)))
    facts.append(("on disk", bytes_text(data["bytes"])))
    for key, label in (("missing_tensors", "missing"), ("surplus_tensors", "surplus")):
        names = data[key]
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            facts.append((label, ", ".join(names[:_MAX_NAMED]) + more))
    return facts


def _expert_text(data: Mapping[str, Any]) -> str:
    text = f"{data['experts_per_token']} of {data['experts']} for each token, MLP {data['expert_intermediate_size']}"
    if data["shared_expert_intermediate_size"]:
        text += f", and a shared one of {data['shared_expert_intermediate_size']}"
    if data["layers_without_experts"]:
        text += f"; none in layers {', '.join(map(str, data['layers_without_experts']))}"
    return f"{text}; {count_text(data['active_parameters'])} parameters active"


def _tokenizer_text(data: Mapping[str, Any]) -> str:
    tokenizer = data["tokenizer"]
    if tokenizer is None:
        return "none"
    rows = data["vocabulary"]
    too_large = isinstance(rows, int) and tokenizer["max_id"] >= rows
    fits = f"; ids up to {tokenizer['max_id']} do not fit the model's rows" if too_large else ""
    template = "with" if data["chat_template"] else "without"
    return f"{tokenizer['vocab_size']:,} entries, end of document {tokenizer['eod']}, {template} chat template{fits}"


def _tensor_lines(tensors: Iterable[TensorFact], each: bool) -> list[str]:
    """Every tensor, or those of all layers as one line each."""
    if each:
        return [tensor_line(_entry(tensor)) for tensor in tensors]
    groups = Counter((pattern_of(tensor.name), tensor.shape, tensor.dtype) for tensor in tensors)
    return [
        f"    {pattern}  {list(shape)}  {dtype}" + (f"  x {count}" if count > 1 else "")
        for (pattern, shape, dtype), count in groups.items()
    ]

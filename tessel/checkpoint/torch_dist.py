"""Reading Megatron's `torch_dist` format: whole tensors by Megatron-core's names, in a folder of DCP.

    metadata.json   that it is this format
    common.pt       what is no tensor: args, iteration, scheduler, the optimizer's groups
    .metadata, __R_K.distcp   tensors (dcp_files.py)

Layers are stacked under one key, `decoder.layers.mlp.linear_fc2.weight` [layers, ...], or have keys of their own,
`decoder.layers.7.mlp...`; both are read, whatever degrees the run had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessel.checkpoint import companion, torch_file
from tessel.checkpoint.dcp_files import METADATA, DcpFolder, damaged, read_folder
from tessel.checkpoint.fused import alone
from tessel.checkpoint.mcore_args import OF_VOCABULARY, config_of
from tessel.checkpoint.mcore_match import check_tied
from tessel.checkpoint.mcore_names import EMBEDDING, EMBEDDING_KEY, HEAD_KEY, Entry
from tessel.checkpoint.megatron_folder import Iteration, companions, find_iteration
from tessel.checkpoint.stored import Piece, StoredModel, StoredTensor
from tessel.checkpoint.torch_dist_keys import LAYER, STACK, Keyed, assemble, find, joined_halves, slots_of
from tessel.checkpoint.torch_dist_optimizer import OptimizerState, optimizer_of
from tessel.checkpoint.weights import named
from tessel.errors import TesselError
from tessel.model.config import ModelConfig

COMMON, FORMAT_FILE = "common.pt", "metadata.json"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
BIAS_OF_CHOICE = "mlp.router.expert_bias"
_NO_WEIGHTS = ("._extra_state", ".inv_freq", ".local_tokens_per_expert", BIAS_OF_CHOICE)
_OTHER_SIZES = (
    "expert_tensor_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
# More than any run has: a damaged file is not to make loops without end.
_MAX_RANKS = 2**20
_DEGREES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "chunks": "virtual_pipeline_model_parallel_size",
}


def is_torch_dist(path: Path) -> bool:
    """Whether the folder of an iteration is in this format."""
    return (path / FORMAT_FILE).is_file() and (path / METADATA).is_file()


def open_torch_dist(
    folder: str | Path, *, ckpt_step: int | None = None, hf_dir: str | Path | None = None
) -> StoredModel:
    """A checkpoint in the `torch_dist` format: an iteration, a release, or the folder above them with its tracker.

    `hf_dir` gives the model's config.json where none travels along; without one it is derived from the args.

    Raises:
        TesselError: files are missing or damaged, or are not those of the config.
    """
    iteration = find_iteration(folder, ckpt_step)
    _check_backend(iteration.path)
    common = read_common(iteration.path)
    found = read_folder(iteration.path)
    args = _args(iteration.path / COMMON, common)
    config, guessed, side_files = _config(iteration, args, hf_dir, found)
    weights = {name: tensor for name, tensor in found.tensors.items() if not _is_beside_weights(name)}
    _check_layers(iteration.path, weights, config)
    keyed = match(iteration.path, weights, config)
    tensors = assemble(keyed, config)
    if config.tie_word_embeddings and HEAD_KEY in weights:
        embedding = tensors[EMBEDDING]
        check_tied(embedding, Piece((0, 0), embedding.shape, weights[HEAD_KEY], (0, 0)), HEAD_KEY)
    config = _with_expert_bias(config, found.tensors)
    rows = found.tensors[EMBEDDING_KEY].shape[0]
    padding = f"The vocabulary is padded from {config.vocab_size} to {rows} rows in the files; the padding is left out."
    # A release is a model alone, as Megatron loads it.
    optimizer = OptimizerState()
    if iteration.number is not None:
        optimizer = optimizer_of(found, common, args, config, keyed, tensors)
    return StoredModel(
        "torch_dist",
        Path(folder),
        config,
        tensors,
        guessed=guessed,
        iteration=iteration.number,
        degrees={name: args[key] for name, key in _DEGREES.items() if args.get(key) not in (None, 1)},
        args=args,
        optimizer=optimizer.tensors,
        state=optimizer.state,
        side_files=side_files,
        left_out=optimizer.left_out,
        notes=(padding,) if rows > config.vocab_size else (),
    )


def _args(path: Path, common: Mapping[str, Any]) -> Mapping[str, Any]:
    args = torch_file.plain(common.get("args") or {})
    if not isinstance(args, Mapping):
        raise TesselError(f"{path}: its args are a {type(args).__name__}, not what Megatron saves. Check the path.")
    num_ranks = 1
    for key in (*_DEGREES.values(), *_OTHER_SIZES):
        size = args.get(key)
        if size is None:
            continue
        if type(size) is not int or size < 1:
            raise TesselError(f"{path}: args.{key} is {str(size)[:100]!r}, and must be a whole number above 0.")
        num_ranks *= size if key in _DEGREES.values() else 1
    if max(num_ranks, args.get(_OTHER_SIZES[0]) or 1) > _MAX_RANKS:
        raise TesselError(f"{path}: its args say more than {_MAX_RANKS:,} ranks, which no run has. Take another copy.")
    return args


def _check_backend(path: Path) -> None:
    file = path / FORMAT_FILE
    if not file.is_file():
        raise TesselError(f"{path} has no {FORMAT_FILE}, so it is no torch_dist checkpoint. Copy the whole folder.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise damaged(file, error) from error
    backend = content.get("sharded_backend") if isinstance(content, dict) else None
    if backend != "torch_dist":
        raise TesselError(
            f"{file} says sharded_backend {backend!r}, and only torch_dist is read. Save it from Megatron again with "
            "--ckpt-format torch_dist."
        )


def read_common(path: Path) -> Mapping[str, Any]:
    """What is no tensor, through the allow-list.

    Raises:
        TesselError: it is missing, damaged, or asks for more than a checkpoint may hold.
    """
    if not (path / COMMON).is_file():
        raise TesselError(f"{path} lacks {COMMON}. Copy the whole folder.")
    content = torch_file.load(path / COMMON)
    if not isinstance(content, Mapping):
        raise damaged(path / COMMON, f"it holds a {type(content).__name__}")
    return content


def _config(
    iteration: Iteration, args: Mapping[str, Any], hf_dir: str | Path | None, found: DcpFolder
) -> tuple[ModelConfig, tuple[str, ...], Mapping[str, bytes]]:
    source = companions(iteration, hf_dir)
    if source is not None:
        return ModelConfig.from_folder(source), (), companion.read(source)
    if not args:
        raise TesselError(f"{iteration.path / COMMON} has no args, so the model is not known. Give --hf-dir.")
    config, guessed = config_of(args, iteration.path / COMMON)
    embedding = found.tensors.get(EMBEDDING_KEY)
    if embedding is not None and len(embedding.shape) == 2 and embedding.shape[0] < config.vocab_size:
        config = replace(config, vocab_size=embedding.shape[0])
        guessed = tuple(line for line in guessed if not line.startswith(OF_VOCABULARY))
        guessed += (f"{OF_VOCABULARY} to have {config.vocab_size} entries, the rows of the embedding.",)
    return config, guessed, {}


def _is_beside_weights(name: str) -> bool:
    return name.startswith("optimizer.") or ".optimizer." in name or name.endswith(_NO_WEIGHTS)


def _check_layers(path: Path, weights: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    counts = {tensor.shape[0] for key, tensor in weights.items() if _is_stacked(key) and tensor.shape}
    numbers = [int(match[1]) for key in weights if (match := LAYER.fullmatch(key))]
    counts |= {max(numbers) + 1} if numbers else set()
    if counts and counts != {config.num_hidden_layers}:
        shown = " or ".join(map(str, sorted(counts)))
        raise TesselError(
            f"{path} holds {shown} layers, and the model's config says {config.num_hidden_layers}: they are not of the "
            "same model."
        )


def _is_stacked(key: str) -> bool:
    return key.startswith(STACK) and LAYER.fullmatch(key) is None


def match(path: Path, weights: Mapping[str, StoredTensor], config: ModelConfig) -> list[Keyed]:
    """Every entry of the model with the tensor that holds it.

    Raises:
        TesselError: tensors are missing, unknown or of another shape.
    """
    weights = joined_halves(weights)
    rows = {key: weights[key].shape[0] for key in (EMBEDDING_KEY, HEAD_KEY) if key in weights and weights[key].shape}
    found: list[Keyed] = []
    missing: list[str] = []
    wrong: list[str] = []
    for slot in slots_of(config, rows):
        variants = [[find(weights, entry) for entry in entries] for entries in slot.values()]
        best = max(range(len(variants)), key=lambda number: sum(keyed is not None for keyed in variants[number]))
        for entry, keyed in zip(list(slot.values())[best], variants[best], strict=True):
            if keyed is None:
                missing.append(entry.key)
                continue
            expected = (config.num_hidden_layers,) * len(keyed.lead) + entry.fused.shape
            if keyed.source.shape != expected:
                wrong.append(f"{keyed.key} is {keyed.source.shape} and should be {expected}")
            found.append(keyed)
    used = {keyed.key for keyed in found}
    # A tied output layer is a copy of the embedding, and some tools store it all the same.
    tied = {HEAD_KEY} if config.tie_word_embeddings else set()
    wrong += [f"{key} is not of this model" for key in weights if key not in used | tied]
    wrong += [
        f"{key} is {weights[key].shape} and should be the embedding's, with {config.hidden_size} columns"
        for key in tied & weights.keys() - used
        if weights[key].shape[1:] != (config.hidden_size,)
    ]
    wrong += [
        f"{key} has {count} rows, fewer than the vocabulary's {config.vocab_size}"
        for key, count in rows.items()
        if count < config.vocab_size
    ]
    _complain(path, missing, list(dict.fromkeys(wrong)))
    return found


def _complain(path: Path, missing: list[str], wrong: list[str]) -> None:
    said = [f"{len(missing)} tensors missing: {named(missing)}"] if missing else []
    said += [f"{len(wrong)} that do not fit: {named(wrong)}"] if wrong else []
    if not said:
        return
    advice = "Take weights and config from the same place."
    if missing and all(".linear_qkv.bias" in key for key in missing):
        advice = (
            "The model has biases on q, k and v, and the tool that wrote this was not told (--add-qkv-bias): convert "
            "it again."
        )
    elif missing == [HEAD_KEY]:
        advice = 'If the output layer is the embedding, config.json must say "tie_word_embeddings": true.'
    raise TesselError(f"The weights in {path} are not those of the model's config; {'; '.join(said)}. {advice}")


def _with_expert_bias(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> ModelConfig:
    """The router's bias of the choice, which a config.json has and Megatron keeps beside the weights."""
    rows: dict[int, tuple[float, ...]] = {}
    for layer in range(config.num_hidden_layers):
        shape = (config.num_experts,)
        keyed = find(tensors, Entry(f"{STACK}{layer}.{BIAS_OF_CHOICE}", alone("bias", (0,), shape)))
        if keyed is not None and keyed.source.shape[-1:] == shape:
            index = (*(slice(at, at + 1) for at in keyed.lead), slice(0, config.num_experts))
            rows[layer] = tuple(keyed.source.read(index).double().flatten().tolist())
    if not rows:
        return config
    zeros = (0.0,) * config.num_experts
    return replace(config, expert_bias=tuple(rows.get(layer, zeros) for layer in range(config.num_hidden_layers)))

"""Reading Megatron's `torch` format with Megatron-core's names: mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt.

Every tensor of every rank is matched with the table of names (mcore_names.py) before anything is read; what is
missing, unknown or of another shape is named. Parameters are then put together out of the ranks' parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tessel.checkpoint import companion
from tessel.checkpoint.fused import alone, experts_of_gemm, pieces
from tessel.checkpoint.mcore_args import config_of
from tessel.checkpoint.mcore_files import ChunkLayers, RankFile, RankFiles, open_files
from tessel.checkpoint.mcore_names import (
    EMBEDDING,
    EMBEDDING_KEY,
    FINAL_NORM_KEY,
    HEAD,
    HEAD_KEY,
    Entry,
    Part,
    Slot,
    last_slots,
    layer_slots,
)
from tessel.checkpoint.megatron_folder import Iteration, companions, find_iteration
from tessel.checkpoint.stored import Assembled, Piece, StoredModel, StoredTensor
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.checkpoint.weights import named
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig

_BIAS_OF_CHOICE = ".mlp.router.expert_bias"
_SHOWN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Held:
    """A tensor of a rank's file and what it holds. `is_used`: no earlier rank holds the same."""

    file: RankFile
    chunk: int
    entry: Entry
    tensor: LoadedTensor
    is_used: bool


def open_torch(folder: str | Path, *, ckpt_step: int | None = None, hf_dir: str | Path | None = None) -> StoredModel:
    """A checkpoint in the `torch` format: an iteration, a release, or the folder above them with its tracker.

    `hf_dir` gives the model's config.json where none travels along; without one it is derived from the args.

    Raises:
        TesselError: files are missing or damaged, contradict each other, or are not those of the config.
    """
    iteration = find_iteration(folder, ckpt_step)
    files = open_files(iteration.path)
    config, guessed, side_files = _config(iteration, files, hf_dir)
    held = match(files, config)
    tensors = assemble(held, config)
    config = _with_expert_bias(config, files)
    notes = _notes(files, config, held)
    return StoredModel(
        "torch",
        Path(folder),
        config,
        tensors,
        guessed=guessed,
        iteration=iteration.number,
        degrees=files.degrees,
        args=files.args,
        side_files=side_files,
        notes=notes,
    )


def _config(
    iteration: Iteration, files: RankFiles, hf_dir: str | Path | None
) -> tuple[ModelConfig, tuple[str, ...], Mapping[str, bytes]]:
    source = companions(iteration, hf_dir)
    guessed: tuple[str, ...] = ()
    side_files: Mapping[str, bytes] = {}
    if source is not None:
        config, side_files = ModelConfig.from_folder(source), companion.read(source)
        where = str(source / companion.CONFIG)
    else:
        if not files.args:
            raise TesselError(f"{iteration.path}: its files have no args, so the model is not known. Give --hf-dir.")
        config, guessed = config_of(files.args, files.files[0].path)
        where = "args"
    if config.num_hidden_layers != files.num_layers:
        raise TesselError(
            f"{iteration.path} holds {files.num_layers} layers, and {where} says {config.num_hidden_layers}: they are "
            "not of the same model, or a stage's layers are missing."
        )
    return config, guessed, side_files


def match(files: RankFiles, config: ModelConfig) -> list[Held]:
    """Every tensor of the files with what it holds.

    Raises:
        TesselError: tensors are missing, unknown or of another shape.
    """
    rows = _vocabulary_offsets(files, config)
    seen: set[tuple[object, ...]] = set()
    held: list[Held] = []
    missing: list[str] = []
    wrong: list[str] = []
    for file in files.files:
        part = Part(config, files.topology, file.place)
        for layers in files.chunks:
            if layers.pp != file.place.pp:
                continue
            tensors = file.chunks[layers.chunk]
            entries = dict(_expected(part, layers, tensors, file, rows, missing))
            for key, tensor in tensors.items():
                if key.endswith(_BIAS_OF_CHOICE):
                    continue
                if key not in entries:
                    wrong.append(f"{file.folder}: {key} is not of this model")
                elif tuple(tensor.shape) != entries[key].shape:
                    wrong.append(f"{file.folder}: {key} is {tuple(tensor.shape)} and should be {entries[key].shape}")
                else:
                    # Whatever is copied (norms by tensor parallelism, attention by the experts') holds the same boxes.
                    own = (key, layers.pp, layers.chunk, entries[key].fused.spans)
                    loaded = LoadedTensor(key, file.path, tensor)
                    held.append(Held(file, layers.chunk, entries[key], loaded, own not in seen))
                    seen.add(own)
    _complain(files, missing, wrong)
    return held


def _expected(
    part: Part,
    layers: ChunkLayers,
    tensors: Mapping[str, torch.Tensor],
    file: RankFile,
    rows: Mapping[tuple[str, int], int],
    missing: list[str],
) -> Iterator[tuple[str, Entry]]:
    """The tensors that a chunk of a rank must have, by key; those that it lacks are put on the list."""
    slots: list[Slot] = []
    for key, name, is_here in (
        (EMBEDDING_KEY, EMBEDDING, layers.is_first),
        (HEAD_KEY, HEAD if part.has(HEAD) else EMBEDDING, layers.is_last and _has_head(part, layers, tensors)),
    ):
        if is_here:
            num_rows = tensors[key].shape[0] if key in tensors and tensors[key].dim() else 0
            size = (num_rows, part.config.hidden_size)
            slots.append({"local": (Entry(key, alone(name, (rows.get((key, file.place.tp), 0), 0), size)),)})
    for number, layer in layers.layers.items():
        slots += layer_slots(part, layer, number)
    if layers.is_last:
        slots += [slot for slot in last_slots(part, layers.is_first) if slot["local"][0].key == FINAL_NORM_KEY]
    for slot in slots:
        entries = max(slot.values(), key=lambda variant: sum(entry.key in tensors for entry in variant))
        for entry in entries:
            if entry.key in tensors:
                yield entry.key, entry
            else:
                missing.append(f"{file.folder}: {entry.key}")


def _has_head(part: Part, layers: ChunkLayers, tensors: Mapping[str, torch.Tensor]) -> bool:
    """An output layer, or a copy of the tied embedding: always on another stage, and where a tool put it beside it."""
    return part.has(HEAD) or not layers.is_first or HEAD_KEY in tensors


def _vocabulary_offsets(files: RankFiles, config: ModelConfig) -> dict[tuple[str, int], int]:
    """The row at which each tensor-parallel rank's part of the embedding and of the output layer begins.

    Counted from the parts that there are, since tools pad by different rules, or cut unevenly.

    Raises:
        TesselError: there are fewer rows than the vocabulary has entries.
    """
    offsets: dict[tuple[str, int], int] = {}
    for key, is_at in ((EMBEDDING_KEY, "is_first"), (HEAD_KEY, "is_last")):
        (layers,) = (layers for layers in files.chunks if getattr(layers, is_at))
        rows: dict[int, int] = {}
        for file in files.files:
            tensor = file.chunks[layers.chunk].get(key) if file.place.pp == layers.pp else None
            if tensor is not None and tensor.dim() == 2:
                rows.setdefault(file.place.tp, tensor.shape[0])
        for tp in range(files.topology.tp):
            offsets[key, tp] = sum(rows.get(rank, 0) for rank in range(tp))
        total = sum(rows.values())
        if len(rows) == files.topology.tp and total < config.vocab_size:
            raise TesselError(
                f"{files.files[0].path.parent.parent}: {key} has {total} rows in all, and the model's config says "
                f"vocab_size {config.vocab_size}. They are not of the same model."
            )
    return offsets


def _complain(files: RankFiles, missing: list[str], wrong: list[str]) -> None:
    if not missing and not wrong:
        return
    folder = files.files[0].path.parent.parent
    said = []
    if missing:
        said.append(f"{len(missing)} tensors missing: {named(missing)}")
    if wrong:
        said.append(f"{len(wrong)} that do not fit: {named(wrong)}")
    advice = "Take weights and config from the same place."
    if missing and all(".linear_qkv.bias" in name for name in missing):
        advice = (
            "The model has biases on q, k and v, and the tool that wrote this was not told (--add-qkv-bias): convert "
            "it again."
        )
    elif missing and all(name.endswith(HEAD_KEY) for name in missing):
        advice = 'If the output layer is the embedding, config.json must say "tie_word_embeddings": true.'
    elif any("lora_" in name for name in wrong):
        advice = "LoRA adapters are in it: merge them into the weights first, by the tool that wrote it."
    raise TesselError(f"The weights in {folder} are not those of the model's config; {'; '.join(said)}. {advice}")


def assemble(held: Iterable[Held], config: ModelConfig) -> dict[str, StoredTensor]:
    """Every parameter out of the ranks' parts.

    Raises:
        TesselError: a tied embedding's copy differs from it, or parts leave gaps.
    """
    shapes = {name: rule.shape for name, rule in parameters(config).items()}
    found: dict[str, list[Piece]] = {name: [] for name in shapes}
    copies: list[Piece] = []
    for item in held:
        if not item.is_used:
            continue
        is_copy = item.entry.key == HEAD_KEY and HEAD not in shapes
        for name, piece in pieces(item.entry.fused, source_of(item.entry, item.tensor), shapes):
            (copies if is_copy else found[name]).append(piece)
    tensors: dict[str, StoredTensor] = {}
    for name, parts in found.items():
        dtype = parts[0].source.dtype if parts else torch.float32
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.source.dtype)
        whole = Assembled(name, dtype, shapes[name], tuple(parts))
        if not whole.is_whole:
            raise TesselError(f"The parts of {name} in the files do not make up its shape {shapes[name]}.")
        tensors[name] = whole
    if copies:
        _check_copy(tensors[EMBEDDING], copies)
    return tensors


def source_of(entry: Entry, tensor: StoredTensor) -> StoredTensor:
    """A tensor of the file in the shape that the entry's fused tensor has."""
    if entry.gemm is None:
        return tensor
    num_experts, features_out, features_in = entry.fused.shape
    is_first = entry.gemm == "first"
    return experts_of_gemm(tensor, num_experts, features_in if is_first else features_out, is_first)


def _check_copy(embedding: StoredTensor, copies: list[Piece]) -> None:
    for copy in copies:
        step = max(_SHOWN_BYTES // (copy.size[1] * embedding.dtype.itemsize), 1)
        low, high = copy.start[0], copy.start[0] + copy.size[0]
        for begin in range(low, high, step):
            box = [(begin, min(begin + step, high)), (0, copy.size[1])]
            if not torch.equal(copy.read(box), embedding.read(tuple(slice(*part) for part in box))):
                raise TesselError(
                    f"{copy.source.path}: {HEAD_KEY} differs from the embedding, and the model's config says "
                    'tie_word_embeddings: true. Write "tie_word_embeddings": false there if they are two.'
                )


def _with_expert_bias(config: ModelConfig, files: RankFiles) -> ModelConfig:
    """The router's bias of the choice, which a config.json has and Megatron keeps beside the weights."""
    rows: dict[int, tuple[float, ...]] = {}
    for layers in files.chunks:
        file = next(file for file in files.files if file.place.pp == layers.pp)
        for number, layer in layers.layers.items():
            bias = file.chunks[layers.chunk].get(f"decoder.layers.{number}{_BIAS_OF_CHOICE}")
            if bias is not None and tuple(bias.shape) == (config.num_experts,):
                rows[layer] = tuple(float(value) for value in bias)
    if not rows:
        return config
    zeros = (0.0,) * config.num_experts
    return replace(config, expert_bias=tuple(rows.get(layer, zeros) for layer in range(config.num_hidden_layers)))


def _notes(files: RankFiles, config: ModelConfig, held: list[Held]) -> tuple[str, ...]:
    rows = sum(item.tensor.shape[0] for item in held if item.entry.key == EMBEDDING_KEY and item.is_used)
    said = []
    if rows > config.vocab_size:
        said.append(
            f"The vocabulary is padded from {config.vocab_size} to {rows} rows in the files; the padding is left out."
        )
    return tuple(said)

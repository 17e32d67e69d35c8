"""Which tensor of a rank's file holds what of which parameter: the `torch` format against the table of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from tessel.checkpoint.four_bits import Dequantized
from tessel.checkpoint.fused import FormerQkv, alone, experts_of_gemm, pieces
from tessel.checkpoint.mcore_files import ChunkLayers, RankFile, RankFiles
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
from tessel.checkpoint.stored import Assembled, Copy, Piece, StoredTensor, index_of
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.checkpoint.weights import named
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig

_COMPARED_BYTES = 64 * 2**20
BIAS_OF_CHOICE = ".mlp.router.expert_bias"


@dataclass(frozen=True)
class Held:
    """A tensor of a rank's file and what it holds. `original`: that of an earlier rank which holds the same."""

    file: RankFile
    chunk: int
    entry: Entry
    tensor: StoredTensor
    original: Held | None = None

    @property
    def is_used(self) -> bool:
        """Whether no earlier rank holds the same."""
        return self.original is None


def match(files: RankFiles, config: ModelConfig) -> list[Held]:
    """Every tensor of the files with what it holds.

    Raises:
        TesselError: tensors are missing, unknown or of another shape.
    """
    rows = _vocabulary_offsets(files, config)
    seen: dict[tuple[object, ...], Held] = {}
    held: list[Held] = []
    missing: list[tuple[str, str]] = []
    wrong: list[str] = []
    for file in files.files:
        part = Part(config, files.topology, file.place)
        for layers in files.chunks:
            if layers.pp != file.place.pp:
                continue
            tensors = file.chunks[layers.chunk]
            entries = dict(_expected(part, layers, tensors, file, rows, missing))
            for key, tensor in tensors.items():
                if key.endswith(BIAS_OF_CHOICE):
                    continue
                if key not in entries:
                    wrong.append(f"{file.folder}: {files.dialect.shown(key)} is not of this model")
                elif tuple(tensor.shape) != entries[key].shape:
                    shapes = f"{tuple(tensor.shape)} and should be {entries[key].shape}"
                    wrong.append(f"{file.folder}: {files.dialect.shown(key)} is {shapes}")
                else:
                    # Whatever is copied (norms by tensor parallelism, attention by the experts') holds the same boxes.
                    own = (key, layers.pp, layers.chunk, entries[key].fused.spans)
                    stored: StoredTensor = (
                        tensor
                        if isinstance(tensor, Dequantized)
                        else LoadedTensor(files.dialect.shown(key), file.path, tensor)
                    )
                    loaded = _in_order(stored, key, file, config)
                    held.append(Held(file, layers.chunk, entries[key], loaded, seen.get(own)))
                    seen.setdefault(own, held[-1])
    _complain(files, [f"{folder}: {files.dialect.shown(key)}" for folder, key in missing], wrong)
    return held


def _in_order(tensor: StoredTensor, key: str, file: RankFile, config: ModelConfig) -> StoredTensor:
    """The tensor with q, k and v in today's order."""
    if file.version >= 2 or ".linear_qkv." not in key:
        return tensor
    if file.version not in (0, 1) or config.num_key_value_heads != config.num_attention_heads:
        raise TesselError(
            f"{file.path} has checkpoint_version {file.version} and {config.num_key_value_heads} key/value heads for "
            f"{config.num_attention_heads} heads: before version 2 there were no query groups. Take config.json and "
            "weights from the same place."
        )
    return FormerQkv(tensor, file.version == 0, config.head_dim)


def _expected(
    part: Part,
    layers: ChunkLayers,
    tensors: Mapping[str, torch.Tensor | Dequantized],
    file: RankFile,
    rows: Mapping[tuple[str, int], int],
    missing: list[tuple[str, str]],
) -> Iterator[tuple[str, Entry]]:
    """The tensors that a chunk of a rank must have, by key; those that it lacks are put on the list."""
    slots: list[Slot] = []
    for key, name, is_here in (
        (EMBEDDING_KEY, EMBEDDING, layers.is_first),
        (HEAD_KEY, HEAD if part.has(HEAD) else EMBEDDING, layers.is_last and _has_head(part, layers, tensors)),
    ):
        if is_here:
            num_rows = tensors[key].shape[0] if key in tensors and tensors[key].shape else 0
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
                missing.append((file.folder, entry.key))


def _has_head(part: Part, layers: ChunkLayers, tensors: Mapping[str, torch.Tensor | Dequantized]) -> bool:
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
            if tensor is not None and len(tensor.shape) == 2:
                rows.setdefault(file.place.tp, tensor.shape[0])
        for tp in range(files.topology.tp):
            offsets[key, tp] = sum(rows.get(rank, 0) for rank in range(tp))
        total = sum(rows.values())
        if len(rows) == files.topology.tp and total < config.vocab_size:
            raise TesselError(
                f"{files.files[0].path.parent.parent}: {files.dialect.shown(key)} has {total} rows in all, and the "
                f"model's config says vocab_size {config.vocab_size}. They are not of the same model."
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
    if missing and all(name.endswith((".linear_qkv.bias", ".query_key_value.bias")) for name in missing):
        advice = (
            "The model has biases on q, k and v, and the tool that wrote this was not told (--add-qkv-bias): convert "
            "it again."
        )
    elif missing and all(name.endswith(HEAD_KEY) for name in missing):
        advice = 'If the output layer is the embedding, config.json must say "tie_word_embeddings": true.'
    elif any("lora_" in name for name in wrong):
        advice = "LoRA adapters are in it: merge them into the weights first, by the tool that wrote it."
    raise TesselError(f"The weights in {folder} are not those of the model's config; {'; '.join(said)}. {advice}")


def whole_parameters(items: Iterable[tuple[Held, StoredTensor]], config: ModelConfig) -> dict[str, StoredTensor]:
    """Every parameter out of the ranks' parts: of each tensor of a file, values in its shape.

    Copies of a tied embedding are passed over. Parameters of which nothing is given are not in the result.

    Raises:
        TesselError: the parts of a parameter leave gaps.
    """
    shapes = {name: rule.shape for name, rule in parameters(config).items()}
    found: dict[str, list[Piece]] = {}
    for held, values in items:
        if held.is_used and not is_copy(held, config):
            for name, piece in pieces(held.entry.fused, source_of(held.entry, values), shapes):
                found.setdefault(name, []).append(piece)
    tensors: dict[str, StoredTensor] = {}
    for name in (name for name in shapes if name in found):
        dtype = found[name][0].source.dtype
        for part in found[name][1:]:
            dtype = torch.promote_types(dtype, part.source.dtype)
        whole = Assembled(name, dtype, shapes[name], tuple(found[name]))
        if not whole.is_whole:
            raise TesselError(f"the parts of {name} in the files do not make up its shape {shapes[name]}.")
        tensors[name] = whole
    return tensors


def copy_of(held: Held, tensor: StoredTensor, original: StoredTensor, kind: str = "") -> Copy:
    """What a rank holds as an earlier one does: its weight, or a state of that `kind`."""
    return Copy(f"{held.file.folder}: {kind}{held.tensor.name}", tensor, original)


def is_copy(held: Held, config: ModelConfig) -> bool:
    """Whether it is a tied embedding under the output layer's name."""
    return held.entry.key == HEAD_KEY and config.tie_word_embeddings


def check_tied(embedding: StoredTensor, copy: Piece, name: str) -> None:
    """Refuse an output layer that is said to be the embedding and is not; `copy`: rows of the embedding out of it.

    Raises:
        TesselError: they differ.
    """
    step = max(_COMPARED_BYTES // (copy.size[1] * embedding.dtype.itemsize), 1)
    low, high = copy.start[0], copy.start[0] + copy.size[0]
    for begin in range(low, high, step):
        box = [(begin, min(begin + step, high)), (0, copy.size[1])]
        if not torch.equal(copy.read(box), embedding.read(index_of(box))):
            raise TesselError(
                f"{copy.source.path}: {name} differs from the embedding, and the model's config says "
                'tie_word_embeddings: true. Write "tie_word_embeddings": false there if they are two.'
            )


def source_of(entry: Entry, tensor: StoredTensor) -> StoredTensor:
    """A tensor of the file in the shape that the entry's fused tensor has."""
    if entry.gemm is None:
        return tensor
    num_experts, features_out, features_in = entry.fused.shape
    is_first = entry.gemm == "first"
    return experts_of_gemm(tensor, num_experts, features_in if is_first else features_out, is_first)

"""From the flags of fine-tuning to the datasets of a run.

Source of the rules: MindSpeed-LLM's DecoderPackedMTFDataset and Pai-Megatron-Patch's datasets. Blends of instructions
are built as blends of plain text are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tessel.config.run import RunConfig
from tessel.data.blend import Blend, BlendedDataset, normalize, share_sizes
from tessel.data.cache import IndexCache
from tessel.data.indexed import IndexedDataset
from tessel.data.instruct.dataset import (
    INSTRUCTION_KEYS,
    PAIR_KEYS,
    InstructionDataset,
    PairDataset,
    open_fields,
)
from tessel.data.instruct.pai_dataset import open_records, record_dataset
from tessel.data.instruct.samples import DialogueDataset, DialogueOptions, Padding
from tessel.data.metadata import read_metadata
from tessel.data.paths import read_sources
from tessel.data.readers.block import format_of
from tessel.data.split import DEFAULT_SPLIT, SPLITS, split_bounds
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError, UsageError
from tessel.runtime.log import warn_once

Dataset = DialogueDataset | BlendedDataset
NumSamples = tuple[int | None, int | None, int | None]
Bounds = tuple[int, int]
Fields = dict[str, IndexedDataset]


def build_dialogues(cfg: RunConfig, tokenizer: Tokenizer, num_samples: NumSamples) -> list[Dataset | None]:
    """Train, valid and test, as far as the flags and the data give them.

    Raises:
        UsageError: flags that contradict the data, or each other.
        TesselError: a file is missing or damaged, or a split that is needed is empty.
    """
    sources = read_sources(cfg.data)
    builder = _Builder(cfg, tokenizer)
    if sources.shared is not None:
        built = builder.build(sources.shared, cfg.data.split or DEFAULT_SPLIT, num_samples)
    else:
        built = [None] * len(SPLITS)
        for i, blend in enumerate(sources.per_split):
            if blend is not None:
                alone = Blend(blend.paths, None) if len(blend.paths) == 1 else blend
                sizes: list[int | None] = [0] * len(SPLITS)
                sizes[i] = num_samples[i]
                built[i] = builder.build(alone, None, (sizes[0], sizes[1], sizes[2]), only=i)[i]
    builder.cache.report()
    return built


def num_training_samples(cfg: RunConfig, tokenizer: Tokenizer) -> int:
    """Samples in the training data, gone through once.

    Raises:
        UsageError: the data is a weighted blend, which has no such number.
    """
    sources = read_sources(cfg.data)
    blend = sources.per_split[0] if sources.shared is None else sources.shared
    if blend is None or blend.weights is not None and len(blend.paths) > 1:
        raise UsageError("--num-train-epochs: a weighted blend has no epochs. Give --train-iters.")
    builder = _Builder(cfg, tokenizer)
    split = None if sources.shared is None else cfg.data.split or DEFAULT_SPLIT
    return sum(builder.num_samples(path, split) for path in blend.paths)


def instruction_bounds(split: str, num_sequences: int) -> list[Bounds | None]:
    """[begin, end) of each split, as Megatron's get_train_valid_test_split_ has them; None for an empty one.

    Shares are rounded one by one, and what they are then off by moves every bound but the first.

    Raises:
        UsageError: not one to three numbers with a positive sum.
    """
    split_bounds(split, num_sequences)  # refuses what is no split
    try:
        shares = [float(text) for text in split.replace("/", ",").split(",")]
    except ValueError:
        raise UsageError(
            f"--split {split}: shares are numbers with commas between them, as in {DEFAULT_SPLIT}."
        ) from None
    shares = (shares + [0.0] * len(SPLITS))[: len(SPLITS)]
    counts = [int(round(share / sum(shares) * float(num_sequences))) for share in shares]
    edges = [0, *np.cumsum(counts).tolist()]
    off = edges[-1] - num_sequences
    edges = [0, *(max(edge - off, 0) for edge in edges[1:])]
    return [(low, high) if high > low else None for low, high in zip(edges[:-1], edges[1:], strict=True)]


def padding_of(cfg: RunConfig, tokenizer: Tokenizer) -> Padding:
    """How micro-batches are padded; a layout that cuts sequences needs lengths that it can cut."""
    wanted, layout = cfg.finetune, cfg.layout
    assert cfg.batch.seq_length is not None
    multiple = cfg.batch.seq_length
    if wanted.dataset == "JSON-SFT":
        multiple = wanted.max_padding_length or multiple
    if wanted.no_pad_to_seq_lengths:
        cp, tp = layout.context_parallel_size, layout.tensor_model_parallel_size
        multiple = math.lcm(
            wanted.pad_to_multiple_of, 2 * cp if cp > 1 else 1, cp * tp if layout.sequence_parallel else 1
        )
        if layout.pipeline_model_parallel_size > 1:
            # A pipeline prepares itself for each length that it meets: few of them are enough.
            multiple *= max(1, cfg.batch.seq_length // (8 * multiple))
    known = (pad_id for pad_id in (tokenizer.pad, tokenizer.eod, 0) if pad_id is not None and pad_id >= 0)
    return Padding(multiple, next(known), wanted.tokenizer_padding_side)


class _Builder:
    """Builds the splits of blends; every file is opened once."""

    def __init__(self, cfg: RunConfig, tokenizer: Tokenizer) -> None:
        self._cfg = cfg
        self._wanted = cfg.finetune
        self._tokenizer = tokenizer
        self._padding = padding_of(cfg, tokenizer)
        self._opened: dict[str, tuple[Fields, DialogueOptions]] = {}
        self._shuffled: dict[str, list[int]] = {}
        self.cache = IndexCache(cfg.data.data_cache_path)

    def build(
        self, blend: Blend, split: str | None, num_samples: NumSamples, only: int | None = None
    ) -> list[Dataset | None]:
        """Train, valid and test of one blend; `split` None gives all of it to the split number `only`."""
        found = [
            self._blend_split(blend, split, i, size) if only in (None, i) else None
            for i, size in enumerate(num_samples)
        ]
        if found[0] is None and only in (None, 0):
            raise TesselError(
                f"{' '.join(blend.paths)}: the train split is empty, so there is nothing to train on. Change --split."
            )
        return found

    def _blend_split(self, blend: Blend, split: str | None, i: int, size: int | None) -> Dataset | None:
        if len(blend.paths) == 1 and blend.weights is None:
            return self._part(blend.paths[0], split, i, size)
        parts = len(blend.paths)
        if blend.weights is None:
            built = [self._part(path, split, i, None) for path in blend.paths]
            weights: Sequence[float] = [0 if part is None else len(part) for part in built]
            total = None if size is None else min(size, int(sum(weights)))
        elif size is None:
            raise UsageError(
                f"The {SPLITS[i]} split is one epoch (--full-validation or no number of samples), which a weighted "
                "blend has not; leave the weights out or give a number of samples."
            )
        else:
            weights = normalize(blend.weights)
            sizes = share_sizes(weights, size, self._cfg.data.mid_level_dataset_surplus)
            built = [self._part(path, split, i, part) for path, part in zip(blend.paths, sizes, strict=True)]
            total = sum(share_sizes(weights, size))
        present = [part for part in built if part is not None]
        if not present or not total:
            return None
        if len(present) < parts:
            empty = blend.paths[built.index(None)]
            raise TesselError(
                f"{empty}: its {SPLITS[i]} split holds no sample, so it cannot be blended. Leave it out, or change "
                "--split."
            )
        return BlendedDataset(present, weights, total, name=SPLITS[i], cache=self.cache)

    def _part(self, path: str, split: str | None, i: int, size: int | None) -> DialogueDataset | None:
        if path not in self._opened:
            self._opened[path] = self._open(path)
        fields, options = self._opened[path]
        first = next(iter(fields.values()))
        if self._wanted.dataset == "MMAP":
            return record_dataset(first, split, i, size, options, self.cache)
        bounds = (0, len(first)) if split is None else instruction_bounds(split, len(first))[i]
        if bounds is None or bounds[0] == bounds[1]:
            return None
        kind = PairDataset if self._wanted.is_pairwise_dataset else InstructionDataset
        if self._wanted.dataset == "JSON-SFT" and self._cfg.data.dataloader_type == "cyclic":
            size = None  # the loader goes through it again and again
        before = self._shuffled.setdefault(path, [])
        dataset = kind(fields, bounds, size, options, name=SPLITS[i], cache=self.cache, shuffled_before=tuple(before))
        before.append(0 if size == 0 else len(dataset))
        return dataset

    def num_samples(self, path: str, split: str | None) -> int:
        """Samples of the training split of one source."""
        if path not in self._opened:
            self._opened[path] = self._open(path)
        length = len(next(iter(self._opened[path][0].values())))
        bounds = (0, length) if split is None else instruction_bounds(split, length)[0]
        return 0 if bounds is None else bounds[1] - bounds[0]

    def _open(self, path: str) -> tuple[Fields, DialogueOptions]:
        if self._wanted.dataset == "MMAP":
            assert self._cfg.batch.seq_length is not None
            records = open_records(path, self._cfg.batch.seq_length)
            return {"text": records}, self._options("eos" if self._cfg.data.reset_position_ids else "none")
        keys = PAIR_KEYS if self._wanted.is_pairwise_dataset else INSTRUCTION_KEYS
        fields = open_fields(self._prefix(path, keys), keys)
        return fields, self._options("none" if self._wanted.is_pairwise_dataset else self._segments(fields))

    def _prefix(self, path: str, keys: Sequence[str]) -> str:
        """Of files that were preprocessed, or are now."""
        if not (Path(path).exists() and format_of(Path(path)) is not None) and not Path(path).is_dir():
            return _bare_prefix(path, keys)
        from tessel.data.instruct.raw import preprocessed_dialogues

        return preprocessed_dialogues(path, self._cfg, self._tokenizer)

    def _segments(self, fields: Fields) -> str:
        """How the samples of a pack are told apart; see `DialogueOptions`."""
        ids = fields["input_ids"]
        noted = read_metadata(ids.prefix) or {}
        if noted.get("pack") and noted.get("compatible") != "mindspeed":
            return "stored"  # packs of tessel's own always say what is whose
        if self._cfg.data.reset_attention_mask:
            return "stored" if self._wanted.neat_pack else "eos"
        packed = self._wanted.pack or (len(ids) > 1 and int(ids.lengths.min()) == int(ids.lengths.max()) > 1)
        if packed:
            warn_once(
                f"{ids.prefix} holds packs, and without --reset-attention-mask the samples of a pack see each other, "
                "as in MindSpeed-LLM; --reset-attention-mask --neat-pack tells them apart where --neat-pack wrote them"
            )
        return "none"

    def _options(self, segments: str) -> DialogueOptions:
        wanted, cfg = self._wanted, self._cfg
        assert cfg.batch.seq_length is not None
        template = _Template(cfg, self._tokenizer)
        return DialogueOptions(
            seq_length=cfg.batch.seq_length,
            padding=self._padding,
            seed=cfg.precision.seed,
            segments=segments,
            eos_id=template.eos() if segments == "eos" and not wanted.reads_pai else None,
            cut="never" if wanted.no_cut_token or wanted.reads_pai else "plain" if wanted.cut_max_seqlen else "turns",
            ends_with_eos=template.ends_with_eos(),
            in_order=wanted.no_shuffle or wanted.dataset == "JSON-SFT",
            round_to=(cfg.batch.global_batch_size or cfg.batch.micro_batch_size) if wanted.padded_samples else 1,
            shuffle_all=wanted.full_shuffle_instruction_dataset,
            per_sequence=wanted.calculate_per_sequence_loss or wanted.reads_pai,
        )


class _Template:
    """What the prompt type says of data that is written already."""

    def __init__(self, cfg: RunConfig, tokenizer: Tokenizer) -> None:
        self._wanted = cfg.finetune
        self._tokenizer = tokenizer

    def _is_named(self) -> bool:
        return self._wanted.prompt_type_path is not None or self._wanted.prompt_type not in (None, "hf")

    def ends_with_eos(self) -> bool:
        """Whether turns end with the first token of the next prompt."""
        from tessel.data.instruct.templates import find_template

        return self._is_named() and find_template(self._wanted.prompt_type, self._wanted.prompt_type_path).efficient_eos

    def eos(self) -> int:
        """The id that ends an answer."""
        from tessel.data.instruct.templates import find_template
        from tessel.data.instruct.vocabulary import vocabulary_for

        eos = self._tokenizer.eod
        if self._is_named():
            template = find_template(self._wanted.prompt_type, self._wanted.prompt_type_path)
            eos = vocabulary_for(self._tokenizer, template).eos
        if eos is None:
            raise UsageError(
                "--reset-attention-mask tells the samples of a pack apart by the token that ends an answer: name the "
                "--prompt-type of the data, or give --eod-id."
            )
        return eos


def _bare_prefix(path: str, keys: Sequence[str]) -> str:
    """The prefix that the data was written with, of a path that may name one of its files.

    Raises:
        TesselError: there is no such data; says what there is.
    """
    name = path
    for suffix in (".idx", ".bin"):
        name = name.removesuffix(suffix)
    for key in keys:
        name = name.removesuffix(f"_packed_{key}_document")
    name = name.removesuffix("_packed")
    if Path(f"{name}_packed_{keys[0]}_document.idx").is_file():
        return name
    other = PAIR_KEYS if keys is INSTRUCTION_KEYS else INSTRUCTION_KEYS
    if Path(f"{name}_packed_{other[0]}_document.idx").is_file():
        flag = "--is-pairwise-dataset" if other is PAIR_KEYS else "--is-instruction-dataset"
        raise TesselError(f"{name} holds {'pairs' if other is PAIR_KEYS else 'instructions'}: give {flag} for it.")
    raise TesselError(
        f"{path}: there is no {name}_packed_{keys[0]}_document.idx. --data-path of instructions is the --output-prefix "
        "that they were preprocessed with."
    )

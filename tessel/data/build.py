"""From the data flags to the datasets of a run.

Source of the rules: megatron-core's blended_megatron_dataset_builder.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tessel.config.run import Data, RunConfig
from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.blend import Blend, BlendedDataset, Part, normalize, share_sizes
from tessel.data.cache import IndexCache
from tessel.data.indexed import IndexedDataset, strip_suffix
from tessel.data.paths import Sources, is_raw_text, read_sources
from tessel.data.samples import NO_PAD, GPTDataset, SampleOptions, resolve_pad_id
from tessel.data.split import DEFAULT_SPLIT, SPLITS, num_samples_for, split_bounds
from tessel.errors import TesselError, UsageError
from tessel.runtime.log import log, warn_once

if TYPE_CHECKING:
    from tessel.data.tokenizer import Tokenizer

__all__ = ["Dataset", "Splits", "ValidationSets", "build_datasets", "build_splits", "num_samples_for", "sample_options"]

Dataset = Part | BlendedDataset
NumSamples = tuple[int | None, int | None, int | None]
Bounds = Sequence[tuple[int, int] | None]
_VALID = SPLITS.index("valid")
_MOST_THREADS = 8


class ValidationSets(NamedTuple):
    """Validation sets that are evaluated apart, and their names in the log."""

    names: tuple[str, ...]
    datasets: tuple[Dataset, ...]


class Splits(NamedTuple):
    """The datasets of a run; None where the data leaves a split empty."""

    train: Dataset | None
    valid: Dataset | ValidationSets | None
    test: Dataset | None

    def by_name(self) -> dict[str, Dataset | None]:
        """All datasets: train, valid and test, or valid-NAME for each of several validation sets."""
        if not isinstance(self.valid, ValidationSets):
            return {"train": self.train, "valid": self.valid, "test": self.test}
        sets = {f"valid-{name}": dataset for name, dataset in zip(*self.valid, strict=True)}
        return {"train": self.train, **sets, "test": self.test}


def build_datasets(cfg: RunConfig, tokenizer: Tokenizer | None, num_samples: NumSamples) -> Splits:
    """The datasets of a training run, and a line about each.

    `num_samples` are the samples needed of each split, None for one epoch; see `num_samples_for`.

    Raises:
        UsageError: flags that contradict each other, or no --seq-length.
        TesselError: a file is missing or damaged, or the training data is shorter than one sequence.
    """
    if cfg.batch.seq_length is None:
        raise UsageError("--seq-length is missing: it says how many tokens a sample has.")
    splits = splits_of(cfg, tokenizer, num_samples)
    for name, dataset in splits.by_name().items():
        log(f"{name} data: {summary(dataset) if dataset is not None else 'none'}")
    return splits


def splits_of(cfg: RunConfig, tokenizer: Tokenizer | None, num_samples: NumSamples) -> Splits:
    """The datasets of a run, of text or of dialogues; says nothing but what came from a cache."""
    if cfg.finetune.reads_dialogues:
        if cfg.data.multiple_validation_sets:
            raise UsageError("--multiple-validation-sets is for plain text; leave it out for dialogues.")
        from tessel.data.instruct.build import build_dialogues

        if tokenizer is None:
            raise UsageError("Dialogues need the tokenizer that they were made with: give --tokenizer-name-or-path.")
        return Splits(*build_dialogues(cfg, tokenizer, num_samples))
    assert cfg.batch.seq_length is not None
    options = sample_options(cfg.data, cfg.tokenizer, tokenizer, cfg.batch.seq_length, cfg.precision.seed)
    return build_splits(cfg.data, options, tokenizer, num_samples)


def sample_options(
    data: Data, section: TokenizerSection, tokenizer: Tokenizer | None, seq_length: int, seed: int
) -> SampleOptions:
    """What decides samples, from the flags and the tokenizer, which may be None where --eod-id says enough.

    Raises:
        UsageError: a flag needs an end-of-document id, and there is none.
    """
    if tokenizer is not None:  # which has read --eod-id and --pad-id itself
        eod_id, pad_id = tokenizer.eod, tokenizer.pad
    else:
        eod_id = section.eod_id
        pad_id = NO_PAD if section.pad_id is None else section.pad_id
        if eod_id is not None:
            pad_id = resolve_pad_id(pad_id, [eod_id], section.allow_ambiguous_pad_tokens)
    needs_eod = data.eod_mask_loss or data.reset_position_ids or data.reset_attention_mask
    if eod_id is None and needs_eod:
        raise UsageError(
            "--eod-mask-loss, --reset-position-ids and --reset-attention-mask need an end-of-document id: "
            "name a tokenizer or give --eod-id."
        )
    return SampleOptions(
        seq_length=seq_length,
        seed=seed,
        eod_id=eod_id,
        pad_id=pad_id,
        add_extra_token=not data.no_add_extra_token_to_sequence,
        eod_mask_loss=data.eod_mask_loss,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        inter_document_masking=data.dataloader_inter_document_masking,
    )


def build_splits(data: Data, options: SampleOptions, tokenizer: Tokenizer | None, num_samples: NumSamples) -> Splits:
    """The datasets that the data flags name; says nothing but what came from a cache."""
    sources = read_sources(data)
    builder = _Builder(data, options, tokenizer)
    apart = _validation_blends(data, sources)
    built: list[Dataset | None]
    if sources.shared is not None:
        built = builder.build(sources.shared, data.split or DEFAULT_SPLIT, num_samples)
    else:
        built = [None] * len(SPLITS)
        for i, blend in enumerate(sources.per_split):
            if blend is not None and not (apart and i == _VALID):
                only = ",".join("1" if j == i else "0" for j in range(len(SPLITS)))
                # With a path of its own, a single dataset's weight means nothing.
                alone = Blend(blend.paths, None) if len(blend.paths) == 1 else blend
                built[i] = builder.build(alone, only, num_samples)[i]
    valid = builder.validation_sets(apart, num_samples[_VALID]) if apart else built[_VALID]
    builder.cache.report()
    return Splits(built[0], valid, built[2])


def _validation_blends(data: Data, sources: Sources) -> dict[str, Blend]:
    """The validation sets that are to be evaluated apart, by name; none if they are not.

    Raises:
        UsageError: --multiple-validation-sets with data that it does not fit, or names that do not fit it.
    """
    names = data.validation_set_names
    if not data.multiple_validation_sets:
        if names is not None:
            raise UsageError("--validation-set-names names the sets of --multiple-validation-sets: give that, too.")
        return {}
    blend = None if sources.shared is not None else sources.per_split[_VALID]
    if blend is None:
        raise UsageError(
            "--multiple-validation-sets needs the sets one by one: give --train-data-path and --valid-data-path, "
            "or --per-split-data-args-path."
        )
    if blend.weights is not None:
        raise UsageError("--multiple-validation-sets evaluates each set by itself: give their paths without weights.")
    if names is None:
        names = tuple(str(i) for i in range(len(blend.paths)))
    if len(names) != len(blend.paths) or len(set(names)) < len(names):
        raise UsageError(
            f"--validation-set-names: {len(names)} names, {len(set(names))} of them different, for {len(blend.paths)} "
            "validation sets; give each set a name of its own."
        )
    return {name: Blend((path,), None) for name, path in zip(names, blend.paths, strict=True)}


def summary(dataset: Dataset) -> str:
    """One line: samples, epochs, tokens and where they come from."""
    parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
    sources = "; ".join(
        f"{part.indexed.prefix} ({len(part.sequence_ids):,} sequences, {part.tokens_per_epoch:,} tokens, "
        f"{part.num_epochs} epoch{'s' if part.num_epochs > 1 else ''})"
        for part in parts[:8]
    )
    more = f"; and {len(parts) - 8} more" if len(parts) > 8 else ""
    length = f"{'' if isinstance(parts[0], GPTDataset) else 'up to '}{parts[0].config.seq_length}"
    return f"{len(dataset):,} samples of {length} tokens from {sources}{more}"


class _Builder:
    """Builds the splits of blends; every file is opened once."""

    def __init__(self, data: Data, options: SampleOptions, tokenizer: Tokenizer | None) -> None:
        self._data = data
        self._options = options
        self._tokenizer = tokenizer
        self._opened: dict[str, IndexedDataset] = {}
        self.cache = IndexCache(data.data_cache_path)

    def build(self, blend: Blend, split: str, num_samples: NumSamples) -> list[Dataset | None]:
        """Train, valid and test of one blend."""
        indexed = [self._open(path) for path in blend.paths]
        if len(indexed) == 1 and blend.weights is None:
            bounds = split_bounds(split, len(indexed[0]))
            return [self._split_dataset(indexed[0], bounds, i, size) for i, size in enumerate(num_samples)]
        return [self._blend_split(indexed, blend.weights, split, i, size) for i, size in enumerate(num_samples)]

    def validation_sets(self, blends: Mapping[str, Blend], size: int | None) -> ValidationSets:
        """One dataset of each; none may be without a sample."""
        built = {name: self.build(blend, "0,1,0", (0, size, 0))[_VALID] for name, blend in blends.items()}
        datasets = tuple(dataset for dataset in built.values() if dataset is not None)
        if len(datasets) < len(built):
            empty = next(name for name, dataset in built.items() if dataset is None)
            raise TesselError(
                f"The validation set {blends[empty].paths[0]} holds no sample of {self._options.seq_length} tokens. "
                "Leave it out, or give it more data."
            )
        return ValidationSets(tuple(built), datasets)

    def _open(self, path: str) -> IndexedDataset:
        if path not in self._opened:
            self._opened[path] = IndexedDataset(self._prefix(path))
        return self._opened[path]

    def _prefix(self, path: str) -> str:
        if not is_raw_text(path):
            return strip_suffix(path)
        if self._tokenizer is None:
            raise UsageError(f"--data-path {path} is raw text, which needs a tokenizer: give --tokenizer-name-or-path.")
        # Preprocessing needs libraries that a .bin/.idx does not.
        from tessel.data import raw_text

        return raw_text.preprocessed_prefix(
            path, self._tokenizer, self._data.json_keys, not self._data.no_append_eod, self._data.data_cache_path
        )

    def _split_dataset(
        self, indexed: IndexedDataset, bounds: Bounds, split: int, size: int | None
    ) -> GPTDataset | None:
        """The dataset of one split; None, and a warning, where it would be empty."""
        span = bounds[split]
        if span is None:
            return None
        name = SPLITS[split]
        tokens = int(indexed.lengths[slice(*span)].sum(dtype=np.int64))
        if tokens == 0:
            self._refuse_empty(indexed.prefix, name, f"no tokens (of {len(indexed)} sequences in all)")
            return None
        dataset = self._gpt_dataset(indexed, span, split, size)
        self._check_length([dataset], len(dataset), size)
        return dataset if len(dataset) else None

    def _refuse_empty(self, what: str, name: str, holds: str) -> None:
        message = f"{what}: the {name} split holds {holds}"
        if name == "train":
            raise TesselError(f"{message}, so there is nothing to train on. Change --split or give more data.")
        warn_once(f"{message}: there is no {name} data (--split or --{name}-data-path gives it some)")

    def _check_length(self, parts: Sequence[GPTDataset], length: int, wanted: int | None) -> None:
        """The training data must hold one sequence; where a smaller part repeats within a sample, say so."""
        needed = self._options.seq_length + int(self._options.add_extra_token)
        short = [part for part in parts if part.tokens_per_epoch < needed]
        if not short or wanted == 0:
            return
        first = short[0]
        if len(short) == len(parts) and first.name == "train":
            raise TesselError(
                f"--seq-length {self._options.seq_length}: the training data holds fewer tokens than one sample "
                f"({first.tokens_per_epoch:,} in {first.indexed.prefix}). Lower --seq-length or give more data."
            )
        held = (
            f"{first.indexed.prefix}: the {first.name} split has {first.tokens_per_epoch:,} tokens, "
            "less than one sample"
        )
        if length == 0:
            warn_once(f"{held}: there is no {first.name} data")
        else:
            warn_once(f"{held}, so its documents repeat within a sample")

    def _gpt_dataset(self, indexed: IndexedDataset, span: tuple[int, int], split: int, size: int | None) -> GPTDataset:
        keep_partial = SPLITS[split] == "valid" and self._data.no_drop_last_partial_validation_sequence
        return GPTDataset(
            indexed,
            np.arange(*span, dtype=np.int32),
            size,
            self._options,
            name=SPLITS[split],
            drop_last=not keep_partial,
            cache=self.cache,
        )

    def _blend_split(
        self,
        indexed: Sequence[IndexedDataset],
        given_weights: tuple[float, ...] | None,
        split_text: str,
        split: int,
        size: int | None,
    ) -> Dataset | None:
        """One split of several datasets."""
        spans = [split_bounds(split_text, len(part))[split] for part in indexed]
        present = [span for span in spans if span is not None]
        if len(present) < len(indexed):  # the share is zero, and so for all
            return None
        name = SPLITS[split]
        empty = [part for part, span in zip(indexed, present, strict=True) if not part.lengths[slice(*span)].any()]
        if len(empty) == len(indexed) or (empty and size == 0):
            self._refuse_empty("the blend", name, "no tokens")
            return None
        if empty:
            raise TesselError(
                f"{empty[0].prefix}: its {name} split holds no tokens (of {len(empty[0])} sequences in all), "
                "so it cannot be blended. Leave it out, or change --split."
            )
        if given_weights is None:
            return self._blend_by_length(indexed, present, split, size)
        if size is None:
            raise UsageError(
                f"The {name} split is one epoch (--full-validation or no number of samples), which a weighted blend "
                "has not; leave the weights out or give a number of samples."
            )
        weights = normalize(given_weights)
        built_sizes = share_sizes(weights, size, self._data.mid_level_dataset_surplus)
        parts = self._in_parallel(
            lambda part, span, built: self._gpt_dataset(part, span, split, built), indexed, present, built_sizes
        )
        return self._blend(parts, weights, sum(share_sizes(weights, size)), name)

    def _in_parallel(self, build: Callable[..., GPTDataset], *items: Sequence[Any]) -> list[GPTDataset]:
        """What `build` makes of each of the items, by several threads."""
        wanted = self._data.num_dataset_builder_threads or min(os.cpu_count() or 1, _MOST_THREADS)
        if min(wanted, len(items[0])) < 2:
            return list(map(build, *items))
        with ThreadPoolExecutor(min(wanted, len(items[0])), "index") as pool:
            return list(pool.map(build, *items))

    def _blend_by_length(
        self, indexed: Sequence[IndexedDataset], spans: Sequence[tuple[int, int]], split: int, size: int | None
    ) -> Dataset | None:
        """Without weights: one epoch of each, in proportion to their samples."""
        parts = self._in_parallel(lambda part, span: self._gpt_dataset(part, span, split, None), indexed, spans)
        lengths = [len(part) for part in parts]
        if not sum(lengths):
            self._check_length(parts, 0, size)
            return None
        return self._blend(parts, lengths, None if size is None else min(size, sum(lengths)), SPLITS[split])

    def _blend(self, parts: list[GPTDataset], weights: Sequence[float], size: int | None, name: str) -> BlendedDataset:
        blended = BlendedDataset(parts, weights, size, name=name, cache=self.cache)
        self._check_length(parts, len(blended), size)
        return blended

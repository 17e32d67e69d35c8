"""`tessel samples`: what the samples of a run hold, and which of them a step trains on."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tessel.config.run import Batch, RunConfig
from tessel.data.blend import BlendedDataset, Part
from tessel.data.build import Dataset, Splits, ValidationSets, splits_of, summary
from tessel.data.instruct.samples import PairSample
from tessel.data.sampler import SampleOrder, sample_ids
from tessel.data.samples import Piece, Sample
from tessel.data.split import SPLITS, num_samples_for
from tessel.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import require_path

if TYPE_CHECKING:
    from tessel.config.verbs import SamplesConfig


@dataclass(frozen=True)
class Shown:
    """One sample as it is shown. `index` counts in the split, `dataset` in the blend (0 without one)."""

    index: int
    step: int | None
    dataset: int
    part: Part
    sample: Sample
    pieces: list[Piece]
    epochs: tuple[int, int]  # the first and last epoch of the dataset that it draws from


def show_samples(
    cfg: SamplesConfig, batch_size_at: Callable[[int], int] | None = None, train_iters: int | None = None
) -> None:
    """Print the samples that --index or --step names, as text or as one JSON object a line.

    `batch_size_at(consumed_samples)` is the run's global batch size (constant if not given), and
    `train_iters` its length where --train-iters does not say it.

    Raises:
        UsageError: flags that contradict each other or cannot be read.
        TesselError: the data is missing or damaged, or has no such sample.
    """
    run = cfg.run
    if run.batch.seq_length is None:
        raise UsageError("--seq-length is missing: it says how many tokens a sample has.")
    tokenizer = _tokenizer(run)
    if run.finetune.is_pairwise_dataset:
        raise UsageError("tessel samples shows samples of one answer: leave --is-pairwise-dataset out.")
    # Lines about caches must not mix with JSON.
    with contextlib.redirect_stdout(sys.stderr):
        splits = splits_of(run, tokenizer, _num_samples(cfg, train_iters))
    dataset = _split(splits, cfg.split_name)
    if not cfg.json:
        print(f"{cfg.split_name}: {summary(dataset)}")
    for shown in _select(cfg, dataset, batch_size_at or _constant(run.batch)):
        if cfg.json:
            print(json.dumps(as_json(shown)))
        else:
            print("\n".join(as_text(shown, tokenizer)))


def as_json(shown: Shown) -> dict[str, Any]:
    """The sample as JSON: pieces are [dataset, document, offset, length], the last label's token included."""
    sample = shown.sample
    content: dict[str, Any] = {
        "index": shown.index,
        "tokens": sample["tokens"].tolist(),
        "labels": sample["labels"].tolist(),
        "loss_mask": sample["loss_mask"].tolist(),
        "position_ids": sample["position_ids"].tolist(),
        "pieces": [[shown.dataset, *piece] for piece in shown.pieces],
        "epoch": list(shown.epochs),
        "epochs": shown.part.num_epochs,
        "path": shown.part.indexed.prefix,
    }
    if sample["segments"] is not None:
        content["segments"] = sample["segments"].tolist()
    if shown.step is not None:
        content["step"] = shown.step
    return content


def as_text(shown: Shown, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Lines: the sample, then each piece with its text; ids where there is no tokenizer."""
    first, last = shown.epochs
    step = f"step {shown.step}, " if shown.step is not None else ""
    epoch = f"epoch {first}" if first == last else f"epochs {first} to {last}"
    num_trained = int((shown.sample["loss_mask"] > 0).sum())
    yield f"sample {shown.index}: {step}{epoch} of {shown.part.num_epochs}, loss on {num_trained} tokens"
    for piece in shown.pieces:
        yield (
            f"  dataset {shown.dataset} ({shown.part.indexed.prefix}), document {piece.document}, "
            f"tokens {piece.offset} to {piece.offset + piece.length} of {shown.part.indexed.lengths[piece.document]}"
        )
        ids = shown.part.indexed.get(*piece).tolist()
        text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
        yield from (f"    {line}" for line in text.splitlines())


def _tokenizer(run: RunConfig) -> Tokenizer | None:
    """The tokenizer that is named, or the one of the model; None where there is neither."""
    section = run.tokenizer
    folder = run.checkpoint.load or run.model.init_from_config
    if folder is not None:
        require_path(folder, "--load" if run.checkpoint.load else "--init-from-config")
    named = section.tokenizer_type or section.tokenizer_name_or_path or section.tokenizer_model
    if not named and (folder is None or not has_tokenizer(folder)):
        return None
    return load_tokenizer(section, folder, run.model.vocab_size)


def _split(splits: Splits, name: str) -> Dataset:
    dataset: Dataset | ValidationSets | None = getattr(splits, name)
    if isinstance(dataset, ValidationSets):
        raise UsageError("--multiple-validation-sets: name the one to look at alone by --valid-data-path, without it.")
    if dataset is None:
        raise TesselError(f"--split-name {name}: the data gives it no sample; see --split and --{name}-data-path.")
    return dataset


def _num_samples(cfg: SamplesConfig, train_iters: int | None) -> tuple[int | None, int | None, int | None]:
    """--num-samples, or what a run of --train-iters or --train-samples asks for; otherwise one epoch of each."""
    if cfg.num_samples is not None:
        train, valid, test = parse_num_samples(cfg.num_samples)
        return train, valid, test
    batch = cfg.run.batch
    if batch.train_iters is None and batch.train_samples is None:
        return None, None, None
    if batch.train_iters is not None:
        train_iters = batch.train_iters
    elif train_iters is None:
        train_iters = (batch.train_samples or 0) // (batch.global_batch_size or batch.micro_batch_size)
    return num_samples_for(cfg.run, train_iters)


def parse_num_samples(text: str) -> list[int | None]:
    """`600,30,2`: samples of train, valid and test; None is one epoch.

    Raises:
        UsageError: not three numbers or None.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) != len(SPLITS) or not all(word == "None" or word.isdecimal() for word in words):
        raise UsageError(f"--num-samples {text}: three numbers are expected, as in 600,30,2; None is one epoch.")
    return [None if word == "None" else int(word) for word in words]


def parse_range(text: str, flag: str) -> tuple[int, int]:
    """`A:B` as (A, B), and `A` as (A, A + 1).

    Raises:
        UsageError: neither, or empty.
    """
    words = text.split(":")
    if len(words) > 2 or not all(word.isdecimal() for word in words):
        raise UsageError(f"{flag} {text}: FIRST:END or one number is expected, as in 0:8.")
    first, end = int(words[0]), int(words[-1]) + (len(words) == 1)
    if end <= first:
        raise UsageError(f"{flag} {text}: the range is empty; END is the first that is not shown.")
    return first, end


def _constant(batch: Batch) -> Callable[[int], int]:
    if batch.rampup_batch_size is not None:
        raise UsageError("--rampup-batch-size: the batch sizes of this run are not known here; give --index.")
    size = batch.global_batch_size or batch.micro_batch_size
    return lambda consumed_samples: size


def _select(cfg: SamplesConfig, dataset: Dataset, batch_size_at: Callable[[int], int]) -> Iterator[Shown]:
    """The samples that the flags name, in order."""
    if cfg.step is None:
        first, end = parse_range(cfg.index or "0:8", "--index")
        if first >= len(dataset):
            raise TesselError(f"--index {first}: the {cfg.split_name} split has {len(dataset):,} samples.")
        for i in range(first, min(end, len(dataset))):
            yield look_up(dataset, i, None)
        return
    if cfg.index is not None or cfg.split_name != "train":
        raise UsageError("--step names training samples: leave out --index, and --split-name valid or test.")
    first, end = parse_range(cfg.step, "--step")
    if first < 1:
        raise UsageError(f"--step {cfg.step}: steps count from 1, as iterations do in the log.")
    data = cfg.run.data
    order = SampleOrder(data.dataloader_type, not data.no_data_sharding)
    consumed = 0
    for step in range(1, end):
        size = batch_size_at(consumed)
        if step >= first:
            for i in sample_ids(len(dataset), consumed, size, cfg.run.batch.micro_batch_size, order).tolist():
                yield look_up(dataset, i, step)
        consumed += size


def look_up(dataset: Dataset, i: int, step: int | None) -> Shown:
    """Sample i of a dataset, with where it comes from."""
    number, part, at = 0, dataset, i
    if isinstance(part, BlendedDataset):
        number, at = part.locate(i)
        part = part.datasets[number]
    sample = part[at]
    assert not isinstance(sample, PairSample), "pairs are refused before"
    return Shown(i, step, number, part, sample, part.pieces(at), part.epochs_of(at))

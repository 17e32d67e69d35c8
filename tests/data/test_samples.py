"""Index arrays and samples against a walk written out here, and against megatron-core itself."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tessel.data.sample_index import build_sample_index, plan_epochs
from tessel.data.samples import GPTDataset, SampleOptions, resolve_pad_id
from tessel.errors import TesselError

from .datasets import EOD, open_random, random_lengths


def walk(lengths: np.ndarray, documents: np.ndarray, seq_length: int, extra: int, num_samples: int) -> list[list[int]]:
    """The sample index as a walk over documents, token count by token count."""
    rows, position, offset = [[0, 0]], 0, 0
    for _ in range(num_samples):
        need = seq_length + extra
        while need > 0:
            rest = int(lengths[documents[position]]) - offset
            if rest >= need:
                offset += need - extra
                need = 0
            elif position == len(documents) - 1:
                offset = int(lengths[documents[position]]) - extra
                break
            else:
                need -= rest
                position, offset = position + 1, 0
        rows.append([position, offset])
    return rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("seq_length", [1, 5, 16, 200])
def test_sample_index_is_the_walk(seed: int, extra: int, seq_length: int) -> None:
    lengths = np.array(random_lengths(seed, 30), np.int32)
    documents = np.random.default_rng(seed).permutation(np.repeat(np.arange(30, dtype=np.int32), 2))
    usable = int(lengths[documents].sum()) - extra
    for drop_last, num_samples in ((True, usable // seq_length), (False, math.ceil(usable / seq_length))):
        index = build_sample_index(lengths, documents, seq_length, extra, drop_last)
        assert index.dtype == np.int32
        assert index.tolist() == walk(lengths, documents, seq_length, extra, num_samples)


def test_epochs() -> None:
    assert plan_epochs(100, None, 10, 1) == (1, False, 0)
    assert plan_epochs(100, 9, 10, 1) == (1, False, 0)
    # 10 samples and a label are 101 tokens; the second epoch gives one sample of nine: shuffled apart.
    assert plan_epochs(100, 10, 10, 1) == (2, True, 9)
    assert plan_epochs(100, 19, 10, 1) == (2, False, 9)
    assert plan_epochs(100, 0, 10, 1) == (1, False, 0)
    # An epoch of 1,000 tokens gives 99 samples, and 80 % of them is the limit.
    assert plan_epochs(1000, 99 + 78, 10, 1) == (2, True, 99)
    assert plan_epochs(1000, 99 + 79, 10, 1) == (2, False, 99)


def expected_sample(dataset: GPTDataset, i: int) -> dict[str, np.ndarray]:
    """Sample i, drawn token by token."""
    options = dataset.config
    extra = int(options.add_extra_token)
    stream: list[int] = []
    for document in dataset.document_index.tolist():
        stream += dataset.indexed.get(document).tolist()
    start = int(dataset.shuffle_index[i]) * options.seq_length
    text = stream[start : start + options.seq_length + extra]
    text += [options.pad_id] * (options.seq_length + extra - len(text))
    tokens = text[: options.seq_length]
    labels = text[1:] if extra else [*text[1:], options.pad_id]
    loss_mask, positions, segments = [], [], []
    position = segment = 0
    for token, label in zip(tokens, labels, strict=True):
        loss_mask.append(float(label != options.pad_id and not (options.eod_mask_loss and token == EOD)))
        positions.append(position)
        segments.append(segment)
        position += 1
        if token == EOD:
            segment += 1
            if options.reset_position_ids:
                position = 0
    return {
        "tokens": np.array([0 if token == options.pad_id else token for token in tokens]),
        "labels": np.array([0 if label == options.pad_id else label for label in labels]),
        "loss_mask": np.array(loss_mask, np.float32),
        "position_ids": np.array(positions),
        "segments": np.array(segments, np.int32),
    }


@pytest.mark.parametrize(
    "flags",
    [
        {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True},
        {"eod_mask_loss": True, "pad_id": 3},
        {"reset_position_ids": True, "add_extra_token": False},
        {"reset_attention_mask": True},
    ],
)
def test_samples_are_drawn_and_masked(tmp_path: Path, flags: dict[str, Any]) -> None:
    indexed = open_random(tmp_path / "data", random_lengths(3, 60), vocab_size=12)
    options = SampleOptions(16, seed=5, eod_id=EOD, **flags)
    dataset = GPTDataset(indexed, np.arange(5, 50, dtype=np.int32), 200, options, name="valid", drop_last=False)
    assert dataset.num_epochs > 1
    for i in range(len(dataset)):
        sample, expected = dataset[i], expected_sample(dataset, i)
        for key in ("tokens", "labels", "position_ids", "loss_mask"):
            assert np.array_equal(sample[key], expected[key]), (i, key)  # type: ignore[literal-required]
        if options.reset_attention_mask:
            assert np.array_equal(sample["segments"], expected["segments"])
        else:
            assert sample["segments"] is None


def test_types_and_pieces(tmp_path: Path) -> None:
    indexed = open_random(tmp_path / "data", random_lengths(1, 40))
    dataset = GPTDataset(indexed, np.arange(40, dtype=np.int32), 100, SampleOptions(16, eod_id=EOD))
    sample = dataset[3]
    assert (sample["tokens"].dtype, sample["labels"].dtype, sample["position_ids"].dtype) == (np.int64,) * 3
    assert sample["loss_mask"].dtype == np.float32
    for i in range(len(dataset)):
        pieces = dataset.pieces(i)
        text = np.concatenate([indexed.get(*piece) for piece in pieces])
        assert all(piece.length > 0 for piece in pieces)
        assert text[:-1].tolist() == dataset[i]["tokens"].tolist()
        assert text[1:].tolist() == dataset[i]["labels"].tolist()
    firsts = [dataset.epochs_of(i)[0] for i in range(len(dataset))]
    assert set(firsts) == set(range(1, dataset.num_epochs + 1))


def test_documents_restart_at_their_first_token(tmp_path: Path) -> None:
    indexed = open_random(tmp_path / "data", [5, 0, 3, 9, 1, 30])
    options = SampleOptions(8, eod_id=EOD, inter_document_masking=True)
    dataset = GPTDataset(indexed, np.arange(6, dtype=np.int32), None, options)
    for i in range(len(dataset)):
        sample = dataset[i]
        lengths = [piece.length for piece in dataset.pieces(i)]
        lengths[-1] -= 1  # the last label is no input
        positions = [position for length in lengths for position in range(length)]
        assert sample["position_ids"].tolist() == positions
        assert sample["segments"] is not None
        changes = np.flatnonzero(np.diff(sample["segments"])) + 1
        assert changes.tolist() == [j for j in range(1, 8) if positions[j] == 0]


def test_padding_of_the_first_sample_is_masked_in_all(tmp_path: Path) -> None:
    indexed = open_random(tmp_path / "data", [40] * 20, vocab_size=6)
    ids = np.arange(20, dtype=np.int32)
    plain = GPTDataset(indexed, ids, None, SampleOptions(16, pad_id=3, eod_mask_loss=True, eod_id=EOD))
    kept = GPTDataset(indexed, ids, None, SampleOptions(16, pad_id=3))
    first = plain[0]["loss_mask"]
    assert 0 < first.sum() < 16
    for i in (4, 0, 2):  # in whatever order they are read
        assert np.array_equal(kept[i]["loss_mask"], plain[i]["loss_mask"] * first)


def test_end_of_document_options_need_its_id(tmp_path: Path) -> None:
    indexed = open_random(tmp_path / "data", [40])
    dataset = GPTDataset(indexed, np.arange(1, dtype=np.int32), None, SampleOptions(8, eod_mask_loss=True))
    with pytest.raises(TesselError, match="--eod-id"):
        dataset[0]


def test_no_tokens_is_an_error(tmp_path: Path) -> None:
    indexed = open_random(tmp_path / "data", [0, 0, 4])
    with pytest.raises(TesselError, match="holds no tokens"):
        GPTDataset(indexed, np.arange(2, dtype=np.int32), 5, SampleOptions(8))


def test_ambiguous_pad_id() -> None:
    assert resolve_pad_id(5, [7, 5], allow_ambiguous=False) == -1
    assert resolve_pad_id(5, [7, 5], allow_ambiguous=True) == 5
    assert resolve_pad_id(5, [7], allow_ambiguous=False) == 5


def their_dataset(prefix: Path, ids: np.ndarray, num_samples: int | None, options: SampleOptions, keep: bool) -> Any:
    """megatron-core's dataset of the same arguments; its index is kept in memory alone."""
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirIndexed
    from megatron.core.datasets.utils import Split

    config = gpt_dataset.GPTDatasetConfig(
        random_seed=options.seed,
        sequence_length=options.seq_length,
        blend=([str(prefix)], None),
        split="0,1,0",
        tokenizer=SimpleNamespace(eod=EOD, pad=options.pad_id, vocab_size=100, unique_identifiers={}),
        reset_position_ids=options.reset_position_ids,
        reset_attention_mask=options.reset_attention_mask,
        eod_mask_loss=options.eod_mask_loss,
        add_extra_token_to_sequence=options.add_extra_token,
        drop_last_partial_validation_sequence=not keep,
    )
    config.mock = True
    return gpt_dataset.GPTDataset(TheirIndexed(str(prefix)), str(prefix), ids, num_samples, Split.valid, config)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [False, True])
def test_same_as_megatron_core(tmp_path: Path, seed: int, keep: bool) -> None:
    rng = np.random.default_rng(100 + seed)
    indexed = open_random(tmp_path / "data", random_lengths(seed, 80), seed, vocab_size=12)
    ids = np.arange(int(rng.integers(0, 10)), int(rng.integers(60, 81)), dtype=np.int32)
    per_epoch = int(indexed.lengths[ids].sum()) // 13
    # One epoch, a little of a second (shuffled apart), most of one, several.
    for num_samples in (None, per_epoch + 3, int(1.95 * per_epoch), 4 * per_epoch + 1):
        options = SampleOptions(
            13,
            seed=int(rng.integers(1, 10_000)),
            eod_id=EOD,
            pad_id=int(rng.choice([-1, 4])),
            add_extra_token=bool(rng.random() < 0.7),
            eod_mask_loss=bool(rng.random() < 0.5),
            reset_position_ids=bool(rng.random() < 0.5),
            reset_attention_mask=bool(rng.random() < 0.5),
        )
        ours = GPTDataset(indexed, ids, num_samples, options, name="valid", drop_last=not keep)
        if ours.sample_index.min() < 0:  # a kept partial sample that ends in an empty document: refused there
            with pytest.raises(AssertionError):
                their_dataset(tmp_path / "data", ids, num_samples, options, keep)
            continue
        theirs = their_dataset(tmp_path / "data", ids, num_samples, options, keep)
        for name in ("document_index", "sample_index", "shuffle_index"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert mine.dtype == other.dtype, (name, options)
            assert np.array_equal(mine, other), (name, options)
        for i in range(len(theirs)):
            sample, expected = ours[i], theirs[i]
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                assert np.array_equal(sample[key], expected[key].numpy()), (i, key, options)  # type: ignore[literal-required]
            if sample["segments"] is not None:
                allowed = np.tril(sample["segments"][:, None] == sample["segments"][None, :])
                assert np.array_equal(~allowed, expected["attention_mask"][0].numpy())

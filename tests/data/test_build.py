from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tessel.config.run import Batch, Data, Evaluation, Precision, RunConfig
from tessel.config.tokenizer import Tokenizer
from tessel.data.blend import BlendedDataset
from tessel.data.build import ValidationSets, build_datasets
from tessel.data.check import check_dataset, check_token_ids
from tessel.data.indexed import IndexedDataset
from tessel.data.samples import GPTDataset
from tessel.data.split import num_samples_for, split_bounds
from tessel.data.tokenizer import load_tokenizer
from tessel.errors import TesselError, UsageError
from tessel.runtime.log import warn_once

from .datasets import write_random


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    warn_once.cache_clear()


def config(tmp_path: Path, *names: str, seq_length: int = 8, **data: object) -> RunConfig:
    paths = tuple(name if not (tmp_path / f"{name}.idx").exists() else str(tmp_path / name) for name in names)
    return RunConfig(
        batch=Batch(seq_length=seq_length, micro_batch_size=2),
        data=Data(data_path=paths or None, **data),  # type: ignore[arg-type]
        precision=Precision(seed=5),
    )


def test_split_shares() -> None:
    assert split_bounds("949,50,1", 2000) == [(0, 1898), (1898, 1998), (1998, 2000)]
    assert split_bounds("969, 30, 1", 11) == [(0, 11), (11, 11), (11, 11)]
    assert split_bounds("100,0,0", 7) == [(0, 7), None, None]
    assert split_bounds("1/1", 5) == [(0, 2), (2, 5), None]  # half to even
    assert split_bounds("0,1,0", 5) == [None, (0, 5), None]


@pytest.mark.parametrize("split", ["", "0,0,0", "1,2,3,4", "1.2.3"])
def test_bad_split_is_refused(split: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        split_bounds(split, 10)


def test_numbers_of_samples() -> None:
    cfg = RunConfig(batch=Batch(global_batch_size=8), evaluation=Evaluation(eval_interval=10, eval_iters=3))
    assert num_samples_for(cfg, 25) == (200, 72, 24)
    assert num_samples_for(replace(cfg, batch=Batch(global_batch_size=8, train_samples=60)), 7) == (60, 24, 24)
    assert num_samples_for(replace(cfg, batch=Batch(global_batch_size=8, skip_train=True)), 25) == (200, 24, 24)
    assert num_samples_for(replace(cfg, evaluation=Evaluation(full_validation=True, eval_iters=3)), 25) == (
        200,
        None,
        24,
    )
    assert num_samples_for(RunConfig(batch=Batch(micro_batch_size=4), evaluation=Evaluation(eval_iters=100)), 2) == (
        8,
        400,
        400,
    )


def test_default_split_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "a", [20] * 100)
    splits = build_datasets(config(tmp_path, "a"), None, (300, 2, 0))
    assert isinstance(splits.train, GPTDataset)
    assert splits.train.sequence_ids.tolist() == list(range(97))
    assert splits.valid is not None
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("train data: 484 samples of 8 tokens from ")
    assert "97 sequences, 1,940 tokens, 2 epochs" in out[0]
    assert out[2] == "test data: none"


def test_one_file_and_its_seed(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 30)
    cfg = config(tmp_path, "a", split="1,1,0")
    one, two = (build_datasets(c, None, (9, 9, 0)) for c in (cfg, replace(cfg, precision=Precision(seed=6))))
    assert one.train is not None
    assert two.train is not None
    assert one.test is None
    assert not np.array_equal(one.train[0]["tokens"], two.train[0]["tokens"])


def test_weighted_blend(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 30)
    write_random(tmp_path / "b", [20] * 30, seed=1)
    splits = build_datasets(config(tmp_path, "3", "a", "1", "b", split="90,10,0"), None, (401, 10, 0))
    assert isinstance(splits.train, BlendedDataset)
    assert len(splits.train) == 301 + 101
    assert [part.num_samples for part in splits.train.datasets] == [303, 102]
    assert np.bincount(splits.train.dataset_index).tolist() == [301, 101]


def test_blend_by_length(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 30)
    write_random(tmp_path / "b", [20] * 10, seed=1)
    for wanted, size in ((None, 74 + 24), (10, 10), (9999, 74 + 24)):
        train = build_datasets(config(tmp_path, "a", "b", split="1"), None, (wanted, 0, 0)).train
        assert isinstance(train, BlendedDataset)
        assert len(train) == size
        assert [part.num_epochs for part in train.datasets] == [1, 1]


def test_paths_of_their_own(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_random(tmp_path / name, [20] * (10 + seed), seed)
    a, b, c = (str(tmp_path / name) for name in "abc")
    flags = Data(train_data_path=("0.2", a, "0.8", b), valid_data_path=(c,))
    by_flags = build_datasets(replace(config(tmp_path), data=flags), None, (20, 5, 5))
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"train": ["0.2", a, "0.8", b], "valid": f"1.0 {c}", "test": None}))
    by_file = build_datasets(config(tmp_path, per_split_data_args_path=str(file)), None, (20, 5, 5))
    for splits in (by_flags, by_file):
        assert isinstance(splits.train, BlendedDataset)
        assert isinstance(splits.valid, GPTDataset)
        assert splits.test is None
        assert splits.valid.name == "valid"
        assert len(splits.valid.sequence_ids) == 12


def test_validation_sets_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is what it would be alone, of the whole number of samples or one epoch."""
    for seed, name in enumerate("abc"):
        write_random(tmp_path / name, [20] * (10 + 5 * seed), seed)
    a, b, c = (str(tmp_path / name) for name in "abc")
    flags = Data(train_data_path=(a,), valid_data_path=(b, c), multiple_validation_sets=True)
    for size in (5, None):
        splits = build_datasets(replace(config(tmp_path), data=flags), None, (20, size, 0))
        assert isinstance(splits.valid, ValidationSets)
        assert splits.valid.names == ("0", "1")
        for path, dataset in zip((b, c), splits.valid.datasets, strict=True):
            alone = Data(train_data_path=(a,), valid_data_path=(path,))
            valid = build_datasets(replace(config(tmp_path), data=alone), None, (20, size, 0)).valid
            assert isinstance(valid, GPTDataset)
            assert isinstance(dataset, GPTDataset)
            assert np.array_equal(dataset.shuffle_index, valid.shuffle_index)
            assert np.array_equal(dataset.sample_index, valid.sample_index)
    named = replace(flags, validation_set_names=("wiki", "code"))
    splits = build_datasets(replace(config(tmp_path), data=named), None, (20, 5, 0))
    assert list(splits.by_name()) == ["train", "valid-wiki", "valid-code", "test"]
    assert "valid-code data: " in capsys.readouterr().out


def test_validation_sets_that_cannot_be_told_apart(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 10)
    write_random(tmp_path / "empty", [0, 0])
    a, empty = str(tmp_path / "a"), str(tmp_path / "empty")
    for flags, message in (
        (Data(data_path=(a,), multiple_validation_sets=True), "needs the sets one by one"),
        (Data(train_data_path=(a,), multiple_validation_sets=True), "needs the sets one by one"),
        (
            Data(train_data_path=(a,), valid_data_path=("1", a, "2", a), multiple_validation_sets=True),
            "without weights",
        ),
        (Data(data_path=(a,), validation_set_names=("x",)), "--validation-set-names names the sets"),
        (
            Data(valid_data_path=(a, a), multiple_validation_sets=True, validation_set_names=("x", "x")),
            "2 names, 1 of them different, for 2",
        ),
        (Data(valid_data_path=(a, a, empty), multiple_validation_sets=True), "empty holds no sample"),
    ):
        with pytest.raises(TesselError, match=message):
            build_datasets(replace(config(tmp_path), data=flags), None, (5, 5, 0))


@pytest.mark.parametrize("threads", [1, 3])
def test_datasets_of_a_blend_by_several_threads(tmp_path: Path, threads: int) -> None:
    names = [write_random(tmp_path / f"d{i}", [20] * (10 + i), i) for i in range(6)]
    train = build_datasets(
        config(tmp_path, *names, split="1", num_dataset_builder_threads=threads), None, (90, 0, 0)
    ).train
    assert isinstance(train, BlendedDataset)
    assert [part.indexed.prefix for part in train.datasets] == names
    assert len(train) == 90


def test_paths_in_a_file(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 30)
    (tmp_path / "args").write_text(f"1\n  {tmp_path / 'a'}\n")
    train = build_datasets(config(tmp_path, data_args_path=str(tmp_path / "args")), None, (20, 0, 0)).train
    assert isinstance(train, BlendedDataset)


def test_padded_last_validation_sequence(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 30)
    cfg = config(tmp_path, "a", split="80,10,10", no_drop_last_partial_validation_sequence=True)
    splits = build_datasets(cfg, None, (10, None, None))
    assert splits.valid is not None
    assert splits.test is not None
    assert (len(splits.valid), len(splits.test)) == (8, 7)
    partial = splits.valid[int(np.argmax(splits.valid.shuffle_index == 7))]  # type: ignore[union-attr]
    assert partial["loss_mask"].tolist() == [1.0] * 3 + [0.0] * 5
    assert partial["labels"].tolist()[3:] == [0] * 5


def test_sequence_longer_than_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "a", [20] * 30)
    with pytest.raises(TesselError, match="--seq-length 601: the training data holds fewer tokens"):
        build_datasets(config(tmp_path, "a", seq_length=601, split="1"), None, (2, 0, 0))
    splits = build_datasets(config(tmp_path, "a", seq_length=64, split="28,2,0"), None, (2, 2, 0))
    assert splits.valid is not None
    assert "its documents repeat within a sample" in capsys.readouterr().err


def test_splits_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "a", [20] * 5)
    splits = build_datasets(config(tmp_path, "a"), None, (2, 2, 2))
    assert (splits.valid, splits.test) == (None, None)
    assert "the valid split holds no tokens" in capsys.readouterr().err
    with pytest.raises(TesselError, match="the train split holds no tokens .* nothing to train on"):
        build_datasets(config(tmp_path, "a", split="0.01,1,0"), None, (2, 2, 2))
    write_random(tmp_path / "b", [20] * 100)
    with pytest.raises(TesselError, match="a: its valid split holds no tokens .* cannot be blended"):
        build_datasets(config(tmp_path, "a", "b"), None, (2, 2, 2))


def test_contradictory_paths(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 5)
    a = str(tmp_path / "a")
    for data, message in (
        (Data(), "no data is given"),
        (Data(data_path=(a,), data_args_path="x"), "--data-path and --data-args-path exclude each other"),
        (Data(data_path=(a,), valid_data_path=(a,)), "exclude each other"),
        (Data(train_data_path=(a,), split="1,1,1"), "--split 1,1,1: each split has a path of its own"),
        (Data(data_path=("1", a, "2", a)), "a weighted blend"),
        (Data(data_path=(a,), eod_mask_loss=True), "--eod-id"),
    ):
        with pytest.raises(UsageError, match=message):
            build_datasets(replace(config(tmp_path), data=data), None, (None, 1, 1))
    with pytest.raises(UsageError, match="--seq-length is missing"):
        build_datasets(replace(config(tmp_path, "a"), batch=Batch()), None, (1, 1, 1))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ('{"trian": []}', '"train"'), ('{"train": 3}', "list")]
)
def test_bad_file_of_splits(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(TesselError, match=message):
        build_datasets(config(tmp_path, per_split_data_args_path=str(tmp_path / "splits.json")), None, (1, 1, 1))


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    write_random(tmp_path / "wiki_text_document", [20] * 5)
    (tmp_path / "notes.md").write_text("x")
    for name, message in (
        ("wiki_text_documents", "holds .*wiki_text_document"),
        ("wiki.txt", "wiki.txt does not exist"),
        ("notes.md", "neither the prefix of a .bin/.idx pair nor raw text"),
    ):
        with pytest.raises(TesselError, match=message):
            build_datasets(config(tmp_path, str(tmp_path / name)), None, (1, 1, 1))
    (tmp_path / "raw.txt").write_text("some text")
    with pytest.raises(UsageError, match="needs a tokenizer"):
        build_datasets(config(tmp_path, str(tmp_path / "raw.txt")), None, (1, 1, 1))


def test_pad_id_without_a_tokenizer(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [20] * 30)
    for section, expected in (
        (Tokenizer(eod_id=7, pad_id=3), 3),
        (Tokenizer(eod_id=7, pad_id=7), -1),
        (Tokenizer(eod_id=7, pad_id=7, allow_ambiguous_pad_tokens=True), 7),
        (Tokenizer(), -1),
    ):
        train = build_datasets(replace(config(tmp_path, "a"), tokenizer=section), None, (5, 0, 0)).train
        assert isinstance(train, GPTDataset)
        assert train.config.pad_id == expected


@pytest.mark.parametrize("bad", [50, -100])
def test_token_ids_past_the_vocabulary(tmp_path: Path, bad: int) -> None:
    from tessel.data.indexed import IndexedDatasetWriter

    with IndexedDatasetWriter(tmp_path / "a", np.int32) as writer:
        for document in ([1, 2], [], [3, bad, 4], [49]):
            writer.add_document(document)
    indexed = IndexedDataset(tmp_path / "a")
    with pytest.raises(TesselError, match=f"token 1 of document 2 is id {bad}, .* 50 rows"):
        check_token_ids(indexed, 50)
    dataset = build_datasets(config(tmp_path, "a", seq_length=2, split="1"), None, (1, 0, 0)).train
    with pytest.raises(TesselError, match="document 2"):
        check_dataset(dataset, 50)
    write_random(tmp_path / "good", [20] * 5, vocab_size=50)
    check_token_ids(IndexedDataset(tmp_path / "good"), 50)
    check_dataset(None, 50)


def test_raw_text_is_tokenized_once(
    tmp_path: Path, tiny_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("".join(f"the quick brown fox jumps over line {i}\n" for i in range(60)))
    tokenizer = load_tokenizer(Tokenizer(tokenizer_name_or_path=str(tiny_tokenizer_folder)))
    cfg = config(tmp_path, str(text), data_cache_path=str(tmp_path / "cache"), eod_mask_loss=True)
    first = build_datasets(cfg, tokenizer, (20, 5, 0))
    assert "reused" not in capsys.readouterr().out
    again = build_datasets(cfg, tokenizer, (20, 5, 0))
    out = capsys.readouterr().out
    assert "tokenized before, reused" in out
    assert f"data index cache {tmp_path / 'cache'}: 2 reused, 0 built" in out
    assert first.train is not None
    assert again.train is not None
    assert isinstance(first.train, GPTDataset)
    assert first.train.config.eod_id == tokenizer.eod
    assert first.train.indexed.get(0)[-1] == tokenizer.eod
    assert np.array_equal(first.train[3]["tokens"], again.train[3]["tokens"])

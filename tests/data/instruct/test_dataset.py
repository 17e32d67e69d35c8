"""Datasets of dialogues: order, cuts, padding, segments, pairs, blends, and what is refused."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tessel.cli import main
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.data.blend import BlendedDataset
from tessel.data.build import build_datasets, splits_of
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.instruct.build import instruction_bounds
from tessel.data.instruct.pai_dataset import RecordDataset
from tessel.data.instruct.samples import PairSample
from tessel.data.instruct.shorten import IGNORED, kept_by_turns, turns_of
from tessel.data.loader import Loader
from tessel.data.metadata import write_metadata
from tessel.data.tokenizer import load_tokenizer
from tessel.errors import TesselError, UsageError
from tests.data.instruct.dialogues import EOS, VOCAB_SIZE, prefixes, write_dialogues

LENGTHS = [9, 20, 33, 12, 64, 7, 41, 28, 15, 50, 6, 22]


def run(data: Path | str, *more: str) -> RunConfig:
    argv = ["--seq-length", "64", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(EOS), "--num-workers", "0"]
    way = [] if "--dataset" in more or "--is-pairwise-dataset" in more else ["--is-instruction-dataset"]
    return parse(RunConfig, [*argv, *way, "--data-path", *str(data).split(), *more], "x").value


def datasets(cfg: RunConfig, *num_samples: int | None):
    sizes = (*num_samples, *[0] * (3 - len(num_samples)))
    return splits_of(cfg, load_tokenizer(cfg.tokenizer, None, EOS), sizes)


def fields(base: Path) -> dict[str, IndexedDataset]:
    return {key: IndexedDataset(prefix) for key, prefix in prefixes(base).items()}


def by_the_book(first: int, n: int, num_samples: int, seed: int, batch: int | None, shuffled: bool) -> list[int]:
    """MindSpeed-LLM's index, step by step."""
    rng = np.random.RandomState(seed)
    index: list[int] = []
    while len(index) < num_samples:
        epoch = np.arange(first, first + n, dtype=np.int64)
        if batch and n % batch:
            epoch = np.append(epoch, np.arange(0, batch - n % batch, dtype=np.int64))
        if shuffled:
            rng.shuffle(epoch)
        index.extend(epoch.tolist())
    return index


@pytest.mark.parametrize(
    ("flags", "batch", "shuffled"),
    [("", None, True), ("--no-shuffle", None, False), ("--padded-samples --global-batch-size 4", 4, True)],
)
def test_order_is_that_of_mindspeed(tmp_path: Path, flags: str, batch: int | None, shuffled: bool) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS)
    found = datasets(run(data, "--split", "80,15,5", "--seed", "7", *flags.split()), 33, 5)
    for dataset, (first, n), size in ((found.train, (0, 9), 33), (found.valid, (9, 2), 5)):
        assert dataset is not None
        assert dataset.shuffle_index.tolist() == by_the_book(first, n, size, 7, batch, shuffled)
        assert [dataset.sequence_of(i) for i in range(3)] == dataset.shuffle_index[:3].tolist()
        assert dataset.epochs_of(0) == (1, 1)


def test_shuffling_all_epochs_goes_on_from_split_to_split(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS)
    flags = ["--split", "50,50", "--seed", "7", "--full-shuffle-instruction-dataset"]
    found = datasets(run(data, *flags), 20, 8)
    random.seed(7)
    for dataset, first, size in ((found.train, 0, 20), (found.valid, 6, 8)):
        expected = by_the_book(first, 6, size, 7, None, True)
        random.shuffle(expected)
        assert dataset is not None and dataset.shuffle_index.tolist() == expected


@pytest.mark.parametrize(
    ("split", "num", "bounds"),
    [
        ("90,8,2", 1999, [(0, 1799), (1799, 1959), (1959, 1999)]),
        ("1/1/1", 10, [(0, 4), (4, 7), (7, 10)]),
        ("100", 5, [(0, 5), None, None]),
        ("50,50", 5, [(0, 3), (3, 5), None]),
    ],
)
def test_bounds_of_splits(split: str, num: int, bounds: list) -> None:
    """Shares are rounded one by one; what they are off by moves all bounds but the first."""
    assert instruction_bounds(split, num) == bounds


def test_samples_hold_next_tokens_as_labels(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS, num_turns=2)
    cfg = run(data, "--no-shuffle", "--split", "1")
    train, files = datasets(cfg, 12).train, fields(data)
    assert train is not None
    for i in range(len(LENGTHS)):
        sample, ids, labels = train[i], files["input_ids"].get(i), files["labels"].get(i)
        assert sample["tokens"].tolist() == ids.tolist()
        assert sample["segments"] is None
        expected = [*labels[1:].tolist(), IGNORED]
        assert sample["loss_mask"].tolist() == [float(label != IGNORED) for label in expected]
        assert [label for label in sample["labels"].tolist() if label] == [x for x in expected if x > 0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("variable", [True, False])
def test_a_micro_batch_is_padded_to_one_length(tmp_path: Path, side: str, variable: bool) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS)
    more = ["--no-pad-to-seq-lengths", "--pad-to-multiple-of", "8"] if variable else []
    cfg = run(data, "--no-shuffle", "--split", "1", "--tokenizer-padding-side", side, *more)
    train = datasets(cfg, 12).train
    assert train is not None
    with Loader(train, cfg, vocab_size=VOCAB_SIZE) as loader:
        first, second = loader.fetch(0, 4, 2)
    assert [batch.tokens_BS.shape[1] for batch in (first, second)] == ([24, 40] if variable else [64, 64])
    length = first.tokens_BS.shape[1]
    at = slice(length - 9, None) if side == "left" else slice(9)
    assert first.tokens_BS[0, at].tolist() == train[0]["tokens"].tolist()
    assert first.labels_BS[0, at].tolist() == train[0]["labels"].tolist()
    assert first.loss_mask_BS.sum(dim=1).tolist() == [train[i]["loss_mask"].sum() for i in range(2)]
    if side == "right":
        assert first.segments_BS is None  # what comes after is not seen
    else:
        assert first.segments_BS is not None
        assert first.segments_BS[0].tolist() == [0] * (length - 9) + [1] * 9


def test_long_samples_are_cut_by_turns(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d", [64, 40], num_turns=2)
    files = fields(data)
    train = datasets(run(data, "--no-shuffle", "--split", "1", "--seq-length", "32"), 2).train
    assert train is not None
    for i in range(2):
        kept = kept_by_turns(files["labels"].get(i), 32)
        assert len(kept) <= 32
        assert train[i]["tokens"].tolist() == files["input_ids"].get(i)[kept].tolist()
    plain = datasets(run(data, "--no-shuffle", "--split", "1", "--seq-length", "32", "--cut-max-seqlen"), 2).train
    assert plain is not None and plain[0]["tokens"].tolist() == files["input_ids"].get(0)[:32].tolist()
    more = ["--seq-length", "32", "--no-cut-token", "--no-pad-to-seq-lengths"]
    never = datasets(run(data, "--no-shuffle", "--split", "1", *more), 2).train
    assert never is not None and len(never[0]["tokens"]) == 64


def test_shares_of_turns() -> None:
    """Worked by hand: 10 + 10 and 10 + 10 tokens on 24; the first turn is whole, the second gets 4 as 2 + 2."""
    labels = np.array(([IGNORED] * 10 + [1] * 10) * 2)
    assert turns_of(labels) == [(0, 10, 20), (20, 30, 40)]
    assert kept_by_turns(labels, 24).tolist() == [*range(20), 20, 21, 30, 31]
    short_answer = np.array([IGNORED] * 30 + [1] * 4)
    assert kept_by_turns(short_answer, 20).tolist() == [*range(16), *range(30, 34)]
    short_prompt = np.array([IGNORED] * 4 + [1] * 30)
    assert kept_by_turns(short_prompt, 20).tolist() == list(range(20))
    assert turns_of(np.array([1, 1, IGNORED])) == [(0, 0, 2), (2, 3, 3)]
    assert kept_by_turns(np.array([IGNORED] * 9), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [
        ("", False, None),
        ("", True, [1, 1, 1, 2, 2, 3, 3, 3]),
        ("--reset-attention-mask --pack --neat-pack", False, [1, 1, 1, 2, 2, 3, 3, 3]),
        ("--reset-attention-mask --pack", False, [1, 2, 2, 3, 3, 4, 4, 4]),
    ],
)
def test_samples_of_a_pack_are_told_apart_as_the_flags_say(
    tmp_path: Path, flags: str, own: bool, expected: list[int] | None
) -> None:
    """Plain packs break after each end of sequence, numbered ones at their numbers, tessel's own always."""
    rows = {
        "input_ids": [EOS, 5, EOS, 7, EOS, 9, 9, 9],
        "labels": [IGNORED, 5, EOS, 7, EOS, IGNORED, IGNORED, IGNORED],
        "attention_mask": [1, 1, 1, 2, 2, 0, 0, 0],
    }
    for key, prefix in prefixes(tmp_path / "d").items():
        with IndexedDatasetWriter(prefix, np.int32) as writer:
            for _ in range(2):
                writer.add_document(rows[key])
        if own:
            write_metadata(prefix, {"pack": True})
    train = datasets(run(tmp_path / "d", "--split", "1", "--seq-length", "8", *flags.split()), 2).train
    assert train is not None
    sample = train[0]
    if expected is None:
        assert sample["segments"] is None
        assert sample["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
        return
    assert sample["segments"] is not None and sample["segments"].tolist() == expected
    starts = {number: expected.index(number) for number in expected}
    assert sample["position_ids"].tolist() == [i - starts[number] for i, number in enumerate(expected)]
    # The last token of a segment has no next one.
    last = [i for i in range(7) if expected[i] != expected[i + 1]]
    assert not sample["loss_mask"][last].any()


def test_each_dialogue_counts_one_with_a_loss_per_sequence(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS)
    train = datasets(run(data, "--split", "1", "--calculate-per-sequence-loss"), 12).train
    assert train is not None
    for i in range(12):
        assert np.isclose(train[i]["loss_mask"].sum(), 1 if train[i]["loss_mask"].any() else 0)


def write_pairs(base: Path, rows: list[tuple[list[int], list[int], list[int]]]) -> Path:
    """Prompt, chosen and rejected answer of each pair."""
    for side in (1, 2):
        for what in ("input_ids", "labels"):
            name = f"{base}_packed_{('chosen', 'rejected')[side - 1]}_{what}_document"
            with IndexedDatasetWriter(name, np.int32) as writer:
                for row in rows:
                    prompt = row[0] if what == "input_ids" else [IGNORED] * len(row[0])
                    writer.add_document([*prompt, *row[side]])
    return base


def test_pairs_share_a_prompt_and_stand_chosen_first(tmp_path: Path) -> None:
    rows = [([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [10, 11, 12, 13])]
    data = write_pairs(tmp_path / "d", rows)
    flags = ["--is-pairwise-dataset", "--no-shuffle", "--split", "1", "--no-pad-to-seq-lengths"]
    cfg = run(data, *flags, "--pad-to-multiple-of", "2")
    train = datasets(cfg, 2).train
    assert train is not None and isinstance(train[0], PairSample)
    with Loader(train, cfg, vocab_size=VOCAB_SIZE) as loader:
        (batch,) = loader.fetch(0, 2, 2)
    assert batch.sample_ids == (0, 1)
    chosen, rejected = [[1, 2, 3, 4, 5], [7, 8, 9]], [[1, 2, 3, 6], [7, 8, 10, 11, 12, 13]]
    pad = train.config.padding.pad_id
    assert batch.tokens_BS.tolist() == [row + [pad] * (6 - len(row)) for row in chosen + rejected]
    assert batch.loss_mask_BS.sum(dim=1).tolist() == [2, 1, 1, 4]
    cut = datasets(run(data, *flags, "--seq-length", "4"), 2).train
    assert cut is not None
    pair = cut[1]  # 2 of the prompt and 4 of the answer on 4 tokens: two thirds of them for the answer
    assert isinstance(pair, PairSample)
    assert pair.chosen["tokens"].tolist() == [7, 8, 9]
    assert pair.rejected["tokens"].tolist() == [7, 8, 10, 11]


def write_records(prefix: Path, num: int, length: int) -> Path:
    """Records as Pai-Megatron-Patch writes them: two dialogues, then padding."""
    rng = np.random.default_rng(3)
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for _ in range(num):
            tokens = rng.integers(0, EOS, length)
            tokens[[3, 7]] = -1 - tokens[[3, 7]]
            tokens[8:] = 999
            labels = np.full(length, IGNORED)
            labels[[1, 2, 5]] = rng.integers(1, EOS, 3)
            writer.add_document([*tokens, *labels])
    return prefix


@pytest.mark.parametrize("reset", [False, True])
def test_records_of_pai(tmp_path: Path, reset: bool) -> None:
    data = write_records(tmp_path / "text_document", 6, 12)
    cfg = run(data, "--dataset", "MMAP", "--seq-length", "12", "--split", "1", *["--reset-position-ids"] * reset)
    train, stored = datasets(cfg, 5).train, IndexedDataset(data)
    assert isinstance(train, RecordDataset)
    seen = set()
    for i in range(5):
        sample, record = train[i], stored.get(train.sequence_of(i))
        seen.add(train.sequence_of(i))
        assert sample["tokens"][:8].tolist() == [t if t >= 0 else -1 - t for t in record[:8].tolist()]
        assert sample["tokens"].max() < VOCAB_SIZE  # padding that the model may lack is not kept
        assert sample["labels"].tolist() == [max(label, 0) for label in record[12:].tolist()]
        if reset:
            assert sample["segments"] is not None
            assert sample["segments"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
            assert sample["position_ids"].tolist() == [0, 1, 2, 3] * 3
            assert sample["loss_mask"][[1, 2, 5]].tolist() == [0.5, 0.5, 1]
        else:
            assert sample["segments"] is None
            assert np.allclose(sample["loss_mask"][[1, 2, 5]], 1 / 3)
    assert len(seen) == 5
    with pytest.raises(TesselError, match=r"2 x --seq-length 16 = 32 numbers, and there are 24 numbers"):
        datasets(run(data, "--dataset", "MMAP", "--seq-length", "16"), 5)


def test_blends_of_instructions(tmp_path: Path) -> None:
    one, two = write_dialogues(tmp_path / "a", LENGTHS), write_dialogues(tmp_path / "b", LENGTHS, seed=1)
    train = datasets(run(f"0.75 {one} 0.25 {two}", "--split", "1"), 40).train
    assert isinstance(train, BlendedDataset)
    assert np.bincount(train.dataset_index).tolist() == [30, 10]
    both = datasets(run(f"{one} {two}", "--split", "1"), 100).train
    assert both is not None and len(both) == 24
    cfg = run(f"0.75 {one} 0.25 {two}", "--split", "1", "--no-pad-to-seq-lengths")
    with Loader(train, cfg, vocab_size=VOCAB_SIZE) as loader:
        assert len(loader.fetch(0, 4, 2)) == 2


def test_the_order_is_kept_and_never_stale(tmp_path: Path) -> None:
    """Written anew under the old name, with more dialogues, the data has another order."""
    cache = ["--data-cache-path", str(tmp_path / "cache"), "--split", "1"]
    data = write_dialogues(tmp_path / "d", LENGTHS)
    orders = []
    for more in ([], [], ["--no-shuffle"], ["--seed", "5"], ["--padded-samples", "--global-batch-size", "5"]):
        train = datasets(run(data, *cache, *more), 12).train
        assert train is not None
        orders.append(train.shuffle_index.tolist())
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 4
    write_dialogues(tmp_path / "d", [*LENGTHS, 10, 11])
    again = datasets(run(data, *cache), 12).train
    assert again is not None and sorted(again.shuffle_index.tolist()) == list(range(14))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS)
    for given in (f"{data}_packed_input_ids_document", f"{data}_packed", f"{data}_packed_labels_document.bin"):
        assert datasets(run(given, "--split", "1"), 4).train is not None
    with pytest.raises(TesselError, match="there is no .*nothing_packed_input_ids_document.idx"):
        datasets(run(tmp_path / "nothing"), 4)
    with pytest.raises(TesselError, match="holds instructions: give --is-instruction-dataset"):
        datasets(run(data, "--is-pairwise-dataset"), 4)
    with pytest.raises(UsageError, match="--split a: "):
        datasets(run(data, "--split", "a"), 4)
    with pytest.raises(TesselError, match="the train split is empty"):
        datasets(run(data, "--split", "0,1"), 4)
    write_dialogues(tmp_path / "other", [*LENGTHS[:-1], 23])
    for suffix in (".bin", ".idx"):
        source = Path(f"{tmp_path}/other_packed_labels_document{suffix}")
        source.rename(f"{data}_packed_labels_document{suffix}")
    with pytest.raises(TesselError, match="differ in their lengths: they do not belong together"):
        datasets(run(data), 4)


def test_ids_that_the_model_lacks_are_found(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS)
    cfg = run(data, "--split", "1")
    train = build_datasets(cfg, load_tokenizer(cfg.tokenizer, None, EOS), (12, 0, 0)).train
    assert train is not None
    with pytest.raises(TesselError, match="the data was made with another tokenizer"):
        train.check_ids(20, 1000)
    with Loader(train, cfg, vocab_size=20) as loader, pytest.raises(TesselError, match="vocabulary has 20 rows"):
        loader.fetch(0, 4, 2)


def test_samples_of_dialogues_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dialogues(tmp_path / "d", LENGTHS)
    argv = ["samples", "--data-path", str(data), "--seq-length", "64", "--tokenizer-type", "NullTokenizer"]
    argv += ["--vocab-size", str(EOS), "--num-samples", "12,0,0", "--split", "1", "--index", "0:2", "--no-shuffle"]
    assert main([*argv, "--is-instruction-dataset"]) == 0
    text = capsys.readouterr().out
    assert "sample 0: epoch 1 of 1, loss on" in text and "document 1, tokens 0 to 20 of 20" in text
    assert main([*argv, "--is-instruction-dataset", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(sample["tokens"]) for sample in shown] == LENGTHS[:2]
    assert main([*argv, "--is-pairwise-dataset"]) == 2
    assert "leave --is-pairwise-dataset out" in capsys.readouterr().err

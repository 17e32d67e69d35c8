"""Packing: MindSpeed-LLM's bytes, tessel's own packs, and what they must hold."""

import bisect
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.instruct.pack import MODES, best_fit, greedy_knapsack, pack_dataset
from tessel.data.instruct.shorten import IGNORED
from tessel.errors import TesselError

KEYS = ("input_ids", "attention_mask", "labels")
PAD = 999


def prefixes(folder: Path, name: str) -> dict[str, Path]:
    return {key: folder / f"{name}_packed_{key}_document" for key in KEYS}


def write_samples(folder: Path, lengths: list[int]) -> dict[str, Path]:
    """Sample i holds i * 1000 + 0, 1, ...; the first half of its labels are ignored."""
    out = prefixes(folder, "plain")
    for key, prefix in out.items():
        with IndexedDatasetWriter(prefix, np.int32) as writer:
            for i, length in enumerate(lengths):
                tokens = 1000 * (i + 1) + np.arange(length)
                labels = np.where(np.arange(length) < length // 2, IGNORED, tokens)
                writer.add_document({"input_ids": tokens, "labels": labels}.get(key, np.ones(length, np.int32)))
    return out


def knapsack_by_the_book(lengths: list[int], capacity: int) -> list[list[int]]:
    """LLaMA-Factory's rule, step by step: the longest that fits, of equally long ones the last."""
    left = sorted(lengths)
    of_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        of_length.setdefault(length, []).append(i)
    packs = []
    while left:
        room, pack = capacity, []
        while (at := bisect.bisect(left, room)) > 0:
            length = left.pop(at - 1)
            room -= length
            pack.append(of_length[length].pop())
        packs.append(pack)
    return packs


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("case", "mode", "num_blocks"),
    [("pack_qwen", "mindspeed", 1), ("neat_qwen", "neat", 1), ("pack_qwen_nsubs", "mindspeed", 2)],
)
def test_packs_have_the_bytes_of_mindspeed(shared: Path, tmp_path: Path, case: str, mode: str, num_blocks: int) -> None:
    folder = shared / "oracle" / "preprocess"
    (oracle,) = (each for each in json.loads((folder / "cases.json").read_text()) if each["name"] == case)
    pack_dataset(prefixes(folder / "files", "sft_qwen"), prefixes(tmp_path, case), 2048, 151643, mode, num_blocks)
    written = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert written == {name: file["sha256"] for name, file in oracle["outputs"].items()}


@pytest.mark.oracle
@pytest.mark.parametrize("seq_length", [1024, 2048, 4096])
def test_own_packs_of_real_instructions_hold_99_percent(shared: Path, tmp_path: Path, seq_length: int) -> None:
    folder = shared / "oracle" / "preprocess" / "files"
    for name in ("sft_qwen", "sft_qwen3"):
        found = pack_dataset(prefixes(folder, name), prefixes(tmp_path, name), seq_length, 0)
        assert found.efficiency >= 0.99
        assert found.num_dropped == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_fast_knapsack_is_the_plain_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, size=rng.integers(1, 200))
    assert [pack.tolist() for pack in greedy_knapsack(lengths, capacity)] == knapsack_by_the_book(
        lengths.tolist(), capacity
    )


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_holds_every_sample_once_and_leaves_no_two_packs_that_fit_in_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, size=rng.integers(1, 200))
    packs = best_fit(lengths, capacity)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    sums = sorted(int(lengths[pack].sum()) for pack in packs)
    assert sums[-1] <= capacity
    assert len(sums) == 1 or sums[0] + sums[1] > capacity
    again = best_fit(lengths, capacity)
    assert [pack.tolist() for pack in again] == [pack.tolist() for pack in packs]


@pytest.mark.parametrize("mode", MODES)
def test_a_pack_holds_whole_samples_numbers_and_padding(tmp_path: Path, mode: str) -> None:
    lengths = [7, 3, 10, 25, 5, 9, 12, 1]
    found = pack_dataset(write_samples(tmp_path, lengths), prefixes(tmp_path, "packed"), 12, PAD, mode)
    ids, mask, labels = (IndexedDataset(prefix) for prefix in prefixes(tmp_path, "packed").values())
    assert set(ids.lengths.tolist()) == {12}
    assert len(ids) == ids.num_documents == found.num_packs
    seen: dict[int, list[int]] = {}
    for pack in range(len(ids)):
        tokens, numbers, targets = ids.get(pack), mask.get(pack), labels.get(pack)
        for at in np.flatnonzero(tokens != PAD).tolist():
            seen.setdefault(int(tokens[at]) // 1000 - 1, []).append(int(tokens[at]) % 1000)
            assert targets[at] in (IGNORED, tokens[at])
        assert (targets[tokens == PAD] == IGNORED).all()
        if mode == "mindspeed":
            assert (numbers == 1).all()
        else:
            assert (numbers[tokens == PAD] == 0).all()
            of_token = (tokens // 1000)[tokens != PAD]
            assert (np.diff(numbers[tokens != PAD]) == (np.diff(of_token) != 0)).all()
            assert numbers[0] == 1
    kept = {i: list(range(length)) for i, length in enumerate(lengths)}
    if mode == "mindspeed":
        del kept[3], kept[6]  # as long as a pack, or longer
    elif mode == "neat":
        kept[3], kept[6] = kept[3][:11], kept[6][:11]
    else:  # half of the room for each half of the sample
        kept[3] = [*range(6), *range(12, 18)]
    assert seen == kept
    assert found.num_samples == len(kept)
    assert found.num_tokens == sum(map(len, kept.values()))
    assert (found.num_dropped, found.num_cut) == (8 - len(kept), {"mindspeed": 0, "neat": 2, "best": 1}[mode])


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="no sample is shorter than --seq-length 4"):
        pack_dataset(write_samples(tmp_path, [7, 9]), prefixes(tmp_path, "packed"), 4, PAD, "mindspeed")
    assert not list(tmp_path.glob("packed*"))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    sources = write_samples(tmp_path, [7, 9])
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(TesselError, match="do not belong together"):
        pack_dataset(sources | {"labels": write_samples(other, [7])["labels"]}, prefixes(tmp_path, "packed"), 20, PAD)

"""`tessel inspect` of datasets: what their tokens say, instructions, and blends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel import commands
from tessel.data.blend import blending_indices, normalize
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError, UsageError
from tessel.report.contents import document_hashes, scan

Inspect = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Inspect:
    def inspect(*arguments: object) -> str:
        capsys.readouterr()
        commands.inspect([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return inspect


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.int32) -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def test_duplicates_and_special_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 50, int(rng.integers(0, 30))).tolist() for _ in range(400)]
    documents += [documents[i] for i in (3, 3, 77)] + [documents[5][::-1]]
    prefix = write(tmp_path / "data", documents)
    found = scan(IndexedDataset(prefix), [3, 7, 60])
    tokens = [token for document in documents for token in document]
    assert (found.num_documents, found.num_tokens) == (len(documents), len(tokens))
    assert found.special == {token: tokens.count(token) for token in (3, 7, 60)}
    filled = [tuple(document) for document in documents if document]
    assert found.num_duplicates == len(filled) - len(set(filled)) > 2


def test_documents_are_hashed_by_their_tokens_in_order() -> None:
    tokens = np.array([1, 2, 2, 1, 1, 2, 0, 1, 2, 12, 1, 2, 0], np.uint16)
    hashes = document_hashes(tokens, np.array([2, 4, 4, 6, 7, 9, 10, 13]))
    groups: dict[int, list[int]] = {}
    for number, value in enumerate(hashes.tolist()):
        groups.setdefault(value, []).append(number)
    assert [group for group in groups.values() if len(group) > 1] == [[0, 2, 4]]  # 1, 2
    assert len(hashes) == 7


def test_only_so_many_tokens_are_read(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data", [[1] * 300_000] * 10)
    found = scan(IndexedDataset(prefix), [1], most_tokens=1_000_000)
    assert (found.num_documents, found.num_tokens, found.num_duplicates) == (6, 1_800_000, 5)


def test_documents_that_do_not_lie_in_order(tmp_path: Path) -> None:
    """Other writers may leave gaps, or put sequences in any order."""
    prefix = write(tmp_path / "data", [[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[34 + 12 : 34 + 36] = np.array([12, 0, 12], "<i8").tobytes()
    path.write_bytes(bytes(content))
    assert scan(IndexedDataset(prefix), []).num_duplicates == 1


def test_random_documents_by_seed(run: Inspect, tmp_path: Path) -> None:
    prefix = write(tmp_path / "data", [[], *([i, i + 1] for i in range(100))])
    shown = [
        json.loads(run(prefix, "--json", "--documents", 5, "--seed", seed))["shown_documents"] for seed in (1, 1, 2)
    ]
    numbers = [[document["document"] for document in some] for some in shown]
    assert numbers[0] == numbers[1] != numbers[2]
    assert all(len(some) == 5 and some[0] == 1 and some == sorted(some) for some in numbers)
    assert "document 42" not in run(prefix)
    assert run(prefix, "--documents", 200).count("as ids:") == 100
    assert "duplicates  0 documents (0.0%) repeat an earlier one exactly" in run(prefix)


def test_a_picture_of_lengths(run: Inspect, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lengths = np.random.default_rng(0).lognormal(4, 1, 300).astype(int).tolist()
    for name, documents in (("data", [[1] * n for n in [0, *lengths]]), ("one", [[5]]), ("none", [])):
        prefix = write(tmp_path / name, documents)
        assert str(tmp_path / f"{name}.png") in run(prefix, "--plot", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def instructions(prefix: Path, keys: dict[str, list[list[int]]]) -> None:
    for key, documents in keys.items():
        write(Path(f"{prefix}_packed_{key}_document"), documents)


def test_instructions(run: Inspect, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    question, answer = tokenizer.encode("the quick"), tokenizer.encode("brown fox")
    ids, labels = question + answer, [-100] * len(question) + answer
    keys = {"input_ids": [ids, ids], "labels": [labels, [-100] * len(ids)], "attention_mask": [[1] * len(ids)] * 2}
    instructions(tmp_path / "sft", keys)
    text = run(tmp_path / "sft", "--tokenizer-name-or-path", tiny_tokenizer_folder)
    assert f"{len(answer) / 2 / len(ids):.1%} of the tokens ({len(answer)})" in text
    assert "1 samples have no trained token" in text
    assert text.endswith("    the quickbrown fox\n  of which trained:\n    brown fox\n")
    assert json.loads(run(tmp_path / "sft", "--json"))["untrained_samples"] == 1


def test_packs_and_pairs(run: Inspect, tmp_path: Path) -> None:
    instructions(tmp_path / "pack", {"input_ids": [[1, 2, 3, 4, 0]], "labels": [[-100, 2, -100, 4, -100]]})
    write(tmp_path / "pack_packed_attention_mask_document", [[1, 1, 2, 2, 0]])
    values = json.loads(run(tmp_path / "pack", "--json"))
    assert (values["packed_samples"], values["filled_tokens"], values["trained_tokens"]) == (2, 4, 2)
    assert "2.0 dialogues in each, 80.00% of the tokens are theirs" in run(tmp_path / "pack")
    names = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    instructions(tmp_path / "dpo", {name: [[1, 2, 3]] for name in names})
    assert json.loads(run(tmp_path / "dpo", "--json"))["rejected_samples"] == 1
    write(tmp_path / "dpo_packed_chosen_labels_document", [[1, 2]])
    with pytest.raises(TesselError, match="not made together"):
        run(tmp_path / "dpo")


def test_stats_of_a_blend(run: Inspect, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [[1] * 100] * 50), write(tmp_path / "b", [[1] * 100] * 5)
    words = ["--stats", "--seq-length", 10, "--num-samples", 300]
    values = json.loads(run("0.7", a, "0.3", b, "--json", *words))
    taken = np.bincount(blending_indices(normalize([0.7, 0.3]), 300)[0]).tolist()
    assert [row["samples"] for row in values["datasets"]] == taken == [210, 90]
    assert [row["epochs"] for row in values["datasets"]] == [2100 / 5000, 900 / 500]
    assert [row["repeated_tokens"] for row in values["datasets"]] == [0, 400]
    text = run("0.7", a, "0.3", b, *words)
    assert "13.3% of what is drawn was drawn before" in text
    assert "0.3000    1.80       90     500       400  " + b in text
    assert json.loads(run(a, b, "--json", "--stats", "--seq-length", 10))["samples"] == 550


def test_blends_that_are_none(run: Inspect, tmp_path: Path) -> None:
    a, empty = write(tmp_path / "a", [[1] * 100]), write(tmp_path / "empty", [])
    with pytest.raises(UsageError, match="all as a blend with --stats"):
        run(a, a)
    with pytest.raises(UsageError, match="holds no tokens"):
        run("1", a, "1", empty, "--stats")
    with pytest.raises(UsageError, match="positive weight"):
        run("1", a, "b", a, "--stats")
    with pytest.raises(UsageError, match="--num-samples is 0"):
        run(a, "--stats", "--num-samples", 0)

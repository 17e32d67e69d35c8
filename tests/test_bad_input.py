"""What a user can get wrong: an error of a sentence or two with the remedy, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessel.checkpoint.safetensors import write_file
from tessel.checkpoint.weights import read_tensors
from tessel.cli import main
from tessel.data.indexed import IndexedDatasetWriter
from tests.train.runs import NULL_TOKENIZER, flags, loading, write_data

WEIGHTS = "model.safetensors"
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 iterations that was stopped after 2, went on, and has hf/."""
    save = tmp_path_factory.mktemp("finished") / "run"
    assert main(flags(data, save, 4, "--exit-interval", "2")) == 0
    assert main(flags(data, save, 4)) == 0
    return save


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder to damage."""
    return Path(shutil.copytree(finished / "hf", tmp_path / "model"))


@pytest.fixture
def refused(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """`refused(arguments, *words, status=1)`: the command fails with one short error that holds `words`.

    Nothing that was in the test's folder changes, and nothing is added to it.
    """
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TESSEL_CACHE", str(cache))

    def check(arguments: list[Any], *words: str, status: int = 1) -> str:
        before = snapshot(tmp_path)
        assert main([str(argument) for argument in arguments]) == status
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("tessel: error: ")]
        assert len(errors) == 1, lines
        assert lines[-1] == errors[0], "the error stands last, with no traceback after it"
        for word in words:
            assert word in errors[0], errors[0]
        assert len(re.findall(r"[.?] (?=[A-Z`])", errors[0])) <= 1, f"more than two sentences: {errors[0]}"
        assert snapshot(tmp_path) == before
        assert not [path for path in cache.rglob("*") if path.is_file()]
        return errors[0]

    return check


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every entry below a folder, with the content of files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def without(arguments: list[str], *gone: str) -> list[str]:
    return [argument for argument in arguments if argument not in gone]


def preprocess(source: Path, prefix: Path, *more: str) -> list[str]:
    return ["preprocess", "--input", str(source), "--output-prefix", str(prefix), *NULL_TOKENIZER, *more]


# Paths


def test_a_path_that_does_not_exist(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine").mkdir()
    missing, save = tmp_path / "mime", tmp_path / "out"
    untokenized = without(flags(data, save, 2), *NULL_TOKENIZER)
    answer = ("mime", "is it one of those?")
    refused(loading(missing, data, save, 2), "--load", *answer)
    refused([*flags(data, save, 2), "--init-from-config", missing], "--init-from-config", *answer)
    refused([*untokenized, "--tokenizer-name-or-path", missing], "--tokenizer-name-or-path", *answer)
    refused(preprocess(missing, tmp_path / "x"), "the input", *answer)
    refused(flags(missing, save, 2), "mime.idx does not exist", "mine")
    refused(flags(tmp_path / "mime.txt", save, 2), "mime.txt does not exist")
    refused([*flags(data, save, 2), "--config", missing], "--config", "No such file", "YAML")
    refused(["inspect", missing], *answer)
    refused(["generate", "--load", missing, "--prompt", "x"], "--load", *answer)
    refused(["plot", missing], *answer)


def test_a_folder_or_a_file_where_the_other_is_meant(data: Path, model: Path, tmp_path: Path, refused: Refused) -> None:
    save = tmp_path / "out"
    refused(loading(model / WEIGHTS, data, save, 2), "--load", "is a file", f"holds it: {model}")
    write_data(tmp_path / "corpus" / "wiki", 3)
    refused(flags(tmp_path / "corpus", save, 2), "is a folder", str(tmp_path / "corpus" / "wiki"))
    refused([*flags(data, save, 2), "--config", tmp_path], "Is a directory")
    by_file = without(flags(data, save, 2), "--data-path", str(data))
    refused([*by_file, "--data-args-path", tmp_path], "--data-args-path", "Is a directory")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    refused([*by_file, "--data-args-path", tmp_path / "binary"], "not UTF-8")


def test_a_save_that_cannot_be_written(data: Path, finished: Path, tmp_path: Path, refused: Refused) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    refused(flags(data, taken, 2), "--save", "is a file", "Give a folder")
    refused(flags(data, taken / "run", 2), "--save", f"below {taken}, which is a file")
    for flag in ("--tensorboard-dir", "--data-cache-path"):
        refused(flags(data, tmp_path / "out", 2, flag, str(taken)), flag, "is a file")
    refused(["plot", finished, "--output", taken / "x.png"], "cannot be written")
    refused(preprocess(taken, taken / "x"), "no extension is not read")
    (tmp_path / "a.txt").write_text("1 2\n")
    refused(preprocess(tmp_path / "a.txt", taken / "x"), "--output-prefix", "cannot be made or written to")


def test_a_save_that_may_not_be_written(
    data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not bind root, under whom tests may run.
    monkeypatch.setattr("tessel.runtime.files.os.access", lambda path, mode: Path(path) != tmp_path)
    refused(flags(data, tmp_path / "out", 2), "--save", f"{tmp_path} cannot be written to")


def test_a_save_that_holds_something_else(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out" / "hf").mkdir(parents=True)
    (tmp_path / "out" / "hf" / "notes.txt").write_text("mine")
    refused(flags(data, tmp_path / "out", 2), "hf exists and is no Hugging Face folder", "Move it away")


@pytest.mark.parametrize("file", ["mp_rank_00/model_optim_rng.pt"])
def test_a_damaged_megatron_checkpoint(file: str, data: Path, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "megatron"
    weights = run / "iter_0000010" / file
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x")
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    for load in (run, run / "iter_0000010"):
        refused(loading(load, data, tmp_path / "out", 2), "model_optim_rng.pt was refused", "Take a copy")
    refused(flags(data, run, 2), "--save", "Megatron checkpoint", "Choose another folder")


# Models


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: stored.read().clone() for name, stored in read_tensors(model).items()}
    change(tensors)
    write_file(model / WEIGHTS, list(tensors.items()), torch.float32)


def shard(model: Path) -> None:
    """Two shards, of which one is missing."""
    names = sorted(read_tensors(model))
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    file_of = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": file_of}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: (m / WEIGHTS).unlink(), ["holds no weights", WEIGHTS, "--init-from-config"]),
        (lambda m: (m / "config.json").unlink(), ["holds no weights", "config.json"]),
        (lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-100]), ["truncated", "again"]),
        (lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:100]), ["header", "another copy"]),
        (lambda m: (m / WEIGHTS).write_bytes(b""), ["is empty"]),
        (shard, ["lacks 1 of the 2 shards", "model-00002-of-00002.safetensors", "Download"]),
        (
            lambda m: rewrite(m, lambda t: t.update({"model.norm.weight": torch.ones(33)})),
            ["model.norm.weight is (33,) and should be (32,)"],
        ),
        (lambda m: rewrite(m, lambda t: t.__delitem__("model.norm.weight")), ["1 missing: model.norm.weight"]),
        (lambda m: rewrite(m, lambda t: t.update({"a.b": torch.ones(3)})), ["1 surplus: a.b"]),
        (lambda m: (m / "config.json").write_text("{,"), ["config.json: not valid JSON"]),
        (lambda m: (m / "config.json").write_text("[]"), ["config.json: holds a list"]),
        (lambda m: configure(m, model_type="gpt2"), ["'gpt2'", "supported are qwen2"]),
        (lambda m: configure(m, hidden_size="big"), ["hidden_size is 'big'", "whole number"]),
        # Weights are compared before memory is taken: this one would need 128 TB.
        (lambda m: configure(m, vocab_size=10**12), ["model.embed_tokens.weight is (64, 32) and should be"]),
    ],
)  # fmt: skip
def test_a_damaged_model(
    damage: Callable[[Path], Any], words: list[str], data: Path, model: Path, tmp_path: Path, refused: Refused
) -> None:
    damage(model)
    refused(loading(model, data, tmp_path / "out", 2), *words)


def configure(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_that_no_memory_holds(data: Path, tmp_path: Path, refused: Refused) -> None:
    refused(flags(data, tmp_path / "out", 2, "--padded-vocab-size", str(10**13)), "GiB in fp32", "smaller model")


def test_a_tokenizer_larger_than_the_vocabulary(
    data: Path, model: Path, tmp_path: Path, tiny_tokenizer_folder: Path, refused: Refused
) -> None:
    command = without(loading(model, data, tmp_path / "out", 2), *NULL_TOKENIZER)
    words = ["gives ids up to 306", "only 64 rows", "--tokenizer-name-or-path"]
    refused([*command, "--tokenizer-name-or-path", tiny_tokenizer_folder], *words)


def test_shape_flags_that_contradict_the_model(data: Path, model: Path, tmp_path: Path, refused: Refused) -> None:
    command = loading(model, data, tmp_path / "out", 2, "--num-layers", "3")
    refused(command, "--num-layers 3 (the model: 2)", status=2)


# Datasets


def patched(position: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + value + content[position + len(value) :]


@pytest.mark.parametrize(
    ("suffix", "damage", "words"),
    [
        (".idx", lambda b: b[:-8], ["is truncated", "Write the dataset anew"]),
        (".idx", lambda b: b[:20], ["less than its header"]),
        (".idx", lambda b: b"", ["is not an index"]),
        (".idx", patched(0, b"XXXX"), ["is not an index", "MMIDIDX", "tessel preprocess"]),
        (".idx", patched(9, struct.pack("<Q", 2)), ["version 2", "version 1"]),
        (".idx", patched(17, b"\x63"), ["code 99"]),
        (".idx", patched(18, b"\xff" * 8), ["truncated"]),
        (".bin", lambda b: b[:-10], ["lies outside", "do not belong together"]),
    ],
)
def test_a_damaged_dataset(
    suffix: str,
    damage: Callable[[bytes], bytes],
    words: list[str],
    data: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    for each in (".bin", ".idx"):
        content = data.with_suffix(each).read_bytes()
        (tmp_path / f"mine{each}").write_bytes(damage(content) if each == suffix else content)
    refused(flags(tmp_path / "mine", tmp_path / "out", 2), f"mine{suffix}", *words)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_dataset(suffix: str, data: Path, tmp_path: Path, refused: Refused) -> None:
    other = {".bin": ".idx", ".idx": ".bin"}[suffix]
    shutil.copy(data.with_suffix(other), tmp_path / f"mine{other}")
    refused(flags(tmp_path / "mine", tmp_path / "out", 2), f"mine{suffix} does not exist")


@pytest.mark.parametrize(
    ("documents", "dtype", "words"),
    [
        ([range(50)] * 9 + [[64] * 9], np.uint16, ["is id 64", "64 rows", "another tokenizer"]),
        ([[-1] * 50] * 9, np.int32, ["is id -1"]),
        ([range(50)] * 9, np.float32, ["float32", "not token ids"]),
        ([range(10)], np.uint16, ["--seq-length 16", "fewer tokens", "Lower --seq-length"]),
        ([[]] * 5, np.uint16, ["no tokens", "nothing to train on"]),
        ([], np.uint16, ["no tokens", "nothing to train on"]),
    ],
)
def test_data_that_cannot_be_trained_on(
    documents: list[Any], dtype: Any, words: list[str], tmp_path: Path, refused: Refused
) -> None:
    with IndexedDatasetWriter(tmp_path / "mine", dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype))
    refused(flags(tmp_path / "mine", tmp_path / "out", 2, "--split", "100,0,0"), "mine", *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["a.txt is empty"]),
        ("a.txt", b"\n\n", ["no document"]),
        ("a.txt", "1 2\n中文".encode("gb18030"), ["a.txt, line 2", "not UTF-8", "iconv"]),
        ("a.txt", b"1 2\nthree\n", ["a.txt, line 2", "'three'", "--tokenizer-name-or-path"]),
        ("a.jsonl", b'{"text": "1 2"}\n{"text": 1 2}\n', ["a.jsonl, line 2", "invalid JSON"]),
        ("a.jsonl", b'{"text": "1 2"}\n\n{"txet": "1 2"}\n', ["a.jsonl, line 3", "no key 'text'", "txet"]),
        ("a.jsonl", b"[1]\n", ["a.jsonl, line 1", "a list"]),
        ("a.csv", b"1,2\n3,4\n", ["a.csv has no column 'text'", "it has 1, 2", "--json-keys"]),
    ],
)
def test_raw_text_that_cannot_be_read(
    name: str, content: bytes, words: list[str], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(flags(tmp_path / name, tmp_path / "out", 2), name, *words)
    refused(preprocess(tmp_path / name, tmp_path / "x"), name, *words)


# Flags


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seq-length", "100"], ["--seq-length 100", "64", "lower"]),
        (["--global-batch-size", "5"], ["--global-batch-size 5", "4 or 6"]),
        (["--gloabl-batch-size", "8"], ["unknown flag", "nearest: --global-batch-size"]),
        (["--split", "a,b"], ["--split a,b", "969,30,1"]),
        (["--eval-interval", "0"], ["--eval-interval is 0", "at least 1"]),
        (["--lr", "fast"], ["--lr is 'fast'", "a number"]),
    ],
)
def test_flags_that_cannot_be(more: list[str], words: list[str], data: Path, tmp_path: Path, refused: Refused) -> None:
    refused(flags(data, tmp_path / "out", 2, *more), *words, status=2)


def test_a_file_of_flags_that_cannot_be(data: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "run.yaml"
    command = [*flags(data, tmp_path / "out", 2), "--config", str(file)]
    file.write_text("train_itres: 5\n")
    refused(command, "unknown key train_itres", "nearest: train_iters", status=2)
    file.write_text("lr: [\n")
    refused(command, "run.yaml, line 2 is not YAML")


def test_sequence_longer_than_the_loaded_model_allows(
    data: Path, model: Path, tmp_path: Path, refused: Refused
) -> None:
    refused(loading(model, data, tmp_path / "out", 2, "--seq-length", "65"), "--seq-length 65", "64", status=2)


# Runs that are there already


def test_one_checkpoint_of_a_run_is_not_the_run(data: Path, finished: Path, tmp_path: Path, refused: Refused) -> None:
    refused(loading(finished / "iter_0000002", data, tmp_path / "out", 6), f"--load {finished} --ckpt-step 2")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("iter_0000004/run.json", b"{", ["run.json is damaged", "--ckpt-step"]),
        ("iter_0000004/run.json", b"[]", ["lacks iteration", "--ckpt-step"]),
        ("iter_0000004/rng.pt", b"junk", ["rng.pt is damaged", "--ckpt-step"]),
        ("iter_0000004/rng.pt", b"", ["rng.pt is damaged", "--ckpt-step"]),
        ("iter_0000004/__0_0.distcp", b"x" * 100, ["iter_0000004 is damaged", "--ckpt-step"]),
        ("iter_0000004/__0_0.distcp", None, ["iter_0000004 is damaged", "--ckpt-step"]),
        ("iter_0000004/.metadata", b"junk", [".metadata cannot be read"]),
        ("iter_0000004/huggingface/config.json", b"{", ["config.json: not valid JSON"]),
        ("latest_checkpointed_iteration.txt", b"x", ["no such checkpoint (there: 2, 4)", "--ckpt-step"]),
        ("latest_checkpointed_iteration.txt", b"77", ["no such checkpoint (there: 2, 4)", "--ckpt-step"]),
    ],
)
def test_a_damaged_checkpoint(
    file: str, content: bytes | None, words: list[str], data: Path, finished: Path, tmp_path: Path, refused: Refused
) -> None:
    save = Path(shutil.copytree(finished, tmp_path / "run"))
    (save / file).unlink()
    if content is not None:
        (save / file).write_bytes(content)
    command = flags(data, save, 6, "--override-opt-param-scheduler")
    refused(command, *words)
    assert main([*command, "--ckpt-step", "2", "--exit-interval", "3"]) == 0
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3\n"


def test_a_run_of_another_model_or_other_data(data: Path, finished: Path, tmp_path: Path, refused: Refused) -> None:
    save = Path(shutil.copytree(finished, tmp_path / "run"))
    longer = Path(shutil.copytree(finished / "hf", tmp_path / "longer"))
    configure(longer, num_hidden_layers=3)
    command = flags(data, save, 6, "--override-opt-param-scheduler")
    again = loading(longer, data, save, 6, "--override-opt-param-scheduler")
    refused(again, "num_hidden_layers was 2 and is 3", "--override", "--no-resume", status=2)
    refused([*command, "--num-layers", "3"], "--num-layers 3 (the model: 2)", "--override", "--no-resume", status=2)
    refused([*command, "--seq-length", "32"], "--seq-length was 16 and is 32", "--override")
    # Of the same lengths, as packed data has them, and other tokens.
    shutil.copy(data.with_suffix(".idx"), tmp_path / "other.idx")
    tokens = np.frombuffer(data.with_suffix(".bin").read_bytes(), np.uint16)
    (tmp_path / "other.bin").write_bytes(((tokens + 1) % 64).astype(np.uint16).tobytes())
    refused(flags(tmp_path / "other", save, 6, "--override-opt-param-scheduler"), "training data was", "--override")
    assert main([*again, "--override", "--exit-interval", "5"]) == 0
    assert main([*command, "--num-layers", "3", "--override"]) == 0

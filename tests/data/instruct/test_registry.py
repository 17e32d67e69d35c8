"""LLaMA-Factory's registry: data sets by name, mixed as `datasets` mixes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel import commands
from tessel.data.indexed import IndexedDataset
from tessel.data.instruct.mixture import mixed_order
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError, UsageError

Make = Callable[..., HuggingFaceTokenizer]
ALPACA = [{"instruction": "hi", "input": "x", "output": f"hello {i}"} for i in range(3)]
ASKED = [{"q": f"bye {i}", "a": "ok", "input": "unread", "sys": "you are a"} for i in range(5)]
CHATS = [
    {"chat": [{"role": "user", "text": f"hi {i}"}, {"role": "bot", "text": "there"}], "instructed": "it"}
    for i in range(4)
]
COLUMNS = {"prompt": "q", "response": "a", "system": "sys"}
TAGS = {"role_tag": "role", "content_tag": "text", "user_tag": "user", "assistant_tag": "bot"}
REGISTRY: dict[str, Any] = {
    "plain": {"file_name": "plain.json"},
    "asked": {"file_name": "asked.jsonl", "columns": COLUMNS, "num_samples": 2},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "system": "instructed"},
        "tags": TAGS,
    },
    "pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}},
    "lost": {"file_name": "lost.json"},
    "script": {"script_url": "make.py"},
    "remote": {"ms_hub_url": "a/b"},
    "strange": {"file_name": "plain.json", "formatting": "sharegtp"},
    "misnamed": {"file_name": "plain.json", "columns": {"promt": "instruction"}},
    "pictures": {"file_name": "plain.json", "columns": {"prompt": "instruction", "images": "images"}},
    "bare": {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"system": "a"}},
    "divided": {"file_name": "plain.json", "split": "test"},
}
HANDLER = ("--handler-name", "LlamaFactoryInstructionHandler", "--prompt-type", "qwen")
MINDSPEED = ("--compatible", "mindspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    (folder / "dataset_info.json").write_text(json.dumps(REGISTRY))
    (folder / "plain.json").write_text(json.dumps(ALPACA))
    pairs = [{"q": "hi", "a": "yes", "b": "no"}]
    for name, rows in (("asked", ASKED), ("chats", CHATS), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, chat_tokenizer: Make) -> Callable[..., Path]:
    """`run(*argv, to="mixed")`: preprocess; returns the prefix."""

    def run(*argv: str, to: str = "mixed") -> Path:
        source = str(chat_tokenizer().source)
        commands.preprocess([*argv, "--tokenizer-name-or-path", source, "--output-prefix", str(tmp_path / to)])
        return tmp_path / to

    def mixed(*argv: str, to: str = "mixed") -> Path:
        return run(*HANDLER, "--dataset-dir", str(folder), *argv, to=to)

    mixed.alone = run  # type: ignore[attr-defined]
    return mixed


def bytes_of(prefix: Path) -> dict[str, bytes]:
    """What lies under a prefix, by the rest of the names."""
    files = prefix.parent.glob(f"{prefix.name}_packed_*")
    return {file.name.removeprefix(prefix.name): file.read_bytes() for file in files if file.suffix != ".json"}


def samples_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(f"{prefix}_packed_input_ids_document")
    return [dataset.get(i).tolist() for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("name", "handler", "mapping"),
    [
        ("plain", "AlpacaStyleInstructionHandler", None),
        ("asked", "AlpacaStyleInstructionHandler", {**COLUMNS, "query": ""}),
        ("chats", "SharegptStyleInstructionHandler", {"messages": "chat", "system": "instructed", "tags": TAGS}),
        ("pairs", "AlpacaStylePairwiseHandler", {"prompt": "q", "query": "", "chosen": "a", "rejected": "b"}),
    ],
)
@pytest.mark.parametrize("more", [(), (*MINDSPEED, "--append-eod", "--seq-length", "40")])
def test_a_data_set_is_what_its_own_handler_writes(
    run: Any, folder: Path, name: str, handler: str, mapping: dict[str, Any] | None, more: Sequence[str]
) -> None:
    keys = () if mapping is None else ("--map-keys", json.dumps(mapping))
    source = str(folder / REGISTRY[name]["file_name"])
    alone = run.alone("--input", source, "--handler-name", handler, "--prompt-type", "qwen", *keys, *more, to="alone")
    written = bytes_of(run("--input", name, *more))
    assert written and written == bytes_of(alone)


def test_data_sets_are_joined_in_the_order_of_their_names(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {name: samples_of(run("--input", name, to=name)) for name in ("plain", "asked", "chats")}
    whole = run("--input", "ignored/chats, plain", "asked", "--max-samples", "4")
    assert samples_of(whole) == alone["chats"] + alone["plain"] + alone["asked"][:4]
    out = capsys.readouterr().out
    assert "num_samples is not heeded" in out and "concat: 11 samples of chats 4, plain 3, asked 4" in out
    noted = json.loads(Path(f"{whole}_packed_labels_document.meta.json").read_text())
    assert noted["data_sets"] == ["chats", "plain", "asked"] and noted["max_samples"] == 4
    assert noted["handler_name"] == "LlamaFactoryInstructionHandler" and noted["prompt_type"] == "qwen"
    assert not list(tmp_path.glob(".*"))


def test_interleaved_packed_and_cut(run: Any) -> None:
    plain, asked = (samples_of(run("--input", name, to=name)) for name in ("plain", "asked"))
    under = samples_of(run("--input", "plain,asked", "--mix-strategy", "interleave_under"))
    assert under == [plain[0], asked[0], plain[1], asked[1], plain[2], asked[2]]
    drawn = ("--mix-strategy", "interleave_over", "--interleave-probs", "0.3,0.7", "--seed", "5")
    order = mixed_order([3, 5], "interleave_over", [0.3, 0.7], 5)
    expected = [[*plain, *asked][i] for i in order]
    assert samples_of(run("--input", "plain,asked", *drawn)) == expected
    # What is too long goes after the mixing, and packs are made of the mixed order.
    longest = max(map(len, expected))
    short = samples_of(run("--input", "plain,asked", *drawn, *MINDSPEED, "--seq-length", str(longest)))
    assert short == [sample for sample in expected if len(sample) < longest] and len(short) < len(expected)
    packs = samples_of(run("--input", "plain,asked", *drawn, "--pack", "--seq-length", str(2 * longest)))
    assert {len(pack) for pack in packs} == {2 * longest}


def test_a_bad_row_is_named_with_its_data_set(run: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "bad.jsonl").write_text('{"instruction": "hi", "input": "", "output": 3}\n')
    (folder / "dataset_info.json").write_text(json.dumps({**REGISTRY, "bad": {"file_name": "bad.jsonl"}}))
    with pytest.raises(TesselError, match=r"bad\.jsonl, line 1: output must be text"):
        run("--input", "plain,bad")
    with pytest.raises(TesselError, match=r"^the data set bad, line 1: output must be text"):
        run("--input", "plain,bad", "--max-samples", "2")
    assert not list(tmp_path.iterdir())


def test_preview_shows_the_first(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("--input", "chats,plain", "--preview", "1")
    out = capsys.readouterr().out
    assert "samples of the first data set, chats" in out and "hi 0" in out


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ("plan", UsageError, "--input plan: there is no data set of this name in .*Did you mean plain"),
        (",", UsageError, "names no data set"),
        ("lost", TesselError, "lost.json does not exist"),
        ("script", UsageError, "script_url is a loading script, which is never run"),
        ("remote", UsageError, "names no source that is read here"),
        ("strange", UsageError, "formatting 'sharegtp' is not read"),
        ("misnamed", UsageError, "The data set misnamed of .*: 'promt' is not a key .* Did you mean prompt"),
        ("pictures", UsageError, "the column images holds media"),
        ("bare", UsageError, "messages must name the column"),
        ("divided", UsageError, "split 'test' of a file"),
        ("plain,pairs", UsageError, r"mixes ranked data sets \(pairs\) with others"),
        ("plain,asked --mix-strategy interleave_under --interleave-probs 1", UsageError, "1 for 2 data sets"),
        ("plain --dataset-dir nowhere", TesselError, "registry nowhere/dataset_info.json cannot be read"),
    ],
)
def test_what_is_refused(run: Any, argv: str, error: type[TesselError], message: str) -> None:
    with pytest.raises(error, match=message):
        run("--input", *argv.split())


def test_a_registry_must_hold_objects(run: Any, tmp_path: Path) -> None:
    for content, message in (("[1]", "must be a JSON object"), ('{"plain": 3}', "must be an object with file_name")):
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(TesselError, match=message):
            run("--dataset-dir", str(tmp_path), "--input", "plain")


def test_the_order_that_is_drawn() -> None:
    """As `datasets` 5.2 gave it."""
    assert mixed_order([3, 5], "interleave_under", [0.3, 0.7], 1234).tolist() == [3, 4, 5, 0, 6, 1, 2]
    assert mixed_order([3, 5], "interleave_over", [0.3, 0.7], 1234).tolist() == [3, 4, 5, 0, 6, 1, 2, 7]
    assert mixed_order([2, 3], "interleave_over", None, 0).tolist() == [0, 2, 1, 3, 0, 4]


@pytest.mark.parametrize("strategy", ["under", "over"])
@pytest.mark.parametrize("probabilities", [None, [0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
def test_the_order_is_that_of_datasets(strategy: str, probabilities: list[float] | None) -> None:
    """Long enough for several blocks of draws."""
    datasets = pytest.importorskip("datasets")
    sizes = [700, 40, 1100]
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [datasets.Dataset.from_dict({"at": range(s, s + n)}) for s, n in zip(starts, sizes, strict=True)]
    stopping = {"under": "first_exhausted", "over": "all_exhausted"}[strategy]
    for seed in (0, 1234):
        theirs = datasets.interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy=stopping)
        assert mixed_order(sizes, f"interleave_{strategy}", probabilities, seed).tolist() == list(theirs["at"])

"""What an --input names: files, folders, globs and datasets of the Hub."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from tessel.data import paths
from tessel.data.readers import check_inputs, columns_of, find_inputs, format_of, parse_rows, read_blocks
from tessel.data.tokenizer import NullTokenizer
from tessel.errors import TesselError, UsageError


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text('{"text": "a"}\n')
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("jsonl", None)),
        ("a.b.JSONL.gz", ("jsonl", "gzip")),
        ("a.json.zst", ("json", "zstd")),
        ("a.txt.gz", ("txt", "gzip")),
        ("a.parquet", ("parquet", None)),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.md", None),
        ("jsonl", None),
    ],
)
def test_formats_by_name(name: str, expected: tuple[str, str | None] | None) -> None:
    assert format_of(name) == expected


def test_files_globs_and_folders(tmp_path: Path) -> None:
    folder = touch(tmp_path / "d", "b.jsonl", "a.jsonl.gz", ".hidden.txt", "README.md")
    touch(folder / "deeper", "x.txt")
    b, a = folder / "b.jsonl", folder / "a.jsonl.gz"
    assert find_inputs([folder]) == [a, b]
    assert find_inputs([str(folder / "*.jsonl*"), b]) == [a, b, b]
    assert find_inputs([str(tmp_path / "**/*.txt")]) == [folder / "deeper/x.txt"]
    # A name that is there is no pattern.
    odd = touch(tmp_path / "[1]", "a.txt") / "a.txt"
    assert find_inputs([odd]) == [odd]
    with pytest.raises(TesselError, match=r"The input .*\*\.parquet matches no file"):
        find_inputs([str(folder / "*.parquet")])
    with pytest.raises(TesselError, match=r"c.jsonl does not exist.*b.jsonl"):
        find_inputs([folder / "c.jsonl"])
    with pytest.raises(UsageError, match="at least one --input"):
        find_inputs([])


def test_folders_of_several_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = touch(tmp_path / "d", "a.json", "b.txt", "c.txt.gz", "d.parquet", "e.parquet", "f.md")
    with pytest.raises(UsageError, match="mixes formats: 2 .parquet and 2 .txt and 1 .json.*Name the files of one"):
        find_inputs([folder])
    # As many of one as of the other.
    assert [path.name for path in find_inputs([folder], "mindspeed")] == ["d.parquet", "e.parquet"]
    assert "2 .parquet and 2 .txt and 1 .json; the 2 .parquet are read" in capsys.readouterr().out
    touch(folder, "g.txt")
    assert [path.name for path in find_inputs([folder], "mindspeed")] == ["b.txt", "c.txt.gz", "g.txt"]
    with pytest.raises(TesselError, match="holds 2 .md and 1 no extension: nothing that is read here; .jsonl,"):
        find_inputs([touch(tmp_path / "none", "a.md", "b.md", "LICENSE")])
    with pytest.raises(TesselError, match="is empty: nothing that is read"):
        find_inputs([touch(tmp_path / "empty")])


def test_loading_scripts_are_not_run(tmp_path: Path) -> None:
    folder = touch(tmp_path / "squad", "squad.py", "a.jsonl")
    with pytest.raises(TesselError, match="squad.py is a loading script, which is never run here"):
        check_inputs([folder / "squad.py"], ["text"])
    with pytest.raises(TesselError, match="squad has a loading script, squad.py, which is never run"):
        find_inputs([folder], "mindspeed")
    assert find_inputs([folder]) == [folder / "a.jsonl"]


def test_what_datasets_saves_beside_its_files_is_no_data(tmp_path: Path) -> None:
    folder = touch(tmp_path / "saved", "state.json", "dataset_info.json", "data-00000-of-00001.arrow")
    assert [path.name for path in find_inputs([folder])] == ["data-00000-of-00001.arrow"]


def test_columns_are_looked_for_before_anything_is_written(tmp_path: Path) -> None:
    table = pyarrow.table({"instruction": ["a"], "output": ["b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n")
    for name in ("a.parquet", "a.arrow", "a.csv"):
        path = tmp_path / name
        assert columns_of(path) == ["instruction", "output"]
        assert check_inputs([path], ["output", "instruction"]) == [path] == check_inputs([path], None)
        with pytest.raises(TesselError, match=f"{name} has no column 'text'; it has instruction, output. Choose with"):
            check_inputs([path], ["text"])
    assert columns_of(tmp_path / "a.jsonl") is None
    with pytest.raises(UsageError, match="has lines, not keys"):
        check_inputs([touch(tmp_path, "a.txt.gz") / "a.txt.gz"], ["content"])
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(TesselError, match="the column 'text' is there twice"):
        check_inputs([tmp_path / "twice.parquet"], ["text"])


class Datasets(types.ModuleType):
    """In place of the library `datasets`: one dataset, of one Arrow file."""

    def __init__(self, file: Path, version: str = "4.1.0") -> None:
        super().__init__("datasets")
        self.__version__ = version
        self.file = file
        self.asked: list[Any] = []
        self.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def load_dataset(self, name: str, config: str | None, split: str) -> Any:
        self.asked.append((name, config, split))
        if split != "train":
            raise ValueError(f'Unknown split "{split}".\nSecond line')
        return _Dataset(self.file)


class _Dataset(list[None]):
    def __init__(self, file: Path) -> None:
        super().__init__([None] * 2)
        self.cache_files = [{"filename": str(file)}]


def test_datasets_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.OSFile("cached.arrow", "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    library = Datasets(tmp_path / "cached.arrow")
    monkeypatch.setitem(sys.modules, "datasets", library)
    for text in ("hub:someone/corpus", "hub:corpus:en", "someone/corpus"):
        (file,) = check_inputs([text], ["text"])
        assert [row.values["text"] for block in read_blocks(file) for row in parse_rows(block)] == ["a", "b"]
    assert library.asked == [
        ("someone/corpus", None, "train"),
        ("corpus", "en", "train"),
        ("someone/corpus", None, "train"),
    ]
    assert "someone/corpus: 2 rows of the split train, in" in capsys.readouterr().out
    with pytest.raises(TesselError, match=r"cannot load it \(Unknown split \"valid\"\.\)\.$"):
        find_inputs(["hub:someone/corpus::valid"])
    for text in ("hub:", "hub:a:b:c:d", "hub:a:b:train[:5]"):
        with pytest.raises(UsageError, match="hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT is expected"):
            find_inputs([text])

    # Nearer at hand: a misspelt name in a folder that is there, or a file.
    Path("someone").mkdir()
    for text in ("someone/corpus", "other/corpus.jsonl"):
        with pytest.raises(TesselError, match="does not exist"):
            find_inputs([text])

    monkeypatch.setitem(sys.modules, "datasets", Datasets(tmp_path, "3.6.0"))
    with pytest.raises(TesselError, match=r"datasets 3.6.0 may run code.*pip install 'tessel\[datasets\]' --upgrade"):
        find_inputs(["hub:someone/corpus"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TesselError, match=r"nobody/corpus does not exist here.*pip install 'tessel\[datasets\]'"):
        find_inputs(["nobody/corpus"])


def test_training_takes_every_format(tmp_path: Path) -> None:
    from tessel.data.indexed import IndexedDataset
    from tessel.data.raw_text import preprocessed_prefix

    (tmp_path / "a.json").write_text(json.dumps([{"text": "1 2"}, {"text": "3"}]))
    parquet.write_table(pyarrow.table({"text": ["1 2", "3"], "n": [1, 2]}), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        assert paths.is_raw_text(str(tmp_path / name))
        prefix = preprocessed_prefix(tmp_path / name, NullTokenizer(9), ["text"], True, tmp_path / "cache")
        assert IndexedDataset(prefix).get(0).tolist() == [1, 2, 9]
    with pytest.raises(TesselError, match=r"is a folder.*give what it holds: .*a.parquet"):
        paths.is_raw_text(str(tmp_path))

"""Files of torch.save: written as a stream, read back by torch and by tessel, hostile ones refused."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint import stored, torch_file
from tessel.checkpoint.torch_file import Deferred, Foreign, LoadedTensor
from tessel.errors import TesselError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def content() -> dict[str, Any]:
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    strided = LoadedTensor("x", Path(), torch.arange(12).reshape(3, 4).T)
    namespace = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, noop=None, cp=["p2p"], lr=1e-3)
    return {
        "args": namespace,
        "model": collections.OrderedDict(tensors),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.0),
        "deferred": Deferred(strided),
        "iteration": 3,
    }


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    made = content()
    torch_file.write(path, made)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "check sums"
    for kwargs in ({"weights_only": False}, {"weights_only": False, "mmap": True}):
        found = torch.load(path, **kwargs)
        assert list(found) == list(made)
        for name, tensor in made["model"].items():
            assert found["model"][name].dtype == tensor.dtype
            assert torch.equal(found["model"][name], tensor)
        assert found["args"] == made["args"]
        assert torch.equal(found["deferred"], torch.arange(12).reshape(3, 4).T)
        assert found["empty"].shape == (0, 4)
        assert found["scalar"].item() == 2.0
        assert found["deferred"].data_ptr() % 8 == 0


def test_tessel_reads_what_torch_writes(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    made = content() | {"deferred": torch.arange(3)}
    torch.save(made, path)
    found = torch_file.load(path)
    assert torch_file.plain(found["args"]) == vars(made["args"])
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in made["model"].items())


def test_a_large_tensor_is_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 40)
    tensor = torch.randn(7, 3)
    torch_file.write(tmp_path / "x.pt", {"a": tensor, "b": torch.zeros(0)})
    assert torch.equal(torch.load(tmp_path / "x.pt")["a"], tensor)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_poisoned_file_is_refused_and_nothing_runs(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "model_optim_rng.pt", tmp_path / "trace"

    class Poison:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {trace}",)

    torch.save({"model": {"x": torch.zeros(2)}, "args": Poison()}, path, pickle_protocol=protocol)
    with pytest.raises(TesselError, match=r"asks for posix\.system.*nothing of it was run"):
        torch_file.load(path)
    assert not trace.exists()


class ForeignEnum:
    """Pickles as a value of an enumeration of Megatron's."""

    def __reduce__(self) -> Any:
        return ForeignEnum, (5,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_enumeration_of_megatron_becomes_its_value(tmp_path: Path, protocol: int, monkeypatch: Any) -> None:
    path = tmp_path / "model_optim_rng.pt"
    model = collections.defaultdict(dict, w=torch.arange(6, dtype=torch.bfloat16).view(2, 3))
    torch.save(
        {"model": model, "args": argparse.Namespace(backend=ForeignEnum(), dtype=torch.bfloat16)},
        path,
        pickle_protocol=protocol,
    )
    rename(path, f"{__name__}", "ForeignEnum", "megatron.core.enums.X", "ModelTypeX")
    found = torch_file.load(path)
    assert isinstance(found["args"].backend, Foreign)
    assert torch_file.plain(found["args"]) == {"backend": 5, "dtype": torch.bfloat16}
    assert torch.equal(found["model"]["w"], model["w"])


def rename(path: Path, module: str, name: str, new_module: str, new_name: str) -> None:
    """Give a global of the pickle another name, as a file of another system would have it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    for key, value in entries.items():
        if key.endswith("data.pkl"):
            changed = value.replace(f"c{module}\n{name}\n".encode(), f"c{new_module}\n{new_name}\n".encode())
            for old, new in ((module, new_module), (name, new_name)):
                short = bytes([0x8C, len(old)]) + old.encode()
                grown = changed.replace(short, bytes([0x8C, len(new)]) + new.encode())
                if grown != changed and changed[2:3] == b"\x95":
                    length = int.from_bytes(grown[3:11], "little") + len(grown) - len(changed)
                    grown = grown[:3] + length.to_bytes(8, "little") + grown[11:]
                changed = grown
            assert changed != value
            entries[key] = changed
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, value in entries.items():
            archive.writestr(key, value)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n}\x8c\x0c__defaults__Nsb.", "it changes a function"),
        (b"\x80\x04Nr\x00\x00\x00\x40.", "numbers its objects with gaps"),
        (b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a\x98.", "has the instruction BYTEARRAY8"),
        (b"\x80\x04\x82\x01.", "has the instruction EXT1"),
    ],
)
def test_the_own_unpickler_does_no_more_than_it_must(tmp_path: Path, attack: bytes, words: str) -> None:
    """A pickle may call a function on the list, and not write to it, nor take memory, nor reach registries."""
    path = tmp_path / "x.pt"
    torch.save({"x": torch.zeros(1)}, path, pickle_protocol=4)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, value in entries.items():
            archive.writestr(key, attack if key.endswith("data.pkl") else value)
    with pytest.raises(TesselError, match=words):
        torch_file.load(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(TesselError, match="compressed"):
        torch_file.load(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04 and no more", "not a whole file of torch.save"),
        (pickle.dumps({"a": 1}), "refused|not a whole file"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(TesselError, match=words):
        torch_file.load(tmp_path / "x.pt")


@pytest.mark.parametrize("protocol", [2, 4])
def test_damaged_files_give_an_error_in_words_or_load(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    torch.save(
        {"model": {f"w{i}": torch.randn(4, 4) for i in range(3)}, "args": argparse.Namespace(a=1)},
        path,
        pickle_protocol=protocol,
    )
    whole = path.read_bytes()
    numbers = random.Random(protocol)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(numbers.randint(1, 4)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        if numbers.random() < 0.3:
            data = data[: numbers.randrange(len(data))]
        path.write_bytes(data)
        try:
            found = torch_file.load(path)
        except TesselError:
            continue
        assert torch_file.plain(found) is not None

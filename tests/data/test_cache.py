from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tessel.data import cache as cache_module
from tessel.data.blend import BlendedDataset
from tessel.data.cache import IndexCache
from tessel.data.indexed import IndexedDataset
from tessel.data.samples import GPTDataset, SampleOptions
from tessel.runtime.log import warn_once

from .datasets import open_random, write_random

OPTIONS = SampleOptions(8, seed=3, eod_id=7)
LENGTHS = [20, 5, 31, 9, 14, 22]


def build(
    indexed: IndexedDataset, cache: IndexCache | None, options: SampleOptions = OPTIONS, **given: object
) -> GPTDataset:
    arguments = {"sequence_ids": np.arange(6, dtype=np.int32), "num_samples": 20} | given
    return GPTDataset(indexed, config=options, cache=cache, **arguments)  # type: ignore[arg-type]


def same(one: GPTDataset, two: GPTDataset) -> bool:
    names = ("document_index", "sample_index", "shuffle_index")
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in names)


def test_second_start_reuses_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indexed = open_random(tmp_path / "data", LENGTHS)
    first = IndexCache(tmp_path / "cache")
    built = build(indexed, first)
    first.report()
    assert capsys.readouterr().out == ""
    second = IndexCache(tmp_path / "cache")
    reused = build(indexed, second)
    second.report()
    assert capsys.readouterr().out == f"data index cache {tmp_path / 'cache'}: 1 reused, 0 built\n"
    assert same(built, reused)
    assert isinstance(reused.sample_index, np.memmap)
    assert np.array_equal(built[4]["tokens"], reused[4]["tokens"])


CHANGES = {
    "num_samples": {"num_samples": 21},
    "split": {"sequence_ids": np.arange(5, dtype=np.int32)},
    "name": {"name": "valid"},
    "drop_last": {"drop_last": False},
    "seed": {"options": replace(OPTIONS, seed=4)},
    "seq_length": {"options": replace(OPTIONS, seq_length=9)},
    "extra token": {"options": replace(OPTIONS, add_extra_token=False)},
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_other_options_are_built_anew(tmp_path: Path, name: str) -> None:
    indexed = open_random(tmp_path / "data", LENGTHS)
    cache = IndexCache(tmp_path / "cache")
    build(indexed, cache)
    changed = build(indexed, cache, **CHANGES[name])  # type: ignore[arg-type]
    assert (cache.num_built, cache.num_reused) == (2, 0)
    assert same(changed, build(indexed, None, **CHANGES[name]))  # type: ignore[arg-type]


def test_data_written_anew_under_its_name_is_not_stale(tmp_path: Path) -> None:
    prefix = write_random(tmp_path / "data", LENGTHS)
    cache = IndexCache(tmp_path / "cache")
    build(IndexedDataset(prefix), cache)
    before = os.stat(f"{prefix}.idx")
    # The same number of bytes at the same time: only the content tells.
    write_random(tmp_path / "data", [5, 20, *LENGTHS[2:]])
    os.utime(f"{prefix}.idx", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(f"{prefix}.idx").st_size == before.st_size
    again = build(IndexedDataset(prefix), cache)
    assert cache.num_reused == 0
    assert same(again, build(IndexedDataset(prefix), None))


def test_moved_data_is_found(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "cache")
    build(open_random(tmp_path / "data", LENGTHS), cache)
    build(open_random(tmp_path / "elsewhere", LENGTHS), cache)
    assert cache.num_reused == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_damaged_entries_are_built_anew(tmp_path: Path, damage: str) -> None:
    indexed = open_random(tmp_path / "data", LENGTHS)
    build(indexed, IndexCache(tmp_path / "cache"))
    expected = build(indexed, None)
    (entry,) = (tmp_path / "cache").iterdir()
    file = entry / "sample_index.npy"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "missing":
        file.unlink()
    else:
        np.save(file, np.zeros((3, 2), np.int32))
    cache = IndexCache(tmp_path / "cache")
    assert same(build(indexed, cache), expected)
    assert (cache.num_built, cache.num_reused) == (1, 0)
    assert build(indexed, cache) and cache.num_reused == 1


def _build_in_process(prefix: str, cache: str, start: str, counts: multiprocessing.Queue[tuple[int, int]]) -> None:
    """A process of a job: waits for the common start, then asks for its index."""
    indexed = IndexedDataset(prefix)
    while not Path(start).exists():
        time.sleep(0.001)
    mine = IndexCache(cache)
    build(indexed, mine)
    counts.put((mine.num_built, mine.num_reused))


def test_many_processes_that_start_together_build_once(tmp_path: Path) -> None:
    prefix = write_random(tmp_path / "data", LENGTHS)
    context = multiprocessing.get_context("fork")
    counts: multiprocessing.Queue[tuple[int, int]] = context.Queue()  # type: ignore[assignment]
    arguments = (prefix, str(tmp_path / "cache"), str(tmp_path / "start"), counts)
    processes = [context.Process(target=_build_in_process, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    (tmp_path / "start").touch()
    done = [counts.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(done) == [(0, 1)] * 5 + [(1, 0)]
    (entry,) = (tmp_path / "cache").iterdir()  # no lock, nothing unfinished
    assert sorted(path.name for path in entry.iterdir()) == [
        "description.json", "document_index.npy", "sample_index.npy", "shuffle_index.npy",
    ]  # fmt: skip


def _killed_while_building(prefix: str, cache: str) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    cache_module.np.save = stop  # type: ignore[assignment]
    build(IndexedDataset(prefix), IndexCache(cache))


def test_a_killed_builder_leaves_no_entry_and_no_lock(tmp_path: Path) -> None:
    prefix = write_random(tmp_path / "data", LENGTHS)
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_building, args=(prefix, str(tmp_path / "cache"))
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in (tmp_path / "cache").iterdir())
    cache = IndexCache(tmp_path / "cache")
    build(IndexedDataset(prefix), cache)
    assert cache.num_built == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_folder_that_may_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it holds is used; what it lacks is built, and not kept."""
    warn_once.cache_clear()
    indexed = open_random(tmp_path / "data", LENGTHS)
    expected = build(indexed, IndexCache(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.mkdtemp", _refuse)
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    cache = IndexCache(tmp_path / "cache")
    assert same(build(indexed, cache), expected)
    assert cache.num_reused == 1
    assert same(build(indexed, cache, num_samples=30), build(indexed, None, num_samples=30))
    assert "the index of the data is not kept" in capsys.readouterr().err


def test_without_locks_the_same_arrays_twice_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines on a file system without locks: the later one finds the entry when it wants to put its own."""
    indexed = open_random(tmp_path / "data", LENGTHS)
    monkeypatch.setattr(cache_module.fcntl, "flock", _refuse)
    other = IndexCache(tmp_path / "cache")
    whole = cache_module.atomic_folder

    @contextlib.contextmanager
    def meanwhile(path: Path) -> Iterator[Path]:
        monkeypatch.setattr(cache_module, "atomic_folder", whole)
        build(indexed, other)
        yield tmp_path
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(cache_module, "atomic_folder", meanwhile)
    cache = IndexCache(tmp_path / "cache")
    assert same(build(indexed, cache), build(indexed, None))
    assert (cache.num_built, other.num_built) == (1, 1)


def test_what_was_just_built_is_read_from_the_disk(tmp_path: Path) -> None:
    """So that the processes of a machine share its memory."""
    built = build(open_random(tmp_path / "data", LENGTHS), IndexCache(tmp_path / "cache"))
    assert isinstance(built.document_index, np.memmap)


def test_blends_are_kept_too(tmp_path: Path) -> None:
    indexed = open_random(tmp_path / "data", LENGTHS)
    parts = [build(indexed, None), build(indexed, None)]
    cache = IndexCache(tmp_path / "cache")
    first = BlendedDataset(parts, [1, 1], 10, cache=cache)
    again = BlendedDataset(parts, [1, 1], 10, cache=cache)
    other = BlendedDataset(parts, [1, 2], 10, cache=cache)
    assert (cache.num_built, cache.num_reused) == (2, 1)
    assert np.array_equal(first.dataset_index, again.dataset_index)
    assert not np.array_equal(first.dataset_index, other.dataset_index)


def test_only_large_indices_are_kept_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed = open_random(tmp_path / "data", LENGTHS)
    build(indexed, IndexCache(None))
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(cache_module, "_MIN_ENTRIES_BESIDE_DATA", 1)
    build(indexed, IndexCache(None))
    cache = IndexCache(None)
    build(indexed, cache)
    assert cache.num_reused == 1
    assert [path.name for path in (tmp_path / "data" / "cache").iterdir()] == ["GPTDataset_indices"]

"""Checkpoints of several processes: saved on one layout, loaded on others, and what happens when one fails."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint as dcp

from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.gather import gather_to_first, write_whole
from tessel.checkpoint.tiles import SliceReader
from tessel.errors import TesselError
from tessel.layout.topology import Degrees
from tessel.runtime import random as random_state
from tessel.runtime.failure import is_lost
from tessel.runtime.team import Team
from tests.checkpoint.pieces import RULES, STATE, Layout, Model, save, whole_values
from tests.parallel.processes import run

TP2_FSDP2 = Layout(Degrees(tp=2, ep=2, etp=2), shards=2)
LOADERS = {
    "TP3": (3, Layout(Degrees(tp=3, etp=3))),
    "TP2 x FSDP3, EP2": (6, Layout(Degrees(tp=2, ep=2, etp=1), shards=3)),
    "PP2": (2, Layout(Degrees(pp=2, etp=1))),
    "replicated x FSDP2, EP4": (4, Layout(Degrees(ep=4, etp=1), shards=2)),
}


def _save_twice(folder: Path) -> list[str]:
    """At once, and in the background while the tensors change."""
    torch.manual_seed(distributed.get_rank())
    values = whole_values()
    model, team, background_team = Model(TP2_FSDP2, values), Team.of(), Team.of()
    save(folder, 1, model.pieces(), team, random_state.get_state())
    background = run_checkpoint.BackgroundSave()
    pieces = model.pieces()
    background.start(lambda on_copied: save(folder, 2, pieces, background_team, on_copied=on_copied))
    model.zero_()
    background.wait()
    run_checkpoint.load_tensors(folder, 2, model.pieces(), team)
    state = run_checkpoint.read_rng(folder, 1, rank=distributed.get_rank())
    assert state is not None and torch.equal(state["torch"], torch.get_rng_state())
    return model.differing(values)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iterations 1 and 2 as TP2 x FSDP2 saved them."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    assert run(4, _save_twice, folder) == [[], [], [], []]
    return folder


def _load(layout: Layout, folder: Path, iteration: int) -> list[str]:
    values = whole_values()
    model = Model(layout, {name: torch.zeros_like(value) for name, value in values.items()})
    run_checkpoint.load_tensors(folder, iteration, model.pieces(), Team.of())
    return model.differing(values)


@pytest.mark.parametrize("name", LOADERS)
def test_what_one_layout_saved_another_loads_exactly(name: str, saved: Path) -> None:
    world_size, layout = LOADERS[name]
    assert run(world_size, _load, layout, saved, 1) == [[]] * world_size


@pytest.mark.parametrize("iteration", [1, 2])
def test_one_process_loads_what_many_saved(iteration: int, saved: Path) -> None:
    values = whole_values()
    found = {name: torch.zeros_like(value) for name, value in values.items()}
    run_checkpoint.load_tensors(saved, iteration, found)
    assert all(torch.equal(found[name], values[name]) for name in values)


def test_many_load_what_one_process_saved(tmp_path: Path) -> None:
    save(tmp_path, 1, whole_values(), Team())
    assert run(4, _load, TP2_FSDP2, tmp_path, 1) == [[]] * 4


def test_each_byte_is_written_once_and_by_all(saved: Path) -> None:
    metadata = SliceReader(run_checkpoint.iteration_folder(saved, 1)).read_metadata()
    elements: dict[str, int] = {}
    for index in metadata.storage_data:
        entry = metadata.state_dict_metadata[index.fqn]
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == index.offset)
        file = metadata.storage_data[index].relative_path
        elements[file] = elements.get(file, 0) + chunk.sizes.numel()
    total = sum(value.numel() for value in whole_values().values())
    assert sum(elements.values()) == total
    assert sorted(elements) == [f"__{rank}_0.distcp" for rank in range(4)]
    assert max(elements.values()) < 1.1 * total / 4


def test_random_state_of_another_layout_is_only_what_all_have_alike(saved: Path) -> None:
    own, other = (run_checkpoint.read_rng(saved, 1, rank=3, same_layout=same) for same in (True, False))
    assert own is not None and other is not None
    assert torch.equal(own["torch"], torch.Generator().manual_seed(3).get_state())
    assert "torch" not in other and "numpy_keys" in other
    torch.manual_seed(5)
    random_state.set_state(other)
    assert torch.initial_seed() == 5


# What fails


def _fails_while_writing(folder: Path, how: str, in_background: bool) -> str:
    """Rank 1 fails inside the second save. Returns what this rank was told."""
    team = Team.of()
    model = Model(TP2_FSDP2, whole_values()) if distributed.get_world_size() == 4 else Model(Layout(), whole_values())
    save(folder, 1, model.pieces(), team)
    if distributed.get_rank() == 1:
        write = dcp.FileSystemWriter.write_data

        def failing(self: Any, *arguments: Any) -> Any:
            write(self, *arguments)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if how == "full" else KeyError("a bug")

        dcp.FileSystemWriter.write_data = failing  # type: ignore[method-assign]
    try:
        if in_background:
            background = run_checkpoint.BackgroundSave()
            pieces = model.pieces()
            background.start(lambda on_copied: save(folder, 2, pieces, team, on_copied=on_copied))
            background.wait()
        else:
            save(folder, 2, model.pieces(), team)
    except Exception as error:  # noqa: BLE001 - told to the test
        told = f"{type(error).__name__} lost={is_lost(error)} {error}"
        (folder / f"told-{distributed.get_rank()}").write_text(told)
        return told
    return "nothing"


@pytest.mark.parametrize("in_background", [False, True])
def test_a_killed_process_leaves_the_last_checkpoint_in_charge(in_background: bool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 died"):
        run(2, _fails_while_writing, tmp_path, "killed", in_background)
    assert run_checkpoint.latest_iteration(tmp_path) == 1
    assert run_checkpoint.saved_iterations(tmp_path) == [1]
    assert "lost=True" in (tmp_path / "told-0").read_text()
    run_checkpoint.clear_unfinished(tmp_path)
    assert not list(tmp_path.glob(".iter_*"))
    assert run(2, _load, Layout(), tmp_path, 1) == [[], []]


@pytest.mark.parametrize("how", ["full", "bug"])
def test_what_fails_on_one_process_all_are_told(how: str, tmp_path: Path) -> None:
    told = run(4, _fails_while_writing, tmp_path, how, False)
    if how == "full":
        assert len(set(told)) == 1
        assert told[0].startswith("TesselError") and "The disk is full: writing" in told[0]
    else:
        assert "KeyError" in told[0] and all("a bug" in text and "lost=True" in text for text in told[1:])
    assert run_checkpoint.latest_iteration(tmp_path) == 1
    assert not list(tmp_path.glob(".iter_*"))


def _load_wrong(folder: Path) -> str:
    model = Model(Layout(Degrees(pp=2, etp=1)), whole_values())
    pieces = model.pieces()
    if distributed.get_rank() == 1:
        pieces["model.not_there"] = pieces.pop("model.q.weight")
    with pytest.raises(TesselError) as caught:
        run_checkpoint.load_tensors(folder, 1, pieces, Team.of())
    return str(caught.value)


def test_a_name_that_one_process_misses_is_told_to_all(saved: Path) -> None:
    told = run(2, _load_wrong, saved)
    assert told[0] == told[1]
    assert "does not fit this run: model.not_there (missing)" in told[0]


# Export


def _gather(folder: Path) -> None:
    team, values = Team.of(), whole_values()
    model = Model(TP2_FSDP2, values)
    with gather_to_first(model.weights(), model.tiles, torch.float32, team) as tensors:
        found = dict(tensors)
    if team.is_first:
        assert list(found) == list(RULES)
        assert all(torch.equal(found[name], values[f"model.{name}"]) for name in RULES)
    else:
        assert found == {}

    # On the way, and before anything was asked for.
    for num_asked_for in (1, 0):

        def full(tensors: Iterator[Any], num_asked_for: int = num_asked_for) -> None:
            for _ in range(num_asked_for):
                next(tensors)
            raise TesselError("the disk is full")

        with pytest.raises(TesselError, match="^the disk is full$"):
            write_whole(model.weights(), model.tiles, torch.bfloat16, full, team)
    lacking = {name: tensor for name, tensor in model.weights().items() if name != "q.weight" or team.rank > 0}
    with pytest.raises(TesselError, match="hold no whole q.weight: the model cannot"):
        write_whole(lacking, model.tiles, torch.bfloat16, lambda tensors: None, team)


def test_parameters_are_put_together_on_the_first_process() -> None:
    run(4, _gather, Path())


def _gather_stages() -> int:
    """How many elements came."""
    team, values = Team.of(), whole_values()
    model = Model(Layout(Degrees(pp=2, etp=1)), values)
    elements = 0
    with gather_to_first(model.weights(), model.tiles, torch.bfloat16, team) as tensors:
        for name, tensor in tensors:
            assert torch.equal(tensor, values[f"model.{name}"].bfloat16())
            elements += tensor.numel()
    return elements


def test_parameters_of_other_stages_come_too() -> None:
    assert run(2, _gather_stages) == [sum(torch.Size(rule.shape).numel() for rule in RULES.values()), 0]


# Nodes without shared storage


def _on_two_nodes(folders: list[Path]) -> None:
    rank = distributed.get_rank()
    team, values = Team.of([[0, 1], [2, 3]]), whole_values()
    folder = folders[team.node]
    # TP4: no node has all of a parameter.
    layout, description = Layout(Degrees(tp=4, etp=4)), {"layout": {"tp": 4}}
    model = Model(layout, values)
    for iteration in (1, 2):
        save(folder, iteration, model.pieces(), team, state=STATE | description)
    assert run_checkpoint.latest_iteration(folder) == 2
    names = {path.name for path in run_checkpoint.iteration_folder(folder, 2).iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "run.json", "huggingface"}
    model.zero_()
    run_checkpoint.require_one_save(folder, 2, {"tp": 4}, team)
    run_checkpoint.load_tensors(folder, 2, model.pieces(), team)
    assert model.differing(values) == []
    with pytest.raises(TesselError, match="this run's differs in ep, tp"):
        run_checkpoint.require_one_save(folder, 2, {"tp": 2, "ep": 2}, team)
    # Another process's pieces are not there.
    other = Model(Layout(), values)
    with pytest.raises(TesselError, match="node 1 .process 2.: .*it does not hold all of model.embed.weight"):
        run_checkpoint.load_tensors(folder, 2, other.pieces(), team)
    if rank == 2:
        run_checkpoint.iteration_folder(folder, 2).rename(folder / "elsewhere")
    team.wait()
    with pytest.raises(TesselError, match="node 1 lacks it"):
        run_checkpoint.require_one_save(folder, 2, {"tp": 4}, team)
    if rank == 2:
        (folder / "elsewhere").rename(run_checkpoint.iteration_folder(folder, 1).with_name("iter_0000003"))
    if rank == 0:
        run_checkpoint.iteration_folder(folder, 1).rename(run_checkpoint.iteration_folder(folder, 3))
    team.wait()
    with pytest.raises(TesselError, match="on node 1 is of another save"):
        run_checkpoint.require_one_save(folder, 3, {"tp": 4}, team)


def test_nodes_without_shared_storage_keep_their_own_parts(tmp_path: Path) -> None:
    run(4, _on_two_nodes, [tmp_path / "0", tmp_path / "1"])


def _thinks_it_is_shared(folders: list[Path]) -> None:
    team = Team.of()
    model = Model(Layout(Degrees(tp=2, etp=2)), whole_values())
    # Each process's own disk, seen at the same path.
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(TesselError, match="the machines do not share that folder.*--no-shared-storage"),
    ):
        patch.setattr(Team, "writer", _elsewhere(team, folders))
        save(folders[team.rank], 1, model.pieces(), team)


def _elsewhere(team: Team, folders: list[Path]) -> Any:
    """`Team.writer` whose first answer, the temporary folder, is read on another disk."""
    write = Team.writer

    def writer(self: Team, function: Any) -> Any:
        value = write(self, function)
        return value.replace(str(folders[0]), str(folders[team.rank])) if isinstance(value, str) else value

    return writer


def test_a_folder_that_is_not_shared_after_all(tmp_path: Path) -> None:
    run(2, _thinks_it_is_shared, [tmp_path / "0", tmp_path / "1"])
    assert run_checkpoint.saved_iterations(tmp_path / "0") == []

"""What many processes start from: they agree, or say where they differ."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tessel.checkpoint import training as run_checkpoint
from tessel.errors import TesselError
from tessel.runtime.team import Team
from tessel.train.source import Kind, Source, agreed
from tests.parallel.processes import run

LAYOUT = {"tp": 1}


def write_run(folder: Path, saves: dict[int, str], tracker: int) -> None:
    """A run's folder: iteration -> save id."""
    for iteration, save_id in saves.items():
        state = dict.fromkeys(run_checkpoint.STATE_KEYS, 0) | {"save_id": save_id, "layout": LAYOUT}
        run_checkpoint.save(folder, iteration, {"x": torch.zeros(1)}, state, None, Path.mkdir, None)
        path = run_checkpoint.iteration_folder(folder, iteration) / run_checkpoint.STATE_FILE
        path.write_text(json.dumps(state))
    (folder / run_checkpoint.TRACKER).write_text(f"{tracker}\n")


def found_in(folder: Path) -> Source:
    iteration = run_checkpoint.latest_iteration(folder)
    if iteration is None:
        return Source(Kind.RANDOM, None, None, None)
    return Source(Kind.RESUME, folder, iteration, None)


def _ask(base: Path, nodes: list[list[int]] | None) -> Any:
    """What each process is told of "run", which is one path and, from here, a disk of each process's own."""
    os.chdir(base / str(distributed.get_rank()))
    try:
        source = agreed(found_in(Path("run")), LAYOUT, Team.of(nodes))
    except TesselError as error:
        return str(error)
    return source.kind, source.iteration


def ask(base: Path, shared: bool) -> list[Any]:
    for rank in range(2):
        (base / str(rank)).mkdir(exist_ok=True)
    return run(2, _ask, base, None if shared else [[0], [1]])


def test_one_process_agrees_with_itself(tmp_path: Path) -> None:
    write_run(tmp_path, {2: "a"}, 2)
    source = found_in(tmp_path)
    assert agreed(source, LAYOUT, Team()) is source


def test_processes_that_see_different_things(tmp_path: Path) -> None:
    write_run(tmp_path / "0" / "run", {2: "a"}, 2)
    told = ask(tmp_path, shared=True)
    assert told[0] == told[1]
    assert "process 0 would start from iteration 2 in run, process 1 from random weights" in told[0]
    assert "--no-shared-storage" in told[0]
    told = ask(tmp_path, shared=False)
    assert told[0] == told[1]
    assert "Not every machine has run/iter_0000002: node 1 lacks it" in told[0]


def test_nodes_whose_checkpoints_are_of_different_saves(tmp_path: Path) -> None:
    write_run(tmp_path / "0" / "run", {2: "a"}, 2)
    write_run(tmp_path / "1" / "run", {2: "b"}, 2)
    told = ask(tmp_path, shared=False)
    assert told[0] == told[1]
    assert "run/iter_0000002 on node 1 is of another save than on the other nodes" in told[0]


def test_a_run_killed_while_the_trackers_moved_goes_on_from_the_newer_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path / "0" / "run", {2: "a", 4: "b"}, 4)
    write_run(tmp_path / "1" / "run", {2: "a", 4: "b"}, 2)
    assert ask(tmp_path, shared=False) == [(Kind.RESUME, 4)] * 2

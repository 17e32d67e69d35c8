"""Checkpoints of a run: torch.distributed.checkpoint by global parameter names, beside a little JSON.

    SAVE/latest_checkpointed_iteration.txt   the iteration to resume from, as Megatron's tracker
    SAVE/iter_0000100/__0_0.distcp .metadata  tensors: model.NAME, optimizer.MOMENT.NAME; a file of each process
                      run.json               counters, schedule, loss scale, what the run is
                      rng.pt                 random state, of each process
                      huggingface/           config.json and tokenizer files: the way back

A folder appears whole or not at all, and the tracker moves only after it: a run that is killed
while saving goes on from the checkpoint before. Whole parameters by name are what is saved, so that
any layout reads what another wrote. Processes that share no storage each have such a folder on
every node, with the pieces of that node's processes; `save_id` in run.json says which belong together.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import secrets
import shutil
import struct
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tessel.checkpoint.tiles import LoadPlans, SavePlans, SliceReader
from tessel.errors import TesselError
from tessel.runtime.files import atomic_folder, atomic_write, disk_errors
from tessel.runtime.team import Team
from tessel.runtime.watchdog import unlimited

TRACKER = "latest_checkpointed_iteration.txt"
STATE_FILE = "run.json"
RNG_FILE = "rng.pt"
HF_FOLDER = "huggingface"
# The trained model, ready for `from_pretrained`, beside the checkpoints.
EXPORT_FOLDER = "hf"
# Beside run.json where a run was saved in Megatron's torch_dist (run_formats.py).
_TORCH_DIST_FILE = "metadata.json"
STATE_KEYS = ("iteration", "consumed_train_samples", "scheduler", "scaler", "identity")
# Under this key rng.pt has the state of each process, by rank; that of one process alone lies at the top.
_BY_RANK = "by_rank"
# What torch.load and DCP raise for a file that is missing, cut short or something else.
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, struct.error, pickle.UnpicklingError)
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return folder / f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int | None:
    """The iteration that a folder's name says; None for another name."""
    match = _ITERATION.fullmatch(path.name)
    return int(match[1]) if match else None


def saved_iterations(folder: Path) -> list[int]:
    """The iterations of a run that have a whole checkpoint in `folder`, in whatever format, rising."""
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        iteration = iteration_of(entry)
        has_tensors = (entry / ".metadata").is_file() or any(entry.glob("mp_rank_*"))
        if iteration is not None and (entry / STATE_FILE).is_file() and has_tensors:
            found.append(iteration)
    return sorted(found)


def is_dcp(checkpoint: Path) -> bool:
    """Whether the checkpoint of an iteration is one of a run in this module's format: not one of Megatron's."""
    files = (STATE_FILE, ".metadata")
    return all((checkpoint / name).is_file() for name in files) and not (checkpoint / _TORCH_DIST_FILE).is_file()


def latest_iteration(folder: Path) -> int | None:
    """The iteration that the tracker names; None where `folder` holds no run.

    A run that was killed between its first checkpoint and the tracker has a checkpoint all the same.

    Raises:
        TesselError: the tracker names a checkpoint that is not there.
    """
    tracker = folder / TRACKER
    saved = saved_iterations(folder)
    if not tracker.is_file():
        return saved[-1] if saved else None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdigit() or int(text) not in saved:
        there = ", ".join(str(i) for i in saved) or "none"
        raise TesselError(
            f"{tracker} says {text!r}, and there is no such checkpoint (there: {there}). "
            "Write the iteration to load into that file, or pass --ckpt-step."
        )
    return int(text)


def save(
    folder: Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    rng: Mapping[str, Any] | None,
    write_hf_metadata: Callable[[Path], None],
    keep_last_k: int | None,
    team: Team | None = None,
    on_copied: Callable[[], None] | None = None,
) -> None:
    """Write the checkpoint of `iteration`, then move the tracker, then drop the oldest beyond `keep_last_k`.

    Every process of `team` calls it with its own `tensors` (whole ones, DTensors, or pieces: see
    `tiles.tiled`) and its own `rng`. What several hold is written once. With `on_copied`, what this
    process writes is copied to host memory first, and `on_copied` is called when the tensors may change.

    Raises:
        TesselError: a disk is full, or machines do not share the folder; on all processes. What was there stays.
    """
    team = team or Team()
    target = iteration_folder(folder, iteration)
    with contextlib.ExitStack() as stack:  # after an error, the temporary folder goes
        temporary = Path(team.writer(lambda: str(stack.enter_context(atomic_folder(target)))))
        team.each(lambda: _write_tensors(temporary, target, tensors, team, on_copied))
        save_id = team.first(lambda: secrets.token_hex(8))
        states = None if rng is None else team.gather(dict(rng))

        def write_rest() -> None:
            if states is not None:
                torch.save(states[0] if team.size == 1 else {_BY_RANK: states}, temporary / RNG_FILE)
            write_hf_metadata(temporary / HF_FOLDER)
            (temporary / STATE_FILE).write_text(json.dumps({**state, "save_id": save_id}, indent=2) + "\n")

        team.writer(write_rest)
        team.writer(stack.close)  # synced, and renamed to `target`
    team.writer(lambda: _move_tracker(folder, iteration, keep_last_k))


def _write_tensors(
    temporary: Path, target: Path, tensors: Mapping[str, Tensor], team: Team, on_copied: Callable[[], None] | None
) -> None:
    """This process's share of the pieces; an error of any of the neighbours is raised on the one that writes."""
    plans = SavePlans(on_copied=on_copied, partial=not team.shares_storage)
    alone = team.neighbours is None
    with disk_errors(target), warnings.catch_warnings():
        # One process saves alone, and DCP would warn of it at each save.
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process.*")
        try:
            writer = dcp.FileSystemWriter(temporary, sync_files=True)
            metadata = dcp.save(
                dict(tensors), storage_writer=writer, planner=plans, process_group=team.neighbours, no_dist=alone
            )
        except dcp.CheckpointException as failed:
            # It is a BaseException that prints a traceback of every rank.
            if team.writes:
                raise next(iter(failed.failures.values()))[0] from failed
            return
    stored = {info.relative_path for info in metadata.storage_data.values()}
    if team.writes and any(not (temporary / name).is_file() for name in stored):
        raise TesselError(
            f"{target} lacks files that other processes have just written there: the machines do not share that "
            "folder. Give --save a folder that they share, or pass --no-shared-storage."
        )


def _move_tracker(folder: Path, iteration: int, keep_last_k: int | None) -> None:
    with atomic_write(folder / TRACKER) as temporary:
        temporary.write_text(f"{iteration}\n")
    if keep_last_k is not None:
        prune(folder, keep_last_k, iteration)


def prune(folder: Path, keep_last_k: int, newest: int) -> None:
    """Drop all but the last `keep_last_k` checkpoints up to `newest`, the one just written."""
    old = [i for i in saved_iterations(folder) if i <= newest][:-keep_last_k]
    for iteration in old:
        shutil.rmtree(iteration_folder(folder, iteration))


def clear_unfinished(folder: Path, team: Team | None = None) -> None:
    """Remove what a killed save or export left behind. All processes of `team` call it."""
    (team or Team()).writer(lambda: _clear(folder))


def _clear(folder: Path) -> None:
    for pattern in (".iter_*", ".hf*", "torch/.iter_*", "torch_dist/.iter_*"):
        for entry in folder.glob(pattern):
            if entry.is_dir() and entry.name.endswith((".tmp", ".old")):
                shutil.rmtree(entry)


def read_state(folder: Path, iteration: int) -> dict[str, Any]:
    """The JSON that `save` was given.

    Raises:
        TesselError: it is damaged.
    """
    path = iteration_folder(folder, iteration) / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    return cast(dict[str, Any], state)


def _damaged(path: Path, why: object) -> TesselError:
    reason = (str(why) or type(why).__name__).splitlines()[0]
    return TesselError(
        f"{path} is damaged ({reason}). Go on from an earlier checkpoint with --ckpt-step, or start anew with "
        "--no-resume."
    )


def require_one_save(folder: Path, iteration: int, layout: Mapping[str, Any], team: Team) -> None:
    """Refuse to go on where the nodes' own folders are not of one save, or of another layout than this run's.

    `layout` is what run.json says under that key. Does nothing on shared storage.

    Raises:
        TesselError: on all processes; names the nodes that lack the checkpoint or have another save of it.
    """
    if team.shares_storage:
        return
    found = team.each(lambda: _save_and_layout(folder, iteration))
    of_node = [found[ranks[0]] for ranks in team.nodes]
    where = iteration_folder(folder, iteration)
    lacking = [str(node) for node, (save_id, _) in enumerate(of_node) if save_id is None]
    if lacking:
        raise TesselError(
            f"Not every machine has {where}: node {', '.join(lacking)} lacks it, and --no-shared-storage needs each "
            "node's own part. Copy it back there, or choose an iteration that all have with --ckpt-step."
        )
    ids = [save_id for save_id, _ in of_node]
    if len(set(ids)) > 1:
        usual = max(ids, key=ids.count)  # of as many, node 0's
        other = [str(node) for node, save_id in enumerate(ids) if save_id != usual]
        raise TesselError(
            f"{where} on node {', '.join(other)} is of another save than on the other nodes. Choose an iteration that "
            "all have of the same save with --ckpt-step, or start anew with --no-resume."
        )
    saved = of_node[0][1]
    if saved != dict(layout):
        names = [key for key in sorted({*(saved or {}), *layout}) if (saved or {}).get(key) != layout.get(key)]
        raise TesselError(
            f"{where} lies on the nodes in the pieces of the layout that it was saved on, and this run's differs in "
            f"{', '.join(names)}. Go on with the layout of the save, or bring the folders of all nodes together."
        )


def _save_and_layout(folder: Path, iteration: int) -> tuple[str | None, dict[str, Any] | None]:
    if iteration not in saved_iterations(folder):
        return None, None
    state = read_state(folder, iteration)
    return state.get("save_id", ""), state.get("layout")


def read_rng(folder: Path, iteration: int, rank: int = 0, same_layout: bool = True) -> dict[str, Any] | None:
    """The random state that the process `rank` gave to `save`; None if it was saved without.

    On another layout the processes' own generators mean nothing: only what all processes have alike is
    given then, Python's and NumPy's.
    """
    path = iteration_folder(folder, iteration) / RNG_FILE
    if not path.is_file():
        return None
    try:
        content = cast(dict[str, Any], torch.load(path, weights_only=True))
        states = content.get(_BY_RANK, {0: content})
        if same_layout:
            return cast(dict[str, Any], states[rank])
        return {key: value for key, value in states[min(states)].items() if key.startswith(("python_", "numpy_"))}
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def holds_optimizer(folder: Path, iteration: int) -> bool:
    """Whether the checkpoint has the optimizer's state."""
    stored = SliceReader(iteration_folder(folder, iteration)).read_metadata().state_dict_metadata
    return any(name.startswith("optimizer.") for name in stored)


def load_tensors(folder: Path, iteration: int, tensors: Mapping[str, Tensor], team: Team | None = None) -> None:
    """Fill `tensors` in place: whole ones, DTensors, or pieces (see `tiles.tiled`), whatever layout saved them.

    Each process reads its own elements alone.

    Raises:
        TesselError: some are not in the checkpoint or have another shape; they are listed. On all processes
            of `team`.
    """
    with unlimited("reading a checkpoint"):
        (team or Team()).each(lambda: _load_own(iteration_folder(folder, iteration), tensors))


def _load_own(path: Path, tensors: Mapping[str, Tensor]) -> None:
    reader = SliceReader(path)
    stored = reader.read_metadata().state_dict_metadata
    wrong = []
    for name, tensor in tensors.items():
        entry = stored.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            wrong.append(f"{name} (missing)")
        elif tuple(entry.size) != tuple(tensor.shape):
            wrong.append(f"{name} (stored {tuple(entry.size)}, wanted {tuple(tensor.shape)})")
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise TesselError(f"{path} does not fit this run: {shown}. Load it with the flags it was saved with.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        try:
            dcp.load(dict(tensors), storage_reader=reader, planner=LoadPlans(), no_dist=True)
        except dcp.CheckpointException as failed:
            # It is a BaseException that prints a traceback of every rank; one process has one cause.
            cause = next(iter(failed.failures.values()))[0]
            raise _damaged(path, cause) from failed
        except _UNREADABLE as error:
            raise _damaged(path, error) from error


class BackgroundSave:
    """One save at a time on a thread, over copies of the tensors, so that training goes on."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: Callable[[Callable[[], None]], None]) -> None:
        """Wait for the save before, and call `save(on_copied)` on a thread.

        Returns when `on_copied` has been called: the tensors may change then. A failure is raised by `wait`.
        """
        self.wait()
        copied = threading.Event()

        def run() -> None:
            try:
                save(copied.set)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                self._error = error
            finally:
                copied.set()

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()
        copied.wait()

    def wait(self) -> None:
        """Wait until the save is on disk; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

"""Checkpoints of a run: torch.distributed.checkpoint by global parameter names, beside a little JSON.

    SAVE/latest_checkpointed_iteration.txt   the iteration to resume from, as Megatron's tracker
    SAVE/iter_0000100/__0_0.distcp .metadata  tensors: model.NAME, optimizer.MOMENT.NAME
                      run.json               counters, schedule, loss scale, what the run is
                      rng.pt                 random state
                      huggingface/           config.json and tokenizer files: the way back

A folder appears whole or not at all, and the tracker moves only after it: a run that is killed
while saving goes on from the checkpoint before.
"""

from __future__ import annotations

import json
import pickle
import re
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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from tessel.checkpoint import safe_pickle
from tessel.errors import TesselError
from tessel.runtime.files import atomic_folder, atomic_write, disk_errors

TRACKER = "latest_checkpointed_iteration.txt"
STATE_FILE = "run.json"
RNG_FILE = "rng.pt"
HF_FOLDER = "huggingface"
# The trained model, ready for `from_pretrained`, beside the checkpoints.
EXPORT_FOLDER = "hf"
STATE_KEYS = ("iteration", "consumed_train_samples", "scheduler", "scaler", "identity")
# What torch.load and DCP raise for a file that is missing, cut short or something else.
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, struct.error, pickle.UnpicklingError)
_ITERATION = re.compile(r"iter_(\d{7,})")


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, with its pickled index read through the allow-list (tensors are weights_only already)."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as file:
            metadata = cast(Metadata, safe_pickle.load(file, safe_pickle.DCP_METADATA_GLOBALS, str(path)))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return folder / f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int | None:
    """The iteration that a folder's name says; None for another name."""
    match = _ITERATION.fullmatch(path.name)
    return int(match[1]) if match else None


def saved_iterations(folder: Path) -> list[int]:
    """The iterations that have a whole checkpoint of this kind in `folder`, rising."""
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        iteration = iteration_of(entry)
        if iteration is not None and (entry / STATE_FILE).is_file() and (entry / ".metadata").is_file():
            found.append(iteration)
    return sorted(found)


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
) -> None:
    """Write the checkpoint of `iteration`, then move the tracker, then drop the oldest beyond `keep_last_k`.

    `tensors` may be DTensors. Raises TesselError on a full disk; what was there before stays.
    """
    target = iteration_folder(folder, iteration)
    with disk_errors(target), atomic_folder(target) as temporary:
        with warnings.catch_warnings():
            # One process saves alone, and DCP would warn of it at each save.
            warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process.*")
            writer = dcp.FileSystemWriter(temporary, sync_files=True)
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
        if rng is not None:
            torch.save(dict(rng), temporary / RNG_FILE)
        write_hf_metadata(temporary / HF_FOLDER)
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    with atomic_write(folder / TRACKER) as temporary:
        temporary.write_text(f"{iteration}\n")
    if keep_last_k is not None:
        _prune(folder, keep_last_k, iteration)


def _prune(folder: Path, keep_last_k: int, newest: int) -> None:
    """Drop all but the last `keep_last_k` checkpoints up to `newest`, the one just written."""
    old = [i for i in saved_iterations(folder) if i <= newest][:-keep_last_k]
    for iteration in old:
        shutil.rmtree(iteration_folder(folder, iteration))


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed save or export left behind."""
    for pattern in (".iter_*", ".hf*"):
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


def read_rng(folder: Path, iteration: int) -> dict[str, Any] | None:
    """The random state that `save` was given; None if it was saved without."""
    path = iteration_folder(folder, iteration) / RNG_FILE
    if not path.is_file():
        return None
    try:
        return cast(dict[str, Any], torch.load(path, weights_only=True))
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def holds_optimizer(folder: Path, iteration: int) -> bool:
    """Whether the checkpoint has the optimizer's state."""
    stored = SafeReader(iteration_folder(folder, iteration)).read_metadata().state_dict_metadata
    return any(name.startswith("optimizer.") for name in stored)


def load_tensors(folder: Path, iteration: int, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place.

    Raises:
        TesselError: some are not in the checkpoint or have another shape; they are listed.
    """
    path = iteration_folder(folder, iteration)
    reader = SafeReader(path)
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
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
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

    def start(self, tensors: Mapping[str, Tensor], save_copies: Callable[[dict[str, Tensor]], None]) -> None:
        """Wait for the save before, copy `tensors` to host memory, and call `save_copies` with them on a thread."""
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

        def run() -> None:
            try:
                save_copies(copies)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save is on disk; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

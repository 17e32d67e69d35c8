"""Megatron's folders: the tracker file, the folder of an iteration, and those of the ranks in it.

    ROOT/latest_checkpointed_iteration.txt   the iteration as text without a newline, or "release"
    ROOT/iter_0000005, or ROOT/release       an iteration
    mp_rank_TT[_PPP][_EEE]                   torch format: a rank, with PPP where PP > 1 and EEE where EP > 1

What Megatron's files have no place for, config.json and the tokenizer, travels along (companion.py).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from tessel.checkpoint import companion
from tessel.errors import TesselError
from tessel.layout.topology import Place, Topology
from tessel.runtime.files import atomic_write, require_path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d{7,})")
_RANK = re.compile(r"mp_rank_\d{2,}(_\d{3,}){0,2}")


@dataclass(frozen=True)
class Iteration:
    """The folder of one iteration below (or at) `root`; `number` is None for a release."""

    root: Path
    path: Path
    number: int | None


def find_iteration(folder: str | Path, ckpt_step: int | None = None) -> Iteration:
    """The iteration to read: `folder` itself if it is one, else `ckpt_step`, else what the tracker names.

    Raises:
        TesselError: there is none, or not the one that was asked for; says what there is.
    """
    folder = require_path(folder, "checkpoint")
    if not folder.is_dir():
        raise TesselError(f"{folder} is a file. Give the folder of the checkpoint.")
    own = _ITERATION.fullmatch(folder.name)
    if not (folder / TRACKER).exists() and (own or folder.name == RELEASE or rank_folders(folder)):
        number = int(own[1]) if own else None
        if ckpt_step is not None and ckpt_step != number:
            raise TesselError(f"--ckpt-step {ckpt_step}: {folder} is another iteration. Give the folder above it.")
        return Iteration(folder.parent, folder, number)
    if ckpt_step is not None:
        return _existing(folder, ckpt_step, f"--ckpt-step {ckpt_step}")
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise TesselError(f"{folder} has no {TRACKER}, so it does not say which iteration to read. {_there(folder)}")
    text = tracker.read_bytes()[:100].decode("ascii", "replace").strip()
    if text == RELEASE:
        return _existing(folder, None, f"{TRACKER} says release, which")
    if not text.isdecimal():
        raise TesselError(f"{tracker} says {text!r}: it must be a number or {RELEASE}. {_there(folder)}")
    return _existing(folder, int(text), f"{TRACKER} says {text}, which")


def _existing(root: Path, number: int | None, what: str) -> Iteration:
    path = root / iteration_name(number)
    if not path.is_dir():
        raise TesselError(f"{what} is not in {root}. {_there(root)}")
    return Iteration(root, path, number)


def _there(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and _is_iteration(path.name))
    if not names:
        return "It holds no iter_* folder and no release."
    return f"It holds {', '.join(names[-5:])}: choose with --ckpt-step, or give that folder itself."


def _is_iteration(name: str) -> bool:
    return name == RELEASE or _ITERATION.fullmatch(name) is not None


def iteration_name(number: int | None) -> str:
    """The folder of an iteration; None is the release."""
    return RELEASE if number is None else f"iter_{number:07d}"


def write_tracker(root: Path, number: int | None) -> None:
    """Name the iteration that is complete. The last thing to be written."""
    with atomic_write(root / TRACKER) as temporary:
        temporary.write_text(RELEASE if number is None else str(number), encoding="ascii")


def rank_folders(path: Path) -> dict[str, Path]:
    """The folders of ranks in an iteration, by name."""
    return {entry.name: entry for entry in sorted(path.glob("mp_rank_*")) if _RANK.fullmatch(entry.name)}


def rank_name(topology: Topology, place: Place) -> str:
    """The folder of a rank."""
    name = f"mp_rank_{place.tp:02d}"
    if topology.pp > 1:
        name += f"_{place.pp:03d}"
    return name + (f"_{place.ep:03d}" if topology.ep > 1 else "")


def model_parallel(tp: int, pp: int, ep: int, etp: int) -> Topology:
    """The fewest processes that hold a whole model with these degrees.

    Raises:
        TesselError: folders cannot tell the ranks apart, since experts are cut finer than the rest.
    """
    if tp % etp:
        raise TesselError(
            f"--expert-tensor-parallel-size {etp} does not divide --tensor-model-parallel-size {tp}: the torch format "
            "names its folders by the latter, and cannot hold that. Use torch_dist, or another size."
        )
    return Topology(pp * math.lcm(tp, ep * etp), tp, pp, 1, ep, etp)


def places(topology: Topology) -> dict[str, Place]:
    """Where the rank of each folder stands, by the folder's name."""
    found: dict[str, Place] = {}
    for rank in range(topology.world_size):
        place = topology.place(rank)
        found.setdefault(rank_name(topology, place), place)
    return dict(sorted(found.items()))


def companions(iteration: Iteration, hf_dir: str | Path | None) -> Path | None:
    """The folder with the config.json that belongs to a checkpoint: `hf_dir` if given, else one that travels along.

    It travels in the iteration's folder, the root, or another iteration of the same root.

    Raises:
        TesselError: `hf_dir` has none.
    """
    if hf_dir is not None:
        folder = require_path(hf_dir, "--hf-dir")
        if not (folder / companion.CONFIG).is_file():
            raise TesselError(f"--hf-dir {folder} has no config.json. Give the Hugging Face folder of the model.")
        return folder
    # A run that goes on from a converted iteration saves its own beside it, without what travels along.
    others = sorted(path for path in iteration.root.iterdir() if path.is_dir() and _is_iteration(path.name))
    travelling = companion.find(iteration.path, iteration.root, *others)
    if travelling is not None:
        return travelling
    beside = (folder for folder in (iteration.path, iteration.root) if (folder / companion.CONFIG).is_file())
    return next(beside, None)

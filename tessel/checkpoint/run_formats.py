"""A run's checkpoint in other formats: made of one in its own format by all processes, each writing some of the files.

    SAVE/iter_0000010          in the run's own format, torch_dcp, or where that is not asked for in one of Megatron's
    SAVE/torch/iter_0000010    others beside it, each with its latest_checkpointed_iteration.txt
    SAVE/torch_dist/iter_0000010
    SAVE/hf_0000010            a Hugging Face folder

Beside Megatron's files lie run.json and rng.pt, with which a run goes on as from its own format. Nothing is gathered:
a file's tensors are read as boxes out of what all processes have just written.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.formats import Written, written
from tessel.checkpoint.run_model import open_run
from tessel.checkpoint.stored import Format, StoredModel, StoredTensor, Target
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig
from tessel.runtime.files import atomic_folder, atomic_write, disk_errors
from tessel.runtime.team import Team

OWN: Format = "torch_dcp"
HUGGING_FACE = "hf"
MEGATRON = ("torch", "torch_dist")
FORMATS = (HUGGING_FACE, *MEGATRON, OWN)
# A checkpoint in the run's own format that is only there to be read; what a killed run leaves has such a name.
_STAGED = ".iter_staged.tmp"


@dataclass(frozen=True)
class Formats:
    """What a run saves: `names` of formats, `target` for those that are cut by degrees.

    `keeps_hf`: whether the Hugging Face folder of an iteration stays, whatever --keep-last-k says.
    """

    names: tuple[str, ...]
    target: Target
    with_optimizer: bool
    keep_last_k: int | None = None
    keeps_hf: Callable[[int], bool] = lambda _: False

    @property
    def first(self) -> str | None:
        """The format that lies in SAVE itself, from which a run goes on; None for Hugging Face folders alone."""
        return OWN if OWN in self.names else next((name for name in self.names if name in MEGATRON), None)

    @property
    def others(self) -> tuple[str, ...]:
        """All but the run's own."""
        return tuple(name for name in self.names if name != OWN)

    def place(self, name: str, save: Path, iteration: int) -> Path:
        """The folder of an iteration in a format."""
        if name == HUGGING_FACE:
            return save / f"{run_checkpoint.EXPORT_FOLDER}_{iteration:07d}"
        return run_checkpoint.iteration_folder(save if name == self.first else save / name, iteration)


def save(
    formats: Formats,
    folder: Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    rng: Mapping[str, Any] | None,
    write_hf_metadata: Callable[[Path], None],
    team: Team | None = None,
    on_copied: Callable[[], None] | None = None,
    on_saved: Callable[[str, Path], None] = lambda name, path: None,
) -> None:
    """Write the checkpoint of `iteration` in all formats; the rest is as in `training.save`.

    Each format's folder appears whole or not at all, the run's own first. `on_saved` is called after each.

    Raises:
        TesselError: a disk is full, or a format cannot hold the model; on all processes. What was there stays.
    """
    team = team or Team()
    with contextlib.ExitStack() as stack:
        own, keep_last_k = folder, formats.keep_last_k
        if OWN not in formats.names:
            own, keep_last_k = folder / _STAGED, None
            stack.callback(lambda: _remove(own, team))
        run_checkpoint.save(own, iteration, tensors, state, rng, write_hf_metadata, keep_last_k, team, on_copied)
        if OWN in formats.names:
            on_saved(OWN, formats.place(OWN, folder, iteration))
        for name in formats.others:
            target = formats.place(name, folder, iteration)
            _save_as(name, formats, run_checkpoint.iteration_folder(own, iteration), target, team)
            team.writer(lambda name=name: _settle(name, formats, folder, iteration))  # type: ignore[misc]
            on_saved(name, target)


def _remove(staged: Path, team: Team) -> None:
    if team.writes:
        shutil.rmtree(staged, ignore_errors=True)


def _save_as(name: str, formats: Formats, own: Path, target: Path, team: Team) -> None:
    """The folder of an iteration in another format, out of the one in the run's own."""
    plan = _plan(name, open_run(own), formats, run_checkpoint.iteration_of(own))
    with contextlib.ExitStack() as stack:  # after an error, the temporary folder goes
        temporary = Path(team.writer(lambda: str(stack.enter_context(atomic_folder(target)))))
        team.each(lambda: _write_files(plan, temporary, target, team))

        def write_rest() -> None:
            for file, content in plan.texts.items():
                path = temporary / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            for file in (run_checkpoint.STATE_FILE, run_checkpoint.RNG_FILE):
                if name in MEGATRON and (own / file).is_file():
                    shutil.copyfile(own / file, temporary / file)

        team.writer(write_rest)
        team.writer(stack.close)  # synced, and renamed to `target`


def _plan(name: str, model: StoredModel, formats: Formats, iteration: int | None) -> Written:
    """The files of an iteration by their names in its folder; the tracker is left out."""
    with_optimizer = formats.with_optimizer and name in MEGATRON
    plan = written(name, model, replace(formats.target, iteration=iteration), with_optimizer)
    if name == HUGGING_FACE:
        return plan
    prefix = f"{run_checkpoint.iteration_folder(Path(), iteration or 0).name}/"
    files = [replace(file, name=file.name.removeprefix(prefix)) for file in plan.files]
    texts = {file.removeprefix(prefix): text for file, text in plan.texts.items() if file != run_checkpoint.TRACKER}
    return Written(plan.format, files, texts)


def _write_files(plan: Written, temporary: Path, target: Path, team: Team) -> None:
    """This process's share of the files."""
    with disk_errors(target):
        for file in plan.files[team.rank :: team.size]:
            path = temporary / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            file.write(path)


def _settle(name: str, formats: Formats, save: Path, iteration: int) -> None:
    """Name the iteration in the format's tracker, and drop the oldest."""
    root = formats.place(name, save, iteration).parent
    if name != HUGGING_FACE:
        with atomic_write(root / run_checkpoint.TRACKER) as temporary:
            temporary.write_text(str(iteration))
    if formats.keep_last_k is None:
        return
    if name != HUGGING_FACE:
        run_checkpoint.prune(root, formats.keep_last_k, iteration)
        return
    found = {int(path.name.rpartition("_")[2]): path for path in _hf_folders(save)}
    old = sorted(number for number in found if number <= iteration)[: -formats.keep_last_k]
    for number in old:
        if not formats.keeps_hf(number):
            shutil.rmtree(found[number])


def _hf_folders(save: Path) -> Iterator[Path]:
    for path in save.glob(f"{run_checkpoint.EXPORT_FOLDER}_*"):
        if path.name.rpartition("_")[2].isdecimal():
            yield path


def check(formats: Formats, config: ModelConfig) -> None:
    """Refuse, before there is a model, what could not be written: plan every format of it, out of nothing.

    Raises:
        UsageError: degrees that a format does not allow.
    """
    tensors: dict[str, StoredTensor] = {name: _Nothing(name, rule.shape) for name, rule in parameters(config).items()}
    moments = {f"{kind}.{name}": tensor for kind in ("exp_avg", "exp_avg_sq") for name, tensor in tensors.items()}
    state = {"opt_param_scheduler": {"end_wd": 0.0}, "param_groups": [{}]}
    model = StoredModel(OWN, Path(), config, tensors, iteration=0, optimizer=moments, state=state)
    for name in formats.others:
        _plan(name, model, formats, 0)


@dataclass(frozen=True)
class _Nothing:
    """A tensor of which only the form is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    path: Path = Path()

    def read(self, index: Sequence[slice] | None = None) -> Tensor:
        raise NotImplementedError

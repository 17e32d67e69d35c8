"""Where a run's weights, optimizer state and counters come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from tessel.checkpoint import huggingface
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.detect import companion_folder, format_of, open_model
from tessel.checkpoint.stored import StoredModel, degrees_text
from tessel.checkpoint.training import EXPORT_FOLDER
from tessel.checkpoint.weights import WEIGHT_FILES
from tessel.config.run import Checkpoint, ModelShape
from tessel.errors import TesselError
from tessel.model.config import ModelConfig
from tessel.runtime.files import require_path, require_writable
from tessel.runtime.team import Team


class Kind(Enum):
    """What there is to start from."""

    RESUME = "resume"
    RUN = "run"
    HUGGINGFACE = "huggingface"
    FOREIGN = "foreign"
    RANDOM = "random"


@dataclass(frozen=True)
class Source:
    """`folder` holds the weights (none for RANDOM), `model_folder` config.json and tokenizer, if any.

    `stored`: the model of a FOREIGN checkpoint, which need not have a `model_folder`, or of a run that was saved in
    one of Megatron's formats.
    """

    kind: Kind
    folder: Path | None
    iteration: int | None
    model_folder: Path | None
    stored: StoredModel | None = field(default=None, repr=False, compare=False)

    def holds_optimizer(self) -> bool:
        """Whether the checkpoint of a run has the optimizer's state."""
        if self.stored is not None:
            return bool(self.stored.optimizer)
        assert self.folder is not None and self.iteration is not None
        return run_checkpoint.holds_optimizer(self.folder, self.iteration)

    def describe(self) -> str:
        """One line for the log."""
        if self.kind is Kind.RESUME:
            return (
                f"--save {self.folder} holds a checkpoint of this run: going on from iteration {self.iteration} "
                "(--no-resume starts anew)"
            )
        if self.kind is Kind.RUN:
            return f"starting from the run in {self.folder}, iteration {self.iteration}"
        if self.kind is Kind.HUGGINGFACE:
            return f"starting from the Hugging Face weights in {self.folder}"
        if self.kind is Kind.FOREIGN:
            assert self.stored is not None
            words = [degrees_text(self.stored.degrees) or "one rank"]
            words.append("a release" if self.iteration is None else f"iteration {self.iteration}")
            return f"starting from the {self.stored.format} checkpoint in {self.folder}, {', '.join(words)}"
        shape = f"the shape in {self.model_folder}/config.json" if self.model_folder else "the shape flags"
        return f"starting from random weights of {shape}, as asked: there is no --load"


def find_source(checkpoint: Checkpoint, model: ModelShape) -> Source:
    """What the flags and the folders they name say.

    Raises:
        TesselError: --load holds no weights; says what was looked for.
    """
    save = Path(checkpoint.save) if checkpoint.save else None
    if save is not None and not checkpoint.no_resume and run_checkpoint.saved_iterations(save):
        wanted = None if _is_another_run(checkpoint.load, save) else checkpoint.ckpt_step
        return _run(Kind.RESUME, save, wanted)
    if checkpoint.load is None:
        shape_folder = require_path(model.init_from_config, "--init-from-config") if model.init_from_config else None
        return Source(Kind.RANDOM, None, None, shape_folder)
    load = require_path(checkpoint.load, "--load")
    if run_checkpoint.saved_iterations(load):
        return _run(Kind.RUN, load, checkpoint.ckpt_step)
    if (load / "config.json").is_file() and any((load / name).is_file() for name in WEIGHT_FILES):
        return Source(Kind.HUGGINGFACE, load, None, load)
    if format_of(load) not in (None, "torch_dcp"):
        return _foreign(load, checkpoint)
    raise TesselError(_no_weights(load))


def _foreign(load: Path, checkpoint: Checkpoint) -> Source:
    stored = open_model(load, ckpt_step=checkpoint.ckpt_step, hf_dir=checkpoint.hf_dir)
    model_folder = companion_folder(load, ckpt_step=checkpoint.ckpt_step, hf_dir=checkpoint.hf_dir)
    return Source(Kind.FOREIGN, load, stored.iteration, model_folder, stored)


def agreed(source: Source, layout: Mapping[str, Any], team: Team) -> Source:
    """What all processes start from, when each has found `source`: machines may not see the same folders.

    A run that was killed while the nodes moved their trackers goes on from the newer checkpoint, which all
    of them have then. `layout` is what the run writes under that key of run.json.

    Raises:
        TesselError: they see different things, or the nodes' own checkpoints are not of one save; on all.
    """
    found = team.each(lambda: (source.kind.value, str(source.folder), source.iteration))
    if team.shares_storage and len(set(found)) > 1:
        other = next(rank for rank, what in enumerate(found) if what != found[0])
        raise TesselError(
            f"Processes see different things in the same folders: process 0 would start from {_words(found[0])}, "
            f"process {other} from {_words(found[other])}. Give folders that all machines share, or pass "
            "--no-shared-storage."
        )
    runs = [what for what in found if what[0] in (Kind.RESUME.value, Kind.RUN.value)]
    if not runs:
        return source
    kind, folder, iteration = max(runs, key=lambda what: (what[0] == Kind.RESUME.value, what[2] or 0))
    assert iteration is not None
    run_checkpoint.require_one_save(Path(folder), iteration, layout, team)
    return source if source.iteration == iteration else _run(Kind(kind), Path(folder), iteration)


def _words(found: tuple[str, str, int | None]) -> str:
    kind, folder, iteration = found
    if kind == Kind.RANDOM.value:
        return "random weights"
    return folder if iteration is None else f"iteration {iteration} in {folder}"


def _is_another_run(load: str | None, save: Path) -> bool:
    """Whether --ckpt-step is about --load: a run that --save is not."""
    if load is None or not run_checkpoint.saved_iterations(Path(load)):
        return False
    return not Path(load).samefile(save)


def asked_model(source: Source, named: str | None) -> ModelConfig | None:
    """The model that --load or --init-from-config names beside a run that goes on; None where it names none.

    The run goes on whatever they say, so what is not there any more is no error.
    """
    if named is None or source.folder is None:
        return None
    folder = Path(named)
    if run_checkpoint.saved_iterations(folder):
        iteration = run_checkpoint.latest_iteration(folder)
        assert iteration is not None
        folder = run_checkpoint.iteration_folder(folder, iteration) / run_checkpoint.HF_FOLDER
    return ModelConfig.from_folder(folder) if (folder / "config.json").is_file() else None


def check_save(checkpoint: Checkpoint) -> None:
    """Look at --save before work is spent; makes nothing.

    Raises:
        TesselError: it is a file, cannot be written to, or holds what a run would overwrite.
    """
    if checkpoint.save is None:
        return
    save = Path(checkpoint.save)
    require_writable(save, "--save")
    if is_megatron_checkpoint(save):
        raise TesselError(
            f"--save {save} holds a Megatron checkpoint, whose {run_checkpoint.TRACKER} the run would overwrite. "
            "Choose another folder."
        )
    huggingface.require_replaceable(save / EXPORT_FOLDER)


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of Megatron-LM: one iteration of it, or the folder of its run."""
    if not folder.is_dir() or run_checkpoint.saved_iterations(folder):
        return False
    iterations = [folder, *folder.glob("iter_*"), folder / "release"]
    return any((path / "common.pt").is_file() or any(path.glob("mp_rank_*")) for path in iterations)


def _run(kind: Kind, folder: Path, wanted: int | None) -> Source:
    if wanted is None:
        iteration = run_checkpoint.latest_iteration(folder)
        assert iteration is not None
    else:
        iteration = wanted
        saved = run_checkpoint.saved_iterations(folder)
        if iteration not in saved:
            raise TesselError(
                f"--ckpt-step {wanted}: {folder} has no checkpoint of that iteration; "
                f"it has {', '.join(str(i) for i in saved)}."
            )
    path = run_checkpoint.iteration_folder(folder, iteration)
    stored = None if run_checkpoint.is_dcp(path) else open_model(path)
    return Source(kind, folder, iteration, path / run_checkpoint.HF_FOLDER, stored)


def _no_weights(load: Path) -> str:
    looked_for = f"a run ({run_checkpoint.TRACKER} with iter_* folders) or a Hugging Face model (config.json with "
    looked_for += f"{', '.join(WEIGHT_FILES[:-1])} or {WEIGHT_FILES[-1]})"
    message = f"--load {load} holds no weights that can be read: looked for {looked_for}."
    if load.is_file():
        return f"--load {load} is a file. Give the folder that holds it: {load.parent}."
    iterations = run_checkpoint.saved_iterations(load.absolute().parent)
    if run_checkpoint.iteration_of(load.absolute()) in iterations:
        return (
            f"--load {load} is one checkpoint of a run. Give the run with the iteration: --load {load.parent} "
            f"--ckpt-step {run_checkpoint.iteration_of(load.absolute())}."
        )
    if (load / "config.json").is_file():
        return f"{message} For random weights of this config.json, use --init-from-config {load} instead of --load."
    if (load / EXPORT_FOLDER).is_dir():
        return f"{message} {load / EXPORT_FOLDER} is a folder: is it that one?"
    return message

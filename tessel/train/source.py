"""Where a run's weights, optimizer state and counters come from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tessel.checkpoint import training as run_checkpoint
from tessel.config.run import Checkpoint, ModelShape
from tessel.errors import TesselError
from tessel.runtime.files import require_path

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Kind(Enum):
    """What there is to start from."""

    RESUME = "resume"
    RUN = "run"
    HUGGINGFACE = "huggingface"
    RANDOM = "random"


@dataclass(frozen=True)
class Source:
    """`folder` holds the weights (none for RANDOM), `model_folder` config.json and tokenizer, if any."""

    kind: Kind
    folder: Path | None
    iteration: int | None
    model_folder: Path | None

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
        shape = f"the shape in {self.model_folder}/config.json" if self.model_folder else "the shape flags"
        return f"starting from random weights of {shape}, as asked: there is no --load"


def find_source(checkpoint: Checkpoint, model: ModelShape) -> Source:
    """What the flags and the folders they name say.

    Raises:
        TesselError: --load holds no weights; says what was looked for.
    """
    save = Path(checkpoint.save) if checkpoint.save else None
    if save is not None and not checkpoint.no_resume and run_checkpoint.saved_iterations(save):
        wanted = checkpoint.ckpt_step if checkpoint.load is None else None
        return _run(Kind.RESUME, save, wanted)
    if checkpoint.load is None:
        shape_folder = require_path(model.init_from_config, "--init-from-config") if model.init_from_config else None
        return Source(Kind.RANDOM, None, None, shape_folder)
    load = require_path(checkpoint.load, "--load")
    if (load / run_checkpoint.TRACKER).is_file() and run_checkpoint.saved_iterations(load):
        return _run(Kind.RUN, load, checkpoint.ckpt_step)
    if (load / "config.json").is_file() and any((load / name).is_file() for name in WEIGHT_FILES):
        return Source(Kind.HUGGINGFACE, load, None, load)
    raise TesselError(_no_weights(load))


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
    metadata = run_checkpoint.iteration_folder(folder, iteration) / run_checkpoint.HF_FOLDER
    return Source(kind, folder, iteration, metadata)


def _no_weights(load: Path) -> str:
    looked_for = f"a run ({run_checkpoint.TRACKER} with iter_* folders) or a Hugging Face model (config.json with "
    looked_for += f"{', '.join(WEIGHT_FILES[:-1])} or {WEIGHT_FILES[-1]})"
    message = f"--load {load} holds no weights that can be read. Looked for {looked_for}."
    if (load / "config.json").is_file():
        return f"{message} For random weights of this config.json, use --init-from-config {load} instead of --load."
    if (load / "hf").is_dir():
        return f"{message} {load / 'hf'} is a folder: is it that one?"
    return message

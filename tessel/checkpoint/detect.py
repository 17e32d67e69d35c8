"""Which format a folder has, and the model in it."""

from __future__ import annotations

from pathlib import Path

from tessel.checkpoint import huggingface, torch_file
from tessel.checkpoint.legacy import open_legacy
from tessel.checkpoint.mcore import open_torch
from tessel.checkpoint.megatron_folder import RELEASE, TRACKER, companions, find_iteration, iteration_name, rank_folders
from tessel.checkpoint.stored import Format, StoredModel
from tessel.checkpoint.torch_dist import open_torch_dist
from tessel.checkpoint.weights import WEIGHT_FILES
from tessel.errors import TesselError
from tessel.runtime.files import require_path


def format_of(folder: str | Path, ckpt_step: int | None = None) -> Format | None:
    """The format of a folder, by the files that are there; None if it is of none that is known.

    Iterations may be in different ones: it is that of `ckpt_step`, or else of the one that the tracker names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHT_FILES):
        return "hf"
    for path in _iterations(folder, ckpt_step):
        if _is_run(path):
            return "torch_dcp"
        if (path / "metadata.json").is_file() or ((path / ".metadata").is_file() and (path / "common.pt").is_file()):
            return "torch_dist"
        ranks = rank_folders(path)
        if ranks:
            return "legacy" if _has_legacy_names(next(iter(ranks.values()))) else "torch"
    return None


def _iterations(folder: Path, ckpt_step: int | None) -> list[Path]:
    """Where the files of a checkpoint may be: the iteration that is asked for, or that the tracker names, first."""
    named: list[Path] = [] if ckpt_step is None else [folder / iteration_name(ckpt_step)]
    tracker = folder / TRACKER
    if tracker.is_file():
        text = tracker.read_bytes()[:100].decode("ascii", "replace").strip()
        named.append(folder / (iteration_name(int(text)) if text.isdecimal() else RELEASE))
    return [*named, folder, *sorted(folder.glob("iter_*"), reverse=True), folder / RELEASE]


def _is_run(path: Path) -> bool:
    """Whether it is an iteration of a run of tessel's own, in its first format."""
    if not (path / ".metadata").is_file():
        return False
    # DCP comes along, which takes a second to import.
    from tessel.checkpoint import training

    return training.is_dcp(path) and training.iteration_of(path.absolute()) is not None


def _has_legacy_names(rank: Path) -> bool:
    """Whether a rank's weights have the names from before Megatron-core: `language_model` at the top."""
    path = next((path for path in sorted(rank.glob("*.pt")) if path.name.startswith("model_")), None)
    content = None if path is None else torch_file.load(path)
    model = content.get("model", content.get("model0")) if isinstance(content, dict) else None
    return isinstance(model, dict) and "language_model" in model


def open_model(folder: str | Path, *, ckpt_step: int | None = None, hf_dir: str | Path | None = None) -> StoredModel:
    """The model in a folder of any format, none of its tensors read.

    `ckpt_step`: the iteration, instead of the latest. `hf_dir`: a folder with the config.json and tokenizer of
    a checkpoint that has none of its own.

    Raises:
        TesselError: there is none; it says what was looked for. Or what the format's reader refuses.
    """
    folder = require_path(folder, "checkpoint")
    kind = format_of(folder, ckpt_step)
    if kind == "hf":
        if ckpt_step is not None:
            raise TesselError(f"--ckpt-step {ckpt_step}: {folder} is a Hugging Face folder, which has no iterations.")
        return huggingface.open_folder(folder)
    if kind == "torch_dcp":
        from tessel.checkpoint.run_model import open_run

        return open_run(folder, ckpt_step)
    if kind == "torch":
        return open_torch(folder, ckpt_step=ckpt_step, hf_dir=hf_dir)
    if kind == "legacy":
        return open_legacy(folder, ckpt_step=ckpt_step, hf_dir=hf_dir)
    if kind == "torch_dist":
        return open_torch_dist(folder, ckpt_step=ckpt_step, hf_dir=hf_dir)
    raise TesselError(_unknown(folder))


def companion_folder(
    folder: str | Path, *, ckpt_step: int | None = None, hf_dir: str | Path | None = None
) -> Path | None:
    """The folder with the config.json and tokenizer that belong to a Megatron checkpoint; None if there is none."""
    return companions(find_iteration(folder, ckpt_step), hf_dir)


def _unknown(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is a file. Give the folder that holds it: {folder.parent}."
    looked = (
        "a Hugging Face model (config.json with model.safetensors, its index, or the .bin files), a run of tessel "
        "(iter_* with run.json), Megatron's torch format or ModelLink's legacy one (iter_* or release with mp_rank_*), "
        "and torch_dist (iter_* or release with metadata.json and .metadata)"
    )
    names = sorted(entry.name for entry in folder.iterdir())[:5]
    return f"{folder} holds no checkpoint: looked for {looked}. It holds {', '.join(names) or 'nothing'}."

"""`tessel inspect PATH`: what a folder or a dataset is, seen from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tessel.data.readers import format_of
from tessel.data.tokenizer import HuggingFaceTokenizer, has_tokenizer
from tessel.errors import TesselError, UsageError
from tessel.report import checkpoint, model_folder, run_folder
from tessel.report.blend import blend_report
from tessel.report.dataset import Look, dataset_report
from tessel.report.facts import Report, bytes_text
from tessel.report.instructions import instructions_report, is_instructions
from tessel.runtime.files import require_path

if TYPE_CHECKING:
    from tessel.checkpoint.stored import StoredModel
    from tessel.config.verbs import InspectConfig

_MAX_NAMED = 5


def inspect(cfg: InspectConfig) -> None:
    """Print what `cfg.path` is.

    Raises:
        TesselError: nothing is there, it is damaged, or it is of no kind that is known.
    """
    look(cfg).print(cfg.json)


def look(cfg: InspectConfig) -> Report:
    """The report on `cfg.path`."""
    if cfg.stats:
        return blend_report(cfg.path, cfg.num_samples, cfg.seq_length)
    if len(cfg.path) > 1:
        raise UsageError(f"{len(cfg.path)} paths are given: one is looked at, or all as a blend with --stats.")
    name = cfg.path[0]
    path = Path(name)
    if cfg.diff is not None:
        return checkpoint.diff_report(_opened(cfg), _open_model(cfg.diff, None, cfg.hf_dir))
    if path.suffix in (".bin", ".idx") or Path(f"{name}.idx").exists():
        return dataset_report(name, cfg.tokenizer, Look(cfg.documents, cfg.seed, cfg.plot))
    if is_instructions(name):
        return instructions_report(name, cfg.tokenizer)
    require_path(path, "the path to inspect")
    if path.is_file():
        return _file_report(path, cfg.tensors)
    if checkpoint.is_megatron(path):
        return checkpoint.checkpoint_report(_opened(cfg), cfg.tensors)
    if run_folder.is_run(path):
        return run_folder.run_report(path, cfg.tensors, cfg.ckpt_step)
    if model_folder.is_model(path):
        return model_folder.model_report(path, cfg.tensors)
    if has_tokenizer(path):
        return _tokenizer_report(path)
    raise TesselError(f"{path} is nothing that is known here. {_looked_for(path)}")


def _opened(cfg: InspectConfig) -> StoredModel:
    return _open_model(cfg.path[0], cfg.ckpt_step, cfg.hf_dir)


def _open_model(path: str, ckpt_step: int | None, hf_dir: str | None) -> StoredModel:
    # It imports torch, which --help has no need of.
    from tessel.checkpoint.detect import open_model

    return open_model(path, ckpt_step=ckpt_step, hf_dir=hf_dir)


def _file_report(path: Path, list_tensors: bool) -> Report:
    if path.suffix == ".safetensors":
        return model_folder.weights_report(path, list_tensors)
    form = format_of(path)
    if form is not None and form.kind != "json":  # which is more often something else
        num_bytes = path.stat().st_size
        facts = [("size", bytes_text(num_bytes)), ("use", "--data-path takes it as it is, or `tessel preprocess`")]
        return Report(f"{path}: raw text", facts, {"kind": "raw text", "path": str(path), "bytes": num_bytes})
    raise TesselError(
        f"{path} is a file of no kind that is known here. Give a folder, the prefix of a .bin/.idx pair, "
        "a .safetensors file, or raw text (.jsonl, .txt, .parquet, .csv, .arrow)."
    )


def _tokenizer_report(path: Path) -> Report:
    tokenizer = HuggingFaceTokenizer(path)
    data = {
        "kind": "tokenizer",
        "path": str(path),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "pad": tokenizer.pad,
        "identity": tokenizer.identity,
    }
    facts = [
        ("entries", f"{tokenizer.vocab_size:,}"),
        (
            "end of document",
            "none" if tokenizer.eod is None else f"{tokenizer.eod} {tokenizer.decode([tokenizer.eod])}",
        ),
        (
            "padding in training",
            "none" if tokenizer.pad < 0 else f"{tokenizer.pad} {tokenizer.decode([tokenizer.pad])}",
        ),
        ("identity", tokenizer.identity),
    ]
    return Report(f"{path}: a tokenizer, without a model", facts, data)


def _looked_for(folder: Path) -> str:
    looked = (
        "Looked for a Hugging Face model (config.json), a run of tessel (latest_checkpointed_iteration.txt, "
        "metrics.jsonl), a Megatron checkpoint (iter_* or release with mp_rank_*, or with metadata.json and .metadata) "
        "and a tokenizer (tokenizer.json)."
    )
    prefixes = sorted(str(entry.with_suffix("")) for entry in folder.glob("*.idx"))
    folders = sorted(str(entry.parent) for entry in folder.glob("*/config.json"))
    inside = (prefixes + folders)[:_MAX_NAMED]
    return f"{looked} It holds {', '.join(inside)}: is it one of those?" if inside else looked

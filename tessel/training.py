"""What the verbs that train have in common: from a command line to a run, in this process or in several."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tessel.config.megatron import MEGATRON
from tessel.config.parser import Parsed, parse
from tessel.config.run import RunConfig
from tessel.config.show import format_config, mark_changes
from tessel.config.tune import with_defaults
from tessel.config.validate import advice, validate
from tessel.entry import note
from tessel.launch import DEFAULT_PORT, launch, starts_processes
from tessel.mindspore_engine import support
from tessel.mindspore_engine.cluster import scheduler
from tessel.runtime.failure import shown_once
from tessel.runtime.files import require_writable
from tessel.runtime.log import voice
from tessel.runtime.world import World, is_launched

if TYPE_CHECKING:
    from tessel.model.config import ModelConfig
    from tessel.train.source import Source

MINDSPORE = "mindspore"


def train(verb: str, argv: list[str]) -> None:
    """Do `pretrain`, `sft` or `dpo`."""
    world = World.from_environment()
    voice.speak_as(world.rank)
    with shown_once(world):
        parsed = parse(RunConfig, argv, f"tessel {verb}", MEGATRON)
        if verb != "pretrain":
            parsed = _with_defaults(verb, parsed)
        cfg = validate(parsed.value)
        idle = support.check(verb, cfg, parsed.given) if _by_mindspore(cfg) else []
        if not is_launched():
            note(*parsed.notes, *advice(cfg, parsed.given), *idle)
        if parsed.print_config:
            derived = mark_changes(parsed.value, cfg, parsed.provenance, "derived")
            print(format_config(*_with_model(cfg, parsed.given, derived)))
            return
        if cfg.launch.rank_log_dir is not None:
            require_writable(cfg.launch.rank_log_dir, "--rank-log-dir")
        if starts_processes(cfg.launch):
            _check_before_launch(cfg, parsed.given)
            with _beside(cfg):
                raise SystemExit(launch(["-m", "tessel", verb, *argv], cfg.launch))
        voice.speak_as(world.rank, cfg.launch.rank_log_dir)
        _run(cfg, parsed.given)


def _run(cfg: RunConfig, given: frozenset[str]) -> None:
    from tessel.runtime.versions import check_versions

    check_versions()
    if _by_mindspore(cfg):
        from tessel.mindspore_engine import command

        command.pretrain(cfg, given)
    else:
        from tessel.train import pretrain as target

        target.pretrain(cfg, given)


def _by_mindspore(cfg: RunConfig) -> bool:
    return cfg.runtime.ai_framework == MINDSPORE


def _beside(cfg: RunConfig) -> AbstractContextManager[None]:
    """What runs beside the processes that are started."""
    return scheduler(cfg.launch, DEFAULT_PORT) if _by_mindspore(cfg) else nullcontext()


def _with_defaults(verb: str, parsed: Parsed) -> Parsed:
    cfg, taken = with_defaults(verb, parsed.value, parsed.given, _positions(parsed.value.checkpoint.load))
    provenance = parsed.provenance | dict.fromkeys(taken, f"default of {verb}")
    values = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in taken.items())
    note = [f"not given, and taken to be: {values}"] if taken else []
    return replace(parsed, value=cfg, provenance=provenance, notes=(*parsed.notes, *note))


def _positions(folder: str | None) -> int | None:
    """max_position_embeddings of a Hugging Face folder, without opening it for good."""
    try:
        return int(json.loads((Path(folder or "") / "config.json").read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another format, or a folder that will be refused in words later


def _check_before_launch(cfg: RunConfig, given: frozenset[str]) -> None:
    """What the model's folder and the number of processes refuse, said once by this process.

    Several machines are left to the processes: only together can they say which one lacks a folder.
    """
    if cfg.launch.nnodes != "1" or cfg.launch.nproc_per_node is None:
        return
    from tessel.train.checks import check_layout, check_model_of_run

    source, model_config = _model_of(cfg, given)
    check_model_of_run(cfg, source, model_config)
    check_layout(cfg, model_config, cfg.launch.nproc_per_node)
    if _by_mindspore(cfg):
        support.check_model(model_config)


def _with_model(cfg: RunConfig, given: frozenset[str], provenance: dict[str, str]) -> tuple[RunConfig, dict[str, str]]:
    """`cfg` with the shape of its model filled in, and the provenance that says so."""
    source, model_config = _model_of(cfg, given)
    missing = {
        name: value for name, value in model_config.shape_flags().items() if getattr(cfg.model, name) in (None, False)
    }
    shown = replace(cfg, model=replace(cfg.model, **missing))
    return shown, mark_changes(cfg, shown, provenance, "derived" if source.model_folder is None else "model")


def _model_of(cfg: RunConfig, given: frozenset[str]) -> tuple[Source, ModelConfig]:
    """Where the run's weights come from, and the model's shape."""
    from tessel.train.setup import model_config_of
    from tessel.train.source import find_source

    source = find_source(cfg.checkpoint, cfg.model)
    return source, model_config_of(source, cfg.model, given, cfg.tokenizer, cfg.checkpoint.override)

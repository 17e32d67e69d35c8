"""What the verbs have in common: a command line read, checked, shown, and done on one process or several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

from tessel.config.generate_flags import GENERATION
from tessel.config.layout import Launch
from tessel.config.megatron import ForeignFlags
from tessel.config.parser import parse
from tessel.config.run import ModelShape, Tokenizer
from tessel.config.show import format_config, mark_changes
from tessel.config.verbs import Loading
from tessel.launch import launch, starts_processes
from tessel.runtime.failure import shown_once
from tessel.runtime.log import voice
from tessel.runtime.world import World, is_launched

Config = TypeVar("Config")


class UsesModel(Protocol):
    """The sections that every verb that uses a model has."""

    @property
    def loading(self) -> Loading: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def launch(self) -> Launch: ...
    @property
    def model(self) -> ModelShape: ...


Using = TypeVar("Using", bound=UsesModel)


def read(
    cls: type[Config],
    argv: list[str],
    verb: str,
    check: Callable[[Config], Config] | None = None,
    foreign: ForeignFlags | None = None,
) -> Config | None:
    """The checked configuration of a verb; None where it was only to be shown."""
    parsed = parse(cls, argv, f"tessel {verb}", foreign)
    cfg: Config = parsed.value if check is None else check(parsed.value)
    note(*parsed.notes)
    if parsed.print_config:
        print(format_config(cfg, mark_changes(parsed.value, cfg, parsed.provenance, "derived")))
        return None
    return cfg


def use_model(
    cls: type[Using],
    argv: list[str],
    verb: str,
    check: Callable[[Using, frozenset[str]], Using],
    target: Callable[[Using, frozenset[str]], None],
    replicas: bool = False,
) -> None:
    """Do a verb that uses a model, on this process or on several that are started here.

    `check` and `target` get the configuration and the fields that were given. `replicas`: several copies may be used.
    """
    world = World.from_environment()
    voice.speak_as(world.rank)
    with shown_once(world):
        parsed = parse(cls, argv, f"tessel {verb}", GENERATION)
        cfg = check(parsed.value, parsed.given)
        if not is_launched():
            note(*parsed.notes)
        if parsed.print_config:
            print(format_config(cfg, mark_changes(parsed.value, cfg, parsed.provenance, "derived")))
            return
        run = cfg.launch
        if starts_processes(run):
            if run.nnodes == "1" and run.nproc_per_node is not None:
                from tessel.generate.load import check_before_launch

                check_before_launch(cfg.loading, cfg.tokenizer, run.nproc_per_node, cfg.model, parsed.given, replicas)
            raise SystemExit(launch(["-m", "tessel", verb, *argv], run))
        voice.speak_as(world.rank, run.rank_log_dir)
        from tessel.runtime.versions import check_versions

        check_versions()
        target(cfg, parsed.given)


def note(*lines: str) -> None:
    """Remarks on the command line, on stderr: stdout belongs to the verb."""
    for line in lines if voice.is_heard else ():
        print(f"tessel: {line}", file=sys.stderr)

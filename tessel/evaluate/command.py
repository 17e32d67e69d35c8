"""`tessel evaluate`: figures on stdout and in --output, everything else on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from tessel.config.evaluate import EvaluateConfig
from tessel.errors import TesselError
from tessel.evaluate import store
from tessel.evaluate.answers import Writer, choose
from tessel.evaluate.compare import compare, describe, write_comparison
from tessel.evaluate.exam import Item, make_exam
from tessel.evaluate.items import ChoiceItem, Key, Outcome, TextItem
from tessel.evaluate.replica import Replica
from tessel.evaluate.results import suite_table, summarize, table, write_results
from tessel.evaluate.scorer import Scorer
from tessel.generate.load import Opened, open_for_use
from tessel.runtime import watchdog
from tessel.runtime.log import log, progress, voice


def evaluate(cfg: EvaluateConfig, given: frozenset[str] = frozenset()) -> dict[str, Any] | None:
    """Ask the model the questions of a set; returns what results.json holds, None where nothing was asked.

    Raises:
        TesselError, UsageError: no model or questions, damaged files, or an --output of something else.
    """
    results = None
    if cfg.task:
        with open_for_use(
            cfg.loading, cfg.tokenizer, cfg.launch, shape=cfg.model, given=given, replicas=True
        ) as opened:
            if cfg.harness:
                _harness(cfg, opened)
            else:
                results = _evaluated(cfg, opened)
    if cfg.compare is not None and voice.is_heard:
        _compare(cfg.output or "", cfg.compare)
    return results


def _harness(cfg: EvaluateConfig, opened: Opened) -> None:
    try:
        from tessel.evaluate.harness import run_harness
    except ImportError as error:
        raise TesselError(f"--harness needs {error.name}: pip install 'tessel[harness]'.") from error
    for line in opened.notes:
        _say(line)
    run_harness(cfg, opened)


def _compare(output: str, other: str) -> None:
    found = compare(output, other)
    for line in describe(found, output, other):
        log(line)
    write_comparison(Path(output), found, other)


def _evaluated(cfg: EvaluateConfig, opened: Opened) -> dict[str, Any]:
    processes = opened.processes
    replica = Replica.of(opened.topology, processes.world.rank)
    exam = processes.together(lambda: make_exam(cfg, opened.tokenizer))
    keys = [item.key for item in exam.items]
    folder = None if cfg.output is None else Path(cfg.output)
    about = _about(cfg, opened)
    done = processes.together(lambda: {} if folder is None else store.read_done(folder, about, keys))
    processes.meet("the answers of an earlier run are read")
    if folder is not None and voice.is_heard:
        store.write_settings(folder, about)
    for line in (*opened.notes, *exam.notes):
        _say(line)
    if done:
        _say(f"{len(done):,} of {len(keys):,} questions are answered in {folder} already")
    started_s = time.perf_counter()
    work = _Work(cfg, opened, replica)
    left = [item for item in exam.items if item.key not in done]
    outcomes = _answered(work, replica.share(left), folder)
    everything = done | _gathered(outcomes, opened, replica)
    results = summarize([everything[key] for key in keys], exam.categories, about)
    _say(f"{len(left):,} questions in {time.perf_counter() - started_s:.1f} s; {work.describe()}")
    if voice.is_heard:
        _show(results, folder, [everything[key] for key in keys], suite_table if cfg.suite_table else table)
    return results


def _show(
    results: Mapping[str, Any],
    folder: Path | None,
    outcomes: Sequence[Outcome],
    lines: Callable[[Mapping[str, Any]], list[str]],
) -> None:
    if folder is not None:
        store.write_all(folder, outcomes)
        write_results(folder, results)
    for line in lines(results):
        log(line)


def _about(cfg: EvaluateConfig, opened: Opened) -> dict[str, Any]:
    """What must be alike for two runs to share a folder."""
    loading = cfg.loading
    precisions = [name for name in ("bf16", "fp16") if getattr(loading, name)]
    return {
        "task": cfg.task[0],
        "rule": cfg.rule,
        "num_fewshot": cfg.num_fewshot,
        "prompt_type": cfg.prompt_type,
        "max_new_tokens": cfg.max_new_tokens,
        "seed": cfg.seed if cfg.prompt_type is not None else None,
        "data_path": cfg.data_path,
        "load": loading.load,
        "lora_load": loading.lora_load,
        "precision": precisions[0] if precisions else "fp32",
        "tokenizer": opened.tokenizer.identity,
    }


@dataclass
class _Work:
    """Answers questions by the rule of the configuration."""

    cfg: EvaluateConfig
    opened: Opened
    replica: Replica
    scorer: Scorer | None = None
    writer: Writer | None = None

    def outcomes(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Each question's, when it is known."""
        opened, batch_size = self.opened, self.cfg.batch_size
        if self.cfg.rule == "choice":
            self.scorer = Scorer(opened.model, opened.device, batch_size)
            choices = [item for item in items if isinstance(item, ChoiceItem)]
            yield from choose(self.scorer, opened.tokenizer, choices)
        else:
            self.writer = Writer(opened, batch_size, judges=self.replica.speaks)
            yield from self.writer.write([item for item in items if isinstance(item, TextItem)])

    def describe(self) -> str:
        """What was computed, for the user."""
        if self.scorer is not None:
            counts = self.scorer.counts
            words = f"{counts.computed_tokens:,} tokens computed, {counts.saving:.2f} times fewer than the texts have"
            return words + _cut(counts.cut_texts)
        return f"{self.cfg.rule}d texts" + _cut(self.writer.cut_texts if self.writer is not None else 0)


def _cut(number: int) -> str:
    return f"; {number:,} texts are longer than the context and lost their beginning" if number else ""


def _answered(work: _Work, items: Sequence[Item], folder: Path | None) -> list[Outcome]:
    """This replica's outcomes, each written down as soon as it is known."""
    replica, outcomes = work.replica, []
    with (
        progress("answering", len(items)) as bar,
        store.added_rows(folder if replica.speaks else None, replica.number, replica.num_replicas) as file,
    ):
        for outcome in work.outcomes(items):
            outcomes.append(outcome)
            store.add(file, outcome)
            watchdog.goes_on()
            bar.advance(1, f"{sum(o.is_right for o in outcomes) / len(outcomes):.4f}")
    return outcomes


def _gathered(outcomes: Sequence[Outcome], opened: Opened, replica: Replica) -> dict[Key, Outcome]:
    """The outcomes of all replicas, on every process."""
    own = list(outcomes) if replica.speaks else []
    parts: list[list[Outcome] | None] = [own]
    if opened.processes.world.world_size > 1:
        opened.processes.meet("all questions are answered")
        parts = [None] * opened.processes.world.world_size
        distributed.all_gather_object(parts, own, group=opened.processes.control)
    return {outcome.key: outcome for part in parts for outcome in part or ()}


def _say(line: str) -> None:
    if voice.is_heard:
        print(f"tessel: {line}", file=sys.stderr)

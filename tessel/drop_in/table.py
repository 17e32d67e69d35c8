"""The tables of flags, for a terminal and for docs/FLAGS.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tessel.config.verbs import FlagsConfig
from tessel.drop_in.flags import SUITES, Kind, Row, rows

TITLES = {
    "mindspeed": "MindSpeed-LLM",
    "modellink": "ModelLink",
    "pai": "Pai-Megatron-Patch",
    "megatron": "Megatron-LM's pretrain_gpt.py",
}
_INTRODUCTION = """# Flags of other suites

Written by `tessel flags --markdown`; `tessel flags SUITE` prints one of the tables. A flag is

- supported: it does here what it does there;
- alias: what stands in its place is used when a script of the suite is run (`tessel drop-in`, drop_in/) or migrated
  (`tessel migrate`), and by the verb itself where it is only another spelling;
- meaningless: accepted, and the reason is printed once;
- refused: an error that names what to use instead. Nothing is accepted and ignored that changes results.

A script for generating or evaluating may repeat the flags of its training run: they are then without effect.
"""


def show(cfg: FlagsConfig) -> None:
    """Print the table of one suite, or of all.

    Raises:
        UsageError: no such suite.
    """
    suites = SUITES if cfg.suite is None else (cfg.suite,)
    tables = {suite: rows(suite) for suite in suites}
    if cfg.markdown:
        print("\n".join(_markdown(tables)))
        return
    for suite, table in tables.items():
        print(f"{TITLES[suite]}: {_counts(table)}")
        width = max(len(row.flag) for row in table)
        for row in table:
            print(f"  {row.flag:<{width}}  {row.verb:<10}  {row.kind:<11}  {row.text}".rstrip())


def _counts(table: Sequence[Row]) -> str:
    counted = Counter(row.kind for row in table)
    return f"{len(table)} flags, " + ", ".join(f"{counted[kind]} {kind}" for kind in Kind if counted[kind])


def _markdown(tables: dict[str, tuple[Row, ...]]) -> Iterator[str]:
    yield _INTRODUCTION.rstrip()
    for suite, table in tables.items():
        yield f"\n## {TITLES[suite]}\n\n{_counts(table)}.\n"
        yield "| flag | verb | what becomes of it | |\n|---|---|---|---|"
        for row in table:
            yield f"| `{row.flag}` | {row.verb} | {row.kind} | {row.text.replace('|', '/')} |"

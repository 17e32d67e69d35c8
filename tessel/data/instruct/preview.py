"""`tessel preprocess --preview N`: samples as they are trained, with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tessel.config.preprocess_rules import REGISTRY_HANDLER
from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.detect import first_rows, with_handler
from tessel.data.instruct.handlers import instruction_encoder
from tessel.data.instruct.pai import pai_encoder
from tessel.data.instruct.pieces import Pieces
from tessel.data.instruct.registry import data_sets
from tessel.data.instruct.shorten import IGNORED
from tessel.data.tokenizer import load_tokenizer
from tessel.errors import TesselError
from tessel.runtime.log import log

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tessel.config.preprocess import PreprocessConfig

# Markers of trained text where there is no colour.
_OPEN, _CLOSE = "⟦", "⟧"


class Shown(NamedTuple):
    """A sample of the preview: what it is, its ids, and which of them are trained."""

    title: str
    ids: list[int]
    trained: list[bool]


def preview(cfg: PreprocessConfig) -> None:
    """Print the first samples that `cfg` makes; nothing is written.

    Raises:
        UsageError, TesselError: see `load_tokenizer`, `instruction_encoder` and `with_handler`.
    """
    from rich.console import Console

    tokenizer = load_tokenizer(cfg.tokenizer)
    if cfg.handler_name == REGISTRY_HANDLER:
        first = data_sets(cfg)[0]
        log(f"samples of the first data set, {first.name}")
        cfg = first.cfg
    cfg = with_handler(cfg)
    encoder: Any
    if cfg.compatible == "pai-sft":
        encoder, added = pai_encoder(cfg, tokenizer), {}
    else:
        encoder = instruction_encoder(cfg, tokenizer)
        added = encoder.vocabulary.added
    pieces = Pieces(tokenizer, added)
    console = Console(highlight=False, soft_wrap=True)
    limit = cfg.seq_length
    shown = 0
    for sample in samples(cfg, encoder):
        show(sample, pieces, console)
        if limit is not None and len(sample.ids) >= limit:
            log(f"  {len(sample.ids):,} tokens do not fit --seq-length {limit:,}: it is left out, or cut by --pack")
        shown += 1
    if not shown:
        raise TesselError("No row of the input gives a sample; the rows that were read are left out for what is said.")


def samples(cfg: PreprocessConfig, encoder: Any) -> Iterator[Shown]:
    """The first --preview samples of the input; of preferences, both sides. Rows without a sample are said."""
    num_rows = 0
    for row in first_rows(cfg, encoder.columns):
        try:
            encoded = encoder([row], "")
        except RowError as error:
            if cfg.on_error != "skip":
                raise TesselError(f"{' '.join(cfg.input)}, row {row.number}: {error.reason}") from error
            log(f"row {row.number} is left out: {error.reason}")
            continue
        for left_out in getattr(encoder, "left_out", ()):
            log(f"row {row.number}: {left_out.reason}")
        arrays = {key.removeprefix("packed_"): part.tokens for key, part in zip(encoder.outputs, encoded, strict=True)}
        if cfg.compatible == "pai-sft":
            parts = [_record(row.number, record) for record in np.split(*_cuts(encoded[0])) if len(record)]
        else:
            parts = list(_parts(row.number, arrays))
        yield from parts
        num_rows += bool(parts)
        if num_rows == cfg.preview:
            return


def _parts(number: int, arrays: dict[str, np.ndarray]) -> Iterator[Shown]:
    for side in ("", "chosen_", "rejected_"):
        ids = arrays.get(f"{side}input_ids")
        if ids is None or not len(ids):
            continue
        labels = arrays.get(f"{side}labels", np.full(len(ids), IGNORED))
        title = f"row {number}" + (f", {side.removesuffix('_')}" if side else "")
        yield Shown(title, ids.tolist(), (labels != IGNORED).tolist())


def _cuts(part: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all sequences, and where one ends and the next begins."""
    return part.tokens, np.cumsum(part.lengths)[:-1]


def _record(number: int, record: np.ndarray) -> Shown:
    """A record of Pai's: tokens, the last of each dialogue as -1 - id, and labels that are shifted already."""
    tokens, labels = np.split(record, 2)
    end = int(np.flatnonzero(tokens < 0)[-1]) + 1
    trained = np.concatenate([[False], labels[: end - 1] != IGNORED])
    return Shown(f"row {number}", np.where(tokens < 0, -1 - tokens, tokens)[:end].tolist(), trained.tolist())


def show(sample: Shown, pieces: Pieces, console: Console) -> None:
    """Print a sample: a line of counts, then its text, trained tokens green (or in brackets without colour)."""
    from rich.rule import Rule

    num_trained = sum(sample.trained)
    share = num_trained / len(sample.ids)
    colour = console.is_terminal and not console.no_color
    legend = "[green]green[/green]" if colour else f"between {_OPEN} and {_CLOSE}"
    console.print(Rule(f"{sample.title}: {len(sample.ids):,} tokens, {num_trained:,} trained ({share:.0%}), {legend}"))
    console.print(_text(sample, pieces, colour))


def _text(sample: Shown, pieces: Pieces, colour: bool) -> Text:
    from rich.text import Text

    text = Text()
    for run, is_trained in _runs(sample.ids, sample.trained):
        if is_trained and not colour:
            text.append(_OPEN)
        for piece, is_special in pieces.of(run):
            style = "bold " if is_special else ""
            text.append(piece, f"{style}{'green' if is_trained else 'dim'}" if colour else "")
        if is_trained and not colour:
            text.append(_CLOSE)
    return text


def _runs(ids: Sequence[int], trained: Sequence[bool]) -> Iterator[tuple[list[int], bool]]:
    """Ids in runs that are all trained or all not."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or trained[i] != trained[start]:
            yield list(ids[start:i]), trained[start]
            start = i

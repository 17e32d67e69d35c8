"""Rows of instructions to the arrays that are written: what stands between the readers and the writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.converters import Converter, Dropped
from tessel.data.instruct.dialogue import Example, Message
from tessel.data.instruct.render import Rendered, Renderer
from tessel.data.instruct.vocabulary import Vocabulary
from tessel.data.rows import BadRow, Row
from tessel.errors import TesselError


@dataclass(frozen=True)
class Settings:
    """What shapes the written samples.

    Attributes:
        max_tokens: a sample of so many tokens or more is left out (MindSpeed-LLM's rule); None keeps all.
        skips_errors: a row that cannot be used is noted and left out, not an error.
        as_mindspeed: do what MindSpeed-LLM does where tessel would not.
        append_eod: for what no renderer ends.
    """

    max_tokens: int | None = None
    skips_errors: bool = False
    as_mindspeed: bool = False
    append_eod: bool = False


class InstructionEncoder:
    """A `RowEncoder`: rows by `converter` to examples, examples by `renderer` to ids and labels.

    Attributes:
        left_out: rows of the last call that gave no sample, and why; those that were too long excepted.
        num_too_long: samples of the last call that were too long.
    """

    keys: tuple[str, ...] = ("input_ids", "attention_mask", "labels")
    num_answers = 1

    def __init__(
        self, converter: Converter, renderer: Renderer, settings: Settings, additional_keys: tuple[str, ...] = ()
    ) -> None:
        self._converter = converter
        self._renderer = renderer
        self._settings = settings
        self._additional = additional_keys
        self.left_out: list[BadRow] = []
        self.num_too_long = 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """Keys of the datasets, as MindSpeed-LLM names them."""
        return tuple(f"packed_{key}" for key in (*self.keys, *self._additional))

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns read."""
        columns = self._converter.columns
        return None if columns is None else tuple(dict.fromkeys((*columns, *self._additional)))

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as the prompt type makes it; `pad` fills packs."""
        return self._renderer.vocabulary

    def examples(self, rows: Sequence[Row]) -> tuple[list[Row], list[Example]]:
        """The rows that can be used, and what they say; the others are noted in `left_out`.

        Raises:
            RowError: a row cannot be used, and errors are not skipped.
        """
        self.left_out = []
        kept, examples = [], []
        for row in rows:
            try:
                example = self._converter(row.values)
            except TesselError as error:
                self._refuse(row, error)
                continue
            if isinstance(example, Dropped):
                self._leave_out(row, example.reason)
                continue
            kept.append(row)
            examples.append(self._checked(example, row))
        return kept, examples

    def _checked(self, example: Example, row: Row) -> Example:
        """MindSpeed-LLM trains an empty question and answer for what is no single answer to an odd prompt."""
        if self._settings.as_mindspeed and (len(example.prompt) % 2 != 1 or len(example.answers) != self.num_answers):
            self._leave_out(row, "no dialogue: an empty one is written, as MindSpeed-LLM does")
            empty = Message("assistant", "")
            return example._replace(prompt=(Message("user", ""),), answers=(empty,) * self.num_answers)
        return example

    def _refuse(self, row: Row, error: TesselError) -> None:
        if not self._settings.skips_errors:
            raise RowError(row.number, str(error)) from error
        self._leave_out(row, str(error))

    def _leave_out(self, row: Row, reason: str) -> None:
        self.left_out.append(BadRow(row.number, reason))

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """One `Encoded` a key, a document and at most one sequence a sample.

        Raises:
            RowError: a row is not of the format, or cannot be written in the prompt type.
        """
        kept, examples = self.examples(rows)
        rendered = self._render_all(kept, examples)
        return (*self._arrays(rendered), *self._additional_arrays(kept))

    def _render_all(self, rows: list[Row], examples: list[Example]) -> list[Rendered]:
        """All at once; where that fails, row by row, to say which. Rows that fail leave both lists."""
        try:
            return self.render(examples)
        except TesselError:
            pass
        rendered: list[Rendered] = []
        for i in range(len(rows) - 1, -1, -1):
            try:
                rendered[:0] = self.render([examples[i]])
            except TesselError as error:
                self._refuse(rows[i], error)
                del rows[i], examples[i]
        return rendered

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """The samples of `examples`; as many for each of them."""
        return self._renderer.dialogues([example.dialogue() for example in examples])

    def _arrays(self, rendered: list[Rendered]) -> tuple[Encoded, ...]:
        ids, labels = self._columns(rendered)
        mask = Encoded(np.ones(len(ids.tokens), np.int32), ids.lengths, ids.sequences_per_document)
        return ids, mask, labels

    def _columns(self, rendered: Sequence[Rendered], keep: np.ndarray | None = None) -> tuple[Encoded, Encoded]:
        """Ids and labels, a document each; the sequences of those that are too long are left out."""
        lengths = np.fromiter((len(one.ids) for one in rendered), np.int32, len(rendered))
        if keep is None:
            keep = self.fits(lengths)
        self.num_too_long = int((~keep).sum())
        chosen = [one for one, fits in zip(rendered, keep.tolist(), strict=True) if fits]
        counts = keep.astype(np.int32)
        return (
            Encoded(_joined([one.ids for one in chosen]), lengths[keep], counts),
            Encoded(_joined([one.labels for one in chosen]), lengths[keep], counts),
        )

    def fits(self, lengths: np.ndarray) -> np.ndarray:
        """bool: which lengths are short enough."""
        most = self._settings.max_tokens
        return np.ones(len(lengths), bool) if most is None else lengths < most

    def _additional_arrays(self, rows: Sequence[Row]) -> list[Encoded]:
        encoder = self._renderer.vocabulary.encoder
        result = []
        for key in self._additional:
            for row in rows:
                if not isinstance(row.values.get(key), str):
                    raise RowError(row.number, f"--dataset-additional-keys {key}: the row has no text of this name")
            tokens, lengths = encoder.encode_flat([row.values[key] for row in rows])
            result.append(Encoded(tokens, lengths, np.ones(len(lengths), np.int32)))
        return result


class PreferenceEncoder(InstructionEncoder):
    """Pairs of a chosen and a rejected dialogue."""

    keys = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    num_answers = 2

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """Chosen and rejected, one after the other."""
        return self._renderer.preferences(examples)

    def _arrays(self, rendered: list[Rendered]) -> tuple[Encoded, ...]:
        """MindSpeed-LLM leaves out the long one of a pair, and the others no longer match; tessel both."""
        chosen, rejected = rendered[0::2], rendered[1::2]
        keep = None
        if not self._settings.as_mindspeed:
            keep = self._lengths_fit(chosen) & self._lengths_fit(rejected)
        return (*self._columns(chosen, keep), *self._columns(rejected, keep))

    def _lengths_fit(self, rendered: Sequence[Rendered]) -> np.ndarray:
        return self.fits(np.fromiter((len(one.ids) for one in rendered), np.int32, len(rendered)))


class PromptEncoder(InstructionEncoder):
    """Prompts alone, for methods that generate the answers."""

    keys = ("input_ids", "attention_mask")

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """Each prompt up to where the assistant answers."""
        dialogues = [example.dialogue()._replace(messages=example.prompt) for example in examples]
        return [Rendered(ids, ids) for ids in self._renderer.prompts(dialogues)]

    def _arrays(self, rendered: list[Rendered]) -> tuple[Encoded, ...]:
        return super()._arrays(rendered)[:2]


ENCODERS: Mapping[str, Any] = {
    "samples": InstructionEncoder,
    "preferences": PreferenceEncoder,
    "prompts": PromptEncoder,
}
"""Encoders by what they write."""


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int32, copy=False) if arrays else np.zeros(0, np.int32)

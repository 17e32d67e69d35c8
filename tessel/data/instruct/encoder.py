"""Rows of instructions to the arrays that are written: what stands between the readers and the writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.converters import Converter, Dropped
from tessel.data.instruct.dialogue import Example, Message
from tessel.data.instruct.render import SlotRenderer
from tessel.data.instruct.rendering import Rendered, Renderer
from tessel.data.instruct.vocabulary import Vocabulary
from tessel.data.rows import BadRow, Row
from tessel.errors import TesselError

ANSWER_KEY = "labels"
"""The additional key that stands for the answer's text, of no column."""


class InstructionEncoder:
    """A `RowEncoder`: rows by `converter` to examples, examples by `renderer` to ids and labels.

    Attributes:
        left_out: rows of the last call that the rules leave out, and why.
    """

    keys: tuple[str, ...] = ("input_ids", "attention_mask", "labels")
    num_answers = 1

    def __init__(
        self,
        converter: Converter,
        renderer: Renderer,
        additional_keys: tuple[str, ...] = (),
        as_mindspeed: bool = False,
    ) -> None:
        self._converter = converter
        self._renderer = renderer
        self._additional = additional_keys
        self._as_mindspeed = as_mindspeed
        self.left_out: list[BadRow] = []

    @property
    def outputs(self) -> tuple[str, ...]:
        """Keys of the datasets, as MindSpeed-LLM names them."""
        return tuple(f"packed_{key}" for key in (*self.keys, *self._additional))

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns read."""
        columns = self._converter.columns
        added = [key for key in self._additional if key != ANSWER_KEY]
        return None if columns is None else tuple(dict.fromkeys((*columns, *added)))

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as the prompt type makes it; `pad` fills packs."""
        return self._renderer.vocabulary

    def examples(self, rows: Sequence[Row]) -> tuple[list[Row], list[Example]]:
        """The rows that can be used, and what they say; those that are left out are noted in `left_out`.

        Raises:
            RowError: a row is not of the format.
        """
        self.left_out = []
        kept, examples = [], []
        for row in rows:
            try:
                example = self._converter(row.values)
            except TesselError as error:
                raise RowError(row.number, str(error)) from error
            if isinstance(example, Dropped):
                self._leave_out(row, example.reason)
            else:
                kept.append(row)
                examples.append(self._checked(example, row))
        return kept, examples

    def _checked(self, example: Example, row: Row) -> Example:
        """MindSpeed-LLM trains an empty question and answer for what is no single answer to an odd prompt."""
        if self._as_mindspeed and (len(example.prompt) % 2 != 1 or len(example.answers) != self.num_answers):
            self._leave_out(row, "no dialogue: an empty one is written instead, as MindSpeed-LLM does")
            empty = Message("assistant", "")
            return example._replace(prompt=(Message("user", ""),), answers=(empty,) * self.num_answers)
        return example

    def _leave_out(self, row: Row, reason: str) -> None:
        self.left_out.append(BadRow(row.number, reason))

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """One `Encoded` a key, a document and a sequence a sample.

        Raises:
            RowError: a row is not of the format, or cannot be written in the prompt type.
        """
        kept, examples = self.examples(rows)
        return (*self._arrays(self._render_all(kept, examples)), *self._additional_arrays(kept, examples))

    def _render_all(self, rows: Sequence[Row], examples: Sequence[Example]) -> list[Rendered]:
        """All at once; where that fails, row by row, to say which."""
        try:
            return self.render(examples)
        except TesselError:
            for row, example in zip(rows, examples, strict=True):
                try:
                    self.render([example])
                except TesselError as error:
                    raise RowError(row.number, str(error)) from error
            raise

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """The samples of `examples`; as many for each of them."""
        return self._renderer.dialogues([example.dialogue() for example in examples])

    def _arrays(self, rendered: Sequence[Rendered]) -> tuple[Encoded, ...]:
        ids, labels = ids_and_labels(rendered)
        return ids, ids._replace(tokens=np.ones_like(ids.tokens)), labels

    def _additional_arrays(self, rows: Sequence[Row], examples: Sequence[Example]) -> list[Encoded]:
        result = []
        for key in self._additional:
            texts = [self._additional_text(key, *pair) for pair in zip(rows, examples, strict=True)]
            tokens, lengths = self._renderer.vocabulary.encoder.encode_flat(texts)
            result.append(Encoded(tokens, lengths, np.ones(len(lengths), np.int32)))
        return result

    def _additional_text(self, key: str, row: Row, example: Example) -> str:
        """A column's text; under ANSWER_KEY, that of the answer."""
        if key == ANSWER_KEY:
            return example.answers[-1].content
        text = row.values.get(key)
        if not isinstance(text, str):
            raise RowError(row.number, f"--dataset-additional-keys {key}: the row has no text of this name.")
        return text


class PreferenceEncoder(InstructionEncoder):
    """Pairs of a chosen and a rejected dialogue."""

    keys = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    num_answers = 2

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """Chosen and rejected, one after the other."""
        return self._renderer.preferences(examples)

    def _arrays(self, rendered: Sequence[Rendered]) -> tuple[Encoded, ...]:
        return (*ids_and_labels(rendered[0::2]), *ids_and_labels(rendered[1::2]))


class PromptEncoder(InstructionEncoder):
    """Prompts alone, for methods that generate the answers."""

    keys = ("input_ids", "attention_mask")

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """Each prompt up to where the assistant answers."""
        dialogues = [example.dialogue()._replace(messages=example.prompt) for example in examples]
        return [Rendered(ids, ids) for ids in self._renderer.prompts(dialogues)]

    def _arrays(self, rendered: Sequence[Rendered]) -> tuple[Encoded, ...]:
        return super()._arrays(rendered)[:2]


class MindSpeedQuestions(PromptEncoder):
    """As MindSpeed-LLM's handler for PPO: the questions of a dialogue alone, joined. No other columns."""

    with_answers = False

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """What is asked in each dialogue, cut as the whole dialogue is."""
        assert isinstance(self._renderer, SlotRenderer), "what MindSpeed-LLM has is templates of slots"
        dialogues = [example.dialogue() for example in examples]
        return [Rendered(ids, ids) for ids in self._renderer.asked(dialogues, self.with_answers)]


class MindSpeedPrompts(MindSpeedQuestions):
    """As its handlers for R1: everything up to the last answer, whose text is the additional key `labels`."""

    with_answers = True


ENCODERS: Mapping[str, Any] = {
    "samples": InstructionEncoder,
    "preferences": PreferenceEncoder,
    "prompts": PromptEncoder,
    "questions": PromptEncoder,
}
"""Encoders by what they write."""
MINDSPEED_ENCODERS: Mapping[str, Any] = {**ENCODERS, "prompts": MindSpeedPrompts, "questions": MindSpeedQuestions}
"""The same by MindSpeed-LLM's rules."""


def ids_and_labels(rendered: Sequence[Rendered]) -> tuple[Encoded, Encoded]:
    """The ids and the labels of samples, a document each."""
    lengths = np.fromiter((len(one.ids) for one in rendered), np.int32, len(rendered))
    one_each = np.ones(len(rendered), np.int32)
    columns = [one.ids for one in rendered], [one.labels for one in rendered]
    return tuple(Encoded(_joined(column), lengths, one_each) for column in columns)  # type: ignore[return-value]


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int32, copy=False) if arrays else np.zeros(0, np.int32)

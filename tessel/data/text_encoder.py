"""Plain text to ids, by the rules of each suite's tool for pretraining.

Megatron-LM   sequences of no tokens are left out; a document of none keeps its entry in the index
Pai           as Megatron-LM; sequences with an id outside the vocabulary are left out, too
MindSpeed-LLM texts of no characters are left out, and documents of no sequence with them; a
              document may be padded with an id after the vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from tessel.data.encoding import Encoded, RowError
from tessel.data.rows import Row, Text, kind_of, why_no_text
from tessel.data.sentences import SentenceSplitter
from tessel.data.tokenizer import BatchEncoder
from tessel.errors import TesselError

GENERAL = "GeneralPretrainHandler"


@dataclass(frozen=True)
class TextRules:
    """Where the tools differ.

    Attributes:
        by_text: leave out texts of no characters, not sequences of no tokens.
        vocab_size: leave out sequences with an id of at least this; None for none.
        pad_id, multiple: fill a document's last sequence up with `pad_id`, end of document counted, to the next
            multiple that it is shorter than (one that is a multiple already gets as many again); 1 for none.
    """

    by_text: bool = False
    vocab_size: int | None = None
    pad_id: int = 0
    multiple: int = 1


@dataclass(frozen=True)
class TextEncoder:
    """A `RowEncoder` of the columns `keys`, a dataset each. `eod` None appends nothing.

    `handler` is one of HANDLERS: how a row becomes text.
    """

    encode_batch: BatchEncoder
    keys: tuple[str, ...]
    eod: int | None
    rules: TextRules = TextRules()
    handler: str = GENERAL
    splitter: SentenceSplitter | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """A dataset a key."""
        return self.keys

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that the handler reads."""
        return _COLUMNS.get(self.handler, None if self.handler == _SHAREGPT else self.keys)

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """See `RowEncoder`."""
        return tuple(self._encode_key(rows, key) for key in self.keys)

    def _encode_key(self, rows: Sequence[Row], key: str) -> Encoded:
        sentences = [self._sentences(row, key) for row in rows]
        counts = np.fromiter(map(len, sentences), np.int32, len(sentences))
        tokens, lengths = self._encode(rows, sentences)
        keeps = self._keeps(tokens, lengths)
        if not keeps.all():
            documents = np.repeat(np.arange(len(counts)), counts)
            counts = np.bincount(documents[keeps], minlength=len(counts)).astype(np.int32)
            tokens, lengths = tokens[np.repeat(keeps, lengths)], lengths[keeps]
        tokens, lengths = self._end_documents(tokens, lengths, counts)
        return Encoded(tokens, lengths, counts)

    def _sentences(self, row: Row, key: str) -> list[str]:
        text = HANDLERS[self.handler](row, key)
        sentences = text if isinstance(text, list) else [text]
        if self.splitter is not None:
            sentences = [part for sentence in sentences for part in self.splitter(sentence)]
        return [sentence for sentence in sentences if sentence] if self.rules.by_text else sentences

    def _encode(self, rows: Sequence[Row], sentences: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self.encode_batch.encode_flat(list(chain.from_iterable(sentences)))
        except TesselError:
            # The tokenizer does not know of rows: find the one it refuses.
            for row, own in zip(rows, sentences, strict=True):
                try:
                    self.encode_batch.encode_flat(own)
                except TesselError as error:
                    raise RowError(row.number, str(error)) from error
            raise

    def _keeps(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which sequences stay: bool[S]."""
        keeps = np.ones(len(lengths), bool) if self.rules.by_text else lengths > 0
        if self.rules.vocab_size is not None and len(tokens) and int(tokens.max()) >= self.rules.vocab_size:
            sequences = np.repeat(np.arange(len(lengths)), lengths)
            keeps = keeps & (np.bincount(sequences[tokens >= self.rules.vocab_size], minlength=len(lengths)) == 0)
        return keeps

    def _end_documents(
        self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Padding and end of document after the last sequence of each document that has any."""
        multiple = self.rules.multiple
        if self.eod is None and multiple == 1:
            return tokens, lengths
        last = np.cumsum(counts, dtype=np.int64)[counts > 0] - 1
        ends = np.cumsum(lengths, dtype=np.int64)[last]
        num_eods = int(self.eod is not None)
        num_added = np.full(len(last), num_eods)
        if multiple > 1:
            num_added = (lengths[last] // multiple + 1) * multiple - lengths[last]
        added = np.full(int(num_added.sum()), self.rules.pad_id, np.int32)
        if self.eod is not None:
            added[np.cumsum(num_added) - 1] = self.eod
        lengths = lengths.copy()
        lengths[last] += num_added.astype(np.int32)
        return np.insert(tokens, np.repeat(ends, num_added), added), lengths


def _general(row: Row, key: str) -> Text:
    if reason := why_no_text(row.values, key):
        raise RowError(row.number, reason)
    text: Text = row.values[key]
    return text


def _alpaca(row: Row, key: str) -> Text:
    """The one text of MindSpeed-LLM's AlpacaPretrainHandler, down to the word "None" where there is no input."""
    instruction, given, output = (row.values.get(name) for name in ("instruction", "input", "output"))
    inputs = f" Input:\n{given}" if given else None
    return _checked(
        row,
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n###{inputs}\n\n### Response: ASSISTANT: {output}",
    )


def _sharegpt(row: Row, key: str) -> Text:
    """All turns of a dialogue without anything between, as MindSpeed-LLM's SharegptPretrainHandler.

    It finds them under the key alone; here also where such dialogues usually have them.
    """
    named = [name for name in (key, "conversations", "messages") if name in row.values]
    turns = row.values[named[0]] if named else None
    if not isinstance(turns, list):
        raise RowError(row.number, f"{key!r} is {kind_of(turns)}, where a list of turns is expected.")
    return _checked(row, "".join(_said(row, turn) for turn in turns))


def _said(row: Row, turn: Any) -> str:
    said = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
    if not isinstance(said, str):
        raise RowError(row.number, 'a turn has no text as its "value" or "content". Mend the row or leave it out.')
    return said


def _questions(row: Row, key: str) -> Text:
    """The text that MindSpeed-LLM's StackOverflowPythonPretrainHandler makes of a question and its answer."""
    missing = [name for name in _COLUMNS[_STACK_OVERFLOW] if name not in row.values]
    if missing:
        raise RowError(row.number, f"the object has no key {missing[0]!r}, which {_STACK_OVERFLOW} reads.")
    title, question, answer = (row.values[name] for name in _COLUMNS[_STACK_OVERFLOW])
    return _checked(row, f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n")


def _checked(row: Row, text: str) -> str:
    if reason := why_no_text({"text": text}, "text"):
        raise RowError(row.number, reason)
    return text


_SHAREGPT = "SharegptPretrainHandler"
_STACK_OVERFLOW = "StackOverflowPythonPretrainHandler"
_COLUMNS = {
    "AlpacaPretrainHandler": ("instruction", "input", "output"),
    _STACK_OVERFLOW: ("title", "question_body", "answer_body"),
}
HANDLERS: dict[str, Callable[[Row, str], Text]] = {
    GENERAL: _general,
    "AlpacaPretrainHandler": _alpaca,
    _SHAREGPT: _sharegpt,
    _STACK_OVERFLOW: _questions,
}
"""MindSpeed-LLM's handlers of plain text, by name: a row and a key to its text."""

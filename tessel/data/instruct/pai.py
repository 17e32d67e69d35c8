"""Pai-Megatron-Patch's records of dialogues: L tokens, and then their L labels, which are shifted already.

As its build_idxmap_sft_dataset.py has it: one question and one answer by the tokenizer's chat template; the last
token of a dialogue is stored as -1 - id; the role that begins the answer is trained, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessel.config.preprocess import PreprocessConfig
from tessel.data.encoding import Encoded, RowError
from tessel.data.finishing import KeepAll, Parts
from tessel.data.instruct.shorten import IGNORED
from tessel.data.instruct.vocabulary import hf_of, plain_vocabulary
from tessel.data.rows import BadRow, Row, kind_of
from tessel.data.tokenizer import BatchEncoder, Tokenizer
from tessel.errors import TesselError, UsageError

DEFAULT_SEQ_LENGTH = 2048
COLUMNS = ("instruction", "input", "output")
_QWEN = ("Qwen2Tokenizer", "Qwen3Tokenizer")
_QWEN_PAD = "<|extra_0|>"
_OTHER_PADS = {
    "LLamaTokenizer": "<unk>",
    "LLama2Tokenizer": "<unk>",
    "LLama3Tokenizer": "<|finetune_right_pad_id|>",
}


def pai_encoder(cfg: PreprocessConfig, tokenizer: Tokenizer) -> PaiEncoder:
    """The encoder that the flags ask for.

    With --sequence-packing a sequence is one dialogue, 2n numbers, for `PackRecords` to join.

    Raises:
        UsageError: the tokenizer has no chat template, or is not one of Hugging Face.
    """
    longest = cfg.seq_length or DEFAULT_SEQ_LENGTH
    return chat_encoder(tokenizer, longest, cfg.patch_tokenizer_type, cfg.sequence_packing, cfg.json_keys[0])


def chat_encoder(
    tokenizer: Tokenizer, seq_length: int, kind: str | None = None, unpacked: bool = False, output: str = "text"
) -> PaiEncoder:
    """The encoder of dialogues of up to `seq_length` tokens; `kind` is that of the tokenizer in Pai-Megatron-Patch.

    Raises:
        UsageError: the tokenizer has no chat template, or is not one of Hugging Face.
    """
    hf = hf_of(tokenizer)
    kind = kind or _kind_of(hf)
    if not hf.chat_template and kind not in _QWEN:
        raise UsageError(
            f"The tokenizer {tokenizer.source} has no chat template, which Pai-Megatron-Patch writes dialogues with. "
            "Give the tokenizer of an instruct model."
        )
    return PaiEncoder(hf, plain_vocabulary(tokenizer).encoder, seq_length, pad_id_of(hf, kind), unpacked, output)


def pad_id_of(hf: Any, kind: str) -> int:
    """The token that fills records, by the kind of tokenizer in Pai-Megatron-Patch.

    Qwen's get a token of their own, with the id after all others where it is new; Llama's that lack one take
    what the tool names for them.
    """
    name = hf.pad_token
    if kind in _QWEN:
        name = _QWEN_PAD
    elif name is None:
        name = _OTHER_PADS.get(kind, hf.eos_token)
    known = hf.get_vocab()
    return int(known[name]) if name in known else len(hf)


def _kind_of(hf: Any) -> str:
    """The kind of a tokenizer for which none is named."""
    name = type(hf).__name__.removesuffix("Fast")
    return name if name in _QWEN else ""


@dataclass(frozen=True)
class _Dialogue:
    """Tokens i32[n] with the last one negative, and labels i32[n], which are shifted."""

    tokens: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class PaiEncoder:
    """A `RowEncoder`: an object is a record, and a list of objects is a pack made by hand, of one record or more.

    A question as long as a record is left out; so is what it answers. Longer answers are cut.
    """

    def __init__(
        self, hf: Any, encoder: BatchEncoder, seq_length: int, pad_id: int, unpacked: bool, output: str = "text"
    ) -> None:
        self._hf = hf
        self._encoder = encoder
        self.seq_length = seq_length
        self.pad_id = pad_id
        self._unpacked = unpacked
        self._output = output
        self.left_out: list[BadRow] = []

    @property
    def outputs(self) -> tuple[str, ...]:
        """One dataset."""
        return (self._output,)

    @property
    def columns(self) -> tuple[str, ...] | None:
        """All: a row may be a list."""
        return None

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """Records, each a sequence and a document of 2 x seq_length numbers; see `pai_encoder` for others.

        Raises:
            RowError: a row is no dialogue.
        """
        groups = [self._texts(row) for row in rows]
        encoded = iter(self.encode([pair for group in groups for pair in group]))
        self.left_out = []
        records: list[np.ndarray] = []
        for row, group in zip(rows, groups, strict=True):
            packer = PackRecords(self.seq_length, self.pad_id)
            for ids in [next(encoded) for _ in group]:
                dialogue = self._dialogue(row, *ids)
                if dialogue is None:
                    self.left_out.append(BadRow(row.number, f"the question has {self.seq_length} tokens or more"))
                elif self._unpacked:
                    records.append(np.concatenate((dialogue.tokens, dialogue.labels)))
                else:
                    records += packer.take(dialogue.tokens, dialogue.labels)
            records += packer.rest()
        return (encoded_records(records),)

    def _texts(self, row: Row) -> list[tuple[str, str]]:
        """The question, and question and answer, of each dialogue of a row, as the chat template writes them."""
        members = row.values.get("", row.values)
        texts = []
        for member in members if isinstance(members, list) else [members]:
            if not isinstance(member, dict):
                raise RowError(row.number, f"a pack holds objects, and here is {kind_of(member)}.")
            for column in COLUMNS:
                if not isinstance(member.get(column), str):
                    what = kind_of(member[column]) if column in member else "missing"
                    raise RowError(row.number, f"{column!r} is {what}, where text is expected.")
            texts.append(self.texts(row, member["instruction"] + member["input"], member["output"]))
        return texts

    def texts(self, row: Row, question: str, answer: str) -> tuple[str, str]:
        """The question, and question and answer, as the chat template writes them.

        Raises:
            RowError: it refuses them.
        """
        try:
            return self._written(question), self._written(question, answer)
        except TesselError as error:
            raise RowError(row.number, str(error)) from error

    def _written(self, question: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        if not self._hf.chat_template:  # what the tool gives to Qwen's tokenizers without one
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
            return "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
        try:
            text: str = self._hf.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # A template may raise anything, in words meant for the user.
            raise TesselError(f"the chat template refuses the dialogue: {error}") from error
        return text

    def encode(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids of each question, and of question and answer."""
        tokens, lengths = self._encoder.encode_flat([text for pair in pairs for text in pair])
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        for i in range(0, len(ends), 2):
            yield tokens[starts[i] : ends[i]], tokens[starts[i + 1] : ends[i + 1]]

    def check_prefix(self, row: Row, question: np.ndarray, whole: np.ndarray) -> None:
        """Question and answer begin with the question.

        Raises:
            RowError: they don't.
        """
        if not np.array_equal(whole[: len(question)], question):
            raise RowError(
                row.number, "the chat template writes the question otherwise when an answer follows; use another one."
            )

    def _dialogue(self, row: Row, question: np.ndarray, whole: np.ndarray) -> _Dialogue | None:
        """What is stored of one dialogue; None where the question fills a record."""
        if len(question) >= self.seq_length:
            return None
        self.check_prefix(row, question, whole)
        tokens = whole[: self.seq_length].astype(np.int32)
        labels = np.full(len(tokens), IGNORED, np.int32)
        labels[len(question) - 1 : -1] = tokens[len(question) :]
        tokens[-1] = -1 - tokens[-1]
        return _Dialogue(tokens, labels)


class PackRecords(KeepAll):
    """Joins dialogues into records, in their order: a dialogue that does not fit begins the next one."""

    def __init__(self, seq_length: int, pad_id: int) -> None:
        self._seq_length = seq_length
        self._pad_id = pad_id
        self._tokens: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._num_tokens = 0
        self.num_long = 0

    def take(self, tokens: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
        """The record that is full before this dialogue, if it is; i32[2 x seq_length] each."""
        full = self.rest() if self._num_tokens + len(tokens) > self._seq_length else []
        self._tokens.append(tokens)
        self._labels.append(labels)
        self._num_tokens += len(tokens)
        return full

    def rest(self) -> list[np.ndarray]:
        """The record in progress, if it holds anything."""
        if not self._num_tokens:
            return []
        record = np.full(2 * self._seq_length, IGNORED, np.int32)
        record[: self._seq_length] = self._pad_id
        record[: self._num_tokens] = np.concatenate(self._tokens)
        record[self._seq_length : self._seq_length + self._num_tokens] = np.concatenate(self._labels)
        self._tokens, self._labels, self._num_tokens = [], [], 0
        return [record]

    def add(self, parts: Parts) -> Iterator[Parts]:
        """See `KeepAll`: the sequences of `parts` are dialogues of 2n numbers."""
        (part,) = parts
        ends = np.cumsum(part.lengths, dtype=np.int64).tolist()
        records: list[np.ndarray] = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            middle = (start + end) // 2
            records += self.take(part.tokens[start:middle], part.tokens[middle:end])
        yield (encoded_records(records),)

    def end(self) -> Iterator[Parts]:
        """See `KeepAll`."""
        yield (encoded_records(self.rest()),)


def encoded_records(records: Sequence[np.ndarray]) -> Encoded:
    """Records as they are written: each a sequence and a document."""
    tokens = np.concatenate(records) if records else np.zeros(0, np.int32)
    lengths = np.array([len(record) for record in records], np.int32)
    return Encoded(tokens, lengths, np.ones(len(records), np.int32))

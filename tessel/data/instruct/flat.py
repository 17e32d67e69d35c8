"""Handlers that write a row as one text: MindSpeed-LLM's older ones, which know no prompt type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.encoder import Settings
from tessel.data.instruct.shorten import IGNORED
from tessel.data.instruct.vocabulary import Vocabulary
from tessel.data.rows import BadRow, Row
from tessel.data.tokenizer import BatchEncoder
from tessel.errors import TesselError

_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "USER: Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)


class FlatText(NamedTuple):
    """A row to one text of pretraining, and the columns it is made of."""

    text: Callable[[Mapping[str, Any]], str]
    columns: tuple[str, ...]


def _alpaca_text(values: Mapping[str, Any]) -> str:
    """MindSpeed-LLM's AlpacaPretrainHandler, with the word None where there is no input."""
    given = values.get("input")
    part = f" Input:\n{given}" if given else None
    instruction, answer = values.get("instruction"), values.get("output")
    return f"{_CHAT}### Instruction:\n{instruction}\n\n###{part}\n\n### Response: ASSISTANT: {answer}"


def _sharegpt_text(values: Mapping[str, Any]) -> str:
    """What all turns say, one after another."""
    messages = values.get("conversations", values.get("messages"))
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise TesselError("there is no list of messages under 'conversations' or 'messages'")
    said = [message.get("value", message.get("content")) for message in messages]
    if not all(isinstance(text, str) for text in said):
        raise TesselError("a message holds text under neither 'value' nor 'content'")
    return "".join(said)


FLAT_TEXTS = {
    "AlpacaPretrainHandler": FlatText(_alpaca_text, ("instruction", "input", "output")),
    "SharegptPretrainHandler": FlatText(_sharegpt_text, ("conversations", "messages")),
}


class FlatEncoder:
    """A `RowEncoder` of texts made from rows, under the key `text`."""

    outputs = ("text",)

    def __init__(self, flat: FlatText, encoder: BatchEncoder, settings: Mapping[str, Any]) -> None:
        self.columns: tuple[str, ...] | None = flat.columns
        self._flat = flat
        self._encoder = encoder
        self._max_tokens, self._eod = settings["max_tokens"], settings["eod"]

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """A document a row; what has no token is left out whole, what is too long keeps its entry."""
        texts = []
        for row in rows:
            try:
                texts.append(self._flat.text(row.values))
            except TesselError as error:
                raise RowError(row.number, str(error)) from error
        ids = [sequence for sequence in self._encoder(texts) if sequence]
        if self._eod is not None:
            ids = [[*sequence, self._eod] for sequence in ids]
        kept = [len(sequence) < self._max_tokens if self._max_tokens is not None else True for sequence in ids]
        chosen = [sequence for sequence, keep in zip(ids, kept, strict=True) if keep]
        lengths = np.fromiter(map(len, chosen), np.int32, len(chosen))
        tokens = np.fromiter((i for sequence in chosen for i in sequence), np.int32, int(lengths.sum()))
        return (Encoded(tokens, lengths, np.array(kept, np.int32)),)


class PlainPrompt(NamedTuple):
    """How an older handler writes a row: its messages are (is it the user?, text), the last of them the answer."""

    messages: Callable[[Mapping[str, Any]], list[tuple[bool, str]]]
    columns: tuple[str, ...]


_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. "
    "Please note that you need to think through your response logically and step by step."
)
_USER, _ASSISTANT = "### Instruction:", "### Response:"


def _one_turn(values: Mapping[str, Any]) -> list[tuple[bool, str]]:
    return [
        (True, f"{_required(values, 'instruction')}\n{_required(values, 'input')}"),
        (False, _required(values, "output")),
    ]


def _belle(values: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """A dialogue in one text: "Human:...Assistant:...Human:...Assistant:", and the last answer apart."""
    messages = []
    for turn in _required(values, "instruction").split("Human:"):
        if turn:
            question, *answers = turn.split("Assistant:")
            if answers:
                messages += [(True, question.strip()), (False, answers[0].strip())]
            else:
                messages.append((False, question.strip()))
    if not messages:
        raise TesselError("the instruction holds no turn: Human: and Assistant: must mark them")
    return [*messages[:-1], (False, _required(values, "output").strip())]


def _required(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise TesselError(f"{name!r} must be text; the row has {', '.join(map(repr, values)) or 'nothing'}")
    return value


PLAIN_PROMPTS = {
    "GeneralInstructionHandler": PlainPrompt(_one_turn, ("instruction", "input", "output")),
    "BelleMultiTurnInstructionHandler": PlainPrompt(_belle, ("instruction", "output")),
}


class PlainPromptEncoder:
    """A `RowEncoder` of dialogues tokenized as one text, with Alpaca's headings; the last answer is trained."""

    outputs = ("packed_input_ids", "packed_attention_mask", "packed_labels")

    def __init__(self, plain: PlainPrompt, encoder: BatchEncoder, settings: Settings, vocabulary: Vocabulary) -> None:
        self.columns: tuple[str, ...] | None = plain.columns
        self.vocabulary = vocabulary
        self.left_out: list[BadRow] = []
        self._plain = plain
        self._encoder = encoder
        self._settings = settings

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """One `Encoded` a key, a document and at most one sequence a row."""
        self.left_out = []
        wholes, prompts = [], []
        for row in rows:
            try:
                whole = _written(self._plain.messages(row.values))
            except TesselError as error:
                if not self._settings.skips_errors:
                    raise RowError(row.number, str(error)) from error
                self.left_out.append(BadRow(row.number, str(error)))
                continue
            wholes.append(whole)
            prompts.append(whole.rsplit(_ASSISTANT, maxsplit=1)[0] + _ASSISTANT + "\n")
        ids = self._encoder([*wholes, *prompts])
        end = [self.vocabulary.eod] if self._settings.append_eod and self.vocabulary.eod is not None else []
        samples = [[*sequence, *end] for sequence in ids[: len(wholes)]]
        labels = []
        for sample, prompt in zip(samples, ids[len(wholes) :], strict=True):
            # As many as the prompt has alone: its last token may differ from the one in the whole text.
            labels.append([IGNORED] * len(prompt) + sample[len(prompt) :])
        most = self._settings.max_tokens
        kept = [most is None or len(sample) < most for sample in samples]
        count = np.array(kept, np.int32)
        return tuple(
            Encoded(*_flat([one for one, keep in zip(column, kept, strict=True) if keep]), count)
            for column in (samples, [[1] * len(sample) for sample in samples], labels)
        )


def _written(messages: Sequence[tuple[bool, str]]) -> str:
    lines = ["", _SYSTEM]
    for is_user, text in messages:
        lines += [_USER if is_user else _ASSISTANT, text]
    return "\n".join(lines) + "\n"


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    return np.fromiter((i for one in sequences for i in one), np.int32, int(lengths.sum())), lengths

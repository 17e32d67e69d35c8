"""Handlers that write a dialogue as one text: MindSpeed-LLM's older ones, which know no prompt type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.shorten import IGNORED
from tessel.data.instruct.vocabulary import Vocabulary
from tessel.data.rows import Row
from tessel.data.tokenizer import BatchEncoder
from tessel.errors import TesselError


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


def _leetcode(values: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """A problem, up to where its code begins; answered by the code and its explanation."""
    problem = _required(values, "code_with_problem").split("```", maxsplit=1)[0].strip()
    answer = f"{_required(values, 'code_only')}\n{_required(values, 'explanation_only')}"
    return [(True, problem), (False, answer)]


def _required(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise TesselError(f"{name!r} must be text; the row has {', '.join(map(repr, values)) or 'nothing'}")
    return value


PLAIN_PROMPTS = {
    "GeneralInstructionHandler": PlainPrompt(_one_turn, ("instruction", "input", "output")),
    "BelleMultiTurnInstructionHandler": PlainPrompt(_belle, ("instruction", "output")),
    "LeetcodePythonInstructionHandler": PlainPrompt(_leetcode, ("code_with_problem", "code_only", "explanation_only")),
}


class PlainPromptEncoder:
    """A `RowEncoder` of dialogues tokenized as one text, with Alpaca's headings; the last answer is trained."""

    outputs = ("packed_input_ids", "packed_attention_mask", "packed_labels")

    def __init__(self, plain: PlainPrompt, encoder: BatchEncoder, append_eod: bool, vocabulary: Vocabulary) -> None:
        self.columns: tuple[str, ...] | None = plain.columns
        self.vocabulary = vocabulary
        self._plain = plain
        self._encoder = encoder
        self._append_eod = append_eod

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """One `Encoded` a key, a document and a sequence a row."""
        wholes, prompts = [], []
        for row in rows:
            try:
                whole = _written(self._plain.messages(row.values))
            except TesselError as error:
                raise RowError(row.number, str(error)) from error
            wholes.append(whole)
            prompts.append(whole.rsplit(_ASSISTANT, maxsplit=1)[0] + _ASSISTANT + "\n")
        ids = self._encoder([*wholes, *prompts])
        end = [self.vocabulary.eod] if self._append_eod and self.vocabulary.eod is not None else []
        samples = [[*sequence, *end] for sequence in ids[: len(wholes)]]
        # As many as the prompt has alone: its last token may differ from the one in the whole text.
        num_untrained = [len(prompt) for prompt in ids[len(wholes) :]]
        tokens, lengths = _flat(samples)
        labels, _ = _flat([[IGNORED] * n + sample[n:] for sample, n in zip(samples, num_untrained, strict=True)])
        one_each = np.ones(len(samples), np.int32)
        return tuple(Encoded(column, lengths, one_each) for column in (tokens, np.ones_like(tokens), labels))


def _written(messages: Sequence[tuple[bool, str]]) -> str:
    lines = ["", _SYSTEM]
    for is_user, text in messages:
        lines += [_USER if is_user else _ASSISTANT, text]
    return "\n".join(lines) + "\n"


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    return np.fromiter((i for one in sequences for i in one), np.int32, int(lengths.sum())), lengths

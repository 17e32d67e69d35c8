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
    """How an older handler writes a row: its messages are (is it the user?, text), the last of them the answer.

    `every_answer`: each answer, with all before it, is a sample; --append-eod is not heeded.
    """

    messages: Callable[[Mapping[str, Any]], list[tuple[bool, str]]]
    columns: tuple[str, ...]
    every_answer: bool = False


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


def _moss(values: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """MOSS's turns, without the marks in which they stand."""
    turns = values.get("chat")
    if not isinstance(turns, Mapping):
        raise TesselError(f"'chat' must hold turns; the row has {', '.join(map(repr, values)) or 'nothing'}")
    messages = []
    for turn in filter(None, turns.values()):
        if not isinstance(turn, Mapping):
            raise TesselError("a turn of 'chat' must be a mapping with 'Human' and 'MOSS'")
        question = _required(turn, "Human").replace("<eoh>", "").replace("<|Human|>: ", "")
        answer = _required(turn, "MOSS").replace("<|MOSS|>:", "").replace("<eom>", "")
        messages += [(True, question.strip()), (False, answer.strip())]
    if not messages:
        raise TesselError("'chat' holds no turn")
    return messages


def _required(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise TesselError(f"{name!r} must be text; the row has {', '.join(map(repr, values)) or 'nothing'}")
    return value


PLAIN_PROMPTS = {
    "GeneralInstructionHandler": PlainPrompt(_one_turn, ("instruction", "input", "output")),
    "BelleMultiTurnInstructionHandler": PlainPrompt(_belle, ("instruction", "output")),
    "LeetcodePythonInstructionHandler": PlainPrompt(_leetcode, ("code_with_problem", "code_only", "explanation_only")),
    "MOSSInstructionHandler": PlainPrompt(_moss, ("chat",), every_answer=True),
}
MOSS_TURNS = "MOSSMultiTurnHandler"
"""The handler of `MossTurnsEncoder`."""
# How Baichuan's vocabulary begins what the user and what the assistant says.
_MOSS_USER, _MOSS_ASSISTANT = 195, 196


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
        every_answer = self._plain.every_answer
        wholes, num_samples = [], []
        for row in rows:
            messages = _messages(self._plain.messages, row)
            ends = range(2, len(messages) + 1, 2) if every_answer else [len(messages)]
            wholes += [_written(messages[:end]) for end in ends]
            num_samples.append(len(ends))
        prompts = [whole.rsplit(_ASSISTANT, maxsplit=1)[0] + _ASSISTANT + "\n" for whole in wholes]
        ids = self._encoder([*wholes, *prompts])
        eod = self.vocabulary.eod
        end = [eod] if self._append_eod and not every_answer and eod is not None else []
        samples = [[*sequence, *end] for sequence in ids[: len(wholes)]]
        # As many as the prompt has alone: its last token may differ from the one in the whole text.
        num_untrained = [len(prompt) for prompt in ids[len(wholes) :]]
        labels = [[IGNORED] * n + sample[n:] for sample, n in zip(samples, num_untrained, strict=True)]
        return _encoded(samples, labels, num_samples)


class MossTurnsEncoder:
    """A `RowEncoder` of MOSS's dialogues for Baichuan: a token begins what each says, and all answers are trained.

    What ends an answer is trained where the next question begins; --append-eod is not heeded.
    """

    outputs = PlainPromptEncoder.outputs

    def __init__(self, encoder: BatchEncoder, vocabulary: Vocabulary) -> None:
        self.columns: tuple[str, ...] | None = ("chat",)
        self.vocabulary = vocabulary
        self._encoder = encoder
        if vocabulary.eos is None:
            raise TesselError(f"{MOSS_TURNS} trains the end of sequence, which the tokenizer does not have.")
        self._end = [vocabulary.eos]

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """One `Encoded` a key, a document and a sequence a row."""
        dialogues = [_messages(_moss, row) for row in rows]
        ids = iter(self._encoder([text for messages in dialogues for _, text in messages]))
        samples: list[list[int]] = []
        labels: list[list[int]] = []
        for messages in dialogues:
            sample: list[int] = []
            trained: list[int] = []
            for is_user, _ in messages:
                said = next(ids)
                sample += [_MOSS_USER if is_user else _MOSS_ASSISTANT, *said]
                trained += [*self._end, *[IGNORED] * len(said)] if is_user else [IGNORED, *said]
            samples.append(sample + self._end)
            labels.append(trained + self._end)
        return _encoded(samples, labels, [1] * len(rows))


def _messages(messages: Callable[[Mapping[str, Any]], list[tuple[bool, str]]], row: Row) -> list[tuple[bool, str]]:
    try:
        return messages(row.values)
    except TesselError as error:
        raise RowError(row.number, str(error)) from error


def _encoded(
    samples: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], num_samples: Sequence[int]
) -> tuple[Encoded, ...]:
    """Ids, mask and labels of samples, so many a document."""
    tokens, lengths = _flat(samples)
    columns = (tokens, np.ones_like(tokens), _flat(labels)[0])
    return tuple(Encoded(column, lengths, np.array(num_samples, np.int32)) for column in columns)


def _written(messages: Sequence[tuple[bool, str]]) -> str:
    lines = ["", _SYSTEM]
    for is_user, text in messages:
        lines += [_USER if is_user else _ASSISTANT, text]
    return "\n".join(lines) + "\n"


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    return np.fromiter((i for one in sequences for i in one), np.int32, int(lengths.sum())), lengths

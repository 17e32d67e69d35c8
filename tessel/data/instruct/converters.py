"""Rows of the usual formats to examples: a prompt, its answers, system text and tools.

What a row lacks or has wrong raises `TesselError` with a reason that names neither file nor row;
who knows them adds them. `Dropped` is a row that the rules leave out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tessel.data.instruct.dialogue import ANSWERING, ASKING, ASSISTANT, FUNCTION, OBSERVATION, USER, Example, Message
from tessel.data.instruct.mapping import AlpacaColumns, MessageColumns
from tessel.errors import TesselError

_SHOWN = 300


class Dropped(NamedTuple):
    """A row that is left out, and why."""

    reason: str


class Converter(Protocol):
    """Values of a row to an example. Can be pickled. `columns` are those it reads; None for all."""

    @property
    def columns(self) -> tuple[str, ...] | None: ...

    def __call__(self, values: Mapping[str, Any]) -> Example | Dropped:
        """Raises TesselError: the row is not of this format."""


@dataclass(frozen=True)
class AlpacaConverter:
    """Rows of instruction, input and output, with history and system text where columns of them are named.

    `as_mindspeed`: what MindSpeed-LLM leaves out or takes as it is, is not an error.
    """

    names: AlpacaColumns = AlpacaColumns()
    pairwise: bool = False
    as_mindspeed: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns read."""
        names = self.names
        answers = (names.chosen, names.rejected) if self.pairwise else (names.response,)
        every = (names.prompt, names.query, *answers, names.history, names.system, names.tools)
        return tuple(name for name in every if name is not None)

    def __call__(self, values: Mapping[str, Any]) -> Example | Dropped:
        """The user says prompt and query, a line each, whatever is not empty; pairs of `history` come before."""
        names = self.names
        prompt = list(self._history(values))
        parts = [_text(values, name) for name in (names.prompt, names.query) if name is not None]
        if names.prompt is not None and names.prompt not in values:
            raise _missing(names.prompt, values)
        question = "\n".join(part for part in parts if part)
        prompt.append(Message(USER, question))
        answers = self._answers(values)
        if not self.as_mindspeed and not question:
            return Dropped("the prompt is empty")
        if not answers:
            return Dropped("there is no answer")
        if not self.as_mindspeed and not all(answers):
            return Dropped("the answer is empty")
        system = _text(values, names.system) if names.system is not None else ""
        tools = _tools(values, names.tools, self.as_mindspeed)
        return Example(tuple(prompt), tuple(Message(ASSISTANT, answer) for answer in answers), system, tools)

    def _history(self, values: Mapping[str, Any]) -> list[Message]:
        name = self.names.history
        pairs = values.get(name) if name is not None else None
        if not pairs:
            return []
        if isinstance(pairs, str):
            pairs = _json(pairs, str(name))
        messages = []
        for pair in pairs if isinstance(pairs, Sequence) else [None]:
            if pair is None or not _is_pair(pair):
                raise TesselError(f"{name} must be a list of [question, answer] pairs, not {_shown(pairs)}")
            messages += [Message(USER, pair[0]), Message(ASSISTANT, pair[1])]
        return messages

    def _answers(self, values: Mapping[str, Any]) -> list[str]:
        names = self.names
        if self.pairwise:
            return self._ranked(values)
        if names.response is None:
            return []
        if names.response not in values:
            raise _missing(names.response, values)
        value = values[names.response]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            if len(value) > 1 and not self.as_mindspeed:
                raise TesselError(f"{names.response} holds {len(value)} answers; a sample has one")
            return list(value)
        if self.as_mindspeed and value is None:
            return []
        return [_text(values, names.response, required=True)]

    def _ranked(self, values: Mapping[str, Any]) -> list[str]:
        """Of lists, the first chosen and the second rejected one, as MindSpeed-LLM takes them."""
        answers = []
        for position, name in enumerate((self.names.chosen, self.names.rejected)):
            if name is None or name not in values:
                raise _missing(name or "chosen", values)
            value = values[name]
            if isinstance(value, list) and len(value) > position and isinstance(value[position], str):
                answers.append(value[position])
            else:
                answers.append(_text(values, name, required=True))
        return answers


@dataclass(frozen=True)
class MessagesConverter:
    """Rows of messages: ShareGPT's, or OpenAI's where `free_order` is true.

    ShareGPT's take turns, asking first; a message of the system before them is the system text.
    `as_mindspeed` leaves out, instead of refusing, what does not take turns. `has_calls`: of OpenAI's, calls of
    functions and thoughts apart from the answer are read, too.
    """

    names: MessageColumns = MessageColumns()
    pairwise: bool = False
    as_mindspeed: bool = False
    free_order: bool = False
    has_calls: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns read."""
        names = self.names
        ranked = (names.chosen, names.rejected) if self.pairwise else ()
        return tuple(name for name in (names.messages, names.system, names.tools, *ranked) if name is not None)

    def __call__(self, values: Mapping[str, Any]) -> Example | Dropped:
        """The last message is the answer; in preferences, `chosen` and `rejected` are."""
        names = self.names
        raw = messages_of(values, names.messages)
        system = _text(values, names.system) if names.system is not None else ""
        if raw and names.tags.system_tag is not None and raw[0].get(names.tags.role_tag) == names.tags.system_tag:
            system, raw = _said(raw[0], names.tags.content_tag), raw[1:]
        messages = [self._message(message) for message in raw]
        answers = [self._ranked(values, str(name)) for name in (names.chosen, names.rejected)] if self.pairwise else []
        problem = self._order_problem(messages, answers)
        if problem is not None:
            if self.as_mindspeed:
                return Dropped(problem)
            raise TesselError(f"{problem}: {_shown(raw)}")
        prompt, answers = (messages, answers) if self.pairwise else (messages[:-1], messages[-1:])
        if not self.as_mindspeed and not all(answer.content or answer.thought for answer in answers):
            return Dropped("the answer is empty")
        return Example(tuple(prompt), tuple(answers), system, _tools(values, names.tools, self.as_mindspeed))

    def _message(self, raw: Mapping[str, Any]) -> Message:
        tags = self.names.tags
        role_of = {
            tags.user_tag: USER,
            tags.assistant_tag: ASSISTANT,
            tags.observation_tag: OBSERVATION,
            tags.function_tag: FUNCTION,
        }
        role = role_of.get(raw.get(tags.role_tag), f"?{raw.get(tags.role_tag)}")
        content = _said(raw, tags.content_tag)
        if not self.free_order or not self.has_calls:
            return Message(role, content)
        thought = raw.get("reasoning_content")
        if raw.get("tool_calls"):
            calls = [call.get("function", call) if isinstance(call, Mapping) else call for call in raw["tool_calls"]]
            return Message(FUNCTION, json.dumps([_with_parsed_arguments(c) for c in calls]), thought or "", content)
        return Message(role, content, thought or "")

    def _ranked(self, values: Mapping[str, Any], name: str) -> Message:
        if name not in values:
            raise _missing(name, values)
        value = values[name]
        return self._message(value) if isinstance(value, Mapping) else Message(ASSISTANT, _text(values, name))

    def _order_problem(self, messages: Sequence[Message], answers: Sequence[Message]) -> str | None:
        """Why these messages are no dialogue; None if they are one."""
        roles = [message.role.removeprefix("?") for message in messages]
        if not messages:
            return "there is no message"
        for i, message in enumerate(messages):
            allowed = (ASKING + ANSWERING) if self.free_order else (ANSWERING if i % 2 else ASKING)
            if message.role not in allowed:
                return f"message {i + 1} is of {roles[i]!r}, which has no turn there (roles: {', '.join(roles)})"
        if messages[0].role not in ASKING:
            return f"the first message is of {roles[0]!r}, and a question must be first"
        if messages[-1].role in (ASKING if not answers else ANSWERING):
            return f"the last message is of {roles[-1]!r}, and {'a question' if answers else 'an answer'} must be last"
        if any(answer.role not in ANSWERING for answer in answers):
            return "a chosen or rejected message is no answer"
        return None


def messages_of(values: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """The messages of a row, a list or JSON of one.

    Raises:
        TesselError: there are none, or they are something else.
    """
    if name not in values:
        raise _missing(name, values)
    raw = values[name]
    if isinstance(raw, str):
        raw = _json(raw, name)
    if not isinstance(raw, Sequence) or not all(isinstance(message, Mapping) for message in raw):
        raise TesselError(f"{name} must be a list of messages, not {_shown(raw)}")
    return raw


def _with_parsed_arguments(call: Any) -> Any:
    """A call of OpenAI's, whose arguments are JSON in a text."""
    if isinstance(call, Mapping) and isinstance(call.get("arguments"), str):
        return {**call, "arguments": _json(call["arguments"], "arguments")}
    return call


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(item, str) for item in pair)


def _text(values: Mapping[str, Any], name: str, required: bool = False) -> str:
    """A column's text; a column that is missing or null is empty, unless it is `required`."""
    value = values.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise TesselError(f"{name} must be text, not {_shown(value)}")
    return value


def _said(message: Mapping[str, Any], key: str) -> str:
    content = message.get(key)
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise TesselError(f"a message must hold text under {key!r}: {_shown(message)}")
    return content


def _tools(values: Mapping[str, Any], name: str | None, as_mindspeed: bool) -> str:
    """JSON of the tools. A text of an empty list is none, but MindSpeed-LLM writes an empty system text for it."""
    value = values.get(name) if name is not None else None
    if not value or (value == "[]" and not as_mindspeed):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TesselError(f"{name} is neither a list nor JSON ({error})") from error


def _missing(name: str, values: Mapping[str, Any]) -> TesselError:
    return TesselError(
        f"there is no {name!r}; the row has {', '.join(map(repr, values)) or 'nothing'} (--map-keys names the columns)"
    )


def _shown(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

"""Messages to pieces: texts that are tokenized alone, and ids that stand for themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tessel.data.instruct.dialogue import (
    ANSWERING,
    ASKING,
    ASSISTANT,
    FUNCTION,
    OBSERVATION,
    USER,
    Dialogue,
    Message,
)
from tessel.data.instruct.templates import LLAMA2, MODERN, REASONING, Slot, Special, Template, Token
from tessel.data.instruct.tools import TOOL_FORMATS
from tessel.data.instruct.vocabulary import Vocabulary
from tessel.errors import TesselError

Piece = str | int
"""A text, or an id."""

_FIELD = re.compile(r"\{\{(\w+)\}\}")


class Layout:
    """Lays out dialogues by one template; ids are those of one vocabulary. Can be pickled."""

    def __init__(self, template: Template, vocabulary: Vocabulary) -> None:
        self.template = template
        self._slots = {
            role: _Slots(getattr(template, role), vocabulary)
            for role in ("system", USER, ASSISTANT, FUNCTION, OBSERVATION, "separator", "prefix")
        }
        self._calls_whole = any(isinstance(slot, str) and "{{content}}" in slot for slot in template.function)

    def messages(self, dialogue: Dialogue) -> list[list[Piece]]:
        """The pieces of each message, with what comes before it.

        Raises:
            TesselError: tools or a function call are not what they should be.
        """
        return [self._message(i, message, dialogue) for i, message in enumerate(dialogue.messages)]

    def _message(self, i: int, message: Message, dialogue: Dialogue) -> list[Piece]:
        """By LLaMA-Factory's Template._encode: prefix and system text first, a separator before later questions."""
        template = self.template
        pieces: list[Piece] = []
        content = message.content
        if i == 0:
            pieces += self._slots["prefix"].fill()
            system = self._system_text(dialogue)
            if system or dialogue.tools:
                if template.kind == LLAMA2:
                    content = _joined(self._slots["system"].fill(content=system)) + content
                else:
                    pieces += self._slots["system"].fill(content=system)
        elif i % 2 == 0 and template.kind not in (MODERN, REASONING):
            pieces += self._slots["separator"].fill()
        if message.thought:
            before, after = template.thought_words
            thought = f"{before}{message.thought}{after}"
            content = thought + content
            message = message._replace(said=thought + message.said)
        if message.role == FUNCTION:
            return pieces + self._function(message)
        return pieces + self._slots[message.role].fill(content=content, idx=str(i // 2))

    def _system_text(self, dialogue: Dialogue) -> str:
        system = dialogue.system or self.template.default_system
        if not dialogue.tools:
            return system
        tools = TOOL_FORMATS[self.template.tools]
        functions = tools.functions(dialogue.tools)
        return system + tools.announce(functions) if functions else system

    def _function(self, message: Message) -> list[Piece]:
        tools = TOOL_FORMATS[self.template.tools]
        calls = tools.calls(message.content)
        slots = self._slots[FUNCTION]
        if self._calls_whole:
            written = tools.write(calls)
            return slots.fill(content=f"{message.said}\n{written}" if message.said else written)
        if message.said:
            raise TesselError(
                f"an answer speaks and calls functions at once, which the prompt type {self.template.name} cannot write"
            )
        return [piece for call in calls for piece in slots.fill(name=call.name, arguments=call.arguments)]


class _Slots:
    """The slots of a role, cut at their placeholders, so that filling them is joining texts."""

    def __init__(self, slots: Sequence[Slot], vocabulary: Vocabulary) -> None:
        self._parts: list[list[str] | int] = []
        for slot in slots:
            part = _part(slot, vocabulary)
            if part is not None:
                self._parts.append(part)

    def fill(self, **values: str) -> list[Piece]:
        """The pieces with the placeholders' values; empty texts left out."""
        pieces: list[Piece] = []
        for part in self._parts:
            if isinstance(part, int):
                pieces.append(part)
            elif len(part) == 1:
                pieces.append(part[0])
            # Every second one is the name of a placeholder.
            elif text := _filled(part, values):
                pieces.append(text)
        return pieces


def _filled(part: list[str], values: dict[str, str]) -> str:
    if len(part) == 3:
        return part[0] + values[part[1]] + part[2]
    return "".join(values[word] if j % 2 else word for j, word in enumerate(part))


def _part(slot: Slot, vocabulary: Vocabulary) -> list[str] | int | None:
    if isinstance(slot, Token):
        return vocabulary.tokens[slot.name]
    if isinstance(slot, Special):
        return vocabulary.eos if slot.name == "eos" else vocabulary.bos
    return _FIELD.split(slot) if slot else None


def _joined(pieces: Sequence[Piece]) -> str:
    if not all(isinstance(piece, str) for piece in pieces):
        raise TesselError("the system text of kind llama2 must be text alone")
    return "".join(str(piece) for piece in pieces)


def without_thoughts(dialogue: Dialogue, template: Template, answers: Sequence[int]) -> Dialogue:
    """The dialogue without the thoughts of these messages, by LLaMA-Factory's remove_thought."""
    before, after = map(re.escape, template.thought_words)
    thought = re.compile(f"{before}(.*?){after}", re.DOTALL)
    messages = list(dialogue.messages)
    for i in answers:
        content = thought.sub("", messages[i].content).lstrip("\n")
        messages[i] = messages[i]._replace(content=content, thought="")
    return dialogue._replace(messages=tuple(messages))


def has_thought(message: Message, template: Template, exactly: bool = False) -> bool:
    """Whether an answer holds one of the thought words; `exactly`, with the blanks around it."""
    if message.thought:
        return True
    return any((word if exactly else word.strip()) in message.content for word in template.thought_words)


def check_turns(dialogue: Dialogue, asks: bool = False) -> None:
    """A template of slots writes turns: a question, an answer, and so on; last an answer, or a question if it `asks`.

    Raises:
        TesselError: the messages are otherwise; shows the roles.
    """
    roles = [message.role for message in dialogue.messages]
    for i, role in enumerate(roles):
        if role not in (ANSWERING if i % 2 else ASKING):
            due = "an answer" if i % 2 else "a question"
            raise TesselError(
                f"message {i + 1} is of {role!r}, where {due} is due (roles: {', '.join(roles)}); "
                "--prompt-type hf may know how to write it"
            )
    if len(roles) % 2 != int(asks):
        raise TesselError(f"{'a question' if asks else 'an answer'} must be last (roles: {', '.join(roles)})")

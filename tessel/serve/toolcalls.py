"""Calls of functions in what a model writes, in the form of Qwen and Hermes.

<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call>
"""

from __future__ import annotations

import json
from typing import NamedTuple

from tessel.data.instruct.tools import Call, parse_calls
from tessel.errors import TesselError
from tessel.generate.text import TaggedText

BEGIN, END = "<tool_call>", "</tool_call>"


class Said(NamedTuple):
    """A piece of an answer: text, and the calls that are whole now."""

    text: str
    calls: tuple[Call, ...] = ()


class ToolCalls:
    """Takes calls out of a text that grows. What only looks like a call stays text; space around calls goes."""

    def __init__(self) -> None:
        self._tagged = TaggedText(BEGIN, END)
        self._call: list[str] = []
        self._space = ""
        self._is_after_call = False
        self.num_calls = 0

    def push(self, text: str) -> Said:
        """What is certain now and was not before."""
        return self._take(self._tagged.push(text))

    def finish(self) -> Said:
        """The rest; a last call may lack its closing tag."""
        said = self._take(self._tagged.finish())
        if self._tagged.is_inside:
            last = self._closed(is_whole=False)
            said = Said(said.text + last.text, said.calls + last.calls)
        return said if self._is_after_call else Said(said.text + self._space, said.calls)

    def _take(self, pieces: list[tuple[bool, str]]) -> Said:
        text = ""
        calls: tuple[Call, ...] = ()
        for is_inside, piece in pieces:
            if is_inside:
                self._call.append(piece)
                continue
            if self._call:
                closed = self._closed()
                text, calls = text + closed.text, calls + closed.calls
            text += self._said(piece)
        if self._call and not self._tagged.is_inside:
            closed = self._closed()
            text, calls = text + closed.text, calls + closed.calls
        return Said(text, calls)

    def _said(self, piece: str) -> str:
        """Text without the space that may stand before a call, or that stands after one."""
        whole = self._space + piece
        if self._is_after_call:
            whole = whole.lstrip()
        said = whole.rstrip()
        self._space = whole[len(said) :]
        if said:
            self._is_after_call = False
        return said

    def _closed(self, is_whole: bool = True) -> Said:
        written, self._call = "".join(self._call), []
        try:
            calls = tuple(_with_object(call) for call in parse_calls(written))
        except TesselError:
            said = self._space + BEGIN + written + (END if is_whole else "")
            self._space = ""
            return Said(said)
        self._space, self._is_after_call = "", True
        self.num_calls += len(calls)
        return Said("", calls)


def _with_object(call: Call) -> Call:
    """Some models write the arguments as a text that holds JSON."""
    arguments = json.loads(call.arguments)
    return call._replace(arguments=arguments) if isinstance(arguments, str) else call

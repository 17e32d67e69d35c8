"""What a row of instructions says, whatever its format: messages, system text, tools."""

from __future__ import annotations

from typing import NamedTuple

SYSTEM = "system"
USER = "user"
ASSISTANT = "assistant"
FUNCTION = "function"
"""The assistant calls functions; the content is JSON: {"name", "arguments"}, or a list of these."""
OBSERVATION = "observation"
"""What a function answered."""

ASKING = (USER, OBSERVATION)
ANSWERING = (ASSISTANT, FUNCTION)


class Message(NamedTuple):
    """One turn.

    `thought` is what a reasoning model thinks before its answer, `said` what it says before it calls functions.
    """

    role: str
    content: str
    thought: str = ""
    said: str = ""


class Dialogue(NamedTuple):
    """Messages that alternate between asking and answering, asking first.

    `system` is "" where the row has none, and `tools` JSON, a list of functions, or "".
    """

    messages: tuple[Message, ...]
    system: str = ""
    tools: str = ""


class Example(NamedTuple):
    """What a converter makes of a row: a prompt and its answer; for preferences the chosen and the rejected one."""

    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    system: str = ""
    tools: str = ""

    def dialogue(self, answer: int = 0) -> Dialogue:
        """The prompt with one of the answers."""
        return Dialogue((*self.prompt, self.answers[answer]), self.system, self.tools)

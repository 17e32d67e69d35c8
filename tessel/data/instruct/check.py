"""A prompt type against the tokenizer's chat template: do they write the same ids?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tessel.data.instruct.chat import ChatRenderer
from tessel.data.instruct.dialogue import ASSISTANT, FUNCTION, OBSERVATION, USER, Dialogue, Message
from tessel.data.instruct.pieces import Pieces
from tessel.data.instruct.rendering import Renderer
from tessel.errors import TesselError

_TOOLS = (
    '[{"name": "get_weather", "description": "Weather of a place", "parameters": {"type": "object", "properties": '
    '{"place": {"type": "string", "description": "Name of the place"}}, "required": ["place"]}}]'
)
_CALL = '{"name": "get_weather", "arguments": {"place": "Paris"}}'
_ASK = (Message(USER, "What is 2 + 2?"), Message(ASSISTANT, "It is 4."))
_AGAIN = (Message(USER, "And 3 + 3?"), Message(ASSISTANT, "It is 6."))

DIALOGUES: dict[str, Dialogue] = {
    "single": Dialogue(_ASK),
    "system": Dialogue(_ASK, "You are brief."),
    "turns": Dialogue(_ASK + _AGAIN),
    "prompt": Dialogue((*_ASK, _AGAIN[0])),
    "tools": Dialogue(
        (
            Message(USER, "How is the weather in Paris?"),
            Message(FUNCTION, _CALL),
            Message(OBSERVATION, '{"sky": "clear"}'),
            Message(ASSISTANT, "It is clear."),
        ),
        "",
        _TOOLS,
    ),
    "thinking": Dialogue((_ASK[0], Message(ASSISTANT, "It is 4.", "2 and 2 make 4."))),
}
"""What is compared, by name. `prompt` ends with a question: up to where the assistant answers."""

SAME = "same"
END = "end"
DIFFERS = "differs"
NONE = "-"
"""One of the two cannot write the dialogue."""

_BEFORE, _AFTER = 6, 8


@dataclass(frozen=True)
class Comparison:
    """One dialogue in both ways. `ours` and `theirs` are ids; `first` is the first place where they differ.

    `status` is END where one of them merely goes on after the other has ended: what follows the last answer is
    never asked of the model.
    """

    name: str
    status: str
    ours: tuple[int, ...] = ()
    theirs: tuple[int, ...] = ()
    first: int = 0
    reason: str = ""


def compare(renderer: Renderer, chat: ChatRenderer) -> list[Comparison]:
    """Each of DIALOGUES by the prompt type and by the chat template."""
    return [_compare(name, dialogue, renderer, chat) for name, dialogue in DIALOGUES.items()]


def _compare(name: str, dialogue: Dialogue, renderer: Renderer, chat: ChatRenderer) -> Comparison:
    asks = len(dialogue.messages) % 2 == 1
    sides: list[tuple[int, ...]] = []
    for what, side in (("the prompt type", renderer), ("the chat template", chat)):
        try:
            ids = side.prompts([dialogue])[0] if asks else side.dialogues([dialogue])[0].ids
        except TesselError as error:
            return Comparison(name, NONE, reason=f"{what} cannot write it: {error}")
        sides.append(tuple(ids.tolist()))
    ours, theirs = sides
    first = next((i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b), None)
    if first is None:
        return Comparison(name, SAME, ours, theirs, len(ours))
    is_end = first == min(len(ours), len(theirs)) and not asks
    return Comparison(name, END if is_end else DIFFERS, ours, theirs, first)


def difference(comparison: Comparison, ours: Pieces, theirs: Pieces) -> list[str]:
    """The tokens around the first difference, a line each: place, that of the prompt type, that of the template."""
    first = comparison.first
    start = max(first - _BEFORE, 0)
    stop = min(max(len(comparison.ours), len(comparison.theirs)), first + _AFTER)
    rows = [
        (i, _piece(comparison.ours, i, ours), _piece(comparison.theirs, i, theirs)) for i in range(start, stop)
    ]  # fmt: skip
    width = max([len("prompt type"), *(len(row[1]) for row in rows)])
    lines = [f"{'token':>8}  {'prompt type':<{width}}  chat template"]
    for i, own, other in rows:
        mark = "  <- first difference" if i == first else ""
        lines.append(f"{i:>8}  {own:<{width}}  {other}{mark}")
    return lines


def _piece(ids: Sequence[int], i: int, pieces: Pieces) -> str:
    return pieces.one(ids[i]) if i < len(ids) else "(end)"

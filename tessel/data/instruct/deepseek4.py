"""DeepSeek-V4's format of dialogues, by MindSpeed-LLM's DeepSeek4Template: no template of slots can say it.

What is said before an answer is one text, tokenized whole, and so is the answer. What functions gave is part
of the user's message. Thoughts before the last question are left out, unless the dialogue has tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from tessel.data.instruct.dialogue import ANSWERING, FUNCTION, OBSERVATION, Dialogue, Message
from tessel.data.instruct.rendering import RenderOptions
from tessel.data.instruct.tools import Call, parse_calls
from tessel.errors import TesselError

_BEGIN, _END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_MARK = "｜DSML｜"
_WRITTEN_THOUGHT = re.compile(r"^\s*<think>\s*(.*?)\s*</think>\s*", re.DOTALL)

_MOST_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_TOOLS = (
    "\n\n## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. "
    f'You can invoke tools by writing a "<{_MARK}tool_calls>" block like the following:\n\n'
    f"<{_MARK}tool_calls>\n"
    f'<{_MARK}invoke name="$TOOL_NAME">\n'
    f'<{_MARK}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{_MARK}parameter>\n'
    "...\n"
    f"</{_MARK}invoke>\n"
    f'<{_MARK}invoke name="$TOOL_NAME2">\n'
    "...\n"
    f"</{_MARK}invoke>\n"
    f"</{_MARK}tool_calls>\n\n"
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, '
    'arrays, objects), pass the value in JSON format and set `string="false"`.\n\n'
    f"If thinking_mode is enabled (triggered by {_THOUGHT}), you MUST output your complete reasoning inside "
    f"{_THOUGHT}...{_THOUGHT_END} BEFORE any tool calls or final response.\n\n"
    f"Otherwise, output directly after {_THOUGHT_END} with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n{schemas}\n\n"
    "You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)


class _Part(NamedTuple):
    """A message as it is written: an answer, or what is asked, with what functions gave."""

    is_answer: bool
    text: str
    thought: str = ""


def turns(dialogue: Dialogue, options: RenderOptions) -> list[tuple[list[str], list[str]]]:
    """What is asked and what is answered in each turn.

    Raises:
        TesselError: two answers follow one another, or tools or calls are not what they should be.
    """
    parts = _parts(dialogue.messages)
    texts = _written(dialogue, parts, options, _drops_all(dialogue, options))
    result: list[tuple[list[str], list[str]]] = []
    source = texts[0]
    for part, text in zip(parts, texts[1:], strict=True):
        if not part.is_answer:
            source += text
            continue
        if not source:
            raise TesselError("two answers follow one another, which the prompt type deepseek4 cannot write")
        result.append(([source], [text]))
        source = ""
    return result


def last_turn(dialogue: Dialogue, options: RenderOptions) -> list[tuple[list[str], list[str]]]:
    """The last answer, and all that is before it, as one turn.

    Raises:
        TesselError: see `turns`.
    """
    parts = _parts(dialogue.messages)
    if _drops_all(dialogue, options):
        last = _last_question(parts)
        parts = [part._replace(thought="") if part.is_answer and i < last else part for i, part in enumerate(parts)]
    *before, answer = _written(dialogue, parts, options, options.drop_thinking)
    return [(["".join(before)], [answer])]


def prompt(dialogue: Dialogue, options: RenderOptions) -> list[str]:
    """A dialogue that ends with a question, up to where the assistant answers."""
    parts = _parts(dialogue.messages)
    drop = _drops_all(dialogue, options)
    return ["".join(_written(dialogue, parts, options, drop))]


def _parts(messages: Sequence[Message]) -> list[_Part]:
    """The messages; what is asked without an answer between is one of them."""
    parts: list[_Part] = []
    for message in messages:
        if message.role in ANSWERING:
            parts.append(_answer(message))
            continue
        text = message.content
        if message.role == OBSERVATION:
            text = f"<tool_result>{text}</tool_result>"
        if parts and not parts[-1].is_answer:
            parts[-1] = _Part(False, f"{parts[-1].text}\n\n{text}")
        else:
            parts.append(_Part(False, text))
    return parts


def _answer(message: Message) -> _Part:
    if message.role == FUNCTION:
        calls = "\n".join(map(_call, parse_calls(message.content)))
        return _Part(True, f"{message.said}\n\n<{_MARK}tool_calls>\n{calls}\n</{_MARK}tool_calls>", message.thought)
    written = None if message.thought else _WRITTEN_THOUGHT.match(message.content)
    if written is not None:
        return _Part(True, message.content[written.end() :], written[1])
    return _Part(True, message.content, message.thought)


def _call(call: Call) -> str:
    arguments = json.loads(call.arguments)
    if not isinstance(arguments, dict):
        raise TesselError(f"the arguments of the call of {call.name} must be a mapping of names to values")
    lines = []
    for name, value in arguments.items():
        is_text = isinstance(value, str)
        text = value if is_text else json.dumps(value, ensure_ascii=False)
        lines.append(f'<{_MARK}parameter name="{name}" string="{str(is_text).lower()}">{text}</{_MARK}parameter>')
    return "\n".join([f'<{_MARK}invoke name="{call.name}">', *lines, f"</{_MARK}invoke>"])


def _drops_all(dialogue: Dialogue, options: RenderOptions) -> bool:
    """Whether thoughts before the last question are left out; with tools, they are part of what led there."""
    return bool(options.drop_thinking and options.thinking and not _functions(dialogue.tools))


def _last_question(parts: Sequence[_Part]) -> int:
    return max((i for i, part in enumerate(parts) if not part.is_answer), default=-1)


def _written(dialogue: Dialogue, parts: Sequence[_Part], options: RenderOptions, drop: bool) -> list[str]:
    """What is before all messages, then each message with what leads over to an answer.

    `drop`: only answers after the last question are written with thoughts.
    """
    thinks = bool(options.thinking)
    last = _last_question(parts)
    texts = [_beginning(dialogue, thinks and options.effort == "max")]
    for i, part in enumerate(parts):
        with_thought = thinks and (not drop or i > last)
        if part.is_answer:
            texts.append((part.thought + _THOUGHT_END if with_thought else "") + part.text + _END)
        else:
            opens = thinks and (not drop or i >= last)
            texts.append(_USER + part.text + _ASSISTANT + (_THOUGHT if opens else _THOUGHT_END))
    return texts


def _beginning(dialogue: Dialogue, most_effort: bool) -> str:
    text = _BEGIN + (_MOST_EFFORT if most_effort else "") + dialogue.system
    schemas = "\n".join(json.dumps(function, ensure_ascii=False) for function in _functions(dialogue.tools))
    return text + _TOOLS.replace("{schemas}", schemas) if schemas else text


def _functions(tools: str) -> list[object]:
    """The functions of a row's tools.

    Raises:
        TesselError: the tools are not OpenAI's: a list of {"type": "function", "function": {...}}.
    """
    if not tools.strip():
        return []
    try:
        parsed = json.loads(tools)
    except ValueError as error:
        raise TesselError(f"tools is not JSON ({error})") from error
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) and "function" in tool for tool in parsed):
        raise TesselError('tools must be a list of {"type": "function", "function": {...}} for deepseek4')
    return [tool["function"] for tool in parsed]

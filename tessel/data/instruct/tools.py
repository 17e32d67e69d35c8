"""How the functions that a model may call are told to it, and how its calls are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tessel.errors import TesselError


class Call(NamedTuple):
    """A function that the assistant calls; `arguments` is JSON."""

    name: str
    arguments: str


def parse_tools(tools: str) -> list[dict[str, Any]]:
    """The functions of a row's tools.

    Raises:
        TesselError: `tools` is not JSON for a list of mappings with a name.
    """
    try:
        parsed = json.loads(tools)
    except ValueError as error:
        raise TesselError(f"tools is not JSON ({error})") from error
    functions = [_function(tool) for tool in (parsed if isinstance(parsed, list) else [parsed])]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise TesselError('tools must be a list of functions, each with a "name"')
    return functions


def _function(tool: Any) -> Any:
    """The function itself where it is wrapped as OpenAI does."""
    return tool["function"] if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool


def parse_calls(content: str) -> list[Call]:
    """The calls in the content of a message of the role FUNCTION.

    Raises:
        TesselError: `content` is not JSON for {"name", "arguments"} or a list of these.
    """
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise TesselError(f"a function call is not JSON ({error})") from error
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls):
        raise TesselError('a function call must be {"name": ..., "arguments": ...}, or a list of these')
    return [Call(str(call["name"]), json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]


class ToolFormat(NamedTuple):
    """`announce`: the text after the system text; `write`: calls, for templates that take them whole.

    `functions` reads the tools of a row, and `calls` the content of a message of the role FUNCTION.
    """

    announce: Callable[[Sequence[Mapping[str, Any]]], str]
    write: Callable[[Sequence[Call]], str]
    functions: Callable[[str], Sequence[Mapping[str, Any]]] = parse_tools
    calls: Callable[[str], Sequence[Call]] = parse_calls


def _functions_or_none(tools: str) -> list[dict[str, Any]]:
    """The functions, or none where one of them is wrapped or lacks parameters: MindSpeed-LLM then tells of none."""
    try:
        functions = json.loads(tools)
        for function in functions:
            for about in function["parameters"]["properties"].values():
                ", ".join(about.get("enum") or ())
            if not isinstance(function["name"], str):
                return []
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    return list(functions)


def _call_or_empty(content: str) -> list[Call]:
    """One call; MindSpeed-LLM writes one without a name for anything else."""
    try:
        calls = parse_calls(content)
    except TesselError:
        return [Call("", "")]
    return calls if isinstance(json.loads(content), dict) else [Call("", "")]


def _announce_default(functions: Sequence[Mapping[str, Any]]) -> str:
    """LLaMA-Factory's text for models that know no format of their own (after ReAct)."""
    described = "".join(_describe(function) for function in functions)
    names = ", ".join(str(function["name"]) for function in functions)
    return (
        f"You have access to the following tools:\n{described}"
        "Use the following format if using a tool:\n"
        "```\n"
        f"Action: tool name (one of [{names}]).\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```).\n'
        "```\n"
    )


def _describe(function: Mapping[str, Any]) -> str:
    parameters = function.get("parameters") or {}
    required = parameters.get("required") or ()
    lines = []
    for name, about in (parameters.get("properties") or {}).items():
        enum = f", should be one of [{', '.join(map(str, about['enum']))}]" if about.get("enum") else ""
        items = f", where each item should be {about['items'].get('type', '')}" if about.get("items") else ""
        needed = ", required" if name in required else ""
        lines.append(
            f"  - {name} ({about.get('type', '')}{needed}): {about.get('description', '')}{enum}{items}\n"
        )  # fmt: skip
    return (
        f"> Tool Name: {function['name']}\nTool Description: {function.get('description', '')}\n"
        f"Tool Args:\n{''.join(lines)}\n"
    )


def _write_default(calls: Sequence[Call]) -> str:
    return "\n".join(f"Action: {call.name}\nAction Input: {call.arguments}" for call in calls)


def _announce_qwen(functions: Sequence[Mapping[str, Any]]) -> str:
    """The text of Qwen2.5's and Qwen3's chat templates."""
    wrapped = ({"type": "function", "function": function} for function in functions)
    signatures = "".join("\n" + json.dumps(function, ensure_ascii=False) for function in wrapped)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{signatures}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _announce_ling(functions: Sequence[Mapping[str, Any]]) -> str:
    """The text that Ling was trained with, by LLaMA-Factory."""
    return _announce_qwen(functions).lstrip("\n") + "\ndetailed thinking off"


def _write_qwen(calls: Sequence[Call]) -> str:
    written = (
        f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments}}}' for call in calls
    )
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)


def _announce_nothing(functions: Sequence[Mapping[str, Any]]) -> str:
    return ""


TOOL_FORMATS = {
    "default": ToolFormat(_announce_default, _write_default),
    "none": ToolFormat(_announce_nothing, _write_default),
    "default_lenient": ToolFormat(_announce_default, _write_default, _functions_or_none, _call_or_empty),
    "none_lenient": ToolFormat(_announce_nothing, _write_default, _functions_or_none, _call_or_empty),
    "qwen": ToolFormat(_announce_qwen, _write_qwen),
    "ling": ToolFormat(_announce_ling, _write_qwen),
}
"""By name. The lenient ones are MindSpeed-LLM's, which writes something for whatever it cannot read."""

"""MindSpeed-LLM's templates.json: a list of templates, read into the fields of `templates`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from tessel.config.nearest import nearest
from tessel.errors import TesselError, UsageError

_KINDS = {
    "Template": "classic",
    "LFDefaultTemplate": "modern",
    "ReasoningTemplate": "reasoning",
    "Llama2Template": "llama2",
    "DeepSeek4Template": "deepseek4",
}
_SPECIALS = {"bos_token": "bos", "eos_token": "eos"}
# Formats of tools of which MindSpeed-LLM's own formatter tells the model nothing.
_UNTOLD = ("glm4", "glm4_moe")
_ROLES = ("user", "assistant", "system", "function", "observation", "separator", "prefix")
_SAME = ("default_system", "stop_words", "efficient_eos", "replace_eos", "thought_words")


def shown(value: Any) -> str:
    """A value of a file for a message, however large it is."""
    return repr(value) if isinstance(value, str) and len(value) < 100 else reprlib.repr(value)


def from_templates_json(entries: Sequence[Any], name: str | None, where: str) -> dict[str, Any]:
    """The entry called `name`, in the fields of a template of tessel's.

    Raises:
        UsageError: no name is given, or none of this name is there.
        TesselError: the entry is damaged.
    """
    by_name = {entry["name"]: entry for entry in entries if isinstance(entry, Mapping) and _has_name(entry)}
    if name is None:
        raise UsageError(f"{where} holds {len(by_name)} templates; choose one with --prompt-type NAME.")
    if name not in by_name:
        close = nearest(name, by_name, similarity=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; it holds {', '.join(by_name) or 'none'}."
        raise UsageError(
            f"--prompt-type {name}: {where.removeprefix('--prompt-type-path ')} has none of this name{hint}"
        )
    return _translated(by_name[name], f"{where}, template {name}")


def _has_name(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("name"), str)


def _translated(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {"name": entry["name"], "origin": "templates.json"}
    for key, value in entry.items():
        role = str(key).removeprefix("format_")
        if value is None or key in ("name", "force_system"):
            continue
        if key == "format_tools":
            values["tools"] = _tool_format(value, where)
        elif str(key).startswith("format_") and role in _ROLES:
            values[role] = _slots(role, value, where)
        elif key in _SAME:
            values[key] = value
        elif key == "template_class":
            if not isinstance(value, str) or value not in _KINDS:
                raise TesselError(
                    f"{where}: template_class {shown(value)} is not known; known are {', '.join(_KINDS)}."
                )
            values["kind"] = _KINDS[value]
        else:
            raise TesselError(f"{where}: field {shown(key)} is not known.")
    if str(entry["name"]).startswith("llama2"):
        values.setdefault("kind", "llama2")
    return values


def _slots(role: str, value: Any, where: str) -> list[Any]:
    slots = value.get("slots") if isinstance(value, Mapping) else None
    if not isinstance(slots, list):
        raise TesselError(f'{where}: format_{role} is {shown(value)}; it must be {{"slots": [...]}}.')
    return [_slot(slot) for slot in slots]


def _slot(slot: Any) -> Any:
    if isinstance(slot, list) and len(slot) == 1 and slot[0] in _SPECIALS:
        return {"special": _SPECIALS[slot[0]]}
    return slot


def _tool_format(value: Any, where: str) -> str:
    """The name that `format_tools` gives, by `tool_format` or as its only slot, whole or letter by letter."""
    name = value
    if isinstance(value, Mapping):
        name = value.get("tool_format") or value.get("slots") or "default"
    if isinstance(name, list) and all(isinstance(part, str) for part in name):
        name = "".join(name)
    if not isinstance(name, str):
        raise TesselError(f"{where}: format_tools is {shown(value)}; it must name a format of tools.")
    return "none" if name in _UNTOLD else name

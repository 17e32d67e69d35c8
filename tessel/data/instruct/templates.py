"""Prompt types: how a dialogue is written for a model. The names are MindSpeed-LLM's.

A template is a list of slots for each role. A slot is text with `{{content}}` in it, a token by its
name, or the tokenizer's own begin or end of sequence. Each slot is tokenized alone, so that slot
borders are token borders.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from tessel.config.nearest import nearest
from tessel.data.instruct.templates_json import from_templates_json, shown
from tessel.data.instruct.tools import TOOL_FORMATS
from tessel.errors import TesselError, UsageError

HF = "hf"
"""The prompt type that is the tokenizer's own chat template."""

CLASSIC = "classic"
MODERN = "modern"
REASONING = "reasoning"
LLAMA2 = "llama2"
DEEPSEEK4 = "deepseek4"
KINDS = (CLASSIC, MODERN, REASONING, LLAMA2, DEEPSEEK4)
"""How turns are put together: the rules of LLaMA-Factory 0.8, those of 0.9, those with thoughts, Llama 2's, and
DeepSeek-V4's, which has no slots."""

ROLES = ("system", "user", "assistant", "function", "observation", "separator", "prefix")
_FIELD = re.compile(r"\{\{(\w+)\}\}")
_FIELDS = {
    "system": ("content",),
    "user": ("content", "idx"),
    "assistant": ("content",),
    "function": ("content", "name", "arguments"),
    "observation": ("content", "idx"),
    "separator": (),
    "prefix": (),
}


class Token(NamedTuple):
    """A slot that is one token, by its name in the vocabulary."""

    name: str


class Special(NamedTuple):
    """A slot that is the tokenizer's own token: `eos` or `bos`; nothing where it has none."""

    name: str


Slot = str | Token | Special
EOS = Special("eos")


@dataclass(frozen=True)
class Template:
    """One prompt type.

    Attributes:
        kind: one of KINDS.
        system, user, assistant, function, observation: slots of what a role says; what a function gives is
            written as a question where nothing else is said.
        separator: slots before each question but the first; classic and llama2 alone.
        prefix: slots at the very beginning.
        tools: a name in `tools.TOOL_FORMATS`.
        default_system: system text of rows without any; "" for none.
        stop_words: tokens that end an answer; made special tokens.
        replace_eos: the first stop word becomes the tokenizer's end of sequence.
        efficient_eos: no end of sequence within a dialogue: what follows an answer is trained to be it.
        thought_words: what is before and after a thought.
        origin: where its text is known from.
    """

    name: str
    kind: str = CLASSIC
    system: tuple[Slot, ...] = ("{{content}}",)
    user: tuple[Slot, ...] = ("{{content}}",)
    assistant: tuple[Slot, ...] = ("{{content}}", EOS)
    function: tuple[Slot, ...] = ("Action: {{name}}\nAction Input: {{arguments}}", EOS)
    observation: tuple[Slot, ...] = ("{{content}}",)
    separator: tuple[Slot, ...] = ()
    prefix: tuple[Slot, ...] = ()
    tools: str = "default"
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False
    efficient_eos: bool = False
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    origin: str = ""


@functools.cache
def known_templates() -> dict[str, Template]:
    """The templates that come with tessel, by name."""
    return {
        name: _template(name, entry, f"the prompt type {name}", {}) for name, entry in _catalog()["templates"].items()
    }


@functools.cache
def _catalog() -> dict[str, Any]:
    import yaml

    text = resources.files("tessel.data.instruct").joinpath("templates.yaml").read_text(encoding="utf-8")
    catalog: dict[str, Any] = yaml.safe_load(text)
    return catalog


@functools.cache
def mindspeed_templates() -> dict[str, Template]:
    """The same as MindSpeed-LLM has them, where its catalogue means something else by a name."""
    known = known_templates()
    differing = {
        name: _template(name, {**entry, "base": name}, f"the prompt type {name}", known)
        for name, entry in _catalog()["mindspeed"].items()
    }
    return {name: _lenient(template) for name, template in (known | differing).items()}


def _lenient(template: Template) -> Template:
    return replace(
        template, tools={"default": "default_lenient", "none": "none_lenient"}.get(template.tools, template.tools)
    )


def find_template(name: str | None, path: str | None = None, as_mindspeed: bool = False) -> Template:
    """The template of --prompt-type, or the one in the file of --prompt-type-path.

    Raises:
        UsageError: no such name; names the nearest.
        TesselError: the file is not a template; names what is wrong.
    """
    if path is not None:
        template = load_template(path, name)
        return _lenient(template) if as_mindspeed else template
    if name is None:
        raise UsageError(
            "Dialogues need a template: give --prompt-type, such as qwen, or hf for the tokenizer's own "
            "(`tessel templates` lists all)."
        )
    known = mindspeed_templates() if as_mindspeed else known_templates()
    if name in known:
        return known[name]
    close = nearest(name, [*known, HF], similarity=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UsageError(f"--prompt-type {name} is not known.{hint} `tessel templates` lists all.")


def load_template(path: str | Path, name: str | None = None) -> Template:
    """The template in a YAML of the user's, or the one called `name` in a templates.json of MindSpeed-LLM.

    Raises:
        TesselError: the file cannot be read or is no template; names the file, the field and the rule.
    """
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TesselError(f"--prompt-type-path {path} cannot be read: {error.strerror}.") from error
    except Exception as error:
        # PyYAML raises nearly anything for a value that is not of the type that its tag says.
        problem = " ".join(str(error).split()) or type(error).__name__
        raise TesselError(f"--prompt-type-path {path} is no YAML or JSON: {problem}.") from error
    where = f"--prompt-type-path {path}"
    if isinstance(content, list):
        entry = from_templates_json(content, name, where)
        return _template(entry["name"], {key: value for key, value in entry.items() if key != "name"}, where, {})
    if not isinstance(content, Mapping):
        raise TesselError(f"{where} holds {_kind_of(content)}; a template is a mapping of fields such as user.")
    own = content.get("name", path.stem)
    if name is not None and name != own:
        raise UsageError(f"--prompt-type {name}: the file {path} holds the template {own}; leave --prompt-type out.")
    entry = {key: value for key, value in content.items() if key != "name"}
    return _template(own, entry, where, known_templates())


def _template(name: Any, entry: Any, where: str, bases: Mapping[str, Template]) -> Template:
    """A checked template from the fields of its entry; `base` names one of `bases` to begin with."""
    if not isinstance(name, str) or not name:
        raise TesselError(f"{where}: name {shown(name)} must be text.")
    if not isinstance(entry, Mapping):
        raise TesselError(f"{where}: {_kind_of(entry)} instead of a mapping of fields such as user and assistant.")
    base_name = entry.get("base")
    if base_name is not None and (not isinstance(base_name, str) or base_name not in bases):
        known = f"; known are {', '.join(bases)}" if bases else ""
        raise TesselError(f"{where}: base {shown(base_name)} is no prompt type{known}.")
    base = replace(bases[base_name], origin="") if base_name is not None else Template(name)
    values = {key: _value(key, value, where) for key, value in entry.items() if key != "base"}
    template = replace(base, name=name, **values)
    if template.efficient_eos and base_name is None:
        # What no slot says has no end of sequence either.
        unsaid = [role for role in ("assistant", "function") if role not in values]
        shorter: dict[str, Any] = {role: tuple(s for s in getattr(template, role) if s != EOS) for role in unsaid}
        template = replace(template, **shorter)
    if "observation" not in values and base_name is None:
        template = replace(template, observation=template.user)
    if template.replace_eos and not template.stop_words:
        raise TesselError(f"{where}: replace_eos makes the first of stop_words the end of sequence, and there is none.")
    if template.kind == LLAMA2 and not isinstance(template.system[0] if template.system else None, str):
        raise TesselError(f"{where}: the system text of kind llama2 stands in the first question: one text slot.")
    return template


def _value(key: Any, value: Any, where: str) -> Any:
    if key in ROLES:
        return _slots(key, value, where)
    if key in ("replace_eos", "efficient_eos"):
        expected, fits = "true or false", isinstance(value, bool)
    elif key in ("default_system", "origin"):
        expected, fits = "text", isinstance(value, str)
    elif key == "stop_words":
        expected, fits = "a list of texts", _is_texts(value)
    elif key == "thought_words":
        expected, fits = "a list of two texts, before and after a thought", _is_texts(value) and len(value) == 2
    elif key == "kind":
        expected, fits = f"one of {', '.join(KINDS)}", isinstance(value, str) and value in KINDS
    elif key == "tools":
        expected, fits = f"one of {', '.join(TOOL_FORMATS)}", isinstance(value, str) and value in TOOL_FORMATS
    else:
        fields = [*ROLES, *(f for f in Template.__dataclass_fields__ if f not in ROLES), "base"]
        close = nearest(str(key), fields, similarity=0.5)
        raise TesselError(f"{where}: unknown field {shown(key)}; " + (f"did you mean {close[0]}?" if close else
                          f"the fields are {', '.join(fields)}."))  # fmt: skip
    if not fits:
        raise TesselError(f"{where}: {key} is {shown(value)}; it must be {expected}.")
    return tuple(value) if isinstance(value, list) else value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and word for word in value)


def _slots(role: str, value: Any, where: str) -> tuple[Slot, ...]:
    items = value if isinstance(value, list) else [value]
    slots = tuple(_slot(role, item, where) for item in items)
    found = [field for slot in slots if isinstance(slot, str) for field in _FIELD.findall(slot)]
    for field in found:
        if field not in _FIELDS[role]:
            allowed = ", ".join(f"{{{{{name}}}}}" for name in _FIELDS[role]) or "no placeholder"
            raise TesselError(f"{where}: {role} holds {{{{{field}}}}}; it may hold {allowed}.")
        if found.count(field) > 1:
            raise TesselError(f"{where}: {role} holds {{{{{field}}}}} more than once; a value stands in one place.")
    if role in ("system", "user", "assistant", "observation") and "content" not in found:
        raise TesselError(f"{where}: {role} lacks {{{{content}}}}: what is said would be left out.")
    return slots


def _slot(role: str, item: Any, where: str) -> Slot:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping) and len(item) == 1:
        ((kind, value),) = item.items()
        if kind == "token" and isinstance(value, str) and value:
            return Token(value)
        if kind == "special" and value in ("eos", "bos"):
            return Special(value)
    raise TesselError(
        f"{where}: {role} holds the slot {shown(item)}; a slot is text, {{token: NAME}}, {{special: eos}} or "
        "{special: bos}."
    )


def _kind_of(value: Any) -> str:
    return {list: "a list", dict: "a mapping", str: "text", type(None): "nothing"}.get(type(value), shown(value))

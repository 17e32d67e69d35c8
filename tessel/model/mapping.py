"""Models that differ from a known family in names alone: `model_mapping.yaml` beside their config.json.

    family: llama                       # whose arithmetic it is
    config:                             # its keys of config.json: the family's; "a.b" is the key b in the object a
      n_embd: hidden_size
    set:                                # the family's keys that hold whatever config.json says, or does not say
      hidden_act: silu
    tensors:                            # its tensors: the family's, as its Hugging Face folders have them
      transformer.wte.weight: model.embed_tokens.weight
      transformer.h.{layer}.attn.out.weight:
        name: model.layers.{layer}.self_attn.o_proj.weight
        transpose: true                 # stored as [in, out]
      transformer.h.{layer}.attn.qkv.{kind}:
        parts:                          # one after the other along the output features
          - model.layers.{layer}.self_attn.q_proj.{kind}
          - model.layers.{layer}.self_attn.k_proj.{kind}
          - model.layers.{layer}.self_attn.v_proj.{kind}
        order: groups                   # for each key/value head: its query heads, it, its value head

{layer} and {expert} stand for a number, {kind} for weight or bias. What no pattern is for keeps its name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from tessel.config.file import read_yaml
from tessel.config.nearest import nearest
from tessel.errors import TesselError
from tessel.model.families import ARCHITECTURES, FAMILIES

MAPPING_FILE = "model_mapping.yaml"
_MAX_BYTES = 2**20
_SECTIONS = ("family", "config", "set", "tensors")
_RULE_KEYS = ("name", "parts", "order", "transpose")
_PLACEHOLDERS = {"layer": r"\d+", "expert": r"\d+", "kind": "weight|bias"}
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
# They say whose model it is, and are never those of the family.
_IDENTITY = ("model_type", "architectures")

Order = Literal["parts", "groups"]


@dataclass(frozen=True)
class TensorRule:
    """A tensor of the folder, and the family's that lie in it. Names are patterns.

    `order` "groups" is that of Megatron's linear_qkv. With `transpose` the last two dims are exchanged.
    """

    stored: str
    parts: tuple[str, ...]
    order: Order = "parts"
    transpose: bool = False


@dataclass(frozen=True)
class Match:
    """What a tensor of the folder holds: the family's names, in order, of layers and experts as they are."""

    rule: TensorRule
    stored: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class ModelMapping:
    """What a mapping file says. `config`: its keys -> the family's; `text`: the file as it is."""

    family: str
    config: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[TensorRule, ...] = ()
    text: bytes = field(default=b"", repr=False)

    @classmethod
    def of_folder(cls, folder: Path) -> ModelMapping | None:
        """The mapping in a Hugging Face folder; None if it has none.

        Raises:
            TesselError: it is not what a mapping may be; the message names the entry.
        """
        path = folder / MAPPING_FILE
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_BYTES:
            raise TesselError(f"{path} has more than {_MAX_BYTES:,} bytes, too many for a mapping. Check the file.")
        return _parsed(path, read_yaml(path, str(path)), path.read_bytes())

    def family_config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json of the family's that says what `raw` does."""
        known = {key: value for key, value in raw.items() if key not in (*self.config, *_IDENTITY)}
        for theirs, ours in self.config.items():
            found, value = _look_up(raw, theirs)
            if found:
                known[ours] = value
        known |= self.fixed
        return known | {"model_type": self.family, "architectures": [ARCHITECTURES[self.family]]}

    def own_config(self, raw: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """`raw` with what has changed in the family's config.json between `before` and `now`."""
        own = dict(raw)
        theirs = {ours: theirs for theirs, ours in self.config.items()}
        for key, value in now.items():
            if key in _IDENTITY or (key in before and before[key] == value):
                continue
            if key in self.fixed:
                raise TesselError(
                    f"{MAPPING_FILE} sets {key} to {self.fixed[key]!r} and the model has {value!r}: its config.json "
                    "cannot say that. Map the key instead of setting it."
                )
            _put(own, theirs.get(key, key), value)
        return own

    def of_stored(self, stored: str) -> Match | None:
        """What a tensor of the folder holds; None if it has the family's name."""
        for rule in self.rules:
            found = _fits(rule.stored, stored)
            if found is not None:
                return Match(rule, stored, tuple(part.format_map(found) for part in rule.parts))
        return None

    def of_name(self, name: str) -> Match | None:
        """In what tensor of the folder the family's tensor `name` lies; None if it has its own name there."""
        for rule in self.rules:
            for part in rule.parts:
                found = _fits(part, name)
                if found is not None:
                    stored = rule.stored.format_map(found)
                    return Match(rule, stored, tuple(other.format_map(found) for other in rule.parts))
        return None


@dataclass(frozen=True)
class OwnConfig:
    """A config.json in its own words, and what they mean."""

    mapping: ModelMapping
    raw: Mapping[str, Any]


def family_names(own: OwnConfig | None, stored: str) -> tuple[str, ...]:
    """The family's names of what a tensor of a folder holds."""
    match = None if own is None else own.mapping.of_stored(stored)
    return (stored,) if match is None else match.parts


def _fits(pattern: str, name: str) -> dict[str, str] | None:
    found = _expression(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    pieces = _PLACEHOLDER.split(pattern)  # text and names of placeholders, by turns
    seen: set[str] = set()
    expression = ""
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            expression += re.escape(piece)
        else:
            expression += f"(?P={piece})" if piece in seen else f"(?P<{piece}>{_PLACEHOLDERS[piece]})"
            seen.add(piece)
    return re.compile(expression)


def _look_up(raw: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    if key in raw:
        return True, raw[key]
    first, _, rest = key.partition(".")
    inner = raw.get(first)
    return _look_up(inner, rest) if rest and isinstance(inner, Mapping) else (False, None)


def _put(own: dict[str, Any], key: str, value: Any) -> None:
    first, _, rest = key.partition(".")
    inner = own.get(first)
    if key not in own and rest and isinstance(inner, Mapping):
        own[first] = dict(inner)
        _put(own[first], rest, value)
    else:
        own[key] = value


def _parsed(path: Path, content: Mapping[Any, Any], text: bytes) -> ModelMapping:
    for key in content:
        if key not in _SECTIONS:
            raise TesselError(f"{path}: {_unknown(str(key), _SECTIONS)}")
    family = content.get("family")
    if family not in FAMILIES:
        raise TesselError(f"{path}: family is {family!r}: it must be one of {', '.join(FAMILIES)}.")
    for section in _SECTIONS[1:]:
        if not isinstance(content.get(section) or {}, Mapping):
            raise TesselError(f"{path}: {section} must be a mapping of names to values.")
    config = content.get("config") or {}
    wrong = [key for key, value in config.items() if not isinstance(key, str) or not isinstance(value, str)]
    if wrong:
        raise TesselError(f"{path}: config.{wrong[0]} must be the name of a key of a {family} model's config.json.")
    rules = tuple(_rule(path, key, value) for key, value in (content.get("tensors") or {}).items())
    _require_once(path, "config", list(config.values()))
    _require_once(path, "tensors", [part for rule in rules for part in rule.parts])
    return ModelMapping(str(family), dict(config), dict(content.get("set") or {}), rules, text)


def _require_once(path: Path, section: str, names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TesselError(f"{path}: {section} has {twice[0]} twice on the right: one of them is another's.")


def _rule(path: Path, stored: Any, value: Any) -> TensorRule:
    where = f"{path}: tensors.{stored}"
    entry = {"name": value} if isinstance(value, str) else value
    if not isinstance(stored, str) or not isinstance(entry, Mapping):
        raise TesselError(f"{where} must be a name, or a mapping with name or parts.")
    for key in entry:
        if key not in _RULE_KEYS:
            raise TesselError(f"{where}: {_unknown(str(key), _RULE_KEYS)}")
    parts = entry.get("parts", [entry["name"]] if "name" in entry else [])
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise TesselError(f"{where} must have a name, or parts: a list of names.")
    if "name" in entry and "parts" in entry:
        raise TesselError(f"{where} has both name and parts; keep one of them.")
    order, transpose = entry.get("order", "parts"), entry.get("transpose", False)
    if order not in get_args(Order) or (order == "groups" and len(parts) != 3):
        raise TesselError(f"{where}: order is {order!r}: it must be parts, or for q, k and v groups.")
    if not isinstance(transpose, bool):
        raise TesselError(f"{where}: transpose is {transpose!r}: it must be true or false.")
    places = _placeholders(where, stored)
    for part in parts:
        if _placeholders(where, part) != places:
            raise TesselError(f"{where}: {part} must have the same of {{layer}}, {{expert}} and {{kind}} as the left.")
    return TensorRule(stored, tuple(parts), cast(Order, order), transpose)


def _placeholders(where: str, pattern: str) -> set[str]:
    found = set(_PLACEHOLDER.findall(pattern))
    if not found <= _PLACEHOLDERS.keys() or set(_PLACEHOLDER.sub("", pattern)) & set("{}"):
        raise TesselError(f"{where}: only {{layer}}, {{expert}} and {{kind}} may stand in braces, not {pattern!r}.")
    return found


def _unknown(key: str, known: tuple[str, ...]) -> str:
    near = nearest(key, known)
    return f"unknown key {key}; " + (f"nearest: {', '.join(near)}." if near else f"there are {', '.join(known)}.")

"""The YAML file of `--config`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessel.config.megatron import ForeignFlags
from tessel.config.nearest import CERTAINTY, SIMILARITY, nearest
from tessel.config.schema import Option, convert, flag_of
from tessel.errors import TesselError, UsageError

_BASE_KEY = "config"


@dataclass(frozen=True)
class FileValues:
    """What a file says: values by field name, and the flags of other suites that it names."""

    values: dict[str, Any]
    foreign: list[str]


def read_file(path: str, all_options: Sequence[Option], foreign: ForeignFlags) -> FileValues:
    """Read the fields of `all_options` from YAML, flat or under the names of their sections.

    Keys may be written with dashes or underscores; a key without a value counts as not given. `config: OTHER` at
    the top level takes over the values of another file, named from this one's folder, where this one has none.

    Raises:
        TesselError: a file cannot be read, or is not YAML.
        UsageError: an unknown or repeated key, a value that does not fit its field, or files that take over each
            other's values.
    """
    return _read_file(path, all_options, foreign, ())


def _read_file(path: str, all_options: Sequence[Option], foreign: ForeignFlags, takers: tuple[Path, ...]) -> FileValues:
    tree = dict(read_yaml(path, f"--config {path}"))
    found = FileValues({}, [])
    base = tree.pop(_BASE_KEY, None)
    if base is not None:
        takers = (*takers, Path(path).resolve())
        other = Path(path).parent / str(base)
        if other.resolve() in takers:
            raise UsageError(f"{_BASE_KEY}: {base} in {path} leads back to where it began; name another file.")
        found = _read_file(str(other), all_options, foreign, takers)
    own = _own_values(tree, path, all_options, foreign)
    return FileValues(found.values | own.values, list(dict.fromkeys(found.foreign + own.foreign)))


def _own_values(tree: Mapping[Any, Any], path: str, all_options: Sequence[Option], foreign: ForeignFlags) -> FileValues:
    by_name = {o.name: o for o in all_options}
    found = FileValues({}, [])
    for section, key, raw in _flat(tree, {o.path[-1] for o in all_options if o.path}, path):
        name = key.replace("-", "_")
        flag = flag_of(name)
        where = f"{key} in {path}"
        if name not in by_name:
            said = [str(raw)] if flag in foreign.accepted and foreign.accepted[flag].num_values else []
            if refusal := foreign.refusal(flag, said):
                raise UsageError(f"{where}: {refusal}")
            if flag in foreign.accepted:
                found.foreign.append(flag)
                continue
            raise UsageError(_unknown_key(where, name, by_name, foreign))
        o = by_name[name]
        if section is not None and o.path[-1:] != (section,):
            home = f"section {o.path[-1]}" if o.path else "the top level"
            raise UsageError(f"{where} stands in section {section}: move it to {home}, or to the top level.")
        if raw is None:
            continue
        if name in found.values:
            raise UsageError(f"{where} is given twice; keep one of them.")
        found.values[name] = convert(o, raw, where)
    return found


def _unknown_key(where: str, name: str, known: Iterable[str], foreign: ForeignFlags) -> str:
    family = foreign.family_refusal(flag_of(name))
    near = nearest(name, known, CERTAINTY if family else SIMILARITY)
    if near or family is None:
        return f"unknown key {where}; " + (f"nearest: {', '.join(near)}." if near else "nothing is like it.")
    return f"{where}: {family}"


def _flat(tree: Mapping[Any, Any], sections: set[str], path: str) -> list[tuple[str | None, str, Any]]:
    """(section or None, key, value) of every entry. A section and a field may share a name."""
    entries: list[tuple[str | None, str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if key not in sections:
                near = nearest(str(key), sections) or sorted(sections)
                raise UsageError(f"unknown section {key} in {path}; nearest: {', '.join(near)}.")
            entries.extend((str(key), str(inner), raw) for inner, raw in value.items())
        elif value is not None or key not in sections:
            entries.append((None, str(key), value))
    return entries


def read_yaml(path: str | Path, what: str) -> Mapping[Any, Any]:
    """The mapping that a YAML file holds, empty for an empty file; `what` names the file in messages.

    Raises:
        TesselError: the file cannot be read, or is not YAML.
        UsageError: it is no mapping, or a key stands twice in one.
    """
    # Not at the top: most commands have no file, and start-up is to stay light.
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in one mapping, where plain YAML keeps the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key, (key_node, _) in zip(keys, node.value, strict=True):
                if keys.count(key) > 1:
                    line = key_node.start_mark.line + 1
                    raise UsageError(f"{key} in {path} is given twice (line {line}); keep one of them.")
            return super().construct_mapping(node, deep)

    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise TesselError(f"{what} cannot be read: {error.strerror}. Give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise TesselError(f"{what} is not UTF-8 text. Give a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise TesselError(f"{what}{where} is not YAML: {problem}. Mend the file.") from None
    except (ValueError, RecursionError) as error:  # of a date that is none, or of brackets without end
        raise TesselError(f"{what} is not YAML: {error}. Mend the file.") from None
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise UsageError(f"{what} holds a {type(tree).__name__}: it must be a mapping of names to values.")
    return tree

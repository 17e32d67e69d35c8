"""The programs that a shell script calls, with their arguments: variables, arrays, arithmetic, if and eval.

Nothing is run. What only running could tell, such as $(command), stays as it is written.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tessel.drop_in.shell_words import Piece, Statement, Word, mended, statements

_ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<plus>\+?)=(?P<value>.*)", re.DOTALL)
_EXPANSION = re.compile(r"\$\(\(.*?\)\)|\$\{[^}]*\}|\$\w+|\$[@#]|\$\([^)]*\)|`[^`]*`", re.DOTALL)
_PLACEHOLDER = re.compile(r"\s*(your|please|the)\b[^-]*$", re.IGNORECASE)
_HARD_SPACE = "\u00a0"
"""A blank at which a value is not cut, as in "your data path", which stands for one that is still to be written."""

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Gt: operator.gt, ast.Lt: operator.lt,
    ast.GtE: operator.ge, ast.LtE: operator.le, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_TESTS: dict[str, Callable[[str, str], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "-eq": lambda a, b: _number(a) == _number(b),
    "-ne": lambda a, b: _number(a) != _number(b),
    "-gt": lambda a, b: _number(a) > _number(b),
    "-ge": lambda a, b: _number(a) >= _number(b),
    "-lt": lambda a, b: _number(a) < _number(b),
    "-le": lambda a, b: _number(a) <= _number(b),
}


@dataclass(frozen=True)
class Call:
    """A program of a script: the words of its command line, and the line it stands in."""

    line: int
    words: tuple[str, ...]


@dataclass
class _If:
    """An `if`: whether what was outside it counts, whether a branch was taken, and whether this one is."""

    outer: bool
    taken: bool
    active: bool


@dataclass
class _Shell:
    values: dict[str, list[str]]
    calls: list[Call] = field(default_factory=list)
    branches: list[_If] = field(default_factory=list)
    skips: bool = False


def calls(text: str, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[Call], list[str]]:
    """The calls of Python programs in a script that is given `arguments`, and remarks on what is wrong with it."""
    text, remarks = mended(text)
    values = {name: [value] for name, value in environment.items()}
    values |= {str(number): [argument] for number, argument in enumerate(arguments, 1)}
    shell = _Shell(values | {"@": list(arguments), "#": [str(len(arguments))]})
    for statement in statements(text):
        _take(shell, statement)
    return shell.calls, remarks


def _take(shell: _Shell, statement: Statement) -> None:
    word = statement.first
    active = all(branch.active for branch in shell.branches)
    if word == "if":
        taken = active and _holds(shell, statement.words[1:])
        shell.branches.append(_If(active, taken, taken))
    elif word in ("elif", "else") and shell.branches:
        branch = shell.branches[-1]
        branch.active = branch.outer and not branch.taken and (word == "else" or _holds(shell, statement.words[1:]))
        branch.taken |= branch.active
    elif word == "fi" and shell.branches:
        shell.branches.pop()
    elif active and word not in ("then", "{", "}", "do", "done"):
        _do(shell, statement)


def _do(shell: _Shell, statement: Statement) -> None:
    words = statement.words
    if statement.first in ("export", "local", "readonly"):
        words = words[1:]
    assigned = 0
    while assigned < len(words) and _ASSIGNMENT.match("".join(piece.text for piece in words[assigned])):
        assigned += _assign(shell, words[assigned:])
    called = [text for word in words[assigned:] for text in _expanded(shell, word)]
    if called and called[0] == "eval":
        called = [text for word in called[1:] for text in re.split(r"[ \t\n]+", word) if text]
    if any(word.endswith(".py") for word in called) and called[0] not in ("echo", "cp", "vi", "cat"):
        shell.calls.append(Call(statement.line, tuple(_unquoted(word) for word in called)))


def _assign(shell: _Shell, words: Sequence[Word]) -> int:
    """Do the assignment that `words` begin with. Returns how many of them it is."""
    found = _ASSIGNMENT.match("".join(piece.text for piece in words[0]))
    assert found is not None
    name, before = found["name"], shell.values.get(found["name"], [])
    if words[0][-1] == Piece("(", ""):
        end = next((i for i, word in enumerate(words) if word == (Piece(")", ""),)), len(words) - 1)
        items = [text for word in words[1:end] for text in _expanded(shell, word)]
        shell.values[name] = [*before, *items] if found["plus"] else items
        return end + 1
    value = "".join(_substituted(shell, piece) for piece in _after_equals(words[0]))
    if _PLACEHOLDER.match(value):
        value = value.strip().replace(" ", _HARD_SPACE)
    shell.values[name] = ["".join(before) + value if found["plus"] else value]
    return 1


def _after_equals(word: Word) -> list[Piece]:
    """The pieces of the value of an assignment."""
    text = ""
    for index, piece in enumerate(word):
        text += piece.text
        if "=" in text:
            return [Piece(text.partition("=")[2], piece.quote), *word[index + 1 :]]
    return []


def _expanded(shell: _Shell, word: Word) -> list[str]:
    """The words that a word becomes: unquoted expansions are cut at blanks, those of arrays at their items."""
    found = [""]
    for piece in word:
        array = re.fullmatch(r"\$\{?(\w+)\[[@*]\]\}?|\$(@)", piece.text) if piece.quote != "'" else None
        if array:
            texts = shell.values.get(array[1] or array[2], [])
            texts = texts if piece.quote else [part for text in texts for part in text.split(" ")]
        elif piece.quote:
            texts = [_substituted(shell, piece)]
        elif "$" in piece.text or "`" in piece.text:
            value = _substituted(shell, piece)
            texts = re.split(r"[ \t\n]+", value.strip(" \t\n")) if value.strip(" \t\n") else []
        else:
            texts = [piece.text]
        if texts:
            found = [*found[:-1], found[-1] + texts[0], *texts[1:]]
    quoted = any(piece.quote for piece in word)
    return found if quoted or found != [""] else []


def _substituted(shell: _Shell, piece: Piece) -> str:
    if piece.quote == "'":
        return piece.text
    return _EXPANSION.sub(lambda found: _value(shell, found[0]), piece.text)


def _value(shell: _Shell, text: str) -> str:
    if text.startswith("$(("):
        inner = _EXPANSION.sub(lambda found: _value(shell, found[0]), text[3:-2])
        inner = re.sub(r"[A-Za-z_]\w*", lambda found: _value(shell, f"${found[0]}") or "0", inner)
        result = _arithmetic(inner)
        return text if result is None else str(result)
    if text.startswith(("$(", "`")):
        return text.replace(" ", _HARD_SPACE)
    name, dash, default = text.strip("${}").partition("-")
    name = name.removesuffix(":").removesuffix("[@]").removesuffix("[*]")
    values = [value for value in shell.values.get(name, []) if value]
    return " ".join(values) if values or not dash else default


def _arithmetic(text: str) -> int | None:
    """The value of whole numbers and operators; None for anything else."""
    condition = re.fullmatch(r"(.*?)\?(.*?):(.*)", text.strip(), re.DOTALL)
    if condition:
        question, then, otherwise = condition.groups()
        if question.count("(") > question.count(")"):  # brackets around the whole
            question, otherwise = question.replace("(", "", 1), otherwise.rstrip().removesuffix(")")
        return _arithmetic(then if _arithmetic(question) else otherwise)
    try:
        return _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _evaluated(node: ast.expr) -> int | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        left, right = _evaluated(node.left), _evaluated(node.right)
        return None if left is None or right is None else int(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Compare):
        left, right = _evaluated(node.left), _evaluated(node.comparators[0])
        return None if left is None or right is None else int(_OPERATORS[type(node.ops[0])](left, right))
    return None


def _holds(shell: _Shell, words: Sequence[Word]) -> bool:
    """A condition of `[`: a comparison, -z or -n; anything else does not hold."""
    texts = [" ".join(_expanded(shell, word)) for word in words]
    texts = [text for text in texts if text not in ("[", "]", "[[", "]]")]
    if texts and texts[0] == "-z":
        return len(texts) == 1 or not texts[1]
    if texts and texts[0] == "-n":
        return len(texts) > 1 and bool(texts[1])
    if len(texts) >= 3 and texts[1] in _TESTS:
        return _TESTS[texts[1]](texts[0], texts[2])
    return False


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _unquoted(word: str) -> str:
    return word.replace(_HARD_SPACE, " ").strip("'\"")

"""Documents of .jsonl and .txt files, as a stream of bounded memory.

A file is cut at line ends into blocks of about a megabyte (`read_blocks`: cheap, done by one
process), and a block becomes documents (`parse_block`: UTF-8, JSON; done by whoever encodes them).

.jsonl: one object a line; a document is the value of a key, a string or a list of strings
(sentences, as Megatron-LM's tool takes them). Lines that hold nothing are passed over.

.txt: one document a line, as the text builder of Hugging Face's `datasets` reads it, which the
Ascend suites use; \\n, \\r\\n and \\r end a line. Empty lines are dropped; a line of spaces is a
document. To keep paragraphs together, put each document on a line of its own or use .jsonl.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tessel.errors import TesselError, UsageError
from tessel.runtime.files import require_path

SUFFIXES = (".jsonl", ".txt")
TEXT_KEY = "text"  # the key that .txt files are said to have
BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Text = str | list[str]


class Block(NamedTuple):
    """Whole lines of a file: their bytes, and the number (from 1) of the first."""

    path: str
    first_line: int
    data: bytes


class Document(NamedTuple):
    """One line of a file: its number (from 1), and the value of each key that was asked for."""

    line: int
    texts: tuple[Text, ...]


def check_inputs(paths: Sequence[str | Path], keys: Sequence[str]) -> list[Path]:
    """The input files, seen to exist, to be of a kind that is read here, and to fit the keys.

    Raises:
        UsageError: no file or no key, the same one twice, or other keys than "text" for .txt.
        TesselError: a file does not exist, is a folder, has another extension, is empty, or may not be read.
    """
    if not paths or not keys:
        raise UsageError("Name at least one --input file and at least one of --json-keys.")
    doubled = [key for i, key in enumerate(keys) if key in keys[:i]]
    if doubled:
        raise UsageError(f"--json-keys names {doubled[0]} twice; each key is written to a file of its own, once.")
    files = []
    for given in paths:
        path = require_path(given, "the input")
        if path.is_dir():
            raise TesselError(f"The input {path} is a folder; give its files ({', '.join(SUFFIXES)}).")
        if path.suffix not in SUFFIXES:
            raise TesselError(
                f"The input {path}: {path.suffix or 'no extension'} is not read; {' and '.join(SUFFIXES)} are. "
                'Convert it to one JSON object a line ({"text": "..."}), or to one document a line.'
            )
        if not os.access(path, os.R_OK):
            raise TesselError(f"The input {path} cannot be read: permission denied. Change its mode or its owner.")
        if path.stat().st_size == 0:
            raise TesselError(f"The input {path} is empty: there is no text to tokenize.")
        if path.suffix == ".txt" and list(keys) != [TEXT_KEY]:
            raise UsageError(f"--json-keys {' '.join(keys)}: {path} has lines, not keys; leave --json-keys out.")
        files.append(path)
    return files


def read_blocks(path: str | Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut a file at line ends into blocks of about `block_bytes`; a longer line is a block of its own."""
    line = 1
    with open(path, "rb") as file:
        while data := file.read(block_bytes):
            if not data.endswith(b"\n"):
                data += file.readline()
            yield Block(str(path), line, data)
            line += data.count(b"\n")


def parse_block(block: Block, keys: Sequence[str]) -> list[Document]:
    """The documents of a block, in order.

    Raises:
        TesselError: not UTF-8, not JSON, a key is missing, or its value is no text; names file and line.
    """
    text = _decode(block)
    if block.path.endswith(".txt"):
        # Universal newlines; no other character ends a line, so not splitlines().
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return [Document(block.first_line + i, (line,)) for i, line in enumerate(lines) if line]
    return [
        Document(block.first_line + i, _parse_line(line, block.path, block.first_line + i, keys))
        for i, line in enumerate(text.split("\n"))
        if line and not line.isspace()
    ]


def _decode(block: Block) -> str:
    data = block.data
    if block.first_line == 1:
        data = data.removeprefix(_BYTE_ORDER_MARK)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = block.first_line + data.count(b"\n", 0, error.start)
        raise TesselError(
            f"{block.path}, line {line}: not UTF-8 ({error.reason} at byte 0x{data[error.start]:02x}). "
            f"Convert the file, for instance: iconv -f GB18030 -t UTF-8 {block.path}"
        ) from error


def _parse_line(line: str, path: str, number: int, keys: Sequence[str]) -> tuple[Text, ...]:
    where = f"{path}, line {number}"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise TesselError(
            f"{where}: invalid JSON ({reason}{at}): {_excerpt(line)}. Each line must be one JSON object."
        ) from error
    if not isinstance(content, dict):
        raise TesselError(
            f"{where}: {_kind(content)}, where an object is expected, as in {{{json.dumps(keys[0])}: ...}}."
        )
    return tuple(_text_of(content, key, where) for key in keys)


def _text_of(content: dict[str, Any], key: str, where: str) -> Text:
    if key not in content:
        near = difflib.get_close_matches(key, content, n=3, cutoff=0.5) or sorted(content)[:8]
        has = f"it has {', '.join(near)}" if near else "it is empty"
        raise TesselError(f"{where}: the object has no key {key!r}; {has}. Choose with --json-keys.")
    value = content[key]
    sentences = value if isinstance(value, list) else [value]
    for sentence in sentences:
        if not isinstance(sentence, str):
            holds = f"a list with {_kind(sentence)}" if isinstance(value, list) else _kind(sentence)
            raise TesselError(f"{where}: {key!r} is {holds}, where text is expected. Mend the line or leave it out.")
        if not _is_unicode(sentence):
            raise TesselError(
                f"{where}: {key!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character. "
                "Mend the line or leave it out."
            )
    return value


def _is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; JSON's \\u escapes can spell what cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")

"""`--handler-name FILE.py:Class`: a class of the user's that says how a row is read.

The class is made without arguments, once in each worker, and has one of two methods:

    def convert(self, row: dict) -> dict | None
        {"messages": [{"role": ..., "content": ...}, ...], "system": ..., "tools": ...}, messages as OpenAI has them
        and the last one the answer, to be written in --prompt-type; or None to leave the row out.

    def encode(self, row: dict, tokenizer) -> dict | None
        {"input_ids": [...], "labels": [...]}, -100 where a token is not trained; `tokenizer` is that of transformers.

The file is run, and only when it is named so: give none that you would not run yourself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.converters import Dropped, MessagesConverter
from tessel.data.instruct.dialogue import Example
from tessel.data.instruct.encoder import InstructionEncoder
from tessel.data.instruct.mapping import OPENAI_TAGS, MessageColumns
from tessel.data.instruct.rendering import Rendered
from tessel.data.instruct.shorten import IGNORED
from tessel.data.instruct.vocabulary import Vocabulary, hf_of, plain_vocabulary
from tessel.data.rows import Row
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError, UsageError

_OPENAI = MessagesConverter(MessageColumns("messages", OPENAI_TAGS, "system", "tools"), free_order=True)


class OwnHandler:
    """The user's class, loaded where it is used: another process does not know it."""

    columns: tuple[str, ...] | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self._made: Any = None

    @property
    def made(self) -> Any:
        """The object of the user's class.

        Raises:
            UsageError: there is no such file or class, or it has neither method.
            TesselError: the file or the class fails.
        """
        if self._made is None:
            self._made = _make(self.name)
        return self._made

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self._made = state["name"], None

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns.

        Raises:
            TesselError: it fails; names what was raised.
        """
        try:
            return getattr(self.made, method)(*arguments)
        except TesselError:
            raise
        except Exception as error:  # It is not our code, and the row must be named.
            raise TesselError(f"{self.name} raises {type(error).__name__}: {error}") from error


class OwnConverter(OwnHandler):
    """A `Converter` by the user's method `convert`."""

    def __call__(self, values: Mapping[str, Any]) -> Example | Dropped:
        """What the class makes of a row."""
        said = self.call("convert", dict(values))
        if said is None:
            return Dropped(f"{self.name} leaves it out")
        if not isinstance(said, Mapping):
            raise TesselError(f'{self.name} returns {type(said).__name__}; a mapping with "messages" is needed')
        return _OPENAI(said)


class OwnEncoder(InstructionEncoder):
    """A `RowEncoder` by the user's method `encode`."""

    def __init__(self, handler: OwnHandler, tokenizer: Tokenizer, append_eod: bool) -> None:
        self._handler = handler
        self._hf = hf_of(tokenizer)
        self._own_vocabulary = plain_vocabulary(tokenizer)
        self._append_eod = append_eod
        self._additional = ()
        self.left_out = []

    @property
    def columns(self) -> tuple[str, ...] | None:
        """All."""
        return None

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as it is."""
        return self._own_vocabulary

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """See `InstructionEncoder`."""
        self.left_out = []
        rendered = []
        for row in rows:
            try:
                said = self._handler.call("encode", dict(row.values), self._hf)
                if said is None:
                    self._leave_out(row, f"{self._handler.name} leaves it out")
                else:
                    rendered.append(self._sample(said))
            except TesselError as error:
                raise RowError(row.number, str(error)) from error
        return self._arrays(rendered)

    def _sample(self, said: Any) -> Rendered:
        """A sample out of what the class returned."""
        if not isinstance(said, Mapping):
            said = {}
        ids, labels = said.get("input_ids"), said.get("labels")
        if not (_is_ids(ids) and _is_ids(labels)) or len(ids) != len(labels):
            raise TesselError(
                f'{self._handler.name}: "input_ids" and "labels" must be lists of integers, one as long as the other'
            )
        highest = self._own_vocabulary.vocab_size
        if any(not 0 <= i < highest for i in ids) or any(i != IGNORED and not 0 <= i < highest for i in labels):
            raise TesselError(f"{self._handler.name}: an id is not of the tokenizer's {highest:,} ids")
        end = [self._own_vocabulary.eod] if self._append_eod else []
        return Rendered(np.array([*ids, *end], np.int32), np.array([*labels, *end], np.int32))


def _is_ids(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def own_handler(name: str) -> OwnHandler:
    """The handler of FILE.py:Class; an `OwnConverter` where the class has `convert`.

    Raises:
        UsageError, TesselError: see `OwnHandler.made`.
    """
    handler = OwnConverter(name)
    return handler if hasattr(handler.made, "convert") else OwnHandler(name)


def _make(name: str) -> Any:
    path_name, _, class_name = name.rpartition(":")
    path = Path(path_name)
    if not path.is_file() or not class_name.isidentifier():
        raise UsageError(f"--handler-name {name}: there is no file {path}, or no class is named; write FILE.py:Class.")
    spec = importlib.util.spec_from_file_location(f"tessel_handler_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--handler-name {name}: {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # It is not our code.
        raise TesselError(f"--handler-name {name}: the file raises {type(error).__name__}: {error}") from error
    own = getattr(module, class_name, None)
    if not isinstance(own, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(
            f"--handler-name {name}: {path} has no class {class_name}; it has {', '.join(classes) or 'none'}."
        )
    if not (callable(getattr(own, "convert", None)) or callable(getattr(own, "encode", None))):
        raise UsageError(
            f"--handler-name {name}: the class needs a method convert(row) or encode(row, tokenizer); see the "
            "documentation of handlers."
        )
    try:
        return own()
    except Exception as error:  # It is not our code.
        raise TesselError(f"--handler-name {name}: making it raises {type(error).__name__}: {error}") from error

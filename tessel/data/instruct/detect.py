"""Which handler reads a file of dialogues, by the columns of its first row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tessel.data.readers import check_inputs, parse_rows, read_blocks
from tessel.data.rows import BadRow, Row
from tessel.errors import TesselError, UsageError
from tessel.runtime.log import log

if TYPE_CHECKING:
    from tessel.config.preprocess import PreprocessConfig

_QUESTIONS = ("instruction", "prompt", "question", "query")
_ANSWERS = ("output", "response", "answer", "completion")
_MESSAGES = ("messages", "conversations", "conversation")
# A block of the beginning of a file; more is read only if it holds no row.
_BLOCK_BYTES = 1 << 16


class Detected(NamedTuple):
    """A handler, and the columns that it does not read by itself, as --map-keys has them."""

    handler_name: str
    map_keys: dict[str, Any]


def with_handler(cfg: PreprocessConfig) -> PreprocessConfig:
    """`cfg` with a handler, chosen by the first row where --prompt-type is given and no --handler-name; and said.

    Raises:
        UsageError: the row is of no known format.
        TesselError: the input cannot be read, or holds no row.
    """
    if cfg.handler_name is not None or (cfg.prompt_type is None and cfg.prompt_type_path is None):
        return cfg
    row = next(first_rows(cfg))
    found = detect(row.values)
    mapping = {**found.map_keys, **json.loads(cfg.map_keys or "{}")}
    keys = json.dumps(mapping, ensure_ascii=False) if mapping else None
    log(f"rows are read by --handler-name {found.handler_name}" + (f" --map-keys '{keys}'" if keys else ""))
    return replace(cfg, handler_name=found.handler_name, map_keys=keys)


def first_rows(cfg: PreprocessConfig, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of the input, from the first on; with --on-error skip those that can be read.

    Raises:
        TesselError: the input cannot be read, or holds no row.
    """
    num_rows = 0
    for path in check_inputs(cfg.input, None, cfg.compatible):
        for block in read_blocks(path, _BLOCK_BYTES, columns, null_words=cfg.compatible == "mindspeed"):
            bad: list[BadRow] | None = [] if cfg.on_error == "skip" else None
            for row in parse_rows(block, columns, bad, lists=cfg.compatible == "pai-sft"):
                num_rows += 1
                yield row
    if not num_rows:
        raise TesselError(f"The input {' '.join(cfg.input)} holds no row.")


def detect(values: Mapping[str, Any]) -> Detected:
    """The handler for rows such as this.

    Raises:
        UsageError: the row is of no known format; shows its columns.
    """
    pairwise = "chosen" in values and "rejected" in values
    extra = {name: name for name in ("system", "tools") if name in values}
    for name in _MESSAGES:
        messages = values.get(name)
        if not isinstance(messages, Sequence) or not messages or not isinstance(messages[0], Mapping):
            continue
        if "role" in messages[0] and "content" in messages[0]:
            if pairwise:
                return Detected("SharegptStylePairwiseHandler", {"messages": name, "tags": _OPENAI, **extra})
            return Detected("OpenAIInstructionHandler", _unless_default({"messages": name}, "messages") | extra)
        if "from" in messages[0] and "value" in messages[0]:
            handler = "SharegptStylePairwiseHandler" if pairwise else "SharegptStyleInstructionHandler"
            return Detected(handler, _unless_default({"messages": name}, "conversations") | extra)
    question = next((name for name in _QUESTIONS if name in values), None)
    answer = next((name for name in _ANSWERS if name in values), None)
    if question is not None and (answer is not None or pairwise):
        mapping = {} if question == "instruction" else {"prompt": question}
        if not pairwise and answer != "output":
            mapping["response"] = str(answer)
        more = {name: name for name in ("system", "history", "tools") if name in values}
        handler = "AlpacaStylePairwiseHandler" if pairwise else "AlpacaStyleInstructionHandler"
        return Detected(handler, mapping | more)
    raise UsageError(
        f"The rows have the columns {', '.join(map(repr, values)) or 'none'}, which is no format that is known by "
        "itself; say how they are read with --handler-name (AlpacaStyleInstructionHandler, "
        "SharegptStyleInstructionHandler, ...) and --map-keys."
    )


_OPENAI = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
    "system_tag": "system",
}


def _unless_default(mapping: dict[str, Any], default: str) -> dict[str, Any]:
    return {} if mapping == {"messages": default} else mapping

"""--map-keys: which columns of a row hold what."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tessel.config.nearest import nearest
from tessel.errors import UsageError

ALPACA_KEYS = ("prompt", "query", "response", "history", "system", "tools", "chosen", "rejected")
SHAREGPT_KEYS = ("messages", "tags", "system", "tools", "chosen", "rejected", "kto_tag")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


@dataclass(frozen=True)
class AlpacaColumns:
    """Columns of an Alpaca row; None for one that is not read."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    system: str | None = None
    tools: str | None = None
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"


@dataclass(frozen=True)
class Tags:
    """Keys of a message, and the names of the roles in it."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


OPENAI_TAGS = Tags("role", "content", "user", "assistant", "tool", "function_call", "system")


@dataclass(frozen=True)
class MessageColumns:
    """Columns of a row of messages; None for one that is not read."""

    messages: str = "conversations"
    tags: Tags = Tags()
    system: str | None = None
    tools: str | None = None
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"


def parse_map_keys(text: str | None, allowed: tuple[str, ...]) -> dict[str, Any]:
    """The mapping of --map-keys: JSON, with keys out of `allowed` and names of columns as values.

    Raises:
        UsageError: it is something else.
    """
    if text is None:
        return {}
    try:
        mapping = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f'--map-keys is not JSON ({error}): {text!r}. Write it as \'{{"prompt": "question"}}\'.'
        ) from error
    if not isinstance(mapping, dict):
        raise UsageError(f'--map-keys {text}: a mapping is needed, such as {{"prompt": "question"}}.')
    for key, value in mapping.items():
        _check_key(key, allowed)
        if key != "tags" and not (value is None or isinstance(value, str)):
            raise UsageError(f"--map-keys: {key} is {value!r}; it must be the name of a column.")
    return mapping


def _check_key(key: str, allowed: tuple[str, ...]) -> None:
    if key not in allowed:
        close = nearest(key, allowed)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(allowed)}."
        raise UsageError(f"--map-keys: {key!r} is not a key of this format. {hint}")


def alpaca_columns(text: str | None, default: AlpacaColumns | None = None) -> AlpacaColumns:
    """Columns of Alpaca rows; an empty name leaves a column out.

    Raises:
        UsageError: --map-keys is no such mapping.
    """
    default = default if default is not None else AlpacaColumns()
    return replace(default, **{key: value or None for key, value in parse_map_keys(text, ALPACA_KEYS).items()})


def message_columns(text: str | None, default: MessageColumns) -> MessageColumns:
    """Columns and tags of rows of messages. A tag that is left out of `tags` is no tag, as in MindSpeed-LLM.

    Raises:
        UsageError: --map-keys is no such mapping.
    """
    mapping = parse_map_keys(text, SHAREGPT_KEYS)
    if mapping.pop("kto_tag", None):
        raise UsageError("--map-keys: kto_tag marks answers as good or bad, which no verb of tessel trains on.")
    tags = default.tags
    if "tags" in mapping:
        given = mapping.pop("tags")
        if not isinstance(given, dict):
            raise UsageError(f"--map-keys: tags is {given!r}; it must be a mapping of {', '.join(TAGS)}.")
        for key, value in given.items():
            _check_key(key, TAGS)
            if not isinstance(value, str):
                raise UsageError(f"--map-keys: {key} is {value!r}; it must be text.")
        for needed in ("role_tag", "content_tag"):
            if needed not in given:
                raise UsageError(
                    f"--map-keys: tags lacks {needed}, and tags that are left out count as none; give all of "
                    f"{', '.join(TAGS)} that the data has."
                )
        none: Any = None
        tags = Tags(**{tag: given.get(tag, none) for tag in TAGS})
    if "messages" in mapping and not mapping["messages"]:
        raise UsageError("--map-keys: messages must name the column of the messages.")
    columns: dict[str, Any] = {key: value or None for key, value in mapping.items()}
    return replace(default, tags=tags, **columns)

"""Rows of each format to examples, and what is wrong with rows."""

from __future__ import annotations

from typing import Any

import pytest

from tessel.data.instruct.converters import AlpacaConverter, Dropped, MessagesConverter
from tessel.data.instruct.dialogue import Example, Message
from tessel.data.instruct.mapping import (
    OPENAI_TAGS,
    MessageColumns,
    Tags,
    alpaca_columns,
    message_columns,
)
from tessel.errors import TesselError, UsageError

OPENAI = MessagesConverter(MessageColumns("messages", OPENAI_TAGS), free_order=True)


def says(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


def test_alpaca() -> None:
    convert = AlpacaConverter()
    assert convert({"instruction": "a", "input": "b", "output": "c"}) == Example(
        (Message("user", "a\nb"),), (Message("assistant", "c"),)
    )
    assert convert({"instruction": "a", "input": "", "output": "c", "system": "not mapped"}) == Example(
        (Message("user", "a"),), (Message("assistant", "c"),)
    )
    assert convert({"instruction": "a", "input": None, "output": ["c"]}).answers == (Message("assistant", "c"),)
    assert convert.columns == ("instruction", "input", "output")


def test_alpaca_with_history_and_system() -> None:
    convert = AlpacaConverter(alpaca_columns('{"history": "h", "system": "s", "query": ""}'))
    row = {"instruction": "q", "input": "unread", "output": "r", "h": [["q0", "r0"]], "s": "sys"}
    assert convert(row) == Example(
        (Message("user", "q0"), Message("assistant", "r0"), Message("user", "q")), (Message("assistant", "r"),), "sys"
    )
    assert convert({**row, "h": None, "s": None}) == Example((Message("user", "q"),), (Message("assistant", "r"),))
    assert convert({**row, "h": '[["q0", "r0"]]'}) == convert(row)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"instruction": "a"}, "there is no 'output'; the row has 'instruction'"),
        ({"output": "a"}, "there is no 'instruction'"),
        ({"instruction": 3, "output": "a"}, "instruction must be text, not 3"),
        ({"instruction": "a", "output": None}, "output must be text, not null"),
        ({"instruction": "a", "output": ["b", "c"]}, "holds 2 answers"),
        ({"instruction": "a", "output": "b", "h": [["q"]]}, r"h must be a list of \[question, answer\] pairs"),
        ({"instruction": "a", "output": "b", "h": "[["}, "h is neither a list nor JSON"),
        ({"instruction": "a", "output": "b", "h": 5}, "h must be a list"),
    ],
)
def test_alpaca_rows_that_are_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(TesselError, match=message):
        AlpacaConverter(alpaca_columns('{"history": "h"}'))(row)


def test_alpaca_rows_that_are_left_out() -> None:
    assert AlpacaConverter()({"instruction": "", "input": "", "output": "c"}) == Dropped("the prompt is empty")
    assert AlpacaConverter()({"instruction": "a", "output": ""}) == Dropped("the answer is empty")
    as_mindspeed = AlpacaConverter(as_mindspeed=True)
    assert as_mindspeed({"instruction": "a", "output": None}) == Dropped("there is no answer")
    assert as_mindspeed({"instruction": "", "output": ""}) == Example(
        (Message("user", ""),), (Message("assistant", ""),)
    )


def test_alpaca_preferences() -> None:
    convert = AlpacaConverter(pairwise=True)
    assert convert({"instruction": "a", "chosen": "b", "rejected": "c"}).answers == (
        Message("assistant", "b"), Message("assistant", "c"),
    )  # fmt: skip
    assert convert({"instruction": "a", "chosen": ["b", "x"], "rejected": ["x", "c"]}).answers == (
        Message("assistant", "b"), Message("assistant", "c"),
    )  # fmt: skip
    with pytest.raises(TesselError, match="there is no 'rejected'"):
        convert({"instruction": "a", "chosen": "b"})


def test_sharegpt() -> None:
    turns = says(("system", "s"), ("human", "q"), ("function_call", "{}"), ("observation", "o"), ("gpt", "r"))
    assert MessagesConverter()({"conversations": turns}) == Example(
        (Message("user", "q"), Message("function", "{}"), Message("observation", "o")),
        (Message("assistant", "r"),),
        "s",
    )
    mapped = message_columns('{"messages": "chat", "system": "sys", "tools": "tools"}', MessageColumns())
    row = {"chat": says(("human", "q"), ("gpt", "r")), "sys": "s", "tools": [{"name": "f"}]}
    assert MessagesConverter(mapped)(row) == Example(
        (Message("user", "q"),), (Message("assistant", "r"),), "s", '[{"name": "f"}]'
    )


@pytest.mark.parametrize(
    "turns, problem",
    [
        (says(("human", "q"), ("gpt", "r"), ("human", "q")), "the last message is of 'user'"),
        (says(("gpt", "q"), ("human", "r")), r"message 1 is of 'assistant'.*roles: assistant, user"),
        (says(("human", "q"), ("bot", "r")), "message 2 is of 'bot'"),
        ([], "there is no message"),
        (says(("system", "s")), "there is no message"),
    ],
)
def test_dialogues_that_take_no_turns(turns: list[dict[str, str]], problem: str) -> None:
    with pytest.raises(TesselError, match=problem):
        MessagesConverter()({"conversations": turns})
    left_out = MessagesConverter(as_mindspeed=True)({"conversations": turns})
    assert isinstance(left_out, Dropped)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": []}, "there is no 'conversations'; the row has 'messages'"),
        ({"conversations": "hello"}, "neither a list nor JSON"),
        ({"conversations": {"a": 1}}, "must be a list of messages"),
        ({"conversations": ["hello"]}, "must be a list of messages"),
        ({"conversations": [{"from": "human"}]}, "a message must hold text under 'value'"),
    ],
)
def test_messages_that_are_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(TesselError, match=message):
        MessagesConverter()(row)


def test_sharegpt_preferences() -> None:
    convert = MessagesConverter(pairwise=True)
    row = {
        "conversations": says(("human", "q")),
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    assert convert(row).answers == (Message("assistant", "yes"), Message("assistant", "no"))
    with pytest.raises(TesselError, match="a chosen or rejected message is no answer"):
        convert({**row, "chosen": {"from": "human", "value": "yes"}})
    with pytest.raises(TesselError, match="a question must be last"):
        convert({**row, "conversations": says(("human", "q"), ("gpt", "r"))})


def test_openai() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "o"},
        {"role": "assistant", "content": "r", "reasoning_content": "t"},
    ]
    assert OPENAI({"messages": messages}) == Example(
        (
            Message("user", "q"),
            Message("function", '[{"name": "f", "arguments": {"a": 1}}]'),
            Message("observation", "o"),
        ),
        (Message("assistant", "r", "t"),),
        "s",
    )
    with pytest.raises(TesselError, match="the last message is of 'user', and an answer must be last"):
        OPENAI({"messages": messages[:2]})


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[]", "a mapping is needed"),
        ('{"promt": "q"}', "'promt' is not a key of this format. Did you mean prompt"),
        ('{"prompt": 3}', "must be the name of a column"),
        ('{"messages": "m"}', "Known are prompt, query"),
    ],
)
def test_map_keys_of_alpaca(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        alpaca_columns(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"tags": {"role_tag": "role"}}', "tags lacks content_tag"),
        ('{"tags": "role"}', "tags is 'role'; it must be a mapping"),
        ('{"tags": {"role_tga": "role"}}', "'role_tga' is not a key"),
        ('{"tags": {"role_tag": 1}}', "must be text"),
        ('{"messages": ""}', "messages must name the column"),
        ('{"kto_tag": "label"}', "kto_tag marks answers"),
    ],
)
def test_map_keys_of_messages(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        message_columns(text, MessageColumns())


def test_tags_that_are_left_out_are_none() -> None:
    text = '{"tags": {"role_tag": "role", "content_tag": "text", "user_tag": "me", "assistant_tag": "it"}}'
    assert message_columns(text, MessageColumns()).tags == Tags("role", "text", "me", "it", None, None, None)

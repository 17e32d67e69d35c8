"""Answers that are held to a form, whatever the model would say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.conftest import serving

TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>\n{% endfor %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Oslo", "Łódź"]}},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "now", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time"}},
]


@pytest.fixture(scope="module")
def client(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("calling") / "tiny"
    shutil.copytree(served_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(folder) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 200} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": "the dog"}], **settings)


def is_weather(found: Any) -> bool:
    return list(found) == ["city", "warm"] and found["city"] in ("Oslo", "Łódź") and type(found["warm"]) is bool


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    answers = [ask(client, response_format=FORMAT, seed=seed, temperature=seed / 2).choices[0] for seed in range(3)]
    answers += ask(client, response_format=FORMAT, n=4, temperature=1.5, seed=9, top_p=0.9).choices
    assert all(is_weather(json.loads(one.message.content)) and one.finish_reason == "stop" for one in answers)
    assert len({one.message.content for one in answers}) > 1
    chunks = [chunk.choices[0] for chunk in ask(client, response_format=FORMAT, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == answers[0].message.content
    assert chunks[-1].finish_reason == "stop"
    plain = ask(client, response_format={"type": "text"}).choices[0].message.content
    assert plain == ask(client).choices[0].message.content != answers[0].message.content


def test_json_of_any_kind_is_an_object(client: openai.OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=40).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_function_that_must_be_called(choice: Any, client: openai.OpenAI) -> None:
    names = set()
    for seed in range(4):
        answer = ask(client, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1.0).choices[0]
        (call,) = answer.message.tool_calls
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
        names.add(call.function.name)
        arguments = json.loads(call.function.arguments)
        assert is_weather(arguments) if call.function.name == "weather" else arguments == {}
    assert names <= {"weather", "time"} if choice == "required" else names == {"weather"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema is given with type 'json_schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}},
            "The answer cannot be held to this form: .*objekt",
        ),
        ({"tool_choice": "required"}, "tool_choice asks for a function that is not in tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rain"}}},
            "asks for a function 'rain' that is not in tools",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": FORMAT}, "has no response_format"),
        (
            {"response_format": FORMAT, "extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
            "The answer begins with a thought",
        ),
    ],
)
def test_forms_that_are_refused(options: dict[str, Any], message: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **options)


def test_a_template_that_writes_calls_otherwise(served_folder: Path) -> None:
    with serving(served_folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        with pytest.raises(openai.BadRequestError, match="cannot be made to call: .* writes calls otherwise"):
            ask(client, tools=TOOLS[:1], tool_choice="required")

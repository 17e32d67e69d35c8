"""Prompt types: those that come along, a user's YAML, MindSpeed-LLM's templates.json, and what is wrong with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessel.data.instruct.templates import (
    Special,
    Template,
    Token,
    find_template,
    known_templates,
    load_template,
)
from tessel.errors import TesselError, UsageError
from tessel.report.templates import as_yaml

MINDSPEED_NAMES = """
chatglm2 chatglm3 chatglm3_system glm4 glm4_moe chatml chatml_de cpm default empty trl qwen_lf qwen qwen_r1 qwen_math_r1
llama3 mistral mixtral magistral gemma llama2 alpaca deepseek2 deepseek2-lite minicpm3 baichuan2 deepseek3 intern2
hunyuan qwen3 bailing_mini plm gpt_oss deepseek4
""".split()


def write(folder: Path, content: Any, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_every_name_of_mindspeed_is_known() -> None:
    assert sorted(MINDSPEED_NAMES) == sorted(known_templates())


def test_a_mistyped_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"qwne is not known\. Did you mean .*qwen"):
        find_template("qwne")
    with pytest.raises(UsageError, match="Dialogues need a template"):
        find_template(None)


@pytest.mark.parametrize("name", known_templates())
def test_a_template_is_shown_as_yaml_that_can_be_read_again(name: str, tmp_path: Path) -> None:
    template = known_templates()[name]
    again = load_template(write(tmp_path, as_yaml(template)))
    assert {**vars(again), "origin": ""} == {**vars(template), "origin": ""}


def test_a_users_yaml(tmp_path: Path) -> None:
    content = """
        base: qwen
        system: ["<sys>", "{{content}}"]
        user: [{special: bos}, "{{content}}", {token: "<|im_end|>"}]
        default_system: ""
    """
    template = load_template(write(tmp_path, content))
    assert template.name == "mine" and template.separator == ("\n",) and template.replace_eos
    assert template.system == ("<sys>", "{{content}}")
    assert template.user == (Special("bos"), "{{content}}", Token("<|im_end|>"))
    assert find_template("mine", str(tmp_path / "mine.yaml")) == template
    with pytest.raises(UsageError, match="holds the template mine; leave --prompt-type out"):
        find_template("qwen", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("just text", "holds text; a template is a mapping"),
        ("", "holds nothing"),
        ("user: [unclosed", "is no YAML or JSON"),
        ({"usr": "{{content}}"}, "unknown field 'usr'; did you mean user"),
        ({"user": "no placeholder"}, r"user lacks \{\{content\}\}"),
        ({"user": "{{content}} {{content}}"}, "more than once"),
        ({"user": "{{content}} {{name}}"}, r"user holds \{\{name\}\}; it may hold \{\{content\}\}, \{\{idx\}\}"),
        ({"separator": "{{content}}"}, "it may hold no placeholder"),
        ({"user": 3}, "user holds the slot 3; a slot is text"),
        ({"user": ["{{content}}", {"special": "pad"}]}, "a slot is text"),
        ({"user": {"slots": ["{{content}}"]}}, "a slot is text"),
        ({"kind": "modren"}, "kind is 'modren'; it must be one of classic, modern"),
        ({"tools": ["default"]}, "tools is .*; it must be one of default, none, "),
        ({"replace_eos": True}, "the first of stop_words"),
        ({"replace_eos": "yes"}, "it must be true or false"),
        ({"stop_words": "<|im_end|>"}, "it must be a list of texts"),
        ({"thought_words": ["<think>"]}, "a list of two texts"),
        ({"default_system": None}, "it must be text"),
        ({"base": "qwen9"}, "base 'qwen9' is no prompt type; known are qwen"),
        ({"name": 7}, "name 7 must be text"),
        ("!!timestamp x", "is no YAML or JSON"),
        ("a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nuser: [*b, *b]\n", "unknown field 'a'"),
        ({"kind": "llama2", "system": [{"token": "x"}, "{{content}}"]}, "one text slot"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TesselError, match=message) as error:
        load_template(path)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="cannot be read: No such file"):
        load_template(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"user: \xff\xfe")
    with pytest.raises(TesselError, match="is no YAML or JSON"):
        load_template(tmp_path / "bytes.yaml")


TEMPLATES_JSON = [
    {
        "name": "one",
        "format_user": {"slots": ["U {{content}}"]},
        "format_assistant": {"slots": ["{{content}}", ["eos_token"]]},
        "format_prefix": {"slots": [["bos_token"], {"token": "[gMASK]"}]},
        "format_separator": {"slots": ["\n"]},
        "format_tools": {"slots": list("qwen")},
        "default_system": "S",
        "stop_words": ["<end>"],
        "efficient_eos": False,
        "replace_eos": True,
        "force_system": True,
        "template_class": "LFDefaultTemplate",
    },
    {"name": "llama2_zh", "format_user": {"slots": ["{{content}}"]}, "efficient_eos": True},
]


def test_templates_json(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(TEMPLATES_JSON), "templates.json")
    assert find_template("one", str(path)) == Template(
        "one",
        "modern",
        user=("U {{content}}",),
        observation=("U {{content}}",),
        prefix=(Special("bos"), Token("[gMASK]")),
        separator=("\n",),
        tools="qwen",
        default_system="S",
        stop_words=("<end>",),
        replace_eos=True,
        origin="templates.json",
    )
    llama = find_template("llama2_zh", str(path))
    assert llama.kind == "llama2" and llama.assistant == ("{{content}}",)
    with pytest.raises(UsageError, match="choose one with --prompt-type"):
        find_template(None, str(path))
    with pytest.raises(UsageError, match="has none of this name; did you mean one"):
        find_template("onne", str(path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_user": "{{content}}"}, "format_user is .*; it must be"),
        ({"format_user": {"slots": [["pad_token"]]}}, "a slot is text"),
        ({"template_class": "Fancy"}, "template_class 'Fancy' is not known"),
        ({"format_smell": {"slots": []}}, "field 'format_smell' is not known"),
        ({"format_tools": 3}, "it must name a format of tools"),
        ({"format_tools": {"tool_format": "lang"}}, "tools is 'lang'; it must be one of"),
    ],
)
def test_a_damaged_templates_json(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, json.dumps([{**TEMPLATES_JSON[0], **change}]), "templates.json")
    with pytest.raises(TesselError, match=message):
        find_template("one", str(path))


def test_mutations_give_errors_in_words(tmp_path: Path) -> None:
    """A damaged file is a template or an error of ours; nothing else is raised."""
    generator = random.Random(5)
    sources = [as_yaml(template).encode() for template in known_templates().values()]
    sources.append(json.dumps(TEMPLATES_JSON).encode())
    path, num_refused = tmp_path / "mutated.yaml", 0
    for _ in range(600):
        data = bytearray(generator.choice(sources))
        for _ in range(generator.randrange(1, 6)):
            at = generator.randrange(len(data))
            change = generator.randrange(4)
            if change == 0:
                data[at] = generator.randrange(256)
            elif change == 1:
                del data[at : at + generator.randrange(1, 20)]
            elif change == 2:
                data[at:at] = data[at : at + generator.randrange(1, 30)]
            else:
                data[at:at] = generator.choice(
                    [b"{{content}}", b"]", b": ", b"\n- ", b"&a *a", b"null", b"!!python/x "]
                )
            data = data or bytearray(b"x")
        path.write_bytes(data)
        try:
            load_template(path, generator.choice([None, "one"]))
        except TesselError as error:
            num_refused += 1
            assert len(str(error)) > 20
    assert num_refused > 100

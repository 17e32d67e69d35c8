"""`tessel chat`: turns, commands, folded thoughts, interrupts; in a pipe and as on a terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tessel.cli import main
from tessel.config.chat import Templating
from tessel.data.instruct.dialogue import Dialogue, Message
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError
from tessel.generate import chat as chats
from tessel.generate import lockstep
from tessel.generate.batcher import Batcher
from tessel.generate.dialogues import ChatTemplate
from tessel.generate.engine import generate_tokens, load_model
from tessel.generate.request import Event, Request
from tessel.generate.sampling import GREEDY
from tessel.generate.text import TaggedText

MakeFolder = Callable[..., Path]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def folder(tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    found = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, max_position_embeddings=256)
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`talk(folder, lines, *flags)`: exit status, stdout, stderr of a chat through a pipe."""

    def run(folder: Path, lines: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = main(["chat", "--load", str(folder), "--device", "cpu", "--greedy", "--max-new-tokens", "6", *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def answer_of(folder: Path, *said: str, system: str = "", max_new_tokens: int = 6) -> str:
    """What the model says to a dialogue, by another road: the template's text, encoded and continued."""
    roles = ("user", "assistant")
    text = f"[system] {system}\n" if system else ""
    text += "".join(f"[{roles[i % 2]}] {one}\n" for i, one in enumerate(said)) + "[assistant] "
    tokenizer, (model, _) = HuggingFaceTokenizer(folder), load_model(folder)
    ids = tokenizer.encode(text)
    new = list(generate_tokens(model, ids, max_new_tokens=max_new_tokens, sampling=GREEDY, eos_ids=[305]))
    return tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]


def test_turns_are_written_by_the_chat_template(folder: Path, talk: Callable[..., Any]) -> None:
    status, out, err = talk(folder, "the lazy dog\nand the fox\n")
    first = answer_of(folder, "the lazy dog")
    second = answer_of(folder, "the lazy dog", first, "and the fox")
    assert (status, out) == (0, f"{first}\n{second}\n")
    assert f"template: the chat template of the tokenizer {folder}" in err


def test_a_turn_computes_what_is_new_alone(
    folder: Path, talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batchers: list[Batcher] = []

    class Watched(Batcher):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            batchers.append(self)

    monkeypatch.setattr(lockstep, "Batcher", Watched)
    talk(folder, "the lazy dog jumps over\nand the fox\nand so on\n")
    counts = batchers[0].counts
    assert counts.reused_tokens > counts.prompt_tokens / 3


def test_commands(folder: Path, talk: Callable[..., Any], tmp_path: Path) -> None:
    saved = tmp_path / "dialogue.json"
    status, out, err = talk(
        folder,
        f"/system be brief\nthe dog\n/save {saved}\n/clear\nthe dog\n/system none\n/clear\nthe dog\n/load {saved}\n"
        "the fox\n/help\n/exit\nnever read\n",
    )
    brief, plain = answer_of(folder, "the dog", system="be brief"), answer_of(folder, "the dog")
    later = answer_of(folder, "the dog", brief, "the fox", system="be brief")
    assert (status, out) == (0, f"{brief}\n{brief}\n{plain}\n{later}\n")
    assert "2 messages in" in err and "/thoughts" in err
    (row,) = json.loads(saved.read_text())
    assert [one["role"] for one in row["messages"]] == ["system", "user", "assistant"]


def test_lines_that_go_on_and_lines_that_are_empty(folder: Path, talk: Callable[..., Any]) -> None:
    status, out, _ = talk(folder, "\n  \nthe dog\\\nand the fox")
    assert (status, out) == (0, answer_of(folder, "the dog\nand the fox") + "\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(
    folder: Path, talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Batcher.step, []

    def pressed(self: Batcher) -> list[Event]:
        steps.append(None)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Batcher, "step", pressed)
    before = signal.getsignal(signal.SIGINT)
    status, out, err = talk(folder, "the dog\nand the fox\n", "--max-new-tokens", "40")
    first = answer_of(folder, "the dog", max_new_tokens=3)
    second = answer_of(folder, "the dog", first, "and the fox", max_new_tokens=40)
    assert (status, out) == (0, f"{first}\n{second}\n")
    assert "stopped" in err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_long_dialogue_loses_its_first_turns(folder: Path, talk: Callable[..., Any]) -> None:
    status, out, err = talk(folder, "the dog and the fox and the dog and the fox\n" * 10)
    assert status == 0 and out.count("\n") == 10
    assert "the context of 256 tokens is full: the first 1 turns are left out" in err
    status, out, _ = talk(folder, "the dog\nthe fox\nand\n", "--history-turns", "0")
    expected = [answer_of(folder, said) for said in ("the dog", "the fox", "and")]
    assert out.split("\n")[:3] == expected


def test_a_message_longer_than_the_context(folder: Path, talk: Callable[..., Any]) -> None:
    status, out, err = talk(folder, "dog " * 300 + "\nthe dog\n")
    assert (status, out) == (1, "")
    assert "more than the model's context of 256" in err


def test_a_prompt_type_instead_of_a_chat_template(folder: Path, talk: Callable[..., Any]) -> None:
    status, _, err = talk(folder, "the dog\n", "--prompt-type", "alpaca")
    assert status == 0 and "template: --prompt-type alpaca" in err
    (folder / "chat_template.jinja").unlink()
    status, out, err = talk(folder, "the dog\n")
    assert (status, out) == (1, "")
    assert "has no chat template" in err and "give --prompt-type NAME" in err
    assert talk(folder, "the dog\n", "--hf-chat-template", "--prompt-type", "qwen")[0] == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/foo\n", "/foo is no command"),
        ("/save\n", "needs the name of a file"),
        ("/load nowhere.json\n", "nowhere.json does not exist"),
    ],
)
def test_commands_that_cannot_be_done(lines: str, message: str, folder: Path, talk: Callable[..., Any]) -> None:
    status, _, err = talk(folder, lines)
    assert status == 1 and message in err


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"messages": [{"role": "assistant", "content": "hi"}]}'])
def test_a_file_that_is_no_dialogue(content: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(TesselError, match=r"file\.json"):
        chats.read_dialogue(path)


# ------------------------------------------------------------------------------------------ thoughts


class Scripted:
    """A batcher that says what it is told to, a piece a step."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def __call__(self, *_: Any, **__: Any) -> Scripted:
        return self

    def add(self, request: Request) -> int:
        self._left: Iterator[str] = iter(self._pieces)
        return 0

    def step(self) -> list[Event]:
        piece = next(self._left, None)
        return [Event(0, finish="stop")] if piece is None else [Event(0, token=1, text=piece)]


PIECES = ["<th", "ink>\nwell, ", "the dog", " barks\n</thi", "nk>", "\n\n", "It ", "barks <b>", "."]


def test_thoughts_are_folded(folder: Path, talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "Batcher", Scripted(PIECES))
    _, out, err = talk(folder, "the dog\n/thoughts\n")
    assert out == "It barks <b>.\n"
    assert "[thought: 4 words" in err and "well, the dog barks" in err
    _, out, _ = talk(folder, "the dog\n", "--show-thoughts")
    assert out == "\nwell, the dog barks\n\nIt barks <b>.\n"


def test_a_prompt_may_begin_the_thought(
    folder: Path, talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("[assistant] {%", "[assistant] <think>\n{%"))
    monkeypatch.setattr(lockstep, "Batcher", Scripted(["so", "</think>", "yes"]))
    assert talk(folder, "the dog\n")[1] == "yes\n"


def test_tags_are_found_wherever_the_text_is_cut() -> None:
    text = "a<c>b</c><c></c>d<c>e"
    for cut in range(1, len(text)):
        tagged = TaggedText("<c>", "</c>")
        pieces = [*tagged.push(text[:cut]), *tagged.push(text[cut:]), *tagged.finish()]
        assert "".join(piece for inside, piece in pieces if inside) == "be"
        assert "".join(piece for inside, piece in pieces if not inside) == "ad"
    assert TaggedText("<c>", "</c>").push(text)[:5] == [
        (False, "a"),
        (True, "b"),
        (False, ""),
        (True, ""),
        (False, "d"),
    ]


# ------------------------------------------------------------------------------------------ a terminal


def test_as_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typed = iter(["the dog", KeyboardInterrupt, "/foo", "the fox", EOFError])

    def type_(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    history = tmp_path / "state" / "history"
    flags = ["--greedy", "--max-new-tokens", "6", "--history-file", str(history)]
    assert main(["chat", "--load", str(folder), "--device", "cpu", *flags]) == 0
    captured = capsys.readouterr()
    first = answer_of(folder, "the dog")
    assert captured.out == f"{first}\n{answer_of(folder, 'the dog', first, 'the fox')}\n\n"
    assert "Ctrl-D or /exit leaves" in captured.err and "error: /foo is no command" in captured.err
    assert history.stat().st_mode & 0o077 == 0, "what was typed is for the user alone"


def test_tools_that_a_template_leaves_out(folder: Path) -> None:
    template = ChatTemplate.of(HuggingFaceTokenizer(folder), Templating())
    tools = json.dumps([{"name": "bark", "parameters": {}}])
    with pytest.raises(TesselError, match="the model is not told of tools: .* leaves out bark"):
        template.prompt(Dialogue((Message("user", "the dog"),), tools=tools))

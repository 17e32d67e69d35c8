"""`tessel preprocess --preview` and `tessel templates`, as a user sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tessel import commands
from tessel.data.instruct.pieces import Pieces
from tessel.data.instruct.preview import Shown, show
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError, UsageError
from tests.data.instruct.conftest import CHATML

Make = Callable[..., HuggingFaceTokenizer]


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preview(tokenizer: HuggingFaceTokenizer, data: str, *more: str) -> None:
    commands.preprocess(
        ["--input", data, "--output-prefix", "unwritten/x", "--tokenizer-name-or-path", str(tokenizer.source), *more]
    )


def test_preview(
    chat_tokenizer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(
        tmp_path / "a.jsonl",
        {"instruction": "hi", "input": "", "output": "hello\nyou"},
        {"instruction": "hi", "input": "", "output": ""},
        {"instruction": "bye", "input": "", "output": "ok"},
        {"instruction": "unseen", "input": "", "output": "unseen"},
    )
    preview(chat_tokenizer(), data, "--prompt-type", "qwen3", "--preview", "2")
    out = capsys.readouterr().out
    assert out.startswith("rows are read by --handler-name AlpacaStyleInstructionHandler\n")
    assert "<|im_start|>user↵\nhi<|im_end|>↵\n<|im_start|>assistant↵\n<think>↵\n↵\n</think>↵\n↵\n⟦hello↵\nyou" in out
    assert "row 2: the answer is empty" in out and "row 3: " in out and "⟦ok<|im_end|>↵\n⟧" in out
    assert "unseen" not in out and not (tmp_path / "unwritten").exists()


def test_preview_of_preferences_and_of_long_samples(
    chat_tokenizer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", {"instruction": "hi", "chosen": "yes", "rejected": "no"})
    preview(chat_tokenizer(), data, "--prompt-type", "hf", "--preview", "1", "--seq-length", "4")
    out = capsys.readouterr().out
    assert "row 1, chosen: " in out and "row 1, rejected: " in out and "do not fit --seq-length 4" in out


def test_preview_of_pai_records(chat_tokenizer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The role that begins the answer is trained there, too; a hand-made pack is one record."""
    row = {"instruction": "hi", "input": "", "output": "ok"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row, [row, row]]))
    preview(chat_tokenizer(), str(path), "--compatible", "pai-sft", "--seq-length", "64", "--preview", "2")
    out = capsys.readouterr().out
    one = "<|im_start|>user↵\nhi<|im_end|>↵\n⟦<|im_start|>assistant↵\nok<|im_end|>↵\n⟧"
    assert out.count(one) == 3 and "row 2: " in out


def test_preview_names_the_row_that_is_wrong(
    chat_tokenizer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "gpt", "value": "I begin"}, {"from": "human", "value": "no"}]
    good = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]
    data = write(tmp_path / "a.jsonl", {"conversations": turns}, {"conversations": good})
    argv = ("--prompt-type", "qwen", "--preview", "1")
    with pytest.raises(TesselError, match=r"a\.jsonl, row 1: message 1 is of 'assistant'.*I begin"):
        preview(chat_tokenizer(), data, *argv)
    preview(chat_tokenizer(), data, *argv, "--on-error", "skip")
    out = capsys.readouterr().out
    assert "row 1 is left out: message 1 is of 'assistant'" in out and "⟦ok<|im_end|>⟧" in out
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "hi", "output": ""}) + "\n")
    with pytest.raises(TesselError, match="No row of the input gives a sample"):
        preview(chat_tokenizer(), str(tmp_path / "b.jsonl"), *argv)


def test_trained_tokens_are_coloured(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    ids = tokenizer.encode("hi<|im_end|>")
    console = Console(force_terminal=True, color_system="standard", width=60)
    with console.capture() as captured:
        show(Shown("row 1", ids, [False] * (len(ids) - 1) + [True]), Pieces(tokenizer, {}), console)
    assert "\x1b[2mhi\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in captured.get()


def test_the_list_of_templates(capsys: pytest.CaptureFixture[str]) -> None:
    commands.templates([])
    out = capsys.readouterr().out
    assert "qwen             compared with MindSpeed-LLM's output\n" in out
    assert "chatglm3         as in LLaMA-Factory; not compared\n" in out


def test_show_gives_a_file_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.templates(["--show", "chatml"])
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    commands.templates(["--prompt-type-path", str(path)])
    assert capsys.readouterr().out == path.read_text()


def test_check(chat_tokenizer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """ChatML's template writes what chatml does, but for a system text; and it knows neither tools nor thoughts."""
    folder = str(chat_tokenizer().source)
    commands.templates(["--check", folder, "--prompt-type", "chatml"])
    out = capsys.readouterr().out
    assert "single: the same up to the end of the prompt type's text" in out
    assert "(end)" in out and "'\\n'  <- first difference" in out
    assert "prompt: the same " in out
    assert "tools: not compared: the chat template cannot write it" in out
    with pytest.raises(SystemExit) as error:
        commands.templates(["--check", folder, "--prompt-type", "qwen"])
    assert error.value.code == 1
    out = capsys.readouterr().out
    assert "single: differs from token 1 on:" in out
    assert "3 of 6 dialogues differ: a model that is trained so is served otherwise." in out


def test_check_of_all_puts_the_nearest_first(chat_tokenizer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    commands.templates(["--check", str(chat_tokenizer(CHATML).source)])
    table = capsys.readouterr().out.split("thinking\n")[1].splitlines()
    assert table[0].split() == ["chatml", "end", "end", "end", "same", "-", "-"]


def test_flags_of_templates_that_do_not_go_together(chat_tokenizer: Make) -> None:
    with pytest.raises(UsageError, match="two questions"):
        commands.templates(["--show", "qwen", "--check", "x"])
    with pytest.raises(UsageError, match="is for --check DIR"):
        commands.templates(["--prompt-type", "qwen"])
    with pytest.raises(UsageError, match="in the tokenizer"):
        commands.templates(["--show", "hf"])
    with pytest.raises(TesselError, match="has no chat template"):
        commands.templates(["--check", str(chat_tokenizer(None).source)])

"""`tessel demo` at a small size: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tessel import demo as module
from tessel.config.verbs import DemoConfig
from tessel.errors import TesselError, UsageError


def run_demo(capfd: pytest.CaptureFixture[str], **values: object) -> str:
    """What the demo and its commands print."""
    module.demo(DemoConfig(device="cpu", **values))  # type: ignore[arg-type]
    return capfd.readouterr().out


def record_commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Have the demo note its commands instead of running them."""
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(module, "_tessel", lambda verb, flags: ran.append((verb, list(flags))))
    return ran


def test_demo_writes_a_model_that_opens_and_goes_on_when_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "demo"
    out = run_demo(capfd, output=str(folder), train_iters=4)
    hf = folder / "run" / "hf"
    model = AutoModelForCausalLM.from_pretrained(hf)
    assert model.config.model_type == "qwen2"
    assert AutoTokenizer.from_pretrained(hf).eos_token == module.END_OF_TEXT
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    shown = [shlex.split(line[2:])[:2] for line in out.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    assert shown == [["tessel", verb] for verb in ("preprocess", "pretrain", "plot", "generate")]
    for path in (hf, folder / "loss.png", folder / "run"):
        assert f"  {path}  " in out
    for prompt in module.PROMPTS:
        assert prompt in out.partition("$ tessel generate")[2].partition("\n\n")[2]

    ran = record_commands(monkeypatch)
    again = run_demo(capfd, output=str(folder), train_iters=4)
    assert "going on from there" in again
    assert [verb for verb, _ in ran] == ["pretrain", "plot", "generate"]


def test_demo_takes_the_users_own_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "own.txt"
    text.write_text("\n".join(f"Line {number} of my own text, about nothing at all." for number in range(400)))
    ran = record_commands(monkeypatch)
    monkeypatch.setattr(module, "_summary", lambda *_: None)
    run_demo(capfd, data=str(text), output=str(tmp_path / "demo"))
    flags = dict(ran)
    assert flags["preprocess"][:2] == ["--input", str(text)]
    assert "Line 0 of my own" in flags["generate"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo" / "model")
    assert len(tokenizer.tokenize(" of my own text, about nothing at all.")) < 12


def test_prompts_are_the_beginnings_of_the_users_documents(tmp_path: Path) -> None:
    text = tmp_path / "own.jsonl"
    documents = ["too short", "one two three four five six", "--load is a flag and no prompt", "a b c d e"]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    assert module._beginnings(text) == ["one two three four five", "a b c d e"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"--output .*: it is there and no demo's folder\. Choose another"):
        module.demo(DemoConfig(output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_settings_do_not_go_on_with_an_earlier_demo(tmp_path: Path) -> None:
    assert not module._claim(tmp_path / "demo", DemoConfig(output="", train_iters=5))
    assert module._claim(tmp_path / "demo", DemoConfig(output="", train_iters=5))
    with pytest.raises(UsageError, match=r"other settings \(train_iters 5 -> 6\)"):
        module._claim(tmp_path / "demo", DemoConfig(output="", train_iters=6))


def test_data_that_is_not_there_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="--data: .*nowhere.txt does not exist"):
        module.demo(DemoConfig(data=str(tmp_path / "nowhere.txt"), output=str(tmp_path / "demo")))
    assert not (tmp_path / "demo").exists()


def test_what_can_be_seen_at_once_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.pdf").write_text("%PDF")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"data": str(tmp_path / "empty.txt")}, "empty.txt is empty"),
        ({"data": str(tmp_path / "text.pdf")}, "pdf is not read"),
        ({"data": str(tmp_path)}, "is a folder"),
        ({"train_iters": 0}, "--train-iters is 0"),
        ({"output": str(tmp_path / "text.pdf" / "demo")}, "--output .* lies below .*text.pdf, which is a file"),
    ]
    for changes, message in wrong:
        with pytest.raises(TesselError, match=message):
            module.demo(DemoConfig(**{"output": str(tmp_path / "demo")} | changes))
        assert not (tmp_path / "demo").exists()


def test_commands_can_be_copied() -> None:
    words = ["tessel", "generate", "--prompt", "it's a", "two words", "--load", "x" * 90, "--greedy"]
    typed = module._as_typed(words)
    assert "\\\n" in typed
    assert shlex.split(typed.replace("\\\n", " ")) == words


def test_a_command_that_fails_ends_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TesselError, match="tessel inspect ended with status 1"):
        module._tessel("inspect", ["/nowhere/at/all"])
    assert "/nowhere/at/all" in capfd.readouterr().err

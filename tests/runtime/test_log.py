"""Lines, warnings and progress."""

from __future__ import annotations

import pytest

from tessel.cli import main
from tessel.runtime import log as logs
from tessel.runtime import versions
from tessel.runtime.versions import check_versions, untested


def test_lines_go_to_stdout_and_warnings_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.log("a line")
    logs.warn_once("take care of this test")
    logs.warn_once("take care of this test")
    out, err = capsys.readouterr()
    assert out == "a line\n"
    assert err == "warning: take care of this test\n"


def test_progress_without_a_terminal_is_sparse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now_s[0])
    with logs.progress("reading", 2500) as bar:
        for _ in range(25):
            now_s[0] += 1.0
            bar.advance(100)
    assert capsys.readouterr().err == "reading: 1,000/2,500\nreading: 2,000/2,500\n"


@pytest.mark.parametrize(
    ("python", "torch", "named"),
    [
        ((3, 11), "2.11.0", []),
        ((3, 13), "2.13.0+cpu", []),
        ((3, 14), "2.13.0", ["Python 3.14"]),
        ((3, 12), "2.10.1", ["torch 2.10"]),
        ((3, 10), "2.14.0a0+git1234", ["Python 3.10", "torch 2.14"]),
    ],
)
def test_versions_outside_what_was_tested_are_named(python: tuple[int, int], torch: str, named: list[str]) -> None:
    sentences = untested(python, torch)
    assert [sentence.split(" is not")[0] for sentence in sentences] == named
    assert all("2.11 to 2.13" in sentence or "3.11 to 3.13" in sentence for sentence in sentences)


def test_this_environment_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    check_versions()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", ["pretrain", "generate"])
def test_verbs_that_use_torch_warn_of_its_version(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda package: "2.10.0")
    logs.warn_once.cache_clear()
    flags = {
        "pretrain": "--data-path nowhere --seq-length 8 --train-iters 1 --lr 1e-3",
        "generate": "--prompt x",
    }
    assert main([verb, "--load", "/nowhere", *flags[verb].split()]) == 1
    assert "warning: torch 2.10 is not a version that tessel was tested with" in capsys.readouterr().err

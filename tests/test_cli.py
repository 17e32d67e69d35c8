"""`tessel VERB`: verbs, errors, exit statuses."""

import os
import subprocess
import sys

import pytest

import tessel
from tessel import cli
from tessel.errors import TesselError, UsageError


def stand_in(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
    def run(argv: list[str]) -> None:
        raise raised

    monkeypatch.setitem(cli.VERBS, "doctor", run)


def test_help_lists_every_verb_on_a_line(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(cli.VERBS)
    assert all(len(line.split()) > 3 and len(line) < 100 for line in lines[2:])


def test_no_verb_at_all_is_a_usage_error_that_shows_them(capsys):
    assert cli.main([]) == 2
    assert "pretrain" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tessel {tessel.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretian"], "tessel: error: unknown verb pretian; nearest: pretrain\n"),
        (["--versoin"], "tessel: error: unknown flag --versoin; the verbs are "),
        (["pretrain", "--gloabl-batch-size", "8"],
         "tessel: error: unknown flag --gloabl-batch-size; nearest: --global-batch-size\n"),
        (["generate", "--load", "x"], "tessel: error: tessel generate needs --prompt; see tessel generate --help.\n"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_exits_with_2(argv, message, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.out == ""


def test_errors_of_a_verb_have_no_traceback(monkeypatch, capsys):
    stand_in(monkeypatch, TesselError("it is not there."))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "tessel: error: it is not there.\n"
    stand_in(monkeypatch, UsageError("one\ntwo"))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "tessel: error: one\ntessel: error: two\n"


def test_an_interrupt_exits_as_shells_have_it(monkeypatch, capsys):
    stand_in(monkeypatch, KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_verb_may_leave_with_a_status_of_its_own(monkeypatch):
    stand_in(monkeypatch, SystemExit(7))
    assert cli.main(["doctor"]) == 7


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    stand_in(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])
    assert "bug in tessel" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    """As in `tessel ... | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tessel", "demo", "--print-config"]
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

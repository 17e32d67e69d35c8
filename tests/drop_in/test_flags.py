"""The tables of flags: no flag of a suite is missing or unknown, and docs/FLAGS.md says what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.config.megatron import ACCEPTED, LATER
from tessel.config.schema import normal_flag
from tessel.drop_in import flags
from tessel.drop_in.flags import SUITES, Kind, judge, rows
from tessel.drop_in.rewrites import REWRITES


def names(suite: str) -> set[str]:
    """The suite's flags as this test knows them, apart from the package's list."""
    text = (Path(__file__).parent / "flags_of_suites.txt").read_text(encoding="utf-8")
    _, _, rest = text.partition(f"[{suite}]\n")
    return set(rest.partition("[")[0].split())


def missing(suite: str) -> set[str]:
    """Flags without a row, or whose row says nothing."""
    return names(suite) - {row.flag for row in rows(suite) if row.kind is not Kind.UNKNOWN and row.text}


@pytest.mark.parametrize("suite", SUITES)
def test_no_flag_is_missing_or_unknown(suite: str) -> None:
    assert len(names(suite)) > 150
    assert missing(suite) == set()


def test_a_row_that_is_removed_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [pair for pair in flags._listed("mindspeed") if pair != ("pretrain", "--use-flash-attn")]
    monkeypatch.setattr(flags, "_listed", lambda _: iter(listed))
    rows.cache_clear()
    assert missing("mindspeed") == {"--use-flash-attn"}
    monkeypatch.undo()
    monkeypatch.delitem(ACCEPTED, "--use-flash-attn")
    rows.cache_clear()
    assert missing("mindspeed") == {"--use-flash-attn"}
    monkeypatch.undo()
    rows.cache_clear()
    assert missing("mindspeed") == set()


def test_every_flag_of_the_reference_has_a_row(shared: Path) -> None:
    text = (shared / "reference" / "flags.md").read_text(encoding="utf-8")
    used = {normal_flag(flag) for flag in re.findall(r"^\| `(--[\w-]+)` \|", text, re.MULTILINE)}
    assert len(used) >= 214
    assert used <= {row.flag for row in rows("mindspeed")}


def test_kinds() -> None:
    assert judge("pretrain", "--lr").kind is Kind.SUPPORTED
    assert judge("pretrain", "--npu_deterministic").text == "--deterministic-mode"
    assert judge("pretrain", "--layernorm-epsilon").text == "--norm-epsilon"
    assert judge("pretrain", "--use-mcore-models").text == "there is one model implementation"
    assert judge("pretrain", "--ai-framework", ["mindspore"]).kind is Kind.SUPPORTED
    assert judge("convert", "--ai-framework", ["mindspore"]).kind is Kind.MEANINGLESS
    assert judge("pretrain", "--fp8-format").text == "not supported yet: fp8 training (use --bf16)"
    assert judge("pretrain", "--enable-high-availability").kind is Kind.REFUSED
    assert judge("convert", "--num-layers").kind is Kind.MEANINGLESS
    assert judge("convert", "--no-such-flag").kind is Kind.UNKNOWN


def test_rewrites_stand_for_flags_that_the_verb_has() -> None:
    for verb, table in REWRITES.items():
        for flag, rewrite in table.items():
            for argument in rewrite.result(["2"]):
                if argument.startswith("--") and argument != flag:
                    assert judge(verb, argument).kind is Kind.SUPPORTED, (verb, flag, argument)


def test_document_is_what_the_command_prints(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "--markdown"]) == 0
    assert (repository / "docs" / "FLAGS.md").read_text(encoding="utf-8") == capsys.readouterr().out


def test_table_of_one_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "mindspeed"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("MindSpeed-LLM: ")
    assert "unknown" not in printed
    assert re.search(r"^  --npu-deterministic +pretrain +alias +--deterministic-mode$", printed, re.MULTILINE)
    assert main(["flags", "mindsped"]) == 2
    assert "it must be one of mindspeed, modellink, pai, megatron" in capsys.readouterr().err


def test_what_is_refused_is_not_accepted_too() -> None:
    assert not set(LATER) & set(ACCEPTED)

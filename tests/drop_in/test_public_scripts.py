"""Every example script of the suites' public repositories has a command of tessel.

The repositories are read where they are and not copied: TESSEL_SUITES names a folder with checkouts of MindSpeed-LLM
2.3.0 (mindspeed-llm), ModelLink 1.0.RC2 (modellink) and Pai-Megatron-Patch (pai).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tessel.drop_in.flags import Kind
from tessel.drop_in.migrate import migrated

FAMILIES = ("qwen25", "qwen3", "qwen3_moe", "llama2", "llama3", "llama31", "llama32", "llama33")
IN_DROP_IN = {
    "mindspeed-llm": ("qwen25", "qwen3", "qwen3_moe", "llama2", "llama3"),
    "modellink": ("llama2",),
}
NOT_THERE = {
    "ckpt_convert_llama2_lora2hf.sh",
    "ckpt_convert_llama2_mg2mg_lora.sh",
    "tune_llama2_7b_lu_lora_ptd.sh",
}
"""docs/SCRIPTS.md says what stands in their place."""
_HEAD, _TAIL = "1 8 1e-5 1e-6 128 128 bf16 1 1 1", "true true true false false false 100000 d d m 10000 100 o"
PAI = {
    "examples/qwen2_5/run_mcore_qwen.sh": f"dsw 0.5B {_HEAD} {_TAIL}",
    "examples/qwen3/run_mcore_qwen3.sh": f"dsw A3B {_HEAD} 1 1 {_TAIL}",
}


@pytest.fixture
def suites() -> Path:
    folder = os.environ.get("TESSEL_SUITES")
    if folder is None:
        pytest.skip("no checkouts of the suites: TESSEL_SUITES is not set")
    return Path(folder)


def check(script: Path, suite: str, arguments: str = "") -> None:
    found, _ = migrated(script.read_text(encoding="utf-8", errors="replace"), tuple(arguments.split()), suite)
    assert found, script
    for one in found:
        assert one.commands, (script, one.remarks)
        assert Kind.UNKNOWN not in one.dropped, (script, one.remarks)
        assert not any("would say" in remark for remark in one.remarks), (script, one.remarks)


@pytest.mark.parametrize("family", FAMILIES)
def test_mindspeed(suites: Path, family: str) -> None:
    scripts = sorted((suites / "mindspeed-llm" / "examples" / "mcore" / family).glob("*.sh"))
    assert len(scripts) > 5
    for script in scripts:
        check(script, "mindspeed")


def test_modellink(suites: Path) -> None:
    scripts = sorted((suites / "modellink" / "examples" / "llama2").glob("*.sh"))
    assert len(scripts) > 15
    for script in scripts:
        check(script, "modellink")


def test_names_are_those_of_drop_in(suites: Path, repository: Path) -> None:
    missing = set()
    for suite, families in IN_DROP_IN.items():
        for family in families:
            place = Path("examples", "mcore", family) if suite == "mindspeed-llm" else Path("examples", family)
            theirs = {path.name for path in (suites / suite / place).glob("*.sh")}
            # Of names that differ in case alone, the one with a small b is there.
            ours = {path.name.lower() for path in (repository / "drop_in" / suite / place).glob("*.sh")}
            missing |= {name for name in theirs if name.lower() not in ours}
    assert missing == NOT_THERE


@pytest.mark.parametrize("script", PAI)
def test_pai(suites: Path, script: str) -> None:
    check(suites / "pai" / script, "pai", PAI[script])

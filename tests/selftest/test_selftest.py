"""`tessel selftest`: its report, what it says of wrong kernels, and the document that follows from reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.cli import main
from tessel.model import kernels as table
from tessel.model.layers import gated
from tessel.selftest import kernels, speed, support, training
from tessel.selftest.result import Check, check
from tessel.selftest.support import NOT_YET

CPU = torch.device("cpu")


def test_every_row_passes_or_says_why_not() -> None:
    found = {check.name: check for check in kernels.run(CPU)}
    assert not [check for check in found.values() if check.status == "failed"]
    passed = {name for name, check in found.items() if check.status == "passed"}
    operations = {name.partition(":")[0] for name in passed}
    assert {*table.OPERATIONS, "attention of blocks", "loss in chunks", "AdamW"} <= operations
    assert found["attention: flash"].status == "skipped" and "cpu" in found["attention: flash"].detail


def wrong_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up) + (up - up.detach()) * 0.1


def off_by_a_little(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up) * 1.001


def not_a_number(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up) * float("nan")


def not_there(gate: Tensor, up: Tensor) -> Tensor:
    raise NotImplementedError("no such operator\nand more")


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (wrong_gradient, "above 2e-05"),
        (off_by_a_little, "1.0e-03 in float32 is above"),
        (not_a_number, "nan"),
        (not_there, "NotImplementedError: no such operator"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, kernel: Any, words: str) -> None:
    monkeypatch.setattr(kernels, "OPERATIONS", {"swiglu": {"ours": kernel}})
    found = next(kernels.run(CPU))
    assert found.status == "failed" and words in found.detail and "\n" not in found.detail


def test_a_run_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"dense-fp32": [3.0, 2.0], "dense-fp32-plain": [3.0, 2.001]}
    monkeypatch.setattr(training, "_losses", lambda folder, name, *rest: losses[name])
    found = check("training", "x", lambda: training._parity(tmp_path, CPU, "dense", "fp32"))
    assert found.status == "failed" and "largest difference 5.0e-04" in found.detail


def test_shapes_of_a_model() -> None:
    from tessel.model.catalog import known_model

    found = speed.products(known_model("Qwen2.5-7B"))
    assert found["keys"] == (3584, 512) and found["gate"] == (3584, 18944) and found["head"] == (3584, 152064)


@pytest.mark.slow
def test_all_of_it_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["selftest", "--device", "cpu", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert {check["part"] for check in report["checks"]} == {"kernels", "collectives", "memory", "training", "speed"}
    assert all(check["name"] in out for check in report["checks"])
    assert report["device"] == "cpu" and report["versions"]["torch"] == torch.__version__


def test_a_failure_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    for status, code in (("passed", 0), ("failed", 1)):
        monkeypatch.setattr(kernels, "run", lambda device, s=status: iter([Check("kernels", "a", s, "b")]))
        assert main(["selftest", "--device", "cpu", "--parts", "kernels", "--output", str(file)]) == code
        assert f"1 {status} in" in capsys.readouterr().out
        assert json.loads(file.read_text())["checks"][0]["status"] == status


def test_the_document_is_what_the_reports_say(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To mend it: `tessel selftest --markdown docs/selftest/*.json > docs/SUPPORT.md`."""
    reports = sorted(str(file) for file in (repository / "docs" / "selftest").glob("*.json"))
    assert main(["selftest", "--markdown", *reports]) == 0
    printed = capsys.readouterr().out
    assert printed == (repository / "docs" / "SUPPORT.md").read_text(encoding="utf-8")
    assert f"| {NOT_YET} | {NOT_YET} |" in printed and "passed on" in printed
    assert not any(
        check["status"] == "failed" for file in reports for check in json.loads(Path(file).read_text())["checks"]
    )


@pytest.mark.parametrize(("readme", "words"), [("README.md", support.ENGLISH), ("README_zh.md", support.CHINESE)])
def test_the_readmes_have_the_short_table(repository: Path, readme: str, words: support.Words) -> None:
    """To mend it: the table that this prints where it fails goes into the README."""
    reports = [json.loads(file.read_text()) for file in sorted((repository / "docs" / "selftest").glob("*.json"))]
    assert "\n".join(support.summary(reports, words)) in (repository / readme).read_text(encoding="utf-8")


def test_the_short_table_says_what_ran() -> None:
    def report(*rows: tuple[str, str]) -> dict[str, Any]:
        checks = [{"part": part, "status": status} for part, status in rows]
        versions = {"torch": "2.13.0", "torch_npu": "2.13.0"}
        return {"device": "npu", "device_name": "Ascend910B3", "versions": versions, "checks": checks}

    rows = (("kernels", "passed"), ("kernels", "skipped"), ("collectives", "failed"), ("collectives", "passed"),
            ("memory", "skipped"))  # fmt: skip
    _, _, *lines = support.summary([report(*rows)], support.ENGLISH)
    assert [line.split(" | ")[-1].removesuffix(" |") for line in lines] == [
        "passed on Ascend910B3 with torch 2.13.0, torch_npu 2.13.0",
        "**failed** on Ascend910B3 with torch 2.13.0, torch_npu 2.13.0",
        NOT_YET,
        NOT_YET,
    ]


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text("[1]")
    assert main(["selftest", "--markdown", str(file)]) == 1
    assert "it is no report; `tessel selftest --output FILE` writes one" in capsys.readouterr().err
    file.write_text("{")
    assert main(["selftest", "--markdown", str(file)]) == 1
    assert "cannot be read as JSON" in capsys.readouterr().err
    assert main(["selftest", "--markdown", str(file), "--output", "x"]) == 2
    assert "keep one of them" in capsys.readouterr().err

"""What `tessel doctor` finds, and what it says of what is missing."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tessel.config.verbs import DoctorConfig
from tessel.report import doctor


def test_report_names_versions_and_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    doctor.doctor(DoctorConfig())
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for label in ("python", "torch", "transformers", "cores", "memory", "disk", "device", "FlashAttention"):
        assert any(line.split()[0] == label for line in out.splitlines()), label
    assert "Every verb has what it needs." in out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(DoctorConfig(json=True))
    data = json.loads(capsys.readouterr().out)
    assert data["packages"]["torch"]
    assert data["disk"]["free_bytes"] > 0
    assert data["accelerator"]["device"]


def test_missing_packages_are_named_with_verb_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    gone = ("matplotlib", "wandb", "torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find_spec(name))
    report = doctor.examine()
    lines = report.lines()
    assert "missing: matplotlib, which plot, demo need (pictures): pip install matplotlib" in lines
    assert "optional: wandb, for --wandb-project: pip install 'tessel[wandb]'" in lines
    assert "Every verb has what it needs." not in lines
    assert report.data["accelerator"] is None
    assert {entry["package"] for entry in report.data["missing"]} >= set(gone)


def test_a_full_disk_and_an_untested_torch_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(".")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage._replace(free=10**6))
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "2.10.0")
    lines = doctor.examine().lines()
    assert any(line.startswith("warning: Less than 2 GB of disk") for line in lines)
    assert any(line.startswith("warning: torch 2.10 is not a version") for line in lines)

"""What is found of an Ascend machine's software, what is wrong with it, and environment variables of the guides."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.errors import TesselError
from tessel.report import doctor
from tessel.runtime import ascend
from tessel.runtime import device as devices
from tests.npu import stand_ins

SOURCED = {"ASCEND_HOME_PATH": "x", "ATB_HOME_PATH": "x"}


def install(root: Path, cann: str = "8.5.0") -> Path:
    """The files that Huawei's installers leave, with the lines that are read."""
    files = {
        "driver/version.info": "Version=25.2.0\nascendhal_version=7.35.23",
        "firmware/version.info": "Version=7.7.0.6.236\n",
        "ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info": f"package_name=x\nversion={cann}\n",
        "ascend-toolkit/latest/opp/version.info": f"Version={cann}\n",
        "nnal/atb/latest/version.info": f"Ascend-cann-atb : {cann}\nversion: {cann}\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_whole_installation_has_no_problems(tmp_path: Path) -> None:
    root = install(tmp_path)
    assert ascend.installed(root) == {
        "driver": "25.2.0", "firmware": "7.7.0.6.236", "CANN toolkit": "8.5.0", "kernels": "8.5.0", "nnal": "8.5.0"
    }  # fmt: skip
    assert ascend.problems("2.12.0", "2.12.0+cpu", root, SOURCED) == []
    assert ascend.problems("2.12.0rc1", "2.12.0", root, SOURCED) == []


def test_each_problem_says_what_to_type(tmp_path: Path) -> None:
    root = install(tmp_path, "8.1.RC1")
    (root / "nnal/atb/latest/version.info").unlink()
    found = ascend.problems("2.11.0", "2.12.0", root, {})
    assert found == [
        f"CANN toolkit 8.1.RC1 is not in the environment: source {root}/cann/set_env.sh",
        f"no nnal under {root}: install the one of your CANN version (docs/ASCEND.md)",
        "torch_npu 2.11.0 is not the one of torch 2.12.0: pip install torch-npu==2.12.0",
        "CANN 8.1.RC1 is older than 8.5, which torch_npu names for torch 2.11: update it",
    ]
    assert "torch_npu is missing: pip install torch-npu==2.13.0" in ascend.problems(None, "2.13.0+cpu", root, SOURCED)
    assert len(ascend.problems(None, "2.13.0", tmp_path / "empty", {})) == len(ascend.PARTS) + 1


def test_the_script_that_is_there_is_named(tmp_path: Path) -> None:
    root = install(tmp_path)
    (root / "ascend-toolkit/set_env.sh").touch()
    assert any("source" in line and "ascend-toolkit" in line for line in ascend.problems("2.12.0", "2.12.0", root, {}))


def test_versions_that_belong_together(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ascend.matching("2.12.0+cpu") == "torch 2.12.0, torch_npu 2.12.0, CANN 8.5.0"
    assert "the CANN that torch_npu's README names" in ascend.matching("2.13.0")
    text = (repository / "docs" / "ASCEND.md").read_text(encoding="utf-8")
    assert all(f"| {torch}.0 | {torch}.0 | {cann} |" in text for torch, cann in ascend.MATCHING.items())
    monkeypatch.setattr(ascend, "has_devices", lambda: True)
    line = next(line for line in doctor.examine().lines() if "belong together" in line)
    assert f"torch_npu {str(torch.__version__).partition('+')[0]}" in line


def test_a_version_that_a_file_does_not_say(tmp_path: Path) -> None:
    (install(tmp_path) / "driver/version.info").write_text("nothing\n")
    assert ascend.installed(tmp_path)["driver"] == "unknown"


def test_variables_that_do_nothing_are_named() -> None:
    given = {"HCCL_CONNECT_TIMEOUT": "1200", "NPUS_PER_NODE": "8", "PATH": "x"}
    assert ascend.remarks(False, given) == [
        "environment variables without effect here: HCCL_CONNECT_TIMEOUT, NPUS_PER_NODE (it is --nproc-per-node here)"
    ]
    assert ascend.remarks(True, given) == [
        "environment variables without effect here: NPUS_PER_NODE (it is --nproc-per-node here)"
    ]
    assert ascend.remarks(False, {"PATH": "x"}) == []


def test_every_variable_of_the_guides_has_a_row(shared: Path) -> None:
    text = (shared / "reference" / "capabilities.md").read_text(encoding="utf-8")
    row = text.partition("## 1M.")[2].partition("\n\n")[2].partition(". All but")[0]
    names = {name.split()[0] for name in row.split(", ")}
    # These two are read on every device.
    assert names - ascend.VARIABLES.keys() == {"CUDA_DEVICE_MAX_CONNECTIONS", "GLOO_SOCKET_IFNAME"}


def test_doctor_shows_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = (ascend.installed(install(tmp_path)), ["torch_npu is missing: pip install torch-npu==2.13.0"])
    monkeypatch.setattr(devices, "vendor_report", lambda: report)
    lines = doctor.examine().lines()
    assert any(line.split() == ["CANN", "toolkit", "8.5.0"] for line in lines)
    assert "device: torch_npu is missing: pip install torch-npu==2.13.0" in lines


def test_nothing_is_said_where_there_is_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "has_devices", lambda: False)
    assert devices.vendor_report() is None
    monkeypatch.setattr(ascend, "has_devices", lambda: True)
    report = devices.vendor_report()
    assert report is not None and any("torch_npu is missing" in line for line in report[1])


def test_a_plugin_that_cannot_be_imported_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(TesselError, match="libhccl.so.*Source CANN's set_env.sh"):
        devices.load_plugins()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_plugin_version", lambda: "2.11.0")
        with pytest.raises(TesselError, match=r"libhccl.so.*torch_npu 2.11.0 is not the one of torch.*pip install"):
            devices.load_plugins()
    accelerator = doctor.examine().data["accelerator"]
    assert accelerator["device"] == "none" and "set_env.sh" in accelerator["description"]


class Npu:
    type = "npu"


def test_compilation_is_off_where_it_has_no_back_end() -> None:
    assert devices.compile_backend(torch.device("cpu")) == ("inductor", None)
    backend, reason = devices.compile_backend(Npu())  # type: ignore[arg-type]
    assert backend is None
    assert reason == ("torch.compile needs torchair on Ascend NPUs, and it cannot be used (No module named 'torchair')")


def test_compilation_goes_through_torchair_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    torchair = types.ModuleType("torchair")
    torchair.CompilerConfig = lambda: "as it is"  # type: ignore[attr-defined]
    torchair.get_npu_backend = lambda *, compiler_config: ("backend", compiler_config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchair", torchair)
    assert devices.compile_backend(Npu()) == (("backend", "as it is"), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_kept", [True, False])
def test_the_profiler_is_set_by_mindspeeds_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_kept: bool
) -> None:
    made = stand_ins.install(monkeypatch).made
    profiler, reason = devices.vendor_profiler(Npu())  # type: ignore[arg-type]
    assert profiler is not None and reason.startswith("torch_npu's profiler")
    recording = profiler(
        tmp_path, "rank-3", level="level1", export_type="db", data_simplification=True, with_cpu=False,
        with_stack=False, with_memory=True, record_shapes=True,
    )  # fmt: skip
    recording.start()
    recording.stop(is_kept=is_kept)
    (recorded,) = made
    assert recorded.calls == ["start", "stop"]
    assert recorded.activities == ["NPU"] and recorded.recorded == (True, True, False)
    assert recorded.config is not None
    assert recorded.config.given == ("Level1", "ACL_AICORE_PIPE_UTILIZATION", True, "db")
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3_20260101_ascend_pt"] * is_kept

"""docker/run.sh: what it asks docker for, with a stub in docker's place and made-up devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "docker" / "run.sh"
ASCEND = ["dev/davinci0", "dev/davinci1", "dev/davinci10", "dev/davinci_manager", "dev/hisi_hdc", "dev/devmm_svm"]


def asked(tmp_path: Path, devices: Sequence[str], *command: str, **variables: str) -> tuple[list[str], str]:
    """docker's arguments on a machine with these devices, and what the script says."""
    host, tools = tmp_path / "host", tmp_path / "tools"
    (host / "dev").mkdir(parents=True)
    tools.mkdir()
    for name in devices:
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).touch()
    stub = tools / "docker"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HOST": str(host), **variables}
    done = subprocess.run(
        ["bash", str(SCRIPT), *command],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


def test_npus_and_what_the_guide_mounts(tmp_path: Path) -> None:
    words, said = asked(
        tmp_path, [*ASCEND, "usr/local/Ascend/driver/version.info", "usr/local/sbin/x"], "tessel", "doctor"
    )
    assert [word for word in words if word.startswith("--device")] == [
        "--device=/dev/davinci0",
        "--device=/dev/davinci1",
        "--device=/dev/davinci10",
        "--device=/dev/davinci_manager",
        "--device=/dev/hisi_hdc",
        "--device=/dev/devmm_svm",
    ]
    mounts = [words[at + 1] for at, word in enumerate(words) if word == "-v"]
    assert mounts == [
        f"{tmp_path}:/workspace",
        "/usr/local/Ascend/driver:/usr/local/Ascend/driver:ro",
        "/usr/local/sbin:/usr/local/sbin:ro",
    ]
    assert {"--net=host", "--shm-size=64g"} <= set(words)
    assert words[-3:] == ["tessel-ascend", "tessel", "doctor"]
    assert said == ""


@pytest.mark.parametrize("devices", [ASCEND, ["dev/nvidia0"], []])
def test_it_is_never_privileged_and_has_no_terminal_that_is_not_there(tmp_path: Path, devices: list[str]) -> None:
    words, _ = asked(tmp_path, devices)
    assert not {"--privileged", "-it", "--cap-add"} & set(words)


def test_gpus(tmp_path: Path) -> None:
    words, said = asked(tmp_path, ["dev/nvidia0", "dev/nvidiactl"], "tessel", "demo")
    assert words[words.index("--gpus") + 1] == "all"
    assert words[-3:] == ["tessel", "tessel", "demo"]
    assert said == ""


def test_a_machine_without_accelerators(tmp_path: Path) -> None:
    words, said = asked(tmp_path, ["dev/davinci_manager"], MOUNTS="/data:/models", IMAGE="mine", SHM_SIZE="8g")
    assert not [word for word in words if word.startswith("--device") or word == "--gpus"]
    assert words[-6:] == ["-v", "/data:/data", "-v", "/models:/models", "mine", "bash"]
    assert "--shm-size=8g" in words
    assert "no accelerator under /dev: on the CPU" in said


def test_a_driver_that_is_not_loaded_is_said(tmp_path: Path) -> None:
    _, said = asked(tmp_path, ["dev/davinci0", "dev/hisi_hdc", "dev/davinci_manager"])
    assert said.strip() == "run.sh: /dev/devmm_svm is missing: is Huawei's driver loaded?"

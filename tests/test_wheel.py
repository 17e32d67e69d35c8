"""The wheel works without the checkout: built, installed alone, and the demo run from it.

The virtual environment sees the installed dependencies (torch alone would take minutes to install
anew), through a .pth file that names their folder; the checkout is an editable install, and an
editable install's own .pth files are not followed from there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from the checkout, with nothing of it on the search path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_licence_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tessel"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tessel").rglob("*.py")}
    assert sources <= set(names)


def test_the_demo_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    libraries = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(libraries) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import tessel; print(tessel.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(environment)

    out = run(environment / "bin" / "tessel", "demo", "--train-iters", "4", "--device", "cpu", cwd=tmp_path)
    assert (tmp_path / "tessel-demo" / "run" / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "tessel-demo" / "loss.png").is_file()
    assert "The loss went from" in out

"""The real torch_npu on a machine without CANN, for its declarations: `python tests/npu/package.py FOLDER`.

Downloads the wheel of the installed torch's version into FOLDER/site, and links libraries of CANN's names into
FOLDER/lib in which every function returns 0. `import torch_npu` then works, and operators have the declarations that
they have on an NPU; none can be called. Needs pip, gcc and nm. Does nothing where FOLDER holds it already.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

# Whatever libtorch itself is linked against gives symbols, too.
_LINKED = re.compile(r"=> (/\S+\.so\S*)")
_NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")
_ALL_FUNCTIONS = "libascendcl.so"


def make(folder: Path) -> str:
    """Fill `folder`; a line that says what it holds, or ends the program with what stands against it."""
    release = torch.__version__.partition("+")[0]
    version = f"torch_npu {release} for Python {platform.python_version()}"
    stamp = folder / "version"
    if stamp.exists() and stamp.read_text() == version:
        return f"{version} is in {folder}"
    missing = [tool for tool in ("gcc", "nm", "readelf", "ldd") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)} not found; stand-ins for CANN's libraries are made with them.")
    shutil.rmtree(folder, ignore_errors=True)
    site, libraries = folder / "site", folder / "lib"
    for made in (site, libraries):
        made.mkdir(parents=True)
    _download(release, folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    _stand_in(sorted(site.rglob("*.so*")), libraries)
    stamp.write_text(version)
    return f"{version} lies in {folder}"


def _download(release: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(folder), f"torch-npu=={release}"], capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise SystemExit(
            f"error: the wheel torch-npu=={release} cannot be downloaded for this Python and machine; pip says: {said}"
        )


def _stand_in(objects: list[Path], libraries: Path) -> None:
    """Every library that the package's objects need and nobody has; the first of them has all functions."""
    torch_libraries = sorted((Path(torch.__file__).parent / "lib").glob("*.so*"))
    linked = _LINKED.findall(_output("ldd", str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")))
    had = _symbols("--defined-only", [*torch_libraries, *objects, *map(Path, linked)])
    wanted = _symbols("--undefined-only", objects) - had
    functions = sorted(name for name in wanted if not re.match("_?Py", name))
    source = "".join(
        f'long stand_in_{number}(void) __asm__("{name}");\nlong stand_in_{number}(void) {{ return 0; }}\n'
        for number, name in enumerate(functions)
    )
    there = {file.name for file in [*objects, *torch_libraries]} | set(_output("ldconfig", "-p").split())
    needed = {name for file in objects for name in _NEEDED.findall(_output("readelf", "-d", str(file)))}
    for name in sorted({_ALL_FUNCTIONS, *(needed - there)}):
        _link(source if name == _ALL_FUNCTIONS else "", libraries / name)


def _link(source: str, library: Path) -> None:
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)], input=source, text=True, check=True)


def _symbols(which: str, objects: Iterable[Path]) -> set[str]:
    lines = _output("nm", "-D", which, *(str(file) for file in objects)).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.split()}


def _output(*command: str) -> str:
    """What a command prints, whatever its status: nm's is 1 where one of many files has no symbols."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).resolve()))

"""What the source may look like: imports point down, no cycles, vendors in one file, short files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "tessel"

# A module may import from lower ranks and, within its own folder or file, from its own rank.
RANKS = {
    "cli": 7,
    "commands": 7,
    "entry": 7,
    "training": 7,
    "__main__": 7,
    "demo": 6,
    "download": 6,
    "drop_in": 6,
    "evaluate": 6,
    "launch": 6,
    "mindspore_engine": 6,
    "report": 6,
    "selftest": 6,
    "serve": 6,
    "train": 5,
    "generate": 5,
    "convert": 5,
    "parallel": 4,
    "checkpoint": 3,
    "model": 2,
    "data": 2,
    "layout": 1,
    "config": 0,
    "runtime": 0,
    "errors": -1,
}
# These must start fast, so nothing that they import when they are imported may reach torch.
LIGHT = (
    "cli",
    "commands",
    "entry",
    "training",
    "errors",
    "config",
    "layout",
    "demo",
    "report",
    "download",
    "drop_in",
    "runtime.ascend",
    "runtime.log",
    "runtime.files",
    "runtime.versions",
    "runtime.world",
    "runtime.failure",
    "runtime.watchdog",
    "launch",
    "mindspore_engine.cluster",
    "mindspore_engine.support",
    "data.indexed",
    "data.samples",
    "data.blend",
    "data.split",
)
VENDOR_WORDS = ("cuda", "npu", "nccl", "hccl", "nvidia", "ascend", "cudnn")
# Where the user's own words for a device are declared and explained.
VENDORS_ALLOWED = {
    "runtime/device.py",
    "runtime/ascend.py",
    # The vendor's own operators, and nothing that decides where they run.
    "model/vendor.py",
    # An engine of that vendor's own framework names its devices.
    "mindspore_engine/collectives.py",
    "mindspore_engine/model.py",
    "mindspore_engine/support.py",
    "config/layout.py",
    "config/profiling.py",
    "config/run.py",
    "config/verbs.py",
    "config/megatron.py",
    "config/suites.py",
    "drop_in/pai.py",
    "drop_in/rewrites.py",
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# path -> why it may be longer.
LONG_FILES: dict[str, str] = {}
# path:function -> why it may be longer.
LONG_FUNCTIONS: dict[str, str] = {}


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not function bodies, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import_time(child)


def imported_names(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names that import statements mention; `from a import b` gives a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in source_files()}


def tessel_imports(path: Path, everywhere: bool) -> set[str]:
    """Modules of tessel, without the leading name, that `path` imports: anywhere, or when it is imported."""
    nodes = ast.walk(tree_of(path)) if everywhere else at_import_time(tree_of(path))
    known = modules()
    names = {name.removeprefix("tessel.") for name in imported_names(iter(nodes)) if name.startswith("tessel.")}
    return {name for name in names if name in known}


def layer_of(module: str) -> str:
    return module.split(".")[0]


def may_import(importer: str, imported: str) -> bool:
    mine, theirs = layer_of(importer), layer_of(imported)
    if mine == theirs or RANKS[theirs] < RANKS[mine]:
        return True
    # The doors and the demo only pass on to each other.
    return {mine, theirs} <= {"cli", "commands", "entry", "training", "__main__"}


def test_every_module_has_a_rank() -> None:
    unknown = {layer_of(name) for name in modules() if name} - RANKS.keys()
    assert not unknown, f"give these a rank, and a paragraph in docs/ARCHITECTURE.md: {unknown}"


def test_imports_point_down() -> None:
    upward = [
        f"{name} imports {imported}"
        for name, path in modules().items()
        if name
        for imported in sorted(tessel_imports(path, everywhere=True))
        if imported and not may_import(name, imported)
    ]
    assert not upward, "\n".join(upward)


def test_the_rule_refuses_an_upward_import() -> None:
    assert may_import("train.trainer", "model.config")
    assert not may_import("model.config", "train.trainer")
    assert not may_import("model.loss", "data.indexed")
    assert not may_import("data.loader", "model.loss")
    assert not may_import("errors", "runtime.log")


def test_no_import_cycles() -> None:
    graph = {name: tessel_imports(path, everywhere=True) - {name} for name, path in modules().items()}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in finished:
            for imported in sorted(graph[name]):
                visit(imported, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def mentions_vendor(path: Path) -> list[str]:
    """Code that names a vendor: identifiers and strings, without docstrings and comments."""
    tree = tree_of(path)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            text = node.value
        elif isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.alias):
            text = node.name
        words = "".join(letter if letter.isalnum() else " " for letter in text.lower().replace("_", " ")).split()
        found += [f"{path.relative_to(PACKAGE)}:{node.lineno} {text!r}" for word in VENDOR_WORDS if word in words]
    return found


def test_only_the_device_file_names_a_vendor() -> None:
    found = [
        place
        for path in source_files()
        if str(path.relative_to(PACKAGE)) not in VENDORS_ALLOWED
        for place in mentions_vendor(path)
    ]
    assert not found, "\n".join(found)
    assert mentions_vendor(PACKAGE / "runtime/device.py"), "the search itself finds vendors where they are"


@pytest.mark.parametrize("start", LIGHT)
def test_light_modules_do_not_import_torch(start: str) -> None:
    heavy = {"torch", "transformers", "tokenizers", "safetensors", "matplotlib"}
    waiting = [name for name in modules() if name == start or name.startswith(f"{start}.")]
    assert waiting, f"{start} does not exist"
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = modules()[name]
        outside = {found.split(".")[0] for found in imported_names(at_import_time(tree_of(path)))}
        assert not outside & heavy, f"{name}, reached from {start}, imports {outside & heavy} when imported"
        waiting += tessel_imports(path, everywhere=False)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from tessel.cli import main; sys.argv = ['tessel', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in source_files()}
    long = {name: length for name, length in lengths.items() if length >= MAX_FILE_LINES}
    assert long.keys() == LONG_FILES.keys(), f"split it, or name it in LONG_FILES with a reason: {long}"


def test_functions_are_short() -> None:
    long = {}
    for path in source_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(PACKAGE)}:{node.name}"] = length
    assert long.keys() == LONG_FUNCTIONS.keys(), f"split it, or name it in LONG_FUNCTIONS with a reason: {long}"


def test_no_global_statement() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Global)
    ]
    assert not found, found

"""More command lines of MindSpeed-LLM's preprocess_data.py: the same bytes from the same flags.

mindspeed_cases.json holds what that tool wrote (commit c77308a1, the small tokenizer): one digest a case, over the
names and the SHA-256 of its files, in the order of their names. Inputs are those of the reference files (in/) and
those in mindspeed_inputs (own/).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tessel import commands

pytestmark = pytest.mark.oracle

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("mindspeed_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_tools_own_bytes(
    case: dict[str, Any], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared / "oracle/preprocess"
    (tmp_path / "in").symlink_to(folder / "in")
    (tmp_path / "own").symlink_to(Path(__file__).with_name("mindspeed_inputs"))
    monkeypatch.chdir(tmp_path)
    tokenizer = ["--tokenizer-name-or-path", str(folder / "small_tokenizer")]
    commands.preprocess(["--compatible", "mindspeed", *case["flags"], *tokenizer, "--output-prefix", "out/x"])
    files = sorted(path for path in Path("out").iterdir() if path.suffix in (".bin", ".idx"))
    assert len(files) == case["num_files"]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.removeprefix("x_").encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    assert digest.hexdigest() == case["sha256"]

"""Every case of the suites' preprocessing tools, from its flags alone: equal sha256 of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tessel import commands

pytestmark = pytest.mark.oracle

TOOLS = {
    "Megatron-LM tools/preprocess_data.py": "megatron",
    "MindSpeed-LLM preprocess_data.py": "mindspeed",
    "Pai build_idxmap_sft_dataset.py": "pai-sft",
}
# Named here, so that each case is a test of its own where the files are not at hand, too.
CASES = """
small_w1 small_w1_eod small_w2_p2_eod small_keys qwen_w1_eod qwen_w2
pre_parquet pre_jsonl_eod pre_nsubs pre_keys pre_seq pre_alpaca pre_stream
sft_qwen3_think sft_qwen_eod sft_qwen_short sft_qwen_noseq sft_qwen_hist sft_qwen_csv sft_qwen_json sft_general
sg_qwen pack_qwen neat_qwen pack_qwen_nsubs sft_qwen_nsubs dpo_qwen sft_qwen sft_qwen3 sft_llama2 sft_default
sft_empty sft_alpaca sft_chatml sft256 sft1024_jsonl
""".split()


def all_cases(shared: Path) -> dict[str, dict[str, Any]]:
    cases = json.loads((shared / "oracle/preprocess/cases.json").read_text())
    return {case["name"]: case for case in cases}


def test_all_cases_are_tried(shared: Path) -> None:
    assert sorted(all_cases(shared)) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_oracle(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Run where the case was: `in/` is a folder of the working directory, and nothing is written into it."""
    folder = shared / "oracle/preprocess"
    case = all_cases(shared)[name]
    tokenizer = shared / "data/tokenizers/qwen2.5" if case["tokenizer"] == "qwen2.5" else folder / case["tokenizer"]
    (tmp_path / "in").symlink_to(folder / "in")
    monkeypatch.chdir(tmp_path)
    argv = ["--compatible", TOOLS[case["tool"]], *case["flags"], "--tokenizer-name-or-path", str(tokenizer)]
    commands.preprocess([*argv, "--output-prefix", f"out/{name}"])
    found = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.suffix in (".bin", ".idx")}
    sizes = {file: len(content) for file, content in found.items()}
    assert sizes == {file: expected["bytes"] for file, expected in case["outputs"].items()}
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in found.items()}
    assert hashes == {file: expected["sha256"] for file, expected in case["outputs"].items()}

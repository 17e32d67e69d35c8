"""Dialogues against what MindSpeed-LLM wrote, row by row, in blocks of any size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tessel.config.preprocess import PreprocessConfig
from tessel.data.indexed import IndexedDataset
from tessel.data.instruct.handlers import instruction_encoder
from tessel.data.rows import Row
from tessel.data.tokenizer import HuggingFaceTokenizer

pytestmark = pytest.mark.oracle

CASES = [
    ("sft_qwen", "alpaca.jsonl", "AlpacaStyleInstructionHandler", "qwen"),
    ("sft_qwen3", "alpaca.jsonl", "AlpacaStyleInstructionHandler", "qwen3"),
    ("sg_qwen", "sharegpt.jsonl", "SharegptStyleInstructionHandler", "qwen"),
    ("dpo_qwen", "pairwise_alpaca.jsonl", "AlpacaStylePairwiseHandler", "qwen"),
]


@pytest.mark.parametrize("name, data, handler, prompt_type", CASES)
def test_oracle_samples(shared: Path, name: str, data: str, handler: str, prompt_type: str) -> None:
    folder = shared / "oracle/preprocess"
    tokenizer = HuggingFaceTokenizer(shared / "data/tokenizers/qwen2.5")
    cfg = PreprocessConfig(
        input=(str(folder / "in" / data),),
        output_prefix="unwritten",
        handler_name=handler,
        prompt_type=prompt_type,
        compatible="mindspeed",
        seq_length=4096,
    )
    encoder = instruction_encoder(cfg, tokenizer)
    lines = (folder / "in" / data).read_text(encoding="utf-8").splitlines()
    rows = [Row(i + 1, json.loads(line)) for i, line in enumerate(lines)]
    blocks = [encoder(rows[i : i + 97], data) for i in range(0, len(rows), 97)]
    for output, parts in zip(encoder.outputs, zip(*blocks, strict=True), strict=True):
        expected = IndexedDataset(folder / "files" / f"{name}_{output}_document")
        assert np.concatenate([part.lengths for part in parts]).tolist() == expected.lengths.tolist()
        tokens = np.concatenate([part.tokens for part in parts])
        assert np.array_equal(tokens, np.fromfile(folder / "files" / f"{name}_{output}_document.bin", np.int32))


def test_oracle_chat_template_of_qwen(shared: Path) -> None:
    """The prompt type qwen asks as the chat template does, whatever the dialogue."""
    from tessel.data.instruct.chat import ChatRenderer
    from tessel.data.instruct.check import DIFFERS, compare
    from tessel.data.instruct.render import renderer_for
    from tessel.data.instruct.rendering import RenderOptions

    tokenizer = HuggingFaceTokenizer(shared / "data/tokenizers/qwen2.5")
    found = compare(renderer_for(tokenizer, "qwen"), ChatRenderer(tokenizer, RenderOptions()))
    assert [one.name for one in found if one.status == DIFFERS] == []
    assert {one.name for one in found if one.ours} == {"single", "system", "turns", "prompt"}

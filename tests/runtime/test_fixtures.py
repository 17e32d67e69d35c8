"""The fixtures that other tests stand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def test_tokenizer_has_every_byte_and_its_special_tokens(tiny_tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    text = "the fox: Füchse 狐\n"
    assert len(tokenizer) == 307
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_models_open_and_keep_overrides(tiny_hf_folder: Callable[..., Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_hf_folder(family, num_hidden_layers=1))
    assert model.config.model_type == family
    assert model.config.num_hidden_layers == 1

"""Shapes of well-known models by name, for planning without a folder. The folder's config.json is the better source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tessel.config.nearest import nearest
from tessel.errors import UsageError
from tessel.model.config import ModelConfig

_LLAMA: dict[str, Any] = {"model_type": "llama", "head_dim": 128, "rms_norm_eps": 1e-5}
_QWEN3: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 40960}
_MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


def _shape(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _qwen25(*shape: int, tied: bool = False, longest: int = 131072) -> dict[str, Any]:
    rows = 151936 if tied else 152064
    more: dict[str, Any] = {
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "max_position_embeddings": longest,
    }
    return _shape(*shape, model_type="qwen2", **more)


def _qwen3(*shape: int, tied: bool = False) -> dict[str, Any]:
    return _shape(*shape, model_type="qwen3", tie_word_embeddings=tied, **_QWEN3)


def _qwen3_moe(*shape: int, experts: int, width: int, **more: Any) -> dict[str, Any]:
    return _shape(*shape, num_experts=experts, moe_intermediate_size=width, **_QWEN3 | _MIXTURE | more)


def _llama2(*shape: int) -> dict[str, Any]:
    return _shape(*shape, vocab_size=32000, rope_theta=1e4, max_position_embeddings=4096, **_LLAMA)


def _llama3(*shape: int, longest: int = 131072, **more: Any) -> dict[str, Any]:
    return _shape(
        *shape, **_LLAMA | {"vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": longest} | more
    )


# (layers, hidden, inner width of the MLP, attention heads, key/value heads). RoPE scaling is left out: no size
# depends on it.
CATALOG: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _qwen25(24, 896, 4864, 14, 2, tied=True, longest=32768),
    "Qwen2.5-1.5B": _qwen25(28, 1536, 8960, 12, 2, tied=True),
    "Qwen2.5-3B": _qwen25(36, 2048, 11008, 16, 2, tied=True, longest=32768),
    "Qwen2.5-7B": _qwen25(28, 3584, 18944, 28, 4),
    "Qwen2.5-14B": _qwen25(48, 5120, 13824, 40, 8),
    "Qwen2.5-32B": _qwen25(64, 5120, 27648, 40, 8),
    "Qwen2.5-72B": _qwen25(80, 8192, 29568, 64, 8),
    "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, 8, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, 8, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 9728, 32, 8, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 12288, 32, 8),
    "Qwen3-14B": _qwen3(40, 5120, 17408, 40, 8),
    "Qwen3-32B": _qwen3(64, 5120, 25600, 64, 8),
    "Qwen3-30B-A3B": _qwen3_moe(48, 2048, 6144, 32, 4, experts=128, width=768),
    "Qwen3-235B-A22B": _qwen3_moe(94, 4096, 12288, 64, 4, experts=128, width=1536),
    "Qwen3-Coder-480B-A35B": _qwen3_moe(
        62, 6144, 8192, 96, 8, experts=160, width=2560, rope_theta=1e7, max_position_embeddings=262144
    ),
    "Llama-2-7B": _llama2(32, 4096, 11008, 32, 32),
    "Llama-2-13B": _llama2(40, 5120, 13824, 40, 40),
    "Llama-2-70B": _llama2(80, 8192, 28672, 64, 8),
    "Llama-3-8B": _llama3(32, 4096, 14336, 32, 8, longest=8192),
    "Llama-3-70B": _llama3(80, 8192, 28672, 64, 8, longest=8192),
    "Llama-3.1-8B": _llama3(32, 4096, 14336, 32, 8),
    "Llama-3.1-70B": _llama3(80, 8192, 28672, 64, 8),
    "Llama-3.1-405B": _llama3(126, 16384, 53248, 128, 8),
    "Llama-3.2-1B": _llama3(16, 2048, 8192, 32, 8, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _llama3(28, 3072, 8192, 24, 8, tie_word_embeddings=True),
    "Llama-3.3-70B": _llama3(80, 8192, 28672, 64, 8),
    "Mixtral-8x7B": _shape(
        32, 4096, 14336, 32, 8, model_type="mixtral", vocab_size=32000, rope_theta=1e6, rms_norm_eps=1e-5,
        num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
    ),
}  # fmt: skip

# What names of one shape end with, and makers' prefixes.
_ENDINGS = re.compile(r"(instruct|base|chat|hf|thinking|2507|v01|v0\.1)$")


def known_model(name: str) -> ModelConfig:
    """The model of a name, in any case, with or without its maker and with endings such as -Instruct.

    Raises:
        UsageError: no such model is in the table.
    """
    by_key = {_key(known): known for known in CATALOG}
    key = _key(name)
    if key not in by_key:
        near = nearest(key, by_key, 0.6)
        others = f"nearest: {', '.join(by_key[found] for found in near)}" if near else f"known: {', '.join(CATALOG)}"
        raise UsageError(
            f"--model {name} is no folder with a config.json, and no model of that name is known; {others}. Give the "
            "path of a Hugging Face folder or of a config.json for any other."
        )
    return ModelConfig.from_hf(CATALOG[by_key[key]])


def model_of(name: str) -> ModelConfig:
    """The model of a folder, of a config.json, or of a known name.

    Raises:
        UsageError: it is none of them.
        TesselError: config.json is damaged or of no supported model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelConfig.from_folder(path)
    if path.is_file():
        return ModelConfig.from_folder(path.parent)
    return known_model(name)


def _key(name: str) -> str:
    key = re.sub(r"[-_ ]", "", name.rsplit("/", 1)[-1].lower())
    while _ENDINGS.search(key):
        key = _ENDINGS.sub("", key)
    return key.removeprefix("meta")

"""What tests share: small models and tokenizers, the folder of reference files, one thread, no network."""

from __future__ import annotations

import os

# Before torch or transformers is imported: every test process stays on one core and off the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# The least that makes each family's own features show: grouped queries, several layers, an odd vocabulary.
_TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS: dict[str, Any] = {
    "rope_theta": 1000000.0,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_TINY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}),
    "qwen3": ("Qwen3", {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "head_dim": 16}),
    "llama": ("Llama", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "sliding_window": None, "head_dim": 8}),
    "mixtral": ("Mixtral", {"rope_theta": 1000000.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in one order, and no fight for cores between test processes."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails at once instead of hanging or passing by luck."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise AssertionError(f"a test tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def known_seed() -> Iterator[None]:
    """Each test starts from the same random state, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data and runs of other systems; skips where there is none.

    It lies beside the checkout, or where the environment variable TESSEL_SHARED says.
    """
    folder = Path(os.environ.get("TESSEL_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "oracle").is_dir():
        pytest.skip(f"no reference files: {folder} does not exist (set TESSEL_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 307 entries in a folder that AutoTokenizer opens.

    Ids 0 to 255 are the bytes, then merges, then the special tokens; `<|endoftext|>` is the
    end-of-document token, `<|pad|>` the padding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=305, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = "the quick brown fox jumps over the lazy dog while the model reads one more line of plain text"
    tokenizer.train_from_iterator([f"{words} {words[::-1]}"] * 4, trainer)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_hf_folder(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_hf_folder(family, seed=0, tokenizer=None, **config)`: a random model saved by transformers.

    `family` is one of `_TINY_FAMILIES`; `config` overrides fields of its tiny config.json.
    Matrices are drawn wider than usual, so that logits differ enough for an error to show.
    """

    def make(family: str, seed: int = 0, tokenizer: Path | None = None, **overrides: Any) -> Path:
        import torch
        import transformers

        prefix, defaults = _TINY_FAMILIES[family]
        config = getattr(transformers, f"{prefix}Config")(**_TINY_SHAPE | defaults | overrides)
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre, width = (1.0, 0.1) if "norm" in name else (0.0, 0.1)
                parameter.copy_(centre + width * torch.randn_like(parameter))
        folder = tmp_path / f"{family}_{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        if tokenizer is not None:
            transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        return folder

    return make

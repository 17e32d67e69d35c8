"""The layouts that are compared with one process, and what each of them trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from tessel.checkpoint import huggingface
from tessel.data.indexed import IndexedDatasetWriter
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer

T = TypeVar("T")

TRAIN_ITERS = 10
VOCAB_SIZE = 67  # no degree divides it
END_OF_DOCUMENT = 66

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 12},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2-moe": {
        "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40, "norm_topk_prob": False, **_EXPERTS,
    },
    "qwen3-moe": {"model_type": "qwen3_moe", "head_dim": 8, "norm_topk_prob": True, **_EXPERTS},
}  # fmt: skip

_TRAINING = (
    "--tokenizer-type NullTokenizer --vocab-size 66 --seq-length 32 --micro-batch-size 1 --global-batch-size 8 "
    "--lr 5e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1 --split 80,10,10 "
    "--eval-interval 4 --eval-iters 2 --log-interval 1 --num-workers 0 --device cpu"
).split()
_MOE = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.02 --moe-z-loss-coeff 0.001".split()
# What is trained, beside the plain run.
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "documents": "--reset-position-ids --reset-attention-mask --eod-mask-loss".split(),
    "per-token": "--reset-attention-mask --eod-mask-loss --calculate-per-token-loss".split(),
    "ramp": "--rampup-batch-size 4 4 24 --train-samples 64 --lr-warmup-iters 0 --lr-warmup-samples 8".split(),
}


@dataclass(frozen=True)
class Case:
    """One layout: how many processes, which flags, and what they train."""

    name: str
    num_processes: int
    flags: str
    family: str = "qwen2"
    variant: str = "plain"

    @property
    def reference(self) -> tuple[str, str]:
        """What one process trains to compare with."""
        return self.family, self.variant


_TP2, _TP4, _SP = "--tensor-model-parallel-size 2 ", "--tensor-model-parallel-size 4 ", "--sequence-parallel "
_PP2, _PP4 = "--pipeline-model-parallel-size 2 ", "--pipeline-model-parallel-size 4 "
_CP2, _CP4 = "--context-parallel-size 2 ", "--context-parallel-size 4 "
_EP2, _EP4 = "--expert-model-parallel-size 2 ", "--expert-model-parallel-size 4 "
_SHARD = "--data-parallel-sharding-strategy "

CASES: tuple[Case, ...] = (
    Case("TP2", 2, _TP2, "qwen2", "documents"),
    Case("TP2 tied", 2, _TP2, "qwen2-tied"),
    Case("TP2+SP", 2, _TP2 + _SP, "qwen3"),
    Case("TP4, 2 KV heads", 4, _TP4, "qwen2"),
    Case("TP4+SP, 2 KV heads", 4, _TP4 + _SP, "qwen3", "documents"),
    Case("PP2", 2, _PP2, "llama", "per-token"),
    Case("PP2 tied, batch ramp", 2, _PP2, "qwen3", "ramp"),
    Case("PP4 uneven", 4, _PP4 + "--num-layer-list 3,0,1,0", "qwen2"),
    Case("PP2 VPP2", 2, _PP2 + "--num-layers-per-virtual-pipeline-stage 1", "qwen2-tied"),
    Case("PP2 interleaved zero bubble", 2,
         _PP2 + "--num-layers-per-virtual-pipeline-stage 1 --pipeline-schedule interleaved-zero-bubble", "qwen2"),
    Case("PP2 ZBV", 2, _PP2 + "--pipeline-schedule zbv", "qwen2"),
    Case("CP2 ring", 2, _CP2, "qwen2", "documents"),
    Case("CP2 Ulysses", 2, _CP2 + "--cp-comm-type a2a", "qwen2", "documents"),
    Case("CP2 all-gather", 2, _CP2 + "--cp-comm-type allgather", "mistral"),
    Case("CP4 ring, document masks", 4, _CP4, "qwen3", "documents"),
    Case("CP4 Ulysses 2 x ring 2", 4, _CP4 + "--cp-comm-type a2a+p2p --ulysses-degree-in-cp 2", "llama", "per-token"),
    Case("DP2 no_shard", 2, "", "qwen2", "per-token"),
    Case("DP2 optim", 2, _SHARD + "optim", "qwen3", "documents"),
    Case("DP2 optim_grads", 2, _SHARD + "optim_grads", "mistral"),
    Case("DP2 optim_grads_params", 2, _SHARD + "optim_grads_params", "qwen2-tied"),
    Case("DP4 in 2 instances", 4,
         "--use-distributed-optimizer --num-distributed-optimizer-instances 2", "qwen2", "documents"),
    Case("EP2", 2, _EP2, "mixtral"),
    Case("EP4", 4, _EP4, "qwen3-moe"),
    Case("EP2 ETP2", 4, _EP2 + "--expert-tensor-parallel-size 2", "qwen2-moe"),
    Case("DP2 of experts", 2, "--use-distributed-optimizer", "qwen2-moe"),
    Case("TP2+SP EP2", 2, _TP2 + _SP + _EP2 + "--expert-tensor-parallel-size 1", "qwen2-moe"),
    Case("TP2+SP ETP2 PP2", 4, _TP2 + _SP + _PP2, "mixtral"),
    Case("TP2 DP2 optim_grads_params", 4, _TP2 + _SP + _SHARD + "optim_grads_params", "qwen3", "documents"),
    Case("PP2 DP2 optim", 4, _PP2 + "--use-distributed-optimizer", "qwen3", "documents"),
    Case("PP2 EP2", 4, _PP2 + _EP2, "qwen3-moe"),
    Case("CP2 EP2", 2, _CP2 + _EP2, "mixtral"),
    Case("TP2 CP2", 4, _TP2 + _CP2, "qwen2", "documents"),
    Case("PP2 CP2", 4, _PP2 + _CP2, "qwen2-tied"),
    Case("CP2 DP2 optim", 4, _CP2 + "--use-distributed-optimizer", "llama", "per-token"),
    Case("TP2 PP2", 4, _TP2 + _SP + _PP2, "qwen2-tied"),
    Case("TP2 PP2 VPP2 DP2", 8, _TP2 + _SP + _PP2 + "--num-layers-per-virtual-pipeline-stage 1", "qwen3", "documents"),
    Case("TP2 PP2 CP2", 8, _TP2 + _SP + _PP2 + _CP2, "qwen2", "documents"),
    Case("TP2 EP2 DP2", 4, _TP2 + _SP + _EP2 + _SHARD + "optim", "qwen3-moe"),
    Case("TP2 EP4 DP4 optim_grads_params", 8, _TP2 + _SP + _EP4 + _SHARD + "optim_grads_params "
         "--expert-tensor-parallel-size 1", "qwen2-moe"),
)  # fmt: skip


# Those of the fast suite: each axis once. `make test-layouts` runs all.
QUICK = frozenset(
    {
        "TP2", "TP2+SP", "PP2 tied, batch ramp", "PP2 VPP2", "CP2 ring", "CP2 Ulysses", "DP2 optim",
        "DP2 optim_grads_params", "EP2", "TP2+SP EP2", "TP2 PP2",
    }
)  # fmt: skip


def marked(values: Iterable[T], quick: Collection[str], key: Callable[[T], str]) -> list[Any]:
    """Parameters of a test: those whose key is not in `quick` are left to `make test-layouts`."""
    unknown = set(quick)
    found = []
    for value in values:
        name = key(value)
        unknown.discard(name)
        found.append(pytest.param(value, id=name, marks=() if name in quick else pytest.mark.layouts))
    assert not unknown, f"no such: {unknown}"
    return found


def arguments(case_flags: str, family: str, variant: str, work: Path) -> list[str]:
    """The command line of a run, without --save."""
    length = [] if variant == "ramp" else ["--train-iters", str(TRAIN_ITERS)]
    moe = _MOE if family in ("mixtral", "qwen2-moe", "qwen3-moe") else []
    return [
        "pretrain", "--load", str(model_folder(work, family)), "--data-path", str(data(work)), *_TRAINING, *length,
        *moe, *VARIANTS[variant], *case_flags.split(),
    ]  # fmt: skip


def data(work: Path) -> Path:
    """Documents of 3 to 50 tokens; made once."""
    prefix = work / "data"
    if not prefix.with_suffix(".idx").exists():
        rng = np.random.default_rng(0)
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            for _ in range(160):
                tokens = rng.integers(0, END_OF_DOCUMENT, size=rng.integers(3, 50))
                writer.add_document(np.append(tokens, END_OF_DOCUMENT).astype(np.uint16))
    return prefix


def model_folder(work: Path, family: str) -> Path:
    """A random model of a family as a Hugging Face folder; made once."""
    folder = work / family
    if not folder.exists():
        config = ModelConfig.from_hf({**_SHAPE, **FAMILIES[family]})
        model = Transformer(config)
        initialize_(model, config, std=0.1, seed=1)
        with torch.no_grad():  # norms of 1 and biases of 0 would hide what is wrong with them
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        huggingface.export(model.named_parameters(), config, folder, torch.float32)
    return folder

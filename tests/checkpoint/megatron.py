"""What tests of Megatron's formats share: Hugging Face folders as stored models, and the tensors of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tessel.checkpoint import torch_file
from tessel.checkpoint.experts import in_memory
from tessel.checkpoint.stored import StoredModel, StoredTensor
from tessel.checkpoint.weights import read_tensors
from tessel.model.config import ModelConfig


def hf_model(folder: Path) -> StoredModel:
    """A Hugging Face folder, its weights by their names in memory."""
    config = ModelConfig.from_folder(folder)
    return StoredModel("hf", folder, config, in_memory(read_tensors(folder)))


def different(one: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor]) -> list[str]:
    """The names of the tensors that are not the same bit for bit, or that only one has."""
    differ = sorted(one.keys() ^ other.keys())
    for name in sorted(one.keys() & other.keys()):
        first, second = one[name], other[name]
        alike = (first.dtype, first.shape) == (second.dtype, second.shape)
        if not alike or digest(first.read()) != digest(second.read()):
            differ.append(name)
    return differ


def digest(tensor: torch.Tensor) -> str:
    """The hash that a manifest has for a tensor."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def manifest_of(case: Path) -> dict[str, Any]:
    return json.loads((case / "manifest.json").read_text())


def tensors_of(path: Path) -> dict[str, list[Any]]:
    """The tensors of a rank's file as a manifest describes them: "model0:KEY" -> [dtype, shape, hash]."""
    content = torch_file.load(path)
    return {
        f"{chunk}:{key}": [str(value.dtype).removeprefix("torch."), list(value.shape), digest(value)]
        for chunk, state in content.items()
        if str(chunk).startswith("model")
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }

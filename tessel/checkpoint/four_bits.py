"""Weights in four bits in Megatron's files, as MindSpeed-LLM 2.3 writes them with --qlora-nf4.

Beside a uint8 weight [elements / 2, 1] stand bitsandbytes' tensors: `.absmax` (fp32, or uint8 with double
quantisation), `.quant_map` [16], then `.nested_absmax` and `.nested_quant_map` [256], and
`.quant_state.bitsandbytes__nf4`, JSON as bytes with quant_type, blocksize, dtype, shape (of the rank's part) and the
nested_* numbers (bitsandbytes 0.50, `functional.py`: `QuantState.as_dict`). A run of adapters has `base_layer.weight`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tessel.checkpoint.stored import Index, StoredTensor
from tessel.errors import TesselError
from tessel.model.quantized import BLOCK, NESTED_BLOCK, NestedScales, Quantized, nested_values, nf4_values, quantize_nf4

_STATE = ".quant_state.bitsandbytes__nf4"
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
"""What is quantised: the ends of the keys."""


@dataclass(frozen=True, eq=False)
class Dequantized:
    """A stored tensor that is held in four bits in its file."""

    name: str
    path: Path
    quantized: Quantized
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quantized.shape

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it."""
        values = _values(self)
        return values if index is None else values[index]


@functools.lru_cache(maxsize=1)
def _values(tensor: Dequantized) -> Tensor:
    """Boxes of the same tensor are read one after another."""
    return tensor.quantized.dequantize(tensor.dtype)


def dequantized(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Dequantized]:
    """The weights of a rank's file by their keys, those in four bits as what they stand for.

    Raises:
        TesselError: what stands beside such a weight is missing, or of another kind than NF4 in blocks of 64.
    """
    plain: dict[str, Tensor | Dequantized] = {}
    for key, tensor in tensors.items():
        if f"{key}{_STATE}" in tensors:
            plain[key] = _dequantized(path, key, tensor, tensors)
        elif not any(key.endswith(end) and key.removesuffix(end) in tensors for end in _BESIDE):
            plain[key] = tensor
    return plain


def _dequantized(path: Path, key: str, codes: Tensor, tensors: Mapping[str, Tensor]) -> Dequantized:
    try:
        state = json.loads(bytes(tensors[f"{key}{_STATE}"].tolist()))
        shape, dtype = tuple(int(size) for size in state["shape"]), _DTYPES[state["dtype"]]
        absmax = tensors[f"{key}.absmax"]
        known = state["quant_type"] == "nf4" and state["blocksize"] == BLOCK
        known = known and torch.equal(tensors[f"{key}.quant_map"].float(), nf4_values())
        nested = None
        if absmax.dtype is torch.uint8:
            nested = NestedScales(tensors[f"{key}.nested_absmax"].float(), float(state["nested_offset"]))
            same = torch.equal(tensors[f"{key}.nested_quant_map"].float(), nested_values())
            known = known and same and state["nested_blocksize"] == NESTED_BLOCK
    except (KeyError, ValueError, TypeError) as error:
        raise TesselError(f"{path}: what stands beside {key} in four bits is damaged ({error!r}).") from error
    num_elements = math.prod(shape)
    if not known or codes.numel() != -(-num_elements // 2) or absmax.numel() != -(-num_elements // BLOCK):
        raise TesselError(f"{path}: {key} is in four bits of another kind than NF4 in blocks of {BLOCK}.")
    return Dequantized(key, path, Quantized(codes.reshape(-1), absmax, shape, nested), dtype)


def in_four_bits(key: str, tensor: StoredTensor) -> Iterator[tuple[str, Tensor]]:
    """A weight in four bits with double quantisation, MindSpeed-LLM's default, and what stands beside it."""
    values = tensor.read()
    whole = quantize_nf4(values, double=True)
    assert whole.nested is not None
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(values.dtype).removeprefix("torch."),
        "shape": list(values.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": whole.nested.offset,
    }
    yield key, whole.codes[:, None]
    yield f"{key}.absmax", whole.absmax
    yield f"{key}.quant_map", nf4_values().clone()
    yield f"{key}.nested_absmax", whole.nested.absmax
    yield f"{key}.nested_quant_map", nested_values().clone()
    yield f"{key}{_STATE}", torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

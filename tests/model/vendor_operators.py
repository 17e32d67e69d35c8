"""The operators of tessel/model/vendor.py on a CPU: declared as torch_npu declares them, with their documented meaning.

A call that does not fit the declaration (a name, a type, the order) is refused by torch's dispatcher. What Huawei's
reference says an operator needs, beyond its types, is asserted. Gradients follow from the formulas.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMAS = Path(__file__).with_name("vendor_schemas.txt")
CALLS: Counter[str] = Counter()
COMPRESSED = 2048


def schemas() -> dict[str, str]:
    """name -> declaration, of every operator in the file."""
    lines = [line for line in SCHEMAS.read_text().splitlines() if not line.startswith("#")]
    return {line.partition("(")[0].removeprefix("npu::"): line for line in lines}


@functools.cache
def register() -> torch.library.Library:
    """Declare and implement all of them, once in a process."""
    library = torch.library.Library("npu", "DEF")
    for name, schema in schemas().items():
        library.define(schema.removeprefix("npu::"))
        library.impl(name, _counted(name, schema), "CompositeImplicitAutograd")
    return library


def _counted(name: str, schema: str) -> Any:
    """The meaning, called by names: torch hands over by position whatever may be given so."""
    names = [argument.name for argument in torch._C.parse_schema(schema).arguments]

    def call(*arguments: Any, **named: Any) -> Any:
        CALLS[name] += 1
        return MEANINGS[name](**dict(zip(names, arguments, strict=False)), **named)

    return call


def fusion_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **named: Any) -> Any:
    """softmax(scale q k^T, masked where atten_mask is True) v; see the table of sparse modes."""
    if input_layout == "TND":
        starts_q, starts_k = [0, *named["actual_seq_qlen"]], [0, *named["actual_seq_kvlen"]]
        assert starts_q[-1] == len(query) and starts_k[-1] == len(key)
        pieces = []
        for number in range(len(starts_q) - 1):
            q = query[starts_q[number] : starts_q[number + 1]].transpose(0, 1)[None]
            k, v = (x[starts_k[number] : starts_k[number + 1]].transpose(0, 1)[None] for x in (key, value))
            pieces.append(_attend(q, k, v, named)[0].transpose(0, 1))
        out = torch.cat(pieces)
    else:
        assert input_layout == "BNSD"
        assert query.shape[1] == head_num
        out = _attend(query, key, value, named)
    return out, out, out, out, 0, 0, 0


def _attend(q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> Tensor:
    mask, mode, (num_queries, num_keys) = named["atten_mask"], named.get("sparse_mode", 0), (q.shape[2], k.shape[2])
    assert mask.dtype == torch.bool and named.get("keep_prob", 1.0) == 1.0
    if mode in (2, 3):
        assert mask.shape == (COMPRESSED, COMPRESSED)
        assert torch.equal(mask, torch.ones_like(mask).triu(1))
        shift = 0 if mode == 2 else num_keys - num_queries
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1 + shift)
    else:
        assert mode == 0 and mask.shape[-2:] == (num_queries, num_keys)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT).float() * named["scale"]
    return scores.masked_fill(mask, float("-inf")).softmax(dim=-1).to(q.dtype) @ v


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    wide = input.float()
    rstd = (wide.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(norm, 1 / rms, sum)."""
    assert x1.shape == x2.shape and x1.dtype == x2.dtype == gamma.dtype
    summed = x1 + x2
    return *rms_norm(summed, gamma, epsilon), summed


def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    assert rotary_mode == "half" and input.dim() == r1.dim() == r2.dim() == 4 and input.dtype == r1.dtype == r2.dtype
    left, right = input.chunk(2, dim=-1)
    return input * r1 + torch.cat((-right, left), dim=-1) * r2


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * up


def grouped_matmul(x: list[Tensor], weight: list[Tensor], **named: Any) -> list[Tensor]:
    """One product for each group of rows (type 0), or of the inner dim (type 2); group_list has where groups end."""
    assert len(x) == len(weight) == 1 and named["split_item"] == 3 and named.get("group_list_type", 0) == 0
    ends = named["group_list"]
    assert ends.dtype == torch.int64
    spans = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))
    if named["group_type"] == 0:
        assert weight[0].dim() == 3 and spans[-1][1] == len(x[0])
        return [torch.cat([x[0][a:b] @ matrix for (a, b), matrix in zip(spans, weight[0], strict=True)])]
    assert named["group_type"] == 2 and x[0].dim() == weight[0].dim() == 2
    assert x[0].stride(0) == 1, "the left factor is given as a transposed view"
    return [torch.stack([x[0][:, a:b] @ weight[0][a:b] for a, b in spans])]


def token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    assert num_out_tokens is None and not padded_mode and indices.dtype in (torch.int32, torch.int64)
    order = indices.flatten().argsort(stable=True)
    return tokens.index_select(0, order // indices.shape[1]), order.argsort().to(torch.int32)


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    assert probs is not None and not padded_mode and restore_shape is None and sorted_indices.dtype == torch.int32
    rows = permuted_tokens.index_select(0, sorted_indices).view(*probs.shape, -1)
    return (rows * probs[..., None]).sum(dim=1)


def all_gather_base_mm(input: Tensor, x2: Tensor, hcom: str, world_size: int, **named: Any) -> tuple[Tensor, Tensor]:
    functional = torch.ops._c10d_functional
    assert named.get("gather_index", 0) == 0 and named.get("gather_output", True)
    gathered = functional.all_gather_into_tensor(input.contiguous(), world_size, hcom)
    whole = functional.wait_tensor(gathered)
    return whole @ x2, whole


def mm_reduce_scatter_base(input: Tensor, x2: Tensor, hcom: str, world_size: int, **named: Any) -> Tensor:
    functional = torch.ops._c10d_functional
    part = functional.reduce_scatter_tensor((input @ x2).contiguous(), named.get("reduce_op", "sum"), world_size, hcom)
    scattered: Tensor = functional.wait_tensor(part)
    return scattered


MEANINGS: dict[str, Any] = {
    "npu_fusion_attention": fusion_attention,
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_unpermute": token_unpermute,
    "npu_all_gather_base_mm": all_gather_base_mm,
    "npu_mm_reduce_scatter_base": mm_reduce_scatter_base,
}

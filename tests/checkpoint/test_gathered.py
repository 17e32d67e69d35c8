"""The distributed optimizer's state as one rank of Megatron's gathered it, in torch_dist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.checkpoint.dcp_files import read_folder
from tessel.checkpoint.dcp_write import Other, Part, other, plan_folder
from tessel.checkpoint.flat_buffers import ORDERS, Buffers
from tessel.checkpoint.fused import assembled, gemm_of_experts
from tessel.checkpoint.mcore_names import EMBEDDING, HEAD, Entry
from tessel.checkpoint.stored import PaddedRows, StoredModel, StoredTensor, Target
from tessel.checkpoint.torch_dist import open_torch_dist
from tessel.checkpoint.torch_dist_write import write_torch_dist
from tessel.checkpoint.torch_file import LoadedTensor
from tests.checkpoint.megatron import different, hf_model

KINDS = ("param", "exp_avg", "exp_avg_sq")
ROWS = 384


def in_memory(name: str, tensor: Tensor) -> StoredTensor:
    return LoadedTensor(name, Path("nowhere"), tensor)


def with_states(source: StoredModel) -> StoredModel:
    """Weights in bf16, with fp32 weights that round to them, and moments."""
    tensors = {name: in_memory(name, tensor.read().bfloat16()) for name, tensor in source.tensors.items()}
    states = {f"{kind}.{name}": source.tensors[name] for kind in KINDS for name in tensors}
    return replace(source, tensors=tensors, optimizer=states)


def flat(entries: list[Entry], states: dict[str, StoredTensor]) -> Tensor:
    """The parameters from the last to the first, each at a multiple of 64 elements."""
    found = torch.empty(0)
    for entry in reversed(entries):
        whole: StoredTensor = assembled(entry.key, entry.fused, states, torch.float32)
        if entry.gemm:
            whole = gemm_of_experts(whole, entry.gemm == "first")
        gap = torch.full((-len(found) % 64,), torch.nan)
        found = torch.cat([found, gap, whole.read().reshape(-1)])
    return found


def gather(folder: Path, source: StoredModel, order: int) -> None:
    """Write the folder's tensors again, with the states as Megatron gathers them."""
    args = open_torch_dist(folder).args
    buffers = Buffers.of_args(args, replace(source.config, vocab_size=ROWS))
    groups: dict[tuple[int, int], dict[Any, Any]] = {}
    for (chained, group, chunk), entries in buffers.all(ORDERS[order]):
        kinds: dict[str, Any] = {}
        for kind in KINDS:
            states = {name: source.optimizer[f"{kind}.{name}"] for name in source.tensors}
            states |= {name: PaddedRows(states[name], ROWS) for name in (EMBEDDING, HEAD) if name in states}
            kinds[kind] = flat(entries, states)
        kinds["numel_unpadded"] = len(kinds["param"])
        content = groups.setdefault((chained, group), {"buckets_coalesced": True})
        content[chunk] = {(torch.bfloat16, torch.float32): kinds}
    items: list[Part | Other] = []
    for key, tensor in read_folder(folder).tensors.items():
        values = tensor.read().clone()  # its file is written anew
        items.append(Part(key, tuple(values.shape), (0,) * values.dim(), in_memory(key, values)))
    for (chained, group), content in groups.items():
        prefix = f"chained_{chained}." if buffers.has_expert_buffers else ""
        items.append(other(f"{prefix}optimizer.distributed.dp_group_idx_{group}.param_state/shard_0_1", [content]))
    plan = plan_folder({"__0_0.distcp": items})
    for planned in plan.files:
        planned.write(folder / planned.name)
    (folder / ".metadata").write_bytes(plan.metadata)


@pytest.mark.parametrize("order", (0, 4, 5))
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen2", Target(tp=2, pp=2)),
        ("qwen3_moe", Target(tp=2, ep=2, etp=1)),
        ("mixtral", Target(pp=2)),
    ],
)
def test_states_come_back(
    tiny_hf_folder: Callable[..., Path], tmp_path: Path, family: str, target: Target, order: int
) -> None:
    """Whichever modules the run had: the order of its parameters is told by the weights."""
    experts = {"num_experts": 4} if family == "qwen3_moe" else {}
    source = with_states(hf_model(tiny_hf_folder(family, **experts)))
    write_torch_dist(source, tmp_path, replace(target, vocab_divisor=ROWS // target.tp))
    gather(tmp_path / "iter_0000001", source, order)
    found = open_torch_dist(tmp_path)
    assert different(found.optimizer, source.optimizer) == [], found.left_out


def test_a_state_of_other_weights_is_said(tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = with_states(hf_model(tiny_hf_folder("qwen2")))
    write_torch_dist(source, tmp_path, Target(vocab_divisor=ROWS))
    others = {name: in_memory(name, tensor.read() + 1) for name, tensor in source.optimizer.items()}
    gather(tmp_path / "iter_0000001", replace(source, optimizer=others), 0)
    found = open_torch_dist(tmp_path)
    assert not found.optimizer
    assert any("its flat buffers are not filled by the parameters" in line for line in found.left_out)

"""The optimizer's state as Megatron's formats have it: states by parameter, and the groups that the parameters are in.

In the `torch` format a rank's parameters are numbered group by group, and within a group in the order of the model's
named_parameters(). Groups come in the order in which that order first meets them. Source: Megatron-core's
optimizer/__init__.py (_get_param_groups) and optimizer.py, core_v0.12.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tessel.checkpoint.mcore_names import EMBEDDING, EMBEDDING_KEY, HEAD, HEAD_KEY, Entry
from tessel.checkpoint.stored import Cast, PaddedRows, StoredModel, StoredTensor, Target
from tessel.checkpoint.torch_file import Deferred
from tessel.errors import TesselError
from tessel.layout.sharding import parameters

MASTER, MOMENTS = "param", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
# Megatron's name for states by the names of weights, which any degrees read.
SHARDING = "fully_reshardable"
# What a group has in Megatron besides what is its own: for the optimizers of PyTorch, Apex and Transformer Engine.
_GROUP: Mapping[str, Any] = {
    "lr_mult": 1.0,
    "default_config": True,
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class GroupKey(NamedTuple):
    """What Megatron divides parameters by."""

    decays: bool
    is_expert: bool
    is_decoupled: bool


class Kept(NamedTuple):
    """A tensor of a rank's model, and its states by kind."""

    entry: Entry
    weight: StoredTensor
    states: Mapping[str, StoredTensor]


def require_state(source: StoredModel) -> None:
    """Refuse a source that Megatron could not go on from.

    Raises:
        TesselError: moments, the schedule, or the numbers of the optimizer's groups are missing; says which.
    """
    lacking = [
        name for name in parameters(source.config) if any(f"{kind}.{name}" not in source.optimizer for kind in MOMENTS)
    ]
    what = None
    if not source.optimizer:
        what = "no optimizer's state"
    elif lacking:
        what = f"no moments of {lacking[0]}: it is of another optimizer than Adam"
    elif "opt_param_scheduler" not in source.state:
        what = "no schedule"
    elif not source.state.get("param_groups"):
        what = "no numbers of the optimizer's groups (betas, eps, ...)"
    if what is not None:
        raise TesselError(f"{source.folder} has {what}, which Megatron needs to go on. Leave the optimizer out.")


def states_of(source: StoredModel, rows: int) -> dict[str, dict[str, StoredTensor]]:
    """The states of each parameter by kind, fp32, those of the vocabulary with `rows` rows.

    Raises:
        TesselError: there are none.
    """
    require_state(source)
    kinds: dict[str, dict[str, StoredTensor]] = {kind: {} for kind in KINDS}
    for kind, own in kinds.items():
        for name in parameters(source.config):
            # A model in fp32 is its own master.
            state = source.optimizer.get(f"{kind}.{name}", source.tensors[name])
            if state.dtype is not torch.float32:
                state = Cast(state, torch.float32)
            own[name] = PaddedRows(state, rows) if name in (EMBEDDING, HEAD) and rows > state.shape[0] else state
    return kinds


def group_of(source: StoredModel, key: GroupKey) -> dict[str, Any]:
    """The numbers of a group: those of the source's group of the same kind, under Megatron's names."""
    groups = [dict(group) for group in source.state["param_groups"]]
    alike = [
        group
        for group in groups
        if bool(group.get("wd_mult", group.get("weight_decay", 0.0))) == key.decays
        and bool(group.get("is_decoupled_lr")) == key.is_decoupled
    ]
    # A rank of the source may have had no parameter of that kind.
    found = (alike or groups)[0]
    schedule = source.state["opt_param_scheduler"]
    numbers = {name: schedule[name] for name in ("max_lr", "min_lr") if name in schedule}
    own = {
        **_GROUP,
        **numbers,
        **{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()},
        "wd_mult": 1.0 if key.decays else 0.0,
        "is_expert_parallel": key.is_expert,
        "is_decoupled_lr": key.is_decoupled,
        "step": int(source.state.get("step", source.iteration or 0)),
    }
    if not alike:
        own["weight_decay"] = schedule.get("end_wd", 0.0) if key.decays else 0.0
    return own


def keys_of(source: StoredModel, entries: Iterable[Entry], target: Target) -> dict[GroupKey, list[Entry]]:
    """The tensors of each group, groups in the order in which the tensors first meet them.

    As in Megatron, experts are apart where expert parallelism deals them out.
    """
    has_decoupled = any(group.get("is_decoupled_lr") for group in source.state["param_groups"])
    found: dict[GroupKey, list[Entry]] = {}
    for entry in entries:
        decays = len(entry.shape) > 1 and not entry.key.endswith(".bias")
        is_decoupled = has_decoupled and entry.key in (EMBEDDING_KEY, HEAD_KEY)
        found.setdefault(GroupKey(decays, entry.is_expert and target.ep > 1, is_decoupled), []).append(entry)
    return found


def of_rank(source: StoredModel, kept: Sequence[Kept], target: Target) -> Any:
    """What a rank's file holds under "optimizer": plain Adam's; with expert parallelism a list, experts apart.

    `kept`: the tensors of all its chunks, in the order of named_parameters().
    """
    if target.ep == 1:
        return _of_one(source, kept, target)
    return [
        _of_one(source, [item for item in kept if item.entry.is_expert == experts], target) for experts in (False, True)
    ]


def _of_one(source: StoredModel, kept: Sequence[Kept], target: Target) -> dict[str, Any]:
    by_entry = {id(item.entry): item for item in kept}
    state: dict[int, dict[str, Any]] = {}
    groups, masters = [], []
    for key, entries in keys_of(source, (item.entry for item in kept), target).items():
        group, items = group_of(source, key), [by_entry[id(entry)] for entry in entries]
        numbers = list(range(len(state), len(state) + len(items)))
        for number, item in zip(numbers, items, strict=True):
            state[number] = {kind: Deferred(item.states[kind]) for kind in MOMENTS}
            if not target.transformer_engine:
                # PyTorch's Adam has it here; Transformer Engine's has it in the group alone, and stumbles over it.
                state[number]["step"] = torch.tensor(float(group["step"]))
        groups.append({**group, "params": numbers})
        masters.append([Deferred(item.states[MASTER]) for item in items if item.weight.dtype.itemsize == 2])
    inner = {"state": state, "param_groups": groups}
    if not any(masters):
        return inner  # as Megatron has it in fp32
    return {"optimizer": inner, "fp32_from_fp16_params": masters, **_scaler(source)}


def of_common(source: StoredModel, entries: Iterable[Entry], target: Target) -> dict[Any, Any]:
    """What torch_dist's common.pt holds under "optimizer", whose states lie apart; `entries`: of the whole model.

    It serves Megatron's plain Adam, in fp32 and in mixed precision, and its distributed optimizer: each looks at
    other keys.
    """
    groups = {key: group_of(source, key) for key in keys_of(source, entries, target)}
    chained: list[dict[str, Any]] = []
    for experts in (False, True) if target.ep > 1 else (False,):
        own = [group for key, group in groups.items() if key.is_expert == experts]
        step = torch.tensor(float(own[0]["step"]))
        inner = {"state": {"common_step": step}, "param_groups": own}
        chained.append({**inner, "optimizer": inner, "param_state_sharding_type": SHARDING, **_scaler(source)})
    return chained[0] if len(chained) == 1 else dict(enumerate(chained))


def _scaler(source: StoredModel) -> dict[str, Any]:
    """The state of the loss scaler, if there is one."""
    scaler = source.state.get("grad_scaler")
    if not scaler:
        return {}
    scale = torch.as_tensor(scaler["scale"], dtype=torch.float32).reshape(1)
    return {"grad_scaler": {**scaler, "scale": scale}}


def planned(chunk_key: str, kept: Sequence[Kept]) -> Iterator[tuple[str, StoredTensor]]:
    """The states of a chunk by the keys that a plan shows."""
    for item in kept:
        for kind in KINDS if item.weight.dtype.itemsize == 2 else MOMENTS:
            yield f"optimizer.{kind}:{chunk_key}:{item.entry.key}", item.states[kind]

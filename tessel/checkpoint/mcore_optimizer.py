"""The optimizer's state in Megatron's `torch` format: moments and fp32 master weights, back under parameters' names.

Nothing in it has a name: states follow the order of the model's named_parameters(), which is that of the
weights in the same file.

    plain        model_optim_rng.pt, "optimizer": state by number, numbers by param group; fp32_from_fp16_params
    distributed  distrib_optim.pt: a flat buffer of each model chunk, parameters in reverse order

With expert parallelism there are two optimizers, for experts and for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from tessel.checkpoint import torch_file
from tessel.checkpoint.flat import Unflattened
from tessel.checkpoint.fused import FormerQkv
from tessel.checkpoint.mcore_files import RankFile, RankFiles
from tessel.checkpoint.mcore_match import Held, copy_of, whole_parameters
from tessel.checkpoint.mcore_names import EMBEDDING_KEY, HEAD_KEY
from tessel.checkpoint.stored import Copy, StoredTensor
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.checkpoint.weights import named
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"  # SGD's only state
DISTRIBUTED_FILE = "distrib_optim.pt"
_ALIGNMENT = 64
_BUCKET_ELEMENTS = 40_000_000
_COUNTERS = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")


@dataclass(frozen=True)
class OptimizerState:
    """As in `StoredModel`: its `optimizer`, `state`, `left_out` and `copies`."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()


class _Found(NamedTuple):
    """The state of one kind (exp_avg, ...) of a tensor of a rank's file, in that tensor's shape."""

    kind: str
    held: Held
    values: StoredTensor


def read_optimizer(files: RankFiles, held: Sequence[Held], config: ModelConfig, is_release: bool) -> OptimizerState:
    """What a run can go on with. What there is and cannot be carried over is said, not raised.

    Raises:
        TesselError: a file is damaged.
    """
    if is_release:
        return OptimizerState()
    content = files.files[0].content
    state, left_out = _numbers(content, files.args), []
    if "rng_state" in content:
        left_out.append("The random state of Megatron's generators, which are not tessel's.")
    tensors: dict[str, StoredTensor] = {}
    found: list[_Found] = []
    try:
        found = [item for file in files.files for item in _of_file(file, held, files, config)]
        tensors = _whole(found, config)
    except _Unknown as error:
        left_out.append(f"The optimizer's state: {error}")
    return OptimizerState(tensors, state, tuple(left_out), tuple(_copies(found)) if tensors else ())


def _copies(found: Sequence[_Found]) -> Iterator[Copy]:
    originals = {(item.kind, id(item.held)): item.values for item in found}
    for item in found:
        original = originals.get((item.kind, id(item.held.original)))
        if original is not None:
            yield copy_of(item.held, item.values, original, f"{item.kind} of ")


class _Unknown(Exception):
    """The state is there in a form that cannot be read; says which."""


def _numbers(content: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Counters, the scheduler, the loss scaler and the optimizer's groups."""
    state = counters(content, args)
    groups: list[Mapping[str, Any]] = []
    steps: list[float] = []
    for optimizer in _optimizers(content):
        if isinstance(optimizer.get("grad_scaler"), Mapping):
            state["grad_scaler"] = torch_file.plain(optimizer["grad_scaler"])
        inner = _inner(optimizer)
        groups += groups_of(inner)
        states = inner.get("state")
        entries = list(states.values()) if isinstance(states, Mapping) else []
        found = [entry["step"] for entry in (*groups, *entries) if isinstance(entry, Mapping) and "step" in entry]
        steps += [step for value in found if (step := step_of(value)) is not None]
    if groups:
        state["param_groups"] = [
            {key: torch_file.plain(value) for key, value in group.items() if key != "params"} for group in groups
        ]
    if steps:
        state["step"] = int(max(steps))
    return state


def counters(content: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Samples and iterations so far, and the scheduler's numbers; what is none of these is left out."""
    state: dict[str, Any] = {key: args[key] for key in _COUNTERS if type(args.get(key)) is int}
    for key in ("iteration", "num_floating_point_operations_so_far"):
        if type(content.get(key)) in (int, float):
            state[key] = content[key]
    if isinstance(content.get("opt_param_scheduler"), Mapping):
        state["opt_param_scheduler"] = torch_file.plain(content["opt_param_scheduler"])
    return state


def _optimizers(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One, or one for all but experts and one for experts."""
    value = content.get("optimizer")
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, Mapping)]


def _inner(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """PyTorch's own state dictionary; in mixed precision Megatron's lies around it."""
    inner = optimizer.get("optimizer", optimizer)
    return inner if isinstance(inner, Mapping) else {}


def step_of(value: Any) -> float | None:
    """A number of steps, which is a number or a tensor of one; None if it is neither."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if type(value) in (int, float) and 0 <= value < 2**63 else None


def groups_of(inner: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The param groups of an optimizer's state dictionary; none where there is something else."""
    return [group for group in _listed(inner.get("param_groups")) if isinstance(group, Mapping)]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _of_file(file: RankFile, held: Sequence[Held], files: RankFiles, config: ModelConfig) -> Iterator[_Found]:
    own = [item for item in held if item.file is file]
    if not any(item.is_used for item in own):
        return
    distributed = file.path.parent / DISTRIBUTED_FILE
    if distributed.is_file():
        yield from _distributed(torch_file.load(distributed), distributed, own, files, config)
        return
    optimizers = _optimizers(file.content)
    # SGD without momentum has groups alone.
    if any(_inner(optimizer).get("state") for optimizer in optimizers):
        for number, optimizer in enumerate(optimizers):
            yield from _plain(optimizer, _share(own, number, len(optimizers)), file)
    elif any(group.get("momentum") != 0 for optimizer in optimizers for group in groups_of(_inner(optimizer))):
        raise _Unknown(f"{file.folder} should have it in {DISTRIBUTED_FILE}, which is missing.")


def _share(own: Sequence[Held], number: int, num_optimizers: int) -> list[Held]:
    """The tensors of an optimizer: all, or with two of them those that are no experts, and the experts."""
    return [item for item in own if num_optimizers == 1 or item.entry.is_expert == (number == 1)]


def _plain(optimizer: Mapping[str, Any], own: Sequence[Held], file: RankFile) -> Iterator[_Found]:
    """Adam's state dictionary: the groups deal its numbers out, and within a group they follow the model's order."""
    inner = _inner(optimizer)
    states, masters = inner.get("state"), _listed(optimizer.get("fp32_from_fp16_params"))
    groups = groups_of(inner)
    by_group = _by_group(groups, own)
    kinds = MOMENTS if not _is_sgd(states) else (MOMENTUM,)
    for number, (group, items) in enumerate(zip(groups, by_group, strict=True)):
        numbers = group.get("params")
        if not isinstance(states, Mapping) or not isinstance(numbers, list) or len(numbers) != len(items):
            raise _Unknown(f"group {number} in {file.folder} has other parameters than the model.")
        for at, item in zip(numbers, items, strict=True):
            entry = states.get(at) if type(at) is int else None
            if not isinstance(entry, Mapping):
                raise _Unknown(f"group {number} in {file.folder} has a parameter {at!r} without a state.")
            for kind in kinds:
                yield _Found(kind, item, _checked(entry.get(kind), item, f"{kind} in {file.folder}"))
        halves = [item for item in items if item.tensor.dtype.itemsize == 2]
        own_masters = _listed(masters[number]) if number < len(masters) else []
        if own_masters and len(own_masters) != len(halves):
            raise _Unknown(f"group {number} in {file.folder} has other master weights than the model has parameters.")
        for values, item in zip(own_masters, halves, strict=bool(own_masters)):
            yield _Found("param", item, _checked(values, item, f"the master weight in {file.folder}"))


def _is_sgd(states: Any) -> bool:
    """Whether an optimizer's states are those of SGD with momentum."""
    return isinstance(states, Mapping) and any(
        isinstance(entry, Mapping) and isinstance(entry.get(MOMENTUM), Tensor) for entry in states.values()
    )


def lacking_states(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> list[str]:
    """The parameters that have no moments among the states of a model, where others have."""
    is_sgd = any(name.startswith(f"{MOMENTUM}.") for name in tensors)
    kinds = (MOMENTUM,) if is_sgd else MOMENTS
    return [name for name in parameters(config) if tensors and any(f"{kind}.{name}" not in tensors for kind in kinds)]


def _by_group(groups: Sequence[Mapping[str, Any]], own: Sequence[Held]) -> list[list[Held]]:
    """The tensors of each group, by what Megatron divides them by."""
    has_decoupled = any(group.get("is_decoupled_lr") for group in groups)
    has_expert_groups = any(group.get("is_expert_parallel") for group in groups)
    return [
        [
            item
            for item in own
            if (len(item.entry.shape) == 1 or item.entry.key.endswith(".bias")) == (group.get("wd_mult", 1.0) == 0.0)
            and (not has_expert_groups or item.entry.is_expert == bool(group.get("is_expert_parallel")))
            and (
                not has_decoupled or (item.entry.key in (EMBEDDING_KEY, HEAD_KEY)) == bool(group.get("is_decoupled_lr"))
            )
        ]
        for group in groups
    ]


def _checked(values: Any, item: Held, what: str) -> StoredTensor:
    if not isinstance(values, Tensor) or tuple(values.shape) != item.entry.shape:
        shape = tuple(values.shape) if isinstance(values, Tensor) else None
        raise _Unknown(f"{what} of {item.entry.key} is {shape} and should be {item.entry.shape}.")
    return LoadedTensor(item.entry.key, item.file.path, values)


def _distributed(
    content: Any, path: Any, own: Sequence[Held], files: RankFiles, config: ModelConfig
) -> Iterator[_Found]:
    """Flat buffers: one for each model chunk and dtype, numbered through all chunks."""
    parts = content if isinstance(content, list) else [content]
    for number, part in enumerate(parts):
        items = _share(own, number, len(parts))
        if part is None:
            if any(item.is_used for item in items):
                raise _Unknown(f"{path} lacks the part of the weights that are no experts.")
            continue
        if not isinstance(part, Mapping) or not part.get("buckets_coalesced"):
            raise _Unknown(f"{path} is of the time before Megatron joined the buckets, and is not read.")
        buffers = list(_buffers(items))
        keys = sorted(key for key in part if type(key) is int)
        if len(keys) != len(buffers):
            raise _Unknown(f"{path} has {len(keys)} buffers, and the model {len(buffers)}.")
        for key, buffer in zip(keys, buffers, strict=True):
            yield from _of_buffer(part[key], path, buffer, files, config)


def _buffers(items: Iterable[Held]) -> Iterator[list[Held]]:
    """The tensors of each chunk and dtype, in the order of the model."""
    found: dict[tuple[int, object], list[Held]] = {}
    for item in items:
        found.setdefault((item.chunk, item.tensor.dtype), []).append(item)
    yield from found.values()


def _of_buffer(
    states: Any, path: Any, items: Sequence[Held], files: RankFiles, config: ModelConfig
) -> Iterator[_Found]:
    by_dtype = list(states.values()) if isinstance(states, Mapping) else []
    kinds = by_dtype[0] if len(by_dtype) == 1 and isinstance(by_dtype[0], Mapping) else {}
    flat = {kind: kinds[kind] for kind in ("param", *MOMENTS) if isinstance(kinds.get(kind), Tensor)}
    sizes = {tuple(values.shape) for values in flat.values()}
    if len(flat) != 1 + len(MOMENTS) or len(sizes) != 1:
        raise _Unknown(f"{path} has a buffer that is none of Adam's.")
    in_order = list(reversed(items))
    numels = [math.prod(item.entry.shape) for item in in_order]
    num_elements = flat["param"].numel()
    starts = starts_of(numels, num_elements, files.args)
    if starts is None:
        raise _Unknown(
            f"{path} has a buffer of {num_elements:,} elements, which the {len(items)} parameters do not fill in any "
            "order that is known."
        )
    for kind, values in flat.items():
        buffer = LoadedTensor(kind, path, values)
        for item, start in zip(in_order, starts, strict=True):
            yield _Found(kind, item, Unflattened(buffer, (), start, item.entry.shape))


def starts_of(numels: Sequence[int], num_elements: int, args: Mapping[str, Any]) -> list[int] | None:
    """Where each parameter begins in a buffer of so many elements; None if they do not fill it.

    A parameter begins at a multiple of 64 elements in its bucket; buckets follow each other without the padding
    that they end with in memory. With gradients reduced during backward a bucket is full at some size.
    """
    full = args.get("ddp_bucket_size") or max(_BUCKET_ELEMENTS, 1_000_000 * int(args.get("data_parallel_size") or 1))
    for bucket_elements in (math.inf, full):
        starts, bucket, position = [], 0, 0
        for numel in numels:
            start = bucket + -(-(position - bucket) // _ALIGNMENT) * _ALIGNMENT
            starts.append(start)
            position = start + numel
            if position - bucket >= bucket_elements:
                bucket = position
        if position == num_elements:
            return starts
    return None


def _whole(found: Iterable[_Found], config: ModelConfig) -> dict[str, StoredTensor]:
    """The states of every parameter, each as one tensor."""
    by_kind: dict[str, list[tuple[Held, StoredTensor]]] = {}
    for item in found:
        if item.held.is_used:
            values, tensor = item.values, item.held.tensor
            if isinstance(tensor, FormerQkv):
                values = replace(tensor, source=values)
            by_kind.setdefault(item.kind, []).append((item.held, values))
    tensors: dict[str, StoredTensor] = {}
    for kind, items in by_kind.items():
        try:
            whole = whole_parameters(items, config)
        except TesselError as error:
            if kind == "param":
                continue  # fp32 weights among others have no other master
            raise _Unknown(str(error)) from error
        tensors |= {f"{kind}.{name}": tensor for name, tensor in whole.items()}
    lacking = lacking_states(tensors, config)
    if lacking:
        raise _Unknown(f"{len(lacking)} parameters have no moments in it: {named(lacking)}.")
    return tensors

"""What a rank writes down about its run, beside the run's own output."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessel.data.loader import MicroBatch
from tessel.train import step as steps


@contextmanager
def recording_samples(folder: Path, rank: int) -> Iterator[None]:
    """The sample ids of every training step, and the replica that this rank belongs to."""
    record: dict[str, Any] = {"replica": 0, "steps": []}
    take_step = steps.TrainStep.__call__

    def recorded(self: steps.TrainStep, batches: Sequence[MicroBatch]) -> steps.StepResult:
        record["replica"] = self._peers.replica
        record["steps"].append([i for batch in batches for i in batch.sample_ids])
        return take_step(self, batches)

    steps.TrainStep.__call__ = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        steps.TrainStep.__call__ = take_step  # type: ignore[method-assign]
        (folder / f"{rank}.samples.json").write_text(json.dumps(record))


def around(recorder: str | None, folder: Path, rank: int) -> AbstractContextManager[None]:
    """The context manager that "module:name" names; one that does nothing for None."""
    if recorder is None:
        return nullcontext()
    module, _, name = recorder.partition(":")
    made: AbstractContextManager[None] = getattr(importlib.import_module(module), name)(folder, rank)
    return made


@contextmanager
def counting_bytes(folder: Path, rank: int) -> Iterator[None]:
    """Bytes that this rank sends in each training step, by the ranks of the group and the operation."""
    record: list[dict[str, float]] = []
    take_step = steps.TrainStep.__call__

    def recorded(self: steps.TrainStep, batches: Sequence[MicroBatch]) -> steps.StepResult:
        with SentBytes() as sent:
            result = take_step(self, batches)
        record.append(dict(sent.by_group))
        return result

    steps.TrainStep.__call__ = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        steps.TrainStep.__call__ = take_step  # type: ignore[method-assign]
        (folder / f"{rank}.bytes.json").write_text(json.dumps(record))


class SentBytes(TorchDispatchMode):
    """Counts what collectives send, by the best algorithm that there is for each (a ring's, or direct exchange).

    An all-reduce of n bytes on g ranks sends 2 n (g - 1) / g, its two halves n (g - 1) / g each; an all-to-all
    what is meant for others; a broadcast n; a send n. `by_group`: "0,1 all_reduce" -> bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_group: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(func.__name__.split(".")[0], args, result)
        return result

    def _count(self, name: str, args: Sequence[Any], result: Any) -> None:
        rule = next((kind for part, kind in _KINDS.items() if part in name), None)
        group = _group_of(args)
        if rule is None or group is None:
            return
        ranks = distributed.get_process_group_ranks(group)
        size = len(ranks)
        tensors = [a for a in tree_leaves(list(args)) if isinstance(a, Tensor)]
        outputs = [a for a in tree_leaves(result) if isinstance(a, Tensor)]
        whole = max((_num_bytes(t) for t in [*tensors, *outputs]), default=0)
        if "all_to_all" in name and len(args) == 4:
            whole, rule = _sent_to_others(args, ranks), "send"
        share = {"all_reduce": 2 * (size - 1) / size, "part": (size - 1) / size, "send": 1.0}[rule]
        self.by_group[f"{','.join(map(str, ranks))} {rule}"] += whole * share


# By a part of the operation's name; the first that fits. What a receive takes was counted where it was sent.
_KINDS = {
    "all_reduce": "all_reduce", "allreduce": "all_reduce", "reduce_scatter": "part", "all_gather": "part",
    "allgather": "part", "all_to_all": "part", "alltoall": "part", "broadcast": "send", "send": "send",
}  # fmt: skip


def _sent_to_others(args: Sequence[Any], ranks: Sequence[int]) -> int:
    """Bytes of an all-to-all's input that go to others: (input, output splits, input splits, group)."""
    tensor, _, splits, _ = args
    own = splits[list(ranks).index(distributed.get_rank())]
    rows = sum(splits)
    return _num_bytes(tensor) * (rows - own) // rows if rows else 0


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _group_of(args: Sequence[Any]) -> distributed.ProcessGroup | None:
    for argument in args:
        if isinstance(argument, str):
            try:
                return distributed.distributed_c10d._resolve_process_group(argument)
            except (ValueError, RuntimeError, LookupError):
                continue
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return distributed.ProcessGroup.unbox(argument)
    return None

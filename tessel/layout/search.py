"""The layouts of a model on so many devices that fit into memory, fastest first.

Every degree that the sharding table allows is tried, but for what another layout beats whatever the rates:
a state that is repeated where it may be shared at the same volume (no_shard against optim), stronger sharding or
more recomputation than memory asks for, and sequences shared by more ranks than need be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tessel.layout.check import degrees_that_cut
from tessel.layout.choice import Choice, RecomputeChoice, RoutedShape
from tessel.layout.cost import Cost, CostModel
from tessel.layout.memory import Memory, MemoryModel
from tessel.layout.schedules import takes
from tessel.layout.topology import Topology

# Of a device's memory, for the driver, collectives and what the allocator cannot use.
USABLE_SHARE = 0.92
_MAX_PP, _MAX_CHUNKS, _MAX_MICRO_BATCH_TOKENS = 64, 4, 65536
# Sequences are shared where each rank still has so many tokens of one; where nothing fits so, down to the second.
_CP_TOKENS, _LEAST_CP_TOKENS = 4096, 256
# A layout with one more axis has to be faster by so much: predictions are not better than that.
_WORTH_AN_AXIS = 0.01
_STRATEGIES = ("optim", "optim_grads", "optim_grads_params")
_RECOMPUTE: tuple[RecomputeChoice, ...] = ("none", "mlp", "full")


@dataclass(frozen=True)
class Cluster:
    """Devices, and how many share a machine's fast links."""

    num_devices: int
    memory_bytes: int
    devices_per_node: int = 8

    @property
    def usable_bytes(self) -> int:
        """Of one device."""
        return int(self.memory_bytes * USABLE_SHARE)


@dataclass(frozen=True)
class Wanted:
    """What is trained, and what of the layout is given; None is to be found."""

    seq_length: int
    global_batch_size: int
    compute_bytes: int = 2
    micro_batch_size: int | None = None
    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    sharding_strategy: str | None = None
    recompute: RecomputeChoice | None = None


@dataclass(frozen=True)
class Found:
    """A layout, with the memory of the pipeline rank that needs most."""

    choice: Choice
    rank: int
    memory: Memory
    cost: Cost


@dataclass(frozen=True)
class Findings:
    """Layouts that fit, fastest first, and the one that needs least memory, whether it fits or not."""

    fitting: tuple[Found, ...]
    least: tuple[Choice, Memory] | None


def search(model: MemoryModel, cost: CostModel, cluster: Cluster, wanted: Wanted) -> Findings:
    """Try the layouts of `wanted` on a cluster."""
    findings = _search(model, cost, cluster, wanted, _CP_TOKENS)
    return findings if findings.fitting else _search(model, cost, cluster, wanted, _LEAST_CP_TOKENS)


def _search(model: MemoryModel, cost: CostModel, cluster: Cluster, wanted: Wanted, cp_tokens: int) -> Findings:
    fitting: list[Found] = []
    least: tuple[Choice, Memory] | None = None
    for start in _starts(model.config, cluster, wanted, cp_tokens):
        smallest = _smallest(start, wanted)
        memory = model.worst(smallest)[1]
        if least is None or memory.peak < least[1].peak:
            least = smallest, memory
        if memory.peak <= cluster.usable_bytes:
            fitting += [
                Found(choice, rank, needs, cost.step(choice))
                for choice, rank, needs in _fitting(model, cluster.usable_bytes, start, wanted)
            ]
    fitting.sort(key=_rank)
    return Findings(tuple(fitting), least)


def _rank(found: Found) -> tuple[float, int]:
    topology = found.choice.topology
    num_axes = sum(degree > 1 for degree in (topology.tp, topology.pp, topology.cp, topology.ep))
    return found.cost.step_s * (1 + _WORTH_AN_AXIS * num_axes), found.memory.peak


def spread(num_layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline rank; what does not divide goes to the middle, since the ends have the vocabulary."""
    each, rest = divmod(num_layers, pp)
    first = (pp - rest) // 2
    return tuple(each + (first <= rank < first + rest) for rank in range(pp))


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _starts(config: RoutedShape, cluster: Cluster, wanted: Wanted, cp_tokens: int) -> Iterator[Choice]:
    """Every set of degrees with micro-batches of one size, unsharded and without virtual stages."""
    world = cluster.num_devices
    cuts = degrees_that_cut(config, cluster.devices_per_node if wanted.tp is None else world)
    for tp in _pinned(wanted.tp, [n for n in _divisors(world, cluster.devices_per_node) if n in cuts]):
        for pp in _pinned(wanted.pp, _divisors(world // tp, min(_MAX_PP, config.num_hidden_layers))):
            most_cp = max(wanted.seq_length // cp_tokens, 1)
            for cp in _pinned(wanted.cp, _divisors(world // (tp * pp), most_cp)):
                if world % (tp * pp * cp) == 0 and wanted.seq_length % (tp * (2 * cp if cp > 1 else 1)) == 0:
                    yield from _with_experts(config, Topology(world, tp, pp, cp, etp=tp), wanted)


def _pinned(value: int | None, candidates: list[int]) -> list[int]:
    return candidates if value is None else [value]


def _with_experts(config: RoutedShape, topology: Topology, wanted: Wanted) -> Iterator[Choice]:
    per_stage = topology.world_size // topology.pp
    etp = wanted.etp or 1
    eps = [1]
    if config.num_experts:
        eps = _pinned(wanted.ep, [n for n in _divisors(per_stage // etp) if config.num_experts % n == 0])
    if wanted.global_batch_size % topology.dp:
        return
    rows = wanted.global_batch_size // topology.dp
    longest = max(_MAX_MICRO_BATCH_TOKENS * topology.cp // wanted.seq_length, 1)
    sizes = [n for n in (1, 2, 4, 8, 16, 32) if n <= longest] if wanted.micro_batch_size is None else []
    layers = spread(config.num_hidden_layers, topology.pp)
    for ep in eps:
        if per_stage % (ep * etp):
            continue
        placed = replace(topology, ep=ep, etp=etp) if config.num_experts else topology
        for size in sizes or [wanted.micro_batch_size or 1]:
            if rows % size == 0:
                yield Choice(
                    placed, layers, wanted.seq_length, size, wanted.global_batch_size,
                    sequence_parallel=topology.tp > 1, compute_bytes=wanted.compute_bytes,
                )  # fmt: skip


def _strategies(start: Choice, wanted: Wanted) -> list[str]:
    if wanted.sharding_strategy is not None:
        return [wanted.sharding_strategy]
    alone = start.topology.world_size == 1 or not start.is_wrapped
    return ["no_shard"] if alone else list(_STRATEGIES)


def _smallest(start: Choice, wanted: Wanted) -> Choice:
    """With everything that saves memory."""
    return replace(start, sharding_strategy=_strategies(start, wanted)[-1], recompute=wanted.recompute or "full")


def _fitting(
    model: MemoryModel, usable_bytes: int, start: Choice, wanted: Wanted
) -> Iterator[tuple[Choice, int, Memory]]:
    """For each number of virtual stages and each way of recomputing, the weakest sharding that fits."""
    for num_chunks in _chunks(start):
        chunked = replace(start, num_chunks=num_chunks)
        for recompute in _RECOMPUTE if wanted.recompute is None else (wanted.recompute,):
            for strategy in _strategies(start, wanted):
                choice = replace(chunked, recompute=recompute, sharding_strategy=strategy)
                rank, memory = model.worst(choice)
                if memory.peak <= usable_bytes:
                    yield choice, rank, memory
                    break
            else:
                continue
            if strategy == _strategies(start, wanted)[0]:
                break  # more recomputation would cost time and buy nothing


def _chunks(start: Choice) -> list[int]:
    """Virtual stages a rank: none, or some where all stages are alike and micro-batches come in whole rounds."""
    pp, layers = start.topology.pp, start.layers
    if pp == 1 or len(set(layers)) > 1 or not takes("interleaved", pp, start.num_micro_batches):
        return [1]
    return _divisors(layers[0], _MAX_CHUNKS)

"""torch.distributed over the processes of a run, and how they wait for one another."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed
from torch.distributed import PrefixStore, ProcessGroup, Store
from torch.distributed.device_mesh import DeviceMesh

from tessel.errors import TesselError, UsageError
from tessel.runtime import device as devices
from tessel.runtime import failure, watchdog
from tessel.runtime.failure import PeerFailedError
from tessel.runtime.log import voice
from tessel.runtime.world import World

T = TypeVar("T")

# The process group gives up a little later than the watchdog, which can say more.
_GROUP_MARGIN = timedelta(seconds=30)
_SHORTEST_POLL_S = 0.02
_LONGEST_POLL_S = 1.0
_SILENT_WAIT_S = 10.0
_PARTING_WAIT_S = 20.0
_CONNECT_TIMEOUT_S = 5.0
_DONE, _FAILED = "done", "failed"


@contextmanager
def mesh_of_one(device: torch.device) -> Iterator[DeviceMesh]:
    """A one-dimensional mesh that holds this process alone, as do all that are made within. No socket is opened."""
    if distributed.is_initialized():
        yield DeviceMesh(device.type, [0])
        return
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh(device.type, [0])
    finally:
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them. `Processes()` is a process alone, which waits for nobody."""

    world: World = field(default_factory=World)
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    """The ranks of each node."""
    control: ProcessGroup | None = None
    """All ranks, for CPU tensors and objects, whatever the device."""
    _store: Store | None = None
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def first(self, what: str, *, per_node: bool = False) -> Iterator[bool]:
        """One process goes through the body before the others do: `with processes.first("the index of the data"):`.

        Yields True there and False in the others, which wait without a limit: for a file that is built once and
        then read, or, with `if` around the work, for work that one does for all. The first is rank 0, or with
        `per_node` (machines that share no storage) the first rank of each node. All processes call it, in the
        same order.

        Raises:
            PeerFailedError: the first one failed; its own error is the one to show.
        """
        if self._store is None:
            yield True
            return
        leader = self.world.node_ranks[0] if per_node else 0
        key = f"first/{next(self._calls)}/{leader}"
        if self.world.rank != leader:
            with watchdog.unlimited(f"waiting for rank {leader}, {what}"):
                self._wait_for(key, f"rank {leader}: {what}")
            if self._store.get(key).decode() != _DONE:
                raise PeerFailedError(f"rank {leader} failed: {what}")
            yield False
            return
        try:
            with watchdog.unlimited(what):
                yield True
        except BaseException:
            with suppress(RuntimeError):
                self._store.set(key, _FAILED)
            raise
        self._store.set(key, _DONE)

    def meet(self, what: str) -> None:
        """Wait, without a limit, until every process is here."""
        if self._store is None:
            return
        key = f"meet/{next(self._calls)}"
        with watchdog.unlimited(f"waiting for all processes, {what}"):
            if self._store.add(f"{key}/count", 1) == self.world.world_size:
                self._store.set(key, _DONE)
            self._wait_for(key, f"all processes: {what}")

    def part(self) -> None:
        """After the last collective: nobody closes its connections while another may still be in it.

        Rank 0, which may hold the store, goes last. One that has died meanwhile is waited for a while only.
        """
        if self._store is None:
            return
        deadline_s = time.monotonic() + _PARTING_WAIT_S
        steps = [("part/here", self.world.world_size), ("part/gone", self.world.world_size - 1)]
        for key, count in steps:
            if key == "part/here" or self.world.rank != 0:
                self._store.add(key, 1)
            while (key == "part/here" or self.world.rank == 0) and time.monotonic() < deadline_s:
                if self._store.add(key, 0) >= count:
                    break
                time.sleep(_SHORTEST_POLL_S)

    def together(self, function: Callable[[], T]) -> T:
        """What `function()` returns here, once it has succeeded everywhere.

        Raises:
            TesselError: it raised one somewhere. All processes raise the same then, which names the nodes or
                ranks that failed, unless all did alike.
        """
        if self.control is None:
            return function()
        error: TesselError | None = None
        stopped = False
        try:
            value = function()
        except TesselError as own:
            error = own
        except PeerFailedError:
            stopped = True
        outcome = (self.world.node, socket.gethostname(), str(error) if error else None, type(error).__name__)
        outcomes: list[Any] = [None] * self.world.world_size
        distributed.all_gather_object(outcomes, (stopped, outcome), group=self.control)
        failed = {rank: outcome for rank, (_, outcome) in enumerate(outcomes) if outcome[2] is not None}
        if not failed:
            if stopped:
                raise PeerFailedError("another process failed")
            return value
        # Who waited for one that failed would have failed alike.
        message = _joined(failed, self.nodes, len(failed) + sum(stopped for stopped, _ in outcomes))
        usage = all(kind == UsageError.__name__ for *_, kind in failed.values())
        raise (UsageError if usage else TesselError)(message) from error

    def _wait_for(self, key: str, what: str) -> None:
        assert self._store is not None
        poll_s, started_s, told = _SHORTEST_POLL_S, time.monotonic(), False
        while not self._store.check([key]):
            time.sleep(poll_s)
            poll_s = min(poll_s * 1.5, _LONGEST_POLL_S)
            if not told and time.monotonic() - started_s > _SILENT_WAIT_S:
                voice.keep(f"waiting for {what}")
                told = True


@contextmanager
def process_group(device: torch.device, timeout_minutes: float, world: World | None = None) -> Iterator[Processes]:
    """torch.distributed over the processes of torchrun's environment, with a watchdog; nothing for one process.

    After an error inside, the group is left as it is: its peers may be gone, and the process must end at once
    (`failure.shown_once` sees to it).
    """
    world = world or World.from_environment()
    if world.world_size == 1:
        yield Processes()
        return
    limit = timedelta(minutes=timeout_minutes)
    store = _store(world, limit)
    failure.sign_in()
    distributed.init_process_group(
        devices.distributed_backend(device),
        store=PrefixStore("torch", store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=limit + _GROUP_MARGIN,
        device_id=None if device.type == "cpu" else device,
    )
    control = distributed.group.WORLD if device.type == "cpu" else distributed.new_group(backend="gloo")
    processes = Processes(world, _nodes(world, control), control, PrefixStore("tessel", store))
    between_nodes = None
    if world.num_nodes > 1:
        # A connection of its own for the watchdog: a store that waits holds its lock.
        between_nodes = NodeNews(lambda: _store(world, limit))
        failure.desk.tell_nodes = between_nodes.tell
    with watchdog.watching(world, limit.total_seconds(), between_nodes):
        yield processes
        processes.meet("the end")
    # Gloo aborts where a rank leaves while another is still in a group.
    distributed.barrier(group=control)
    processes.part()
    failure.sign_out()
    distributed.destroy_process_group()


def on_every_node(function: Callable[[], T], world: World) -> Callable[[], T]:
    """Call `function` now, and let what it returns or raises come out of the function that is returned.

    For what looks at files before there is a process group: a node that lacks one must not leave the others
    waiting there, so its error is kept for `Processes.together`. What is wrong on every node alike, a UsageError,
    is raised at once, and so is anything on a single node.
    """
    try:
        value = function()
    except TesselError as error:
        if isinstance(error, UsageError) or world.num_nodes == 1:
            raise
        return partial(_raise, error)
    return lambda: value


def _raise(error: TesselError) -> NoReturn:
    raise error


class NodeNews:
    """What nodes tell each other when one of them fails, over the launcher's store."""

    _KEY = "failure"

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._store = connect()

    def tell(self, text: str) -> None:
        """Say why this node fails."""
        self._store.compare_set(self._KEY, "", text)  # the first to know says it

    def hear(self) -> str | None:
        """Why a node has failed, if one has; that the first node is gone, if its store is."""
        try:
            return self._store.get(self._KEY).decode() if self._store.check([self._KEY]) else None
        except RuntimeError as error:
            voice.keep(f"the store of the run does not answer: {error}")
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, _CONNECT_TIMEOUT_S).close()
            self._store = self._connect()
        except ConnectionRefusedError:
            return "node 0 has left the run"
        except (OSError, RuntimeError):  # out of reach: the network may come back
            pass
        return None


def store_prefix(num_restarts: int | str, world_size: int) -> str:
    """Under which the keys of one start of a run lie: the launcher's store may still hold those of an earlier one."""
    return f"start_{num_restarts}_{world_size}"


def _store(world: World, timeout: timedelta) -> Store:
    found, _, _ = next(distributed.rendezvous("env://", world.rank, world.world_size, timeout=timeout))
    # A store of rank 0's own is new at each start. Launchers count their restarts each for itself.
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    num_restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_launchers else "0"
    return PrefixStore(store_prefix(num_restarts, world.world_size), found)


def tell_nodes(address: str, port: int, prefix: str, text: str) -> None:
    """Say why this node fails, for processes that can no longer say it themselves."""
    timeout = timedelta(seconds=_CONNECT_TIMEOUT_S)
    with suppress(RuntimeError, OSError):  # whoever holds the store may be gone, too
        # torch would print a stack of its own if it could not connect.
        socket.create_connection((address, port), _CONNECT_TIMEOUT_S).close()
        store = distributed.TCPStore(address, port, is_master=False, timeout=timeout)
        NodeNews(lambda: PrefixStore(prefix, store)).tell(text)


def _nodes(world: World, control: ProcessGroup | None) -> tuple[tuple[int, ...], ...]:
    if world.num_nodes == 1:
        return (tuple(range(world.world_size)),)
    found: list[Any] = [None] * world.world_size
    distributed.all_gather_object(found, world.node, group=control)
    return tuple(tuple(rank for rank, node in enumerate(found) if node == own) for own in sorted(set(found)))


def _joined(failed: dict[int, tuple[int, str, str, str]], nodes: tuple[tuple[int, ...], ...], num_affected: int) -> str:
    """One message for all, with the places where that says more: where not all are affected, or not alike."""
    num_ranks = sum(len(ranks) for ranks in nodes)
    ranks_of: dict[str, list[int]] = {}
    for rank, (_, _, message, _) in failed.items():
        ranks_of.setdefault(message, []).append(rank)
    if len(ranks_of) == 1 and num_affected == num_ranks:
        return next(iter(ranks_of))
    lines = []
    for message, ranks in ranks_of.items():
        places = dict.fromkeys(f"node {failed[rank][0]} ({failed[rank][1]})" for rank in ranks)
        whole = len(nodes) > 1
        lines.append(f"{', '.join(places) if whole else 'rank ' + ', '.join(map(str, ranks))}: {message}")
    return "\n".join(lines)

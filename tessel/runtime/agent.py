"""torchrun's agent, started from here: it starts the processes of a node, and looks after them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from tessel.errors import TesselError, UsageError
from tessel.runtime.failure import CLAIM
from tessel.runtime.process import store_prefix, tell_nodes
from tessel.runtime.world import LAUNCHED, node_name

_RUN_ID = "tessel"
_STOPPING = (signal.SIGTERM, signal.SIGINT)
# Looked at this often: a process that died is noticed at once.
_MONITOR_INTERVAL_S = 0.1
_LAST_NEWS_S = 4.0
# Ends of a process that are never the agent's own doing.
_DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


@dataclass(frozen=True)
class Nodes:
    """How many processes and machines there are, and where they meet."""

    nproc_per_node: int
    fewest: int = 1
    most: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0 takes a free one, on a single machine."""
    max_restarts: int = 0

    @property
    def is_static(self) -> bool:
        """Whether the machines and their numbers are fixed; otherwise they are given out as machines come."""
        return 1 < self.most == self.fewest and self.max_restarts == 0


def run(arguments: Sequence[str], nodes: Nodes, environment: Mapping[str, str]) -> int:
    """Start `python ARGUMENTS` in the processes of this node, with `environment` besides, and wait for their end.

    Returns the exit status of the one process that it stands for: 0, that of the process that failed first, or
    128 and the signal that killed it. SIGTERM and SIGINT are passed on to the processes, which stop in good order.

    Raises:
        TesselError: the machines, or the processes of one, did not meet.
    """
    if nodes.most > 1 and not nodes.is_static:
        # Each start then has a store of its own, in rank 0; the agent's would keep the keys of the start before.
        environment = {**environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with tempfile.TemporaryDirectory(prefix="tessel_") as folder, _surroundings(environment):
        try:
            spec = _spec(arguments, nodes)
        except RendezvousError as error:
            raise TesselError(_not_met(nodes, error.__cause__ or error)) from error
        agent = _Agent(spec, DefaultLogsSpecs(log_dir=folder), folder=Path(folder))
        with agent.signals_passed_on():
            try:
                result = agent.run()
            except SignalException as stopped:
                return 128 + stopped.sigval
            except (RendezvousError, DistError, TimeoutError, ConnectionError) as error:
                raise TesselError(_not_met(nodes, error)) from error
            return agent.status_of(result)


def _not_met(nodes: Nodes, error: BaseException) -> str:
    where = f"{nodes.master_addr}:{nodes.master_port}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if nodes.most == 1:
        return (
            f"The processes cannot meet at {where} ({reason}). If something else listens there, perhaps a run that was "
            "left behind, end it, or give another --master-port; without --master-port a free one is taken."
        )
    return (
        f"The {nodes.most} machines did not meet at {where} ({reason}). Start the same command on each, with the "
        "--master-addr and --master-port of machine 0, which must be reachable and free, and a --node-rank of its own."
    )


def _spec(arguments: Sequence[str], nodes: Nodes) -> WorkerSpec:
    parameters = RendezvousParameters(
        backend="static" if nodes.is_static else "c10d",
        endpoint=f"{nodes.master_addr}:{nodes.master_port}",
        run_id=_RUN_ID,
        min_nodes=nodes.fewest,
        max_nodes=nodes.most,
        # One machine needs no name to find itself by.
        local_addr=nodes.master_addr if nodes.most == 1 else None,
        **({"rank": nodes.node_rank} if nodes.is_static else {"is_host": nodes.node_rank == 0}),
    )
    return WorkerSpec(
        role="tessel",
        local_world_size=nodes.nproc_per_node,
        entrypoint=sys.executable,
        # The agent fills in templates, and a path may hold what looks like one.
        args=("-u", *(argument.replace("$", "$$") for argument in arguments)),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=nodes.max_restarts,
        monitor_interval=_MONITOR_INTERVAL_S,
        master_addr=nodes.master_addr if nodes.is_static else None,
        master_port=nodes.master_port if nodes.is_static else None,
        local_addr=parameters.local_addr,
    )


class _Agent(LocalElasticAgent):
    """Says in tessel's words how processes ended, and passes on the signals that stop a run."""

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, folder: Path) -> None:
        super().__init__(spec, logs_specs)
        self._folder = folder
        self._signal: signal.Signals | None = None

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """While inside, SIGTERM and SIGINT go to the processes, and end this one where there are none yet."""
        before = {number: signal.signal(number, self._pass_on) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = signal.Signals(number)
        # Who is asked to stop is not to be started again.
        self._remaining_restarts = 0
        pids = [worker.id for worker in self.get_worker_group().workers if worker.id is not None]
        if not pids:
            raise SignalException(f"stopped by {self._signal.name}", self._signal)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            if self.status_of(result) == UsageError.exit_code:
                self._remaining_restarts = 0  # the same command line would be refused again
            self._describe(result)
            self._tell_nodes(result)
            if self._remaining_restarts:
                left = self._remaining_restarts
                _say(f"starting again; {left} restart{'s' if left > 1 else ''} left (--max-restarts)")
        return result

    def _describe(self, result: RunResult) -> None:
        """A line on a process that could not speak for itself."""
        rank, first = self._first_of(result)
        has_spoken = self._has_spoken()
        if first.exitcode > 0:
            if not has_spoken:
                _say(f"error: rank {rank} (pid {first.pid}) ended with exit status {first.exitcode}")
            return
        number = -first.exitcode
        if number == self._signal:
            _say(f"stopped by {self._signal.name}")
        elif number in _DEADLY or not has_spoken:
            _say(f"error: rank {rank} (pid {first.pid}) was killed by {_signal_name(number)}{_hint(number)}")

    def _tell_nodes(self, result: RunResult) -> None:
        """Processes that were killed could not tell the other nodes, which may wait for them."""
        group = self.get_worker_group()
        world_size = group.workers[0].world_size
        if world_size == len(group.workers) or group.master_addr is None or group.master_port is None:
            return
        rank, first = self._first_of(result)
        prefix = store_prefix(0, world_size)  # runs of several nodes that restart have a new store each time
        text = f"rank {rank} on {node_name(group.group_rank or 0)} ended with status {first.exitcode}"
        tell_nodes(group.master_addr, group.master_port, prefix, text)
        if group.group_rank == 0 and not self._remaining_restarts:
            # The store ends with this process, and the others look at it now and then.
            time.sleep(_LAST_NEWS_S)

    def _first_of(self, result: RunResult) -> tuple[int, ProcessFailure]:
        """The process that failed first: as the agent noticed, but a death comes before a silent end."""
        failures = list(result.failures.items())
        if not self._has_spoken():
            failures.sort(key=lambda found: -found[1].exitcode not in _DEADLY)
        return failures[0]

    def _has_spoken(self) -> bool:
        """Whether a process has said what happened."""
        attempts = sorted(self._folder.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        return bool(attempts) and (attempts[-1] / CLAIM).exists()

    def status_of(self, result: RunResult) -> int:
        """The exit status that stands for all processes of this node."""
        if not result.is_failed():
            return 0
        _, first = self._first_of(result)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def _say(text: str) -> None:
    print(f"tessel: {text}", file=sys.stderr, flush=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _hint(number: int) -> str:
    if number == signal.SIGKILL:
        return "; the kernel's log says whether memory ran out (dmesg)"
    return "" if number == signal.SIGTERM else ", in native code; --rank-log-dir keeps what it said last"


@contextmanager
def _surroundings(environment: Mapping[str, str]) -> Iterator[None]:
    """The environment that the processes inherit, and the agent's own messages off: ours say the same, once."""
    signals = "SIGHUP,SIGQUIT"  # the others are ours
    changed = {**environment, LAUNCHED: "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": signals}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def loopback_interface() -> str | None:
    """The name of the network interface that only this machine sees."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)

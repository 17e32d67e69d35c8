"""Every collective over all devices of this machine, or over two processes where it has none: results and gradients.

Each process knows what the others hold, from their numbers alone, so that nothing has to be collected to be checked.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from tessel.parallel import collectives
from tessel.parallel.overlap import FusedProducts
from tessel.runtime import device as devices
from tessel.selftest.result import Check, SkippedError, WrongError, check

PART = "collectives"
CPU_PROCESSES = 2
TIME_LIMIT_S = 240.0
DTYPES = (torch.float32, torch.bfloat16)
ROWS, COLUMNS = 3, 5
"""Of what one process sends to one other: odd on purpose."""


def run(device: torch.device) -> Iterator[Check]:
    """A check for each collective; those of processes that do not answer fail together."""
    num_processes = CPU_PROCESSES if device.type == "cpu" else devices.count(device)
    if num_processes < 2:
        for name in COLLECTIVES:
            yield Check(PART, name, "skipped", "this machine has one device")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield from _in_processes(device.type, num_processes, Path(folder) / "store")


def _in_processes(kind: str, num_processes: int, store: Path) -> list[Check]:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_one_process, args=(kind, rank, num_processes, str(store), sending), daemon=True)
        for rank in range(num_processes)
    ]
    try:
        for process in processes:
            process.start()
        sending.close()
        try:
            found: list[Check] = receiving.recv() if receiving.poll(TIME_LIMIT_S) else []
        except EOFError:
            found = []
        if not found:
            reason = f"{num_processes} processes did not answer within {TIME_LIMIT_S:g} s, or died"
            return [Check(PART, "process group", "failed", reason)]
        for process in processes:
            process.join(TIME_LIMIT_S)
        return found
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _one_process(kind: str, rank: int, num_processes: int, store: str, sending: Connection) -> None:
    """What each process does: all checks, in one order. The first tells what was found, anywhere."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if kind == "cpu" else devices.resolve(f"{kind}:{rank}")
    distributed.init_process_group(
        devices.distributed_backend(device),
        store=distributed.FileStore(store, num_processes),
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=TIME_LIMIT_S),
    )
    group = distributed.group.WORLD
    assert group is not None
    own = [check(PART, name, partial(_checked, body, device, group)) for name, body in COLLECTIVES.items()]
    gathered: list[list[Check]] = [[] for _ in range(num_processes)]
    distributed.all_gather_object(gathered, own)
    if rank == 0:
        sending.send([_worst(of_ranks) for of_ranks in zip(*gathered, strict=True)])
    distributed.barrier()
    distributed.destroy_process_group()


def _worst(of_ranks: tuple[Check, ...]) -> Check:
    """The first rank's finding, or that of the first one that failed."""
    for rank, found in enumerate(of_ranks):
        if found.status == "failed":
            return Check(PART, found.name, "failed", f"rank {rank}: {found.detail}", found.seconds)
    return of_ranks[0]


Body = Callable[[torch.device, ProcessGroup, torch.dtype], list[tuple[Tensor, Tensor]]]


def _checked(body: Body, device: torch.device, group: ProcessGroup) -> str:
    """Run a collective in every dtype; the numbers are small integers, so that all sums are exact."""
    for dtype in DTYPES:
        for actual, expected in body(device, group, dtype):
            if not torch.equal(actual.detach().cpu().float(), expected.float()):
                raise WrongError(f"wrong numbers in {dtype}")
    return f"{group.size()} processes on {device.type}, exact in {', '.join(str(d)[6:] for d in DTYPES)}"


def _of_rank(rank: int, num_rows: int = ROWS) -> Tensor:
    return torch.arange(num_rows * COLUMNS).view(num_rows, COLUMNS) % 7 + rank


def _there(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype).requires_grad_()


def _pair(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output and gradient of a function of x."""
    leaf = _there(x, device, dtype)
    out = function(leaf)
    (found,) = torch.autograd.grad(out, leaf, grad.to(device, dtype))
    return out, found


def _all_reduce(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """copy_to and reduce_from."""
    everybody = sum((_of_rank(rank) for rank in range(group.size())), torch.zeros(ROWS, COLUMNS))
    own = _of_rank(group.rank())
    copied, copied_grad = _pair(lambda x: collectives.copy_to(x, group), own, own, device, dtype)
    reduced, reduced_grad = _pair(lambda x: collectives.reduce_from(x, group), own, own, device, dtype)
    return [(copied, own), (copied_grad, everybody), (reduced, everybody), (reduced_grad, own)]


def _all_gather(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """gather_from and join_from, along both dims."""
    found = []
    ranks, own = range(group.size()), _of_rank(group.rank())
    for dim in (0, 1):
        joined = torch.cat([_of_rank(rank) for rank in ranks], dim)
        grads = [joined + rank for rank in ranks]
        part = slice(group.rank() * own.shape[dim], (group.rank() + 1) * own.shape[dim])
        index = (part, slice(None)) if dim == 0 else (slice(None), part)
        summed = sum(grads, torch.zeros_like(joined))[index]
        for function, expected in ((collectives.gather_from, summed), (collectives.join_from, grads[0][index])):
            grad = grads[group.rank() if function is collectives.gather_from else 0]
            out, found_grad = _pair(lambda x, f=function, d=dim: f(x, group, d), own, grad, device, dtype)  # type: ignore[misc]
            found += [(out, joined), (found_grad, expected)]
    return found


def _reduce_scatter(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """scatter_to."""
    ranks, num_rows = range(group.size()), ROWS * group.size()
    everybody = sum((_of_rank(rank, num_rows) for rank in ranks), torch.zeros(num_rows, COLUMNS))
    own, part = _of_rank(group.rank(), num_rows), slice(group.rank() * ROWS, (group.rank() + 1) * ROWS)
    out, grad = _pair(lambda x: collectives.scatter_to(x, group, 0), own, _of_rank(group.rank()), device, dtype)
    return [(out, everybody[part]), (grad, torch.cat([_of_rank(rank) for rank in ranks]))]


def _all_to_all(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Runs of other lengths for every pair of ranks, some of them empty: rank a sends (a + b) % 3 rows to rank b."""
    ranks, me = range(group.size()), group.rank()
    sent = [(me + other) % 3 for other in ranks]
    own, starts = _of_rank(me, sum(sent)), {rank: sum((rank + other) % 3 for other in range(me)) for rank in ranks}
    received = [
        _of_rank(rank, sum((rank + other) % 3 for other in ranks))[starts[rank] : starts[rank] + (rank + me) % 3]
        for rank in ranks
    ]
    expected = torch.cat(received)
    out, grad = _pair(lambda x: collectives.all_to_all(x, group, sent, sent), own, expected, device, dtype)
    return [(out, expected), (grad, own)]


def _broadcast(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    found = []
    for source in range(group.size()):
        x = _there(_of_rank(group.rank()), device, dtype).detach()
        distributed.broadcast(x, source)
        found.append((x, _of_rank(source)))
    return found


def _send_receive(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """To the next in a ring and from the one before, together, as pipelines and rings do."""
    size, me = group.size(), group.rank()
    own, other = _of_rank(me).to(device, dtype), torch.empty(ROWS, COLUMNS, dtype=dtype, device=device)
    operations = [
        distributed.P2POp(distributed.isend, own, (me + 1) % size),
        distributed.P2POp(distributed.irecv, other, (me - 1) % size),
    ]
    for work in distributed.batch_isend_irecv(operations):
        work.wait()
    return [(other, _of_rank((me - 1) % size))]


def _subgroup(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """A group of the last ranks, all but the first, which every process helps to make."""
    members = list(range(1, group.size()))
    part = distributed.new_group(members)
    if group.rank() == 0:
        return []
    x = _of_rank(group.rank()).to(device, dtype)
    distributed.all_reduce(x, group=part)
    return [(x, sum((_of_rank(rank) for rank in members), torch.zeros(ROWS, COLUMNS)))]


def _objects(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    gathered: list[int] = [0] * group.size()
    distributed.all_gather_object(gathered, group.rank())
    return [(torch.tensor(gathered), torch.arange(group.size()))]


def _products(device: torch.device, group: ProcessGroup, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Products with a gather or a scatter inside them, against products and collectives apart: 16-bit numbers alone."""
    available, reason = devices.fused_products_available(device, group.size(), torch.bfloat16)
    if not available:
        raise SkippedError(reason)
    if dtype.itemsize != 2:
        return []
    products = FusedProducts(devices.communicator_name(group, device), group.size())
    size, num_rows = products.inner_sizes[0], ROWS * group.size()
    # Rows with a single one pick rows of the weight: everything is a sum of a few small integers.
    picks = (torch.arange(2 * num_rows) + group.rank()).view(2, num_rows)
    rows = torch.nn.functional.one_hot(picks % size, size)
    weight = (torch.arange(size)[:, None] + torch.arange(size)) % 5

    def gathered(x: Tensor, w: Tensor) -> Tensor:
        return products.gathered(x, [w])[0]

    def gathered_apart(x: Tensor, w: Tensor) -> Tensor:
        return collectives.gather_from(x, group, 1) @ w.T

    def scattered_apart(x: Tensor, w: Tensor) -> Tensor:
        return collectives.scatter_to(x @ w.T, group, 1)

    cases = (
        (gathered, gathered_apart, rows[:, :ROWS], rows),
        (products.scattered, scattered_apart, rows, rows[:, :ROWS]),
    )
    found = []
    for ours, apart, x, grad in cases:
        both = []
        for function in (ours, apart):
            leaves = [_there(x, device, dtype), _there(weight, device, dtype)]
            out = function(*leaves)
            both.append([out, *torch.autograd.grad(out, leaves, grad.to(device, dtype))])
        found += [(a, b.detach().cpu()) for a, b in zip(*both, strict=True)]
    return found


COLLECTIVES: dict[str, Body] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-to-all": _all_to_all,
    "broadcast": _broadcast,
    "send and receive": _send_receive,
    "a group of some": _subgroup,
    "objects": _objects,
    "products with a gather or a scatter inside": _products,
}

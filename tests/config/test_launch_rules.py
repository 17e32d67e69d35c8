"""How many processes and machines: what the flags may say."""

from __future__ import annotations

import pytest

from tessel.config.launch_rules import check_launch, num_nodes_of
from tessel.config.layout import Launch
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.errors import UsageError

REQUIRED = "--seq-length 8 --train-iters 1 --lr 1e-3 --data-path x"


def check(flags: str) -> None:
    check_launch(parse(RunConfig, f"{REQUIRED} {flags}".split(), "tessel pretrain").value)


@pytest.mark.parametrize(("text", "nodes"), [("1", (1, 1)), ("4", (4, 4)), ("2:4", (2, 4))])
def test_nnodes_is_a_number_or_a_range(text: str, nodes: tuple[int, int]) -> None:
    assert num_nodes_of(Launch(nnodes=text)) == nodes


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--nproc-per-node 8",
        "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1",
        "--nproc-per-node 8 --nnodes 2:4 --master-addr head --max-restarts 3",
    ],
)
def test_what_can_be(flags: str) -> None:
    check(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nproc-per-node 2 --nnodes two", "--nnodes is 'two': it must be a number of machines, or MIN:MAX"),
        ("--nproc-per-node 2 --nnodes 0", "--nnodes is '0'"),
        ("--nproc-per-node 2 --nnodes 1:2:3", "--nnodes is '1:2:3'"),
        ("--nproc-per-node 2 --nnodes 4:2 --master-addr a", "the fewest machines come first. Give 2:4"),
        ("--nproc-per-node 2 --nnodes 2", "--nnodes 2 with --master-addr 127.0.0.1: that is each machine itself"),
        ("--nproc-per-node 2 --nnodes 2 --master-addr localhost", "--master-addr localhost: that is each machine"),
        ("--nproc-per-node 2 --nnodes 1:2 --master-addr ::1", "--master-addr ::1: that is each machine itself"),
        ("--nproc-per-node 2 --nnodes 2 --master-addr a --node-rank 2", "--node-rank is 2 of --nnodes 2.*below 2"),
        ("--nproc-per-node 2 --master-port 70000", "--master-port is 70000: it must be from 1 to 65535"),
        ("--nnodes 2 --master-addr a", "--nnodes needs --nproc-per-node"),
        ("--max-restarts 2", "--max-restarts needs --nproc-per-node.*or start with torchrun"),
    ],
)
def test_what_cannot_be(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(flags)

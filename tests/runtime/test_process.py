"""Which process this is, what several say together, and how they wait for one another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tessel.errors import TesselError, UsageError
from tessel.runtime import device as devices
from tessel.runtime import failure
from tessel.runtime.failure import BUG, ERROR, HANG, Desk, PeerFailedError, Record, is_lost, message_lines
from tessel.runtime.process import Processes, _joined, on_every_node, process_group, store_prefix
from tessel.runtime.world import World, is_launched, unread_counts
from tests.runtime.launched import by_tessel, run

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}  # fmt: skip
SECOND_NODE = World(rank=5, world_size=8, local_rank=1, local_world_size=4, node=1, num_nodes=2)


def test_torchruns_environment_says_which_process_this_is() -> None:
    assert World.from_environment(TORCHRUN) == SECOND_NODE
    assert list(SECOND_NODE.node_ranks) == [4, 5, 6, 7]
    without_groups = {name: value for name, value in TORCHRUN.items() if not name.startswith("GROUP")}
    assert World.from_environment(without_groups) == SECOND_NODE


@pytest.mark.parametrize("counts", [{}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_without_local_rank_it_is_one_process(counts: dict[str, str]) -> None:
    assert World.from_environment(counts) == World(0, 1, 0, 1, 0, 1)


def test_part_of_an_environment_is_refused() -> None:
    with pytest.raises(UsageError, match="LOCAL_RANK is set and WORLD_SIZE and LOCAL_WORLD_SIZE not.*torchrun"):
        World.from_environment({"LOCAL_RANK": "0", "RANK": "0"})
    with pytest.raises(UsageError, match="WORLD_SIZE=many in the environment is no whole number"):
        World.from_environment(TORCHRUN | {"WORLD_SIZE": "many"})


def test_processes_without_a_port_are_refused_instead_of_hanging() -> None:
    with pytest.raises(UsageError, match="MASTER_PORT is 0.*torchrun --standalone"):
        World.from_environment(TORCHRUN | {"MASTER_PORT": "0"})


def test_counts_of_machines_are_remarked_upon_where_they_count_several() -> None:
    assert "WORLD_SIZE=2 and RANK=1 without LOCAL_RANK" in (unread_counts({"WORLD_SIZE": "2", "RANK": "1"}) or "")
    assert unread_counts({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert unread_counts(TORCHRUN) is None
    assert not is_launched(TORCHRUN) and is_launched(TORCHRUN | {"TESSEL_LAUNCHED": "1"})


def test_each_process_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    assert devices.resolve("auto", SECOND_NODE) == devices.resolve("cuda", SECOND_NODE) == torch.device("cuda:1")
    assert taken == [1, 1]
    with pytest.raises(UsageError, match="--device cuda:3 is one device for 4 processes. Give --device cuda"):
        devices.resolve("cuda:3", SECOND_NODE)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(TesselError, match="4 processes on this machine, and torch sees 2 of cuda"):
        devices.resolve("auto", SECOND_NODE)


def test_tensors_of_the_cpu_go_by_gloo_whatever_the_device() -> None:
    assert devices.distributed_backend(torch.device("cpu")) == "gloo"
    assert devices.distributed_backend(torch.device("cuda:1")) == "cpu:gloo,cuda:nccl"


def test_one_process_waits_for_nobody() -> None:
    with process_group(torch.device("cpu"), 1.0, World()) as processes:
        with processes.first("nothing") as leads:
            assert leads
        processes.meet("here")
        assert processes.together(lambda: 3) == 3
        assert processes.nodes == ((0,),)
    assert not torch.distributed.is_initialized()


def test_an_error_on_files_waits_for_the_other_nodes() -> None:
    def lacking() -> int:
        raise TesselError("no such folder")

    def wrong() -> int:
        raise UsageError("cannot be")

    later = on_every_node(lacking, SECOND_NODE)
    with pytest.raises(TesselError, match="no such folder"):
        Processes().together(later)
    with pytest.raises(TesselError, match="no such folder"):
        on_every_node(lacking, World(0, 2, 0, 2, 0, 1))
    with pytest.raises(UsageError):
        on_every_node(wrong, SECOND_NODE)
    assert on_every_node(lambda: 4, SECOND_NODE)() == 4


def test_an_error_names_the_places_that_differ() -> None:
    def failed(*ranks: int, message: str = "gone") -> dict[int, tuple[int, str, str, str]]:
        return {rank: (rank // 2, f"host{rank // 2}", message, "TesselError") for rank in ranks}

    two_nodes = ((0, 1), (2, 3))
    assert _joined(failed(0, 1, 2, 3), two_nodes, 4) == "gone"
    assert _joined(failed(0), two_nodes, 4) == "gone", "the others waited for that one"
    assert _joined(failed(2), two_nodes, 2) == "node 1 (host1): gone"
    assert _joined(failed(1, 3), (tuple(range(4)),), 2) == "rank 1, 3: gone"
    both = failed(0, 1) | failed(2, message="full")
    assert _joined(both, two_nodes, 3) == "node 0 (host0): gone\nnode 1 (host1): full"


def test_keys_of_an_earlier_start_are_not_read() -> None:
    assert len({store_prefix(0, 4), store_prefix(1, 4), store_prefix(0, 2)}) == 3


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is"), True),
        (torch.distributed.DistBackendError("the library failed"), True),
        (PeerFailedError("rank 0 failed"), True),
        (RuntimeError("shapes do not match"), False),
        (TesselError("the disk is full."), False),
        (ConnectionRefusedError("Connection refused"), False),
    ],
)
def test_an_error_of_another_process_is_told_from_ones_own(error: Exception, lost: bool) -> None:
    assert is_lost(error) is lost
    try:
        raise TesselError("told anew") from error
    except TesselError as outer:
        assert is_lost(outer) is lost


def test_what_all_ranks_say_has_no_rank_and_what_one_says_has() -> None:
    world = World(0, 3, 0, 3, 0, 1)
    records = [Record(rank, ERROR, "not there.\nLook again.") for rank in range(3)]
    assert message_lines(records[1], records, world) == ["tessel: error: not there.", "tessel: error: Look again."]
    assert message_lines(records[1], records[1:2], world)[0] == "tessel: error: rank 1: not there."
    assert message_lines(records[1], records[1:], world)[0] == "tessel: error: ranks 1, 2: not there."
    bug = Record(5, BUG, "ValueError: x", detail="Traceback\nValueError: x\n")
    first, *rest = message_lines(bug, [bug], SECOND_NODE)
    assert first.startswith("tessel: error: rank 5 on node 1 (") and first.endswith("): ValueError: x")
    assert rest[0] == "Traceback\nValueError: x"


def test_of_hanging_ranks_the_odd_one_comes_first() -> None:
    world = World(0, 4, 0, 4, 0, 1)
    records = [Record(rank, HANG, f"waits in {place}", group=place) for rank, place in enumerate("aaba")]
    lines = message_lines(records[0], records, world)
    assert lines[:2] == ["tessel: error: rank 2: waits in b", "tessel: error: ranks 0, 1, 3: waits in a"]
    assert "--distributed-timeout-minutes" in lines[2]


def test_records_of_a_node_meet_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    desk = Desk()
    desk.open(SECOND_NODE, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "0" / "error.json")})
    assert desk.folder == tmp_path and not desk.is_claimed()
    (tmp_path / "error_00004.json").write_text(json.dumps(asdict(Record(4, ERROR, "full"))))
    (tmp_path / "error_00005.json").write_text("{half")
    assert desk.read() == [Record(4, ERROR, "full")]
    desk.open(SECOND_NODE, {"TORCHELASTIC_ERROR_FILE": ""})
    assert desk.folder is None and desk.read() == []


def test_a_rank_that_died_is_told_from_one_that_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "desk", Desk())
    assert failure.dead_peers() == []
    failure.desk.world, failure.desk.folder = SECOND_NODE, tmp_path
    failure.sign_in()
    (tmp_path / "pid_00006").write_text(str(2**22 + 1))  # more than any process's number
    assert failure.dead_peers() == [6]
    failure.sign_out()
    assert [path.name for path in tmp_path.iterdir()] == ["pid_00006"]


def test_one_makes_a_file_while_the_others_wait_longer_than_any_operation_may_take(tmp_path: Path) -> None:
    status, _, err = run(by_tessel("--nproc-per-node 2", "once", tmp_path), TEST_TIMEOUT_MINUTES="0.05")
    assert (status, err) == (0, "")
    made = {path.name for path in tmp_path.iterdir()}
    assert {"all_leader_0_1", "all_leader_1_0", "node_0_leader_0_1", "node_0_leader_1_0"} <= made

"""What a run that makes no progress, and one whose peers are gone, comes to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tessel.runtime import failure, stack, watchdog
from tessel.runtime.failure import ELSEWHERE, ERROR, HANG, Desk, Record
from tessel.runtime.watchdog import Watchdog
from tessel.runtime.world import World
from tests.runtime.launched import by_tessel, run

WORLD = World(rank=0, world_size=4, local_rank=0, local_world_size=2, node=0, num_nodes=2)


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A desk in a folder of its own; ends of the process are exceptions."""

    def end(what: object) -> None:
        raise Ended(what)

    desk = Desk()
    desk.world, desk.folder = WORLD, tmp_path
    for module in (failure, watchdog):
        monkeypatch.setattr(module, "desk", desk)
    monkeypatch.setattr(failure, "report", end)
    monkeypatch.setattr(failure, "leave", end)
    monkeypatch.setattr(watchdog, "_position", watchdog.Position())
    yield desk


def ended(dog: Watchdog) -> object:
    with pytest.raises(Ended) as found:
        dog._look()
    return found.value.args[0]


def test_no_progress_is_reported_with_iteration_phase_and_place(desk: Desk) -> None:
    dog = Watchdog(WORLD, limit_s=60)
    watchdog.at(7, "save")
    dog._look()
    watchdog._position.since_s -= 90
    watchdog.goes_on()
    dog._look()
    watchdog._position.since_s -= 90
    record = ended(dog)
    assert isinstance(record, Record) and (record.rank, record.kind) == (0, HANG)
    assert record.message.startswith("no progress for 1.5 minutes in iteration 7, save: in ")


def test_work_on_files_has_no_limit_and_begins_the_count_anew(desk: Desk) -> None:
    dog = Watchdog(WORLD, limit_s=60)
    watchdog.at(None, "start-up")
    with watchdog.unlimited("tokenizing"):
        watchdog._position.since_s -= 1000
        dog._look()
    dog._look()
    watchdog._position.since_s -= 61
    assert "in start-up" in ended(dog).message  # type: ignore[attr-defined]


def test_a_process_ends_some_seconds_after_another_has_failed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert desk.folder is not None
    dog = Watchdog(WORLD, limit_s=60)
    (desk.folder / failure.CLAIM).write_text(json.dumps(asdict(Record(1, ERROR, "full"))))
    dog._look()
    dog._look()
    now_s = time.monotonic()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now_s + watchdog.GRACE_S + 1)
    assert ended(dog) == 1


def test_when_another_hangs_a_process_says_where_it_is_itself(desk: Desk) -> None:
    assert desk.folder is not None
    (desk.folder / failure.CLAIM).write_text(json.dumps(asdict(Record(1, HANG, "waits", group="there"))))
    Watchdog(WORLD, limit_s=60)._look()
    (record,) = desk.read()
    assert (record.rank, record.kind) == (0, HANG)


def test_a_dead_process_is_told_to_the_other_nodes(desk: Desk) -> None:
    assert desk.folder is not None
    told: list[str] = []
    desk.tell_nodes = told.append
    (desk.folder / "pid_00001").write_text(str(2**22 + 1))
    Watchdog(WORLD, limit_s=60)._look()
    assert len(told) == 1 and told[0].startswith("rank 1 on node 0 (") and told[0].endswith(" died")


def test_news_of_another_node_ends_this_one(desk: Desk) -> None:
    class News:
        def hear(self) -> str | None:
            return "rank 2 on node 1 failed"

    record = ended(Watchdog(WORLD, limit_s=60, news=News()))
    assert record == Record(0, ELSEWHERE, "rank 2 on node 1 failed")
    other = World(rank=1, world_size=4, local_rank=1, local_world_size=2, node=0, num_nodes=2)
    Watchdog(other, limit_s=60, news=News())._look()  # one of a node asks


def function_in(file: str, name: str) -> Any:
    """A function that calls another, as if it stood in `file`, on its line 3."""
    names: dict[str, Any] = {}
    exec(compile(f"\n\ndef {name}(call): return call()", file, "exec"), names)
    return names[name]


def place_seen_by_a_thread() -> str:
    places: list[str] = []
    thread = threading.Thread(target=lambda: places.append(stack.place_of_main_thread(threading.get_ident())))
    thread.start()
    thread.join()
    return places[0]


def test_the_place_is_the_operation_and_who_asked_for_it() -> None:
    package = Path(stack.__file__).parent.parent
    step = function_in(str(package / "train" / "step.py"), "step")
    wait = function_in(str(package / "runtime" / "process.py"), "wait")
    all_reduce = function_in("/lib/torch/distributed/distributed_c10d.py", "all_reduce")
    wrapper = function_in("/lib/torch/distributed/c10d_logger.py", "wrapper")
    assert step(place_seen_by_a_thread) == "in step (tessel/train/step.py:3)"
    assert step(lambda: wrapper(lambda: all_reduce(place_seen_by_a_thread))) == "in all_reduce (tessel/train/step.py:3)"
    assert step(lambda: wait(place_seen_by_a_thread)).endswith("(tessel/train/step.py:3)")
    assert wait(place_seen_by_a_thread).endswith("(tessel/runtime/process.py:3)")


def test_the_place_of_an_exception() -> None:
    all_reduce = function_in("/lib/torch/distributed/distributed_c10d.py", "all_reduce")

    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError) as found:
        all_reduce(fail)
    assert stack.place_of_traceback(found.value.__traceback__).startswith("in all_reduce (test_watchdog.py:")
    assert stack.place_of_traceback(None) == "nowhere"


def test_a_hung_operation_is_reported_with_ranks_step_and_operation(tmp_path: Path) -> None:
    status, out, err = run(by_tessel("--nproc-per-node 3", "hang", tmp_path), TEST_TIMEOUT_MINUTES="0.1")
    assert status == 1 and out.splitlines()[-1] == "iteration 2"
    odd, others, remedy = err.splitlines()
    where = r"no progress for 0\.\d+ minutes in iteration 3, training step: in"
    assert re.fullmatch(rf"tessel: error: rank 1: {where} on_step \(worker\.py:\d+\)", odd)
    assert re.fullmatch(rf"tessel: error: ranks 0, 2: {where} all_reduce \(worker\.py:\d+\)", others)
    assert remedy == "tessel: --distributed-timeout-minutes says how long to wait"


def test_gloos_own_time_limit_reads_the_same(tmp_path: Path) -> None:
    status, _, err = run(by_tessel("--nproc-per-node 2", "hang_in_group", tmp_path))
    assert status == 1
    assert err.splitlines()[0].startswith("tessel: error: rank 0: no answer from another process in all_reduce (")

"""How a run of many processes ends when one of them fails: with that one's error, shown once.

The processes of a node meet in the folder that torchrun's agent made for their error files. A process with an
error of its own writes it there, and the first to claim the floor prints it. A process that only lost the others
waits for the one who knows why, and says nothing. Every process then leaves at once, without the interpreter's
way out: process groups whose peers are gone can hang or abort there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from tessel.errors import TesselError
from tessel.runtime import stack
from tessel.runtime.log import voice
from tessel.runtime.world import World, node_name

ERROR, BUG, LOST, HANG, INTERRUPT, ELSEWHERE = "error", "bug", "lost", "hang", "interrupt", "elsewhere"
INTERRUPTED = 130
"""Exit status of a program that SIGINT ended, as shells have it."""
CLAIM = "claim.json"
SHOWN = "shown"

# How long a process waits for the others to say the same (an error of the command line is everyone's)...
_ALIKE_WAIT_S = 1.0
# ... for all to say where they are, when one hangs (their watchdogs look twice a second) ...
_HANG_WAIT_S = 3.0
# ... and for the cause, when all it knows is that it has lost the others.
_CAUSE_WAIT_S = 8.0
_DEATH_WAIT_S = 1.0
_LOOK_INTERVAL_S = 0.05
_TELL_WAIT_S = 2.0

# What Gloo and the vendors' libraries say, in plain RuntimeErrors, when another process is gone or does not answer.
_LOST_TEXTS = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "gloo/transport",
    "Timed out waiting", "Application timeout", "Socket Timeout", "Connection was likely closed", "DIST call",
    "process group watchdog", "Failed to recv", "failed to connect", "wait timeout after",
)  # fmt: skip
_TIMEOUT_TEXTS = ("Timed out", "timed out", "timeout", "Timeout")


class PeerFailedError(RuntimeError):
    """Another process failed in work that this one waited for."""


@dataclass(frozen=True)
class Record:
    """What became of one process."""

    rank: int
    kind: str
    message: str
    exit_code: int = 1
    detail: str = ""
    """What follows the message: a traceback, or nothing."""
    group: str = ""
    """Processes with the same text are named together."""


class Desk:
    """Where this process's end is reported from: its world, the folder of its node, and the way to the other nodes."""

    def __init__(self) -> None:
        self.world = World()
        self.folder: Path | None = None
        self.tell_nodes: Callable[[str], None] | None = None
        """Hands a text to the watchdogs of the other nodes, where there is a store that reaches them."""

    def open(self, world: World, environment: Mapping[str, str] = os.environ) -> None:
        """Take the place of one process among many."""
        self.world = world
        file = environment.get("TORCHELASTIC_ERROR_FILE")
        folder = Path(file).parent.parent if file else None
        self.folder = folder if folder is not None and folder.is_dir() else None

    def read(self) -> list[Record]:
        """What the processes of this node have written so far, by rank."""
        if self.folder is None:
            return []
        found = (_read(path) for path in sorted(self.folder.glob("error_*.json")))
        return [record for record in found if record is not None]

    def is_claimed(self) -> bool:
        """Whether a process of this node has an error to show."""
        return self.folder is not None and (self.folder / CLAIM).exists()

    def claim(self) -> Record | None:
        """The record of the process that was first."""
        return None if self.folder is None else _read(self.folder / CLAIM)

    def is_shown(self) -> bool:
        """Whether the error has been printed."""
        return self.folder is not None and (self.folder / SHOWN).exists()


desk = Desk()


@contextmanager
def shown_once(world: World) -> Iterator[None]:
    """Around the work of one process of many: an exception ends the process here, as this module's head says.

    One process alone is left to the door, `tessel.cli`.
    """
    if world.world_size == 1:
        yield
        return
    desk.open(world)
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - ends the process, with its traceback where it is a bug
        end(error)


def end(error: BaseException) -> NoReturn:
    """Report an exception and leave the process."""
    voice.keep("".join(traceback.format_exception(error)))
    record = _record_of(error)
    if record.kind == LOST:
        _wait(_CAUSE_WAIT_S, lambda: desk.is_shown() or bool(dead_peers()))
        if desk.is_claimed() or dead_peers():
            # The launcher should see the one that died first, and then ends this one.
            time.sleep(_DEATH_WAIT_S)
            leave(record.exit_code)
    report(record)


def report(record: Record) -> NoReturn:
    """Print a record unless another process was first, and leave the process."""
    write(record)
    if not _claimed(record):
        _wait(_CAUSE_WAIT_S, desk.is_shown)
        leave(record.exit_code)
    if threading.current_thread() is threading.main_thread():
        # The agent sends it as soon as another process is gone; what is to be said is not said yet.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait_s = _HANG_WAIT_S if record.kind == HANG else _ALIKE_WAIT_S
    _wait(wait_s, lambda: len(desk.read()) >= desk.world.local_world_size)
    _show(record)
    _tell_nodes(record)
    leave(record.exit_code)


def leave(status: int) -> NoReturn:
    """End the process now."""
    for stream in (sys.stdout, sys.stderr, voice.file):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


def is_lost(error: BaseException) -> bool:
    """Whether an exception, or what caused it, only says that another process is gone or does not answer."""
    return any(_says_lost(link) for link in _chain(error))


def _says_lost(link: BaseException) -> bool:
    # By name: torch need not be there, and this is no reason to import it.
    if isinstance(link, PeerFailedError) or any(kind.__name__ == "DistError" for kind in type(link).__mro__):
        return True
    return isinstance(link, RuntimeError) and any(text in str(link) for text in _LOST_TEXTS)


def _record_of(error: BaseException) -> Record:
    rank = desk.world.rank
    if isinstance(error, KeyboardInterrupt):
        return Record(rank, INTERRUPT, "interrupted", INTERRUPTED)
    if isinstance(error, TesselError) and not is_lost(error):
        return Record(rank, ERROR, str(error), error.exit_code)
    if is_lost(error):
        place = stack.place_of_traceback(error.__traceback__)
        said = _first_sentence(next(link for link in _chain(error) if _says_lost(link)))
        if any(text in said for text in _TIMEOUT_TEXTS):
            return Record(rank, HANG, f"no answer from another process {place}", group=place)
        return Record(rank, LOST, f"another process is gone {place}: {said}")
    text = "".join(traceback.format_exception(error))
    return Record(rank, BUG, f"{type(error).__name__}: {error}", detail=text)


def _first_sentence(error: BaseException) -> str:
    """What a library says, without the place in its own source and without its advice."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"^\[[^]]*\]\s*", "", line).partition(". ")[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _wait(limit_s: float, until: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + limit_s
    while not until() and time.monotonic() < deadline_s:
        time.sleep(_LOOK_INTERVAL_S)


def write(record: Record) -> None:
    """Keep a record for the others of this node, and for torchrun's own table."""
    if desk.folder is None:
        return
    with suppress(OSError):
        _write_whole(desk.folder / f"error_{record.rank:05d}.json", json.dumps(asdict(record)))
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # torchrun prints this at the end. The traceback has been shown.
        extra = {"py_callstack": record.message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": record.message, "extraInfo": extra}}))


def _claimed(record: Record) -> bool:
    """Whether this process is the first of its node. Without a folder, each is."""
    if desk.folder is None:
        return True
    try:
        with open(desk.folder / CLAIM, "x") as file:
            file.write(json.dumps(asdict(record)))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _show(record: Record) -> None:
    lines = message_lines(record, desk.read() or [record], desk.world)
    text = "\n".join(lines)
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    if desk.folder is not None:
        with suppress(OSError):
            (desk.folder / SHOWN).touch()


def message_lines(first: Record, records: Sequence[Record], world: World) -> list[str]:
    """What the user reads, when `first` claimed the floor and the node's processes left `records`."""
    if first.kind == INTERRUPT:
        return ["tessel: interrupted"]
    if first.kind == ELSEWHERE:
        return [f"tessel: {node_name(world.node)} ends, because {first.message}"]
    if first.kind == HANG:
        return [*_hang_lines(records, world), "tessel: --distributed-timeout-minutes says how long to wait"]
    ranks = [record.rank for record in records if (record.kind, record.message) == (first.kind, first.message)]
    who = "" if len(ranks) == world.local_world_size else f"{world.name_of(ranks)}: "
    first_line, *more = first.message.splitlines() or [""]
    lines = [f"tessel: error: {who}{first_line}", *(f"tessel: error: {line}" for line in more)]
    if first.kind == BUG:
        lines += [first.detail.rstrip(), "tessel: this is a bug in tessel; please report it with the command line"]
    return lines


def _hang_lines(records: Sequence[Record], world: World) -> list[str]:
    """One line for each place where processes wait; the place of the fewest first, since theirs is the odd one."""
    places: dict[str, list[Record]] = {}
    for record in records:
        if record.kind == HANG:
            places.setdefault(record.group, []).append(record)
    odd_first = sorted(places.values(), key=len)
    return [f"tessel: error: {world.name_of([r.rank for r in same])}: {same[0].message}" for same in odd_first]


def _tell_nodes(record: Record) -> None:
    """Let the other nodes know, if that can be done at once: a store may be gone, too."""
    tell, world = desk.tell_nodes, desk.world
    if tell is None or world.num_nodes == 1 or record.kind == ELSEWHERE:
        return
    text = f"{world.name_of([record.rank])} failed: {record.message.splitlines()[0] if record.message else ''}"
    thread = threading.Thread(target=tell, args=(text,), daemon=True)
    thread.start()
    thread.join(_TELL_WAIT_S)


def _read(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def sign_in() -> None:
    """Let the other processes of this node see that this one lives."""
    if desk.folder is not None:
        _write_whole(_pid_file(desk.world.rank), str(os.getpid()))


def sign_out() -> None:
    """This process ends in good order."""
    if desk.folder is not None:
        _pid_file(desk.world.rank).unlink(missing_ok=True)


def _pid_file(rank: int) -> Path:
    assert desk.folder is not None
    return desk.folder / f"pid_{rank:05d}"


def dead_peers() -> list[int]:
    """Ranks of this node that have signed in, not out, and are no longer there."""
    if desk.folder is None:
        return []
    dead = []
    for path in desk.folder.glob("pid_*"):
        with suppress(OSError, ValueError):
            if not _lives(int(path.read_text())):
                dead.append(int(path.name.removeprefix("pid_")))
    return sorted(dead)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A child that its parent has not looked after yet still has a number.
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True

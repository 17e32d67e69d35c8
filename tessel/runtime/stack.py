"""Where a process stands in the code, in words for a user: the operation between processes, and who asked for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType

_PACKAGE = Path(__file__).resolve().parent.parent
# Parts of torch.distributed that only hand on to others.
_WRAPPERS = frozenset({"wrapper", "inner", "_fn", "fn", "__call__", "_call_impl", "_wrapped_call_impl", "decorate"})
_TORCH = "/torch/"
_COMMUNICATION = "/torch/distributed/"
_REPORTING = "failure.py"  # at the bottom of every stack
_BACKWARD = "/torch/autograd/"

Spot = tuple[CodeType, int]


def place_of_main_thread(but_thread: int | None = None) -> str:
    """Where the main thread is; where it waits for a backward pass, where that is.

    `but_thread` is the identity of a thread that does not count: the one that looks.
    """
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident or 0, None)
    frames.pop(but_thread or 0, None)
    if main is None:
        return "nowhere"
    candidates = [main]
    if _BACKWARD in main.f_code.co_filename:
        # On an accelerator, it runs in threads of torch's own.
        candidates = [*frames.values(), main]
    spots = [list(_spots_of_frame(frame)) for frame in candidates]
    return _place(next((stack for stack in spots if _operation(stack) is not None), spots[-1]))


def place_of_traceback(trace: TracebackType | None) -> str:
    """Where an exception comes from."""
    return _place(list(_spots_of_traceback(trace)))


def _place(spots: list[Spot]) -> str:
    """`in all_reduce (tessel/parallel/peers.py:70)`, from the frames of a stack, outermost first."""
    if not spots:
        return "nowhere"
    code, line = _asking(spots)
    file = Path(code.co_filename)
    name = file.relative_to(_PACKAGE.parent).as_posix() if _PACKAGE in file.parents else file.name
    return f"in {_operation(spots) or code.co_name} ({name}:{line})"


def _asking(spots: list[Spot]) -> Spot:
    """The innermost frame that says what the work is for: tessel's, outside this folder if there is one."""
    files = [(spot, Path(spot[0].co_filename)) for spot in spots]
    tessel = [spot for spot, file in files if _PACKAGE in file.parents and file.name != _REPORTING]
    above = [spot for spot in tessel if Path(spot[0].co_filename).parent.name != "runtime"]
    theirs = [spot for spot in spots if _TORCH not in spot[0].co_filename]
    return (above or tessel or theirs or spots)[-1]


def _operation(spots: Iterable[Spot]) -> str | None:
    """The innermost function of torch.distributed that does something."""
    found = None
    for code, _ in spots:
        if _COMMUNICATION in code.co_filename and code.co_name not in _WRAPPERS:
            found = code.co_name
    return found


def _spots_of_frame(frame: FrameType) -> Iterator[Spot]:
    spots: list[Spot] = []
    link: FrameType | None = frame
    while link is not None:
        spots.append((link.f_code, link.f_lineno))
        link = link.f_back
    return reversed(spots)


def _spots_of_traceback(trace: TracebackType | None) -> Iterator[Spot]:
    while trace is not None:
        yield trace.tb_frame.f_code, trace.tb_lineno
        trace = trace.tb_next

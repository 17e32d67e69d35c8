"""When to stop, as one of several processes."""

from __future__ import annotations

import os
import signal

from tessel.train.stop import StopRequest, signals_stop


def test_a_signal_to_another_process_counts_here() -> None:
    request = StopRequest(largest=lambda own: max(own, int(signal.SIGTERM)))
    assert request.signal_name is None
    assert request.reason(1) == "received SIGTERM"
    assert request.signal_name == "SIGTERM"


def test_a_signal_that_comes_while_all_agree_counts_the_next_time() -> None:
    answers = [0, int(signal.SIGTERM)]

    def largest(own: int) -> int:
        if len(answers) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return answers.pop(0)

    request = StopRequest(largest=largest)
    with signals_stop(request):
        assert not request.signalled(), "the others were not asked about it"
        assert request.signal_name == "SIGTERM", "nor is it forgotten"
        assert request.signalled()


def test_a_clock_that_is_ahead_stops_all() -> None:
    asked: list[int] = []

    def largest(own: int) -> int:
        asked.append(own)
        return 1 if len(asked) == 2 else own

    request = StopRequest(exit_duration_in_mins=1000, largest=largest)
    assert request.reason(1) == "--exit-duration-in-mins 1000 is over"
    assert asked == [0, 0], "the signal, and the time"

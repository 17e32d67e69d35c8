"""HumanEval: functions that the model writes, run against their tests.

A program is run only where the user allows it: in a process of its own, in an empty folder that is removed, without
the environment, with limits on time, memory, processes and the size of files. That stops accidents, not an attacker.
"""

from __future__ import annotations

import gzip
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

from tessel.errors import TesselError
from tessel.evaluate.items import TextItem
from tessel.evaluate.questions import Question, Subject, parse_json_lines, set_files

# Where a function ends, by the set's authors (Chen et al. 2021, arXiv:2107.03374, section 2.1).
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_NEEDED = ("task_id", "prompt", "test", "entry_point")
TIMEOUT_S = 10.0
_CPU_S = 10
_MEMORY_BYTES = 4 << 30
_FILE_BYTES = 16 << 20
_NUM_PROCESSES = 256


def read_human_eval(folder: str) -> list[Subject]:
    """The problems of HumanEval.jsonl or HumanEval.jsonl.gz, one subject.

    Raises:
        TesselError: there is no such file, or it is damaged.
    """
    path = set_files(folder, "HumanEval*.jsonl*", "HumanEval, with HumanEval.jsonl.gz")[0]
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise TesselError(f"{path} is no whole gzip file ({error}). Fetch it again.") from error
    rows = parse_json_lines(content, path, *_NEEDED)
    questions = tuple(Question(i, row["prompt"], (), row["task_id"], row) for i, row in enumerate(rows))
    return [Subject("human_eval", "human_eval", "code", questions)]


def human_eval_item(subject: Subject, question: Question, max_new_tokens: int | None) -> TextItem:
    """Right if the function passes its tests; the answer is "passed", or how it failed."""
    row = question.more or {}

    def judge(text: str) -> tuple[str, bool]:
        outcome = run_program(f"{question.text}{text}\n\n{row['test']}\n\ncheck({row['entry_point']})\n")
        return outcome, outcome == "passed"

    return TextItem((subject.name, question.index), question.text, "passed", judge, max_new_tokens or 512, _STOP)


def run_program(program: str, timeout_s: float = TIMEOUT_S) -> str:
    """Run Python source within limits: "passed" if its end is reached, "timed out", or the last line of its error."""
    with tempfile.TemporaryDirectory(prefix="tessel-program-") as folder:
        path, errors = Path(folder) / "program.py", Path(folder) / "errors.txt"
        # A program that ends itself early has not passed.
        end = Path(folder) / secrets.token_hex(16)
        path.write_text(f"{program}\nopen({str(end)!r}, 'w').close()\n", encoding="utf-8", errors="replace")
        with open(errors, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(path)],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                preexec_fn=_limit,
            )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)
        if status == 0 and end.exists():
            return "passed"
        if status == -signal.SIGXCPU:
            return "timed out"
        last = errors.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1] if errors.exists() else ""
        return last[:200] or f"ended with status {status} before its tests were through"


def _limit() -> None:
    for what, most in (
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NPROC, _NUM_PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

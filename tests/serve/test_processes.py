"""`tessel serve` and `tessel chat` on several processes that hold one model: the answers of one process."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.processes import run
from tests.parallel.verbs import join
from tests.runtime.launched import by_rank, lives, started, wait_for
from tests.serve.conftest import TEMPLATE

MakeFolder = Callable[..., Path]
TEXTS = ["the lazy dog", "over the", "the quick brown fox jumps over the lazy dog " * 4, "the lazy dog jumps over it"]
NEW_TOKENS = [12, 30, 20, 8]
LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size", "2"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "EP2": ("--expert-model-parallel-size", "2"),
}


def complete(url: str, text: str, max_tokens: int, **more: Any) -> str:
    """A completion, greedy unless `more` says otherwise."""
    body = {"model": "m", "prompt": text, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found: str = json.loads(response.read())["choices"][0]["text"]
        return found


def boolean(url: str) -> str:
    """An answer that is held to a form."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "the dog"}],
        "response_format": form,
        "max_tokens": 50,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body | {"seed": 3}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found: str = json.loads(response.read())["choices"][0]["message"]["content"]
    assert found in ('{"a": true}', '{"a": false}')
    return found


def leave(url: str) -> None:
    """A client that goes away after the first event of its stream."""
    body = json.dumps({"model": "m", "prompt": "the", "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 30) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while b"data: " not in connection.recv(4096):
            pass


def asked(url: str) -> list[str]:
    """Several texts at once, beside a client that leaves; then one again, which begins like a text that is kept."""
    with ThreadPoolExecutor(len(TEXTS) + 1) as pool:
        pool.submit(leave, url)
        found = list(pool.map(lambda text, most: complete(url, text, most), TEXTS, NEW_TOKENS))
    drawn = complete(url, TEXTS[0], 12, temperature=1.0, top_p=0.9, seed=5)
    return [*found, complete(url, TEXTS[2] + "and on", 10), drawn, boolean(url)]


def served(folder: str, flags: tuple[str, ...]) -> list[str] | None:
    """What clients of a server get; None on processes that have no server."""
    from tessel.config.generate_flags import GENERATION
    from tessel.config.parser import parse
    from tessel.config.serve import ServeConfig, validate_serve
    from tessel.serve.command import Server, serve

    join()
    flags = (
        "--load",
        folder,
        "--served-model-name",
        "m",
        "--device",
        "cpu",
        "--port",
        "0",
        "--max-running",
        "3",
        *flags,
    )
    parsed = parse(ServeConfig, list(flags), "tessel serve", GENERATION)
    found: list[str] = []
    threads: list[threading.Thread] = []

    def ready(server: Server) -> None:
        def ask() -> None:
            try:
                found.extend(asked(server.url))
            finally:
                server.should_exit = True

        threads.append(threading.Thread(target=ask))
        threads[0].start()

    serve(validate_serve(parsed.value, parsed.given), parsed.given, ready)
    for thread in threads:
        thread.join()
    return found if threads else None


@pytest.fixture(scope="module")
def alone(served_folder: Path) -> list[str]:
    """The answers of one process."""
    (found,) = run(1, served, str(served_folder), ())
    assert len(found) == 7 and all(found)
    return list(found)


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_a_server_on_processes_answers_as_one_does(layout: str, served_folder: Path, alone: list[str]) -> None:
    assert run(2, served, str(served_folder), LAYOUTS[layout]) == [alone, None]


def test_processes_that_share_experts_answer_as_one_does(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path
) -> None:
    folder = tiny_hf_folder("qwen3_moe", tokenizer=tiny_tokenizer_folder, max_position_embeddings=512, num_experts=4)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (found,) = run(1, served, str(folder), ())
    assert run(2, served, str(folder), LAYOUTS["EP2"]) == [found, None]


def chatted(folder: str, flags: tuple[str, ...]) -> tuple[int, str]:
    """Status and stdout of a dialogue of three turns, with a command between."""
    from tessel.cli import main

    join()
    sys.stdin = io.StringIO("the dog\nand the fox\n/clear\nthe dog and the fox and so on\n")
    sys.stdout = io.StringIO()
    return main(
        ["chat", "--load", folder, "--device", "cpu", "--greedy", "--max-new-tokens", "9", *flags]
    ), sys.stdout.getvalue()


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_a_dialogue_on_processes_is_that_of_one(layout: str, served_folder: Path) -> None:
    (alone,) = run(1, chatted, str(served_folder), ())
    assert alone[0] == 0 and alone[1].count("\n") == 3
    assert run(2, chatted, str(served_folder), LAYOUTS[layout]) == [alone, (0, "")]


# ------------------------------------------------------------------------------------------ by the launcher


def command(verb: str, folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tessel",
        verb,
        "--load",
        str(folder),
        "--device",
        "cpu",
        "--nproc-per-node",
        "2",
        *flags,
    ]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 0), pytest.param(signal.SIGKILL, 128 + signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_all_processes_end_with_the_server(number: signal.Signals, status: int, served_folder: Path) -> None:
    """By SIGTERM to the launcher in good order; by SIGKILL to one that follows with an error."""
    flags = ("--port", "0", "--served-model-name", "m", *LAYOUTS["PP2"])
    with started(command("serve", served_folder, *flags)) as launcher:
        assert launcher.stderr is not None
        lines = iter(launcher.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://127.0.0.1:\d+", line)))
        assert len(complete(url, "the dog", 5)) > 0
        leave(url)
        ranks = by_rank(launcher.pid)
        os.kill(launcher.pid if status == 0 else ranks[1], number)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == status, err
    assert ("stopped\n" in err) is (status == 0)
    assert (f"rank 1 (pid {ranks[1]}) was killed by SIGKILL" in err) is (status != 0)
    wait_for(lambda: not any(lives(pid) for pid in ranks.values()), "end of the processes")

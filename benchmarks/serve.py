"""`tessel serve` under load: clients at once for minutes, against the same texts as an offline batch, in one run.

    python benchmarks/serve.py                             # 32 clients, 120 s, CPU, fp32, a small random model
    python benchmarks/serve.py --seconds 20 --rounds 2

The server is `tessel serve` in a process of its own; the clients share another one, each streams completions of prompts
of 8 to 128 tokens with 16 to 128 new tokens, greedy, one after another. The offline batch is the batcher alone, in a
third process, on the same requests with as many texts running. The two take turns, and the ratio is the median over
rounds of tokens per second of CPU time, of the server's whole process: other load on the machine counts little, and
what HTTP costs counts in full, though it has a thread of its own. --wall takes seconds of the clock, which say more on
a machine with cores to spare. Every stream is compared with the text that the offline batch makes of
its prompt: one that differs, is cut off, or brings an error is a failure. Memory is the server's resident set:
flat means that the second half of the turns adds at most 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_TEXTS = 128
WANTED_RATIO = 0.9
FLAT = 1.02
_EVENT = b"data: {"


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """A random model with a byte-level tokenizer of 2,000 entries and no end of text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(3000)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(folder)
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 128, 1),
        intermediate_size=3 * hidden,
        vocab_size=2048,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # wide, so that no two tokens are nearly as likely
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)


def texts() -> list[dict[str, Any]]:
    """Bodies of requests."""
    draw = random.Random(7)
    # Of the 2,000 entries, those after the bytes and their merges; any id will do.
    return [
        {
            "model": "model",
            "prompt": [draw.randrange(300, 2000) for _ in range(draw.randint(8, 128))],
            "max_tokens": draw.randint(16, 128),
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        for _ in range(NUM_TEXTS)
    ]


# ------------------------------------------------------------------------------------------ the offline batch


def offline(folder: str, num_running: int) -> None:
    """Each line of stdin is a number of seconds: print what a turn took; first, the text of every request."""
    from tessel.data.tokenizer import HuggingFaceTokenizer
    from tessel.generate.batcher import Batcher
    from tessel.generate.engine import load_model
    from tessel.generate.packed import suit_many_texts
    from tessel.generate.request import Request

    (model, _), tokenizer = load_model(folder), HuggingFaceTokenizer(Path(folder))
    suit_many_texts(model)  # as the server's model has them
    requests = [Request(tuple(body["prompt"]), max_new_tokens=body["max_tokens"]) for body in texts()]

    def run(seconds: float) -> tuple[dict[str, float], list[str]]:
        batcher = Batcher(model, tokenizer, max_running=num_running)
        found: dict[int, list[str]] = {batcher.add(request): [] for request in requests}
        pieces = list(found.values())
        started_s, cpu_s = time.perf_counter(), time.process_time()
        more = itertools.cycle(requests)
        num_tokens = 0
        while (elapsed_s := time.perf_counter() - started_s) < seconds or seconds == 0:
            if not (batcher.num_running or batcher.num_waiting):
                break
            for event in batcher.step():
                num_tokens += event.token is not None
                if event.request in found:
                    found[event.request].append(event.text)
                if event.finish is not None and seconds:
                    batcher.add(next(more))
        took = {"tokens": num_tokens, "wall_s": elapsed_s, "cpu_s": time.process_time() - cpu_s}
        return took, ["".join(parts) for parts in pieces]

    print(json.dumps(run(0)[1]), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(float(line))[0]), flush=True)


# ------------------------------------------------------------------------------------------ the clients


class Clients:
    """Streams of some clients, counted and compared."""

    def __init__(self, port: int, server_pid: int, expected: list[str]) -> None:
        self.port, self.server_pid, self.expected = port, server_pid, expected
        self.texts = texts()
        self.bodies = [json.dumps(body).encode() for body in self.texts]
        self.order = itertools.cycle(range(NUM_TEXTS))
        self.num_tokens, self.num_streams = 0.0, 0
        self.problems: list[str] = []
        self.until_s = 0.0

    async def one(self) -> None:
        """A client: one request after another, on one connection, until the turn is over."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while time.perf_counter() < self.until_s:
            number = next(self.order)
            body = self.bodies[number]
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            head, content, in_turn = await self.read(reader)
            self.check(number, head, content)
            # A token that is a part of a character has no event, so that those within the turn are a share.
            self.num_tokens += self.texts[number]["max_tokens"] * in_turn / max(content.count(_EVENT), 1)
        writer.close()

    async def read(self, reader: asyncio.StreamReader) -> tuple[bytes, bytes, int]:
        """Head and whole content of a chunked answer, and how many of its events come within the turn."""
        head = await reader.readuntil(b"\r\n\r\n")
        pieces, in_turn = [], 0
        while size := int(await reader.readline(), 16):
            piece = await reader.readexactly(size)
            await reader.readexactly(2)
            pieces.append(piece)
            if time.perf_counter() < self.until_s:
                in_turn += piece.count(_EVENT)
        await reader.readexactly(2)
        return head, b"".join(pieces), in_turn

    def check(self, number: int, head: bytes, content: bytes) -> None:
        """The text is the one that is due, and all of it."""
        self.num_streams += 1
        events = content.removesuffix(b"\n\n").split(b"\n\n")
        if not head.startswith(b"HTTP/1.1 200") or events.pop() != b"data: [DONE]":
            self.problems.append(f"text {number}: {content[-300:]!r}")
            return
        choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
        found = "".join(choice["text"] for choice in choices)
        if found != self.expected[number] or choices[-1]["finish_reason"] != "length":
            common = os.path.commonprefix([found, self.expected[number]])
            self.problems.append(f"text {number}: differs after {len(common)} of {len(found)} letters")

    async def turn(self, num_clients: int, seconds: float) -> dict[str, Any]:
        """All clients for some seconds."""
        self.num_tokens, self.num_streams = 0.0, 0
        self.problems = []
        started_s = time.perf_counter()
        self.until_s = started_s + seconds
        before_s, cpu_s = cpu_seconds(self.server_pid), []
        # What the last streams take after the turn, with a batch that empties, is not counted; nor are their tokens.
        asyncio.get_running_loop().call_later(seconds, lambda: cpu_s.append(cpu_seconds(self.server_pid)))
        ended = await asyncio.gather(*(self.one() for _ in range(num_clients)), return_exceptions=True)
        self.problems += [repr(one) for one in ended if isinstance(one, BaseException)]
        return {
            "tokens": self.num_tokens,
            "wall_s": seconds,
            "cpu_s": cpu_s[0] - before_s,
            "streams": self.num_streams,
            "problems": self.problems,
        }


def clients(port: int, server_pid: int, num_clients: int) -> None:
    """The first line of stdin is the texts that are due, each other one the seconds of a turn."""
    ours = Clients(port, server_pid, json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(asyncio.run(ours.turn(num_clients, float(line)))), flush=True)


# ------------------------------------------------------------------------------------------ the run


class Side:
    """A process of this program, asked by lines."""

    def __init__(self, *arguments: Any) -> None:
        command = [sys.executable, __file__, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_env())

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _env() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


def start_server(folder: Path, num_running: int) -> tuple[subprocess.Popen[str], int]:
    """The server and its port."""
    flags = f"--load {folder} --served-model-name model --port 0 --device cpu --max-running {num_running}"
    command = [sys.executable, "-m", "tessel", "serve", *flags.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_env())
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving .* at http://127\.0\.0\.1:(\d+)", line):
            threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True).start()
            return process, int(found[1])
    raise SystemExit("the server did not start")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Resident set of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def rounds_of(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A dictionary of figures for each round."""
    batch = Side("offline", folder, options.clients)
    server, port = start_server(folder, options.clients)
    load = Side("clients", port, server.pid, options.clients)
    load.tell(json.dumps(batch.hear()))
    seconds = options.seconds / options.rounds
    try:
        for _ in range(options.rounds):
            batch.tell(str(min(seconds, options.batch_seconds)))
            alone = batch.hear()
            load.tell(str(seconds))
            served = load.hear()
            yield figures(served, alone, options.wall) | {"mib": resident_mib(server.pid)}
    finally:
        server.terminate()
        status = server.wait(30)
        load.close()
        batch.close()
    if status != 0:
        raise SystemExit(f"the server ended with status {status}")


def figures(served: dict[str, Any], alone: dict[str, float], wall: bool) -> dict[str, Any]:
    """Rates of a round, in tokens per second of the clock or of CPU time."""
    unit = "wall_s" if wall else "cpu_s"
    rate, rate_alone = served["tokens"] / served[unit], alone["tokens"] / alone[unit]
    return served | {"rate": rate, "alone": rate_alone, "ratio": rate / rate_alone}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of serving, over all rounds")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch-seconds", type=float, default=10.0, help="of the offline batch, each round at most")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--wall", action="store_true", help="seconds of the clock, not of the processes' CPU time")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.hidden, options.layers)
        found = []
        for one in rounds_of(options, Path(folder)):
            found.append(one)
            print(
                f"{one['streams']} streams, {one['rate']:.0f} tokens/s served, {one['alone']:.0f} alone, ratio "
                f"{one['ratio']:.3f}; {one['mib']:.0f} MiB; {len(one['problems'])} failures",
                flush=True,
            )
    problems = [problem for one in found for problem in one["problems"]]
    ratio = statistics.median(one["ratio"] for one in found)
    growth = found[-1]["mib"] / found[(len(found) - 1) // 2]["mib"]
    print("\n".join(problems[:10]))
    print(
        f"{options.clients} clients, {options.seconds:.0f} s: {sum(one['streams'] for one in found)} streams, "
        f"{len(problems)} failures; throughput {ratio:.3f} x the offline batch (wanted: {WANTED_RATIO}); memory "
        f"{growth:.3f} x that of half-time (wanted: {FLAT})"
    )
    return int(bool(problems) or ratio < WANTED_RATIO or growth > FLAT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["offline"]:
        offline(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["clients"]:
        clients(*map(int, sys.argv[2:5]))
    else:
        raise SystemExit(main())

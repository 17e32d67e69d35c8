"""Speed and memory of generation against transformers, in one run.

    python benchmarks/generate.py                          # CPU, fp32: a random model of Qwen2.5-0.5B's shape
    python benchmarks/generate.py --model 60M --rounds 5

Each side is a process of its own with the same random model, and the same prompts; they run in turn, and the ratio is
of medians over rounds. Greedy, and nothing ends a text but its length.

- one text: a prompt of 16 tokens, 32 new ones; transformers with its default cache.
- 32 texts: prompts of 8 to 256 tokens, and 8 to 96 new tokens each, both drawn with a fixed seed. transformers pads
  the prompts on the left and goes on until the longest text is done, as its `generate` does when texts end at
  different lengths; the tokens that were asked for count.
- 32 texts of mixed prompts and 48 new tokens each: what padding alone costs.

Seconds are of the process's own CPU time on a CPU (one thread by default), so that other load on the machine counts
little; --wall takes those of the clock. Memory is the largest resident set during the runs, less what it was before
the model was loaded; on an accelerator the largest number of allocated bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# hidden, layers, heads, key/value heads, MLP width, vocabulary, tied.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "60M": (512, 12, 8, 2, 1408, 32_000, True),
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
}
SIDES = ("tessel", "transformers")
CASES = ("one text", "32 texts, mixed", "32 texts, 48 new each")
WANTED = {"one text": 1.1, "32 texts, mixed": 2.0}


@dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens each is to get."""

    prompts: list[list[int]]
    new_tokens: list[int]


def work_of(case: str, vocab: int) -> Work:
    """The prompts of a case."""
    draw = random.Random(7)
    if case == "one text":
        return Work([[draw.randrange(vocab) for _ in range(16)]], [32])
    prompts = [[draw.randrange(vocab) for _ in range(draw.randint(8, 256))] for _ in range(32)]
    return Work(prompts, [draw.randint(8, 96) if "mixed" in case else 48 for _ in prompts])


def write_model(folder: Path, model: str) -> None:
    """A Hugging Face folder with random weights, in fp32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, heads, kv_heads, width, vocab, tied = SHAPES[model]
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


# ------------------------------------------------------------------------------------------ a side


def tessel_side(folder: str, device: str, dtype: str) -> Callable[[Work], list[list[int]]]:
    """tessel's batcher."""
    import torch

    from tessel.generate.batcher import Batcher
    from tessel.generate.engine import load_model
    from tessel.generate.packed import suit_many_texts, suit_one_text
    from tessel.generate.request import Request

    model, _ = load_model(folder, device, getattr(torch, dtype))

    class NoText:
        def decode(self, ids: Any) -> str:
            return ""

    def generate(work: Work) -> list[list[int]]:
        (suit_one_text if len(work.prompts) == 1 else suit_many_texts)(model)  # the first time
        batcher = Batcher(model, NoText(), device=device)
        found: dict[int, list[int]] = {}
        for ids, number in sorted(zip(work.prompts, work.new_tokens, strict=True), key=lambda one: -one[1]):
            found[batcher.add(Request(tuple(ids), max_new_tokens=number))] = []
        while batcher.num_running or batcher.num_waiting:
            for event in batcher.step():
                if event.token is not None:
                    found[event.request].append(event.token)
        return list(found.values())

    return generate


def transformers_side(folder: str, device: str, dtype: str) -> Callable[[Work], list[list[int]]]:
    """transformers' generate, with its default cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

    def generate(work: Work) -> list[list[int]]:
        longest, most = max(map(len, work.prompts)), max(work.new_tokens)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in work.prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in work.prompts], device=device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
        return [row[longest : longest + n].tolist() for row, n in zip(out, work.new_tokens, strict=True)]

    return generate


class Peak:
    """The largest resident set while it is watched, in bytes."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, resident_bytes())


def resident_bytes() -> int:
    """Pages of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(side: str, folder: str, device: str, dtype: str) -> None:
    """Answer cases, a line each, with what they took."""
    import torch

    if side == "transformers":
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    else:
        import tessel.generate.engine  # noqa: F401
    before = resident_bytes()
    generate = (tessel_side if side == "tessel" else transformers_side)(folder, device, dtype)
    vocab = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    print("ready", flush=True)
    for line in sys.stdin:
        work = work_of(line.strip(), vocab)
        on_cpu = device == "cpu"
        if not on_cpu:
            torch.accelerator.reset_peak_memory_stats()
        with Peak() as peak:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            texts = generate(work)
            if not on_cpu:
                torch.accelerator.synchronize()
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        taken = peak.bytes - before if on_cpu else torch.accelerator.max_memory_allocated()
        tokens = sum(map(len, texts))
        print(json.dumps({"tokens": tokens, "wall_s": wall_s, "cpu_s": cpu_s, "bytes": taken}), flush=True)


# ------------------------------------------------------------------------------------------ both


def start(side: str, folder: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    """A side's process, when it is ready."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--device", args.device, "--dtype", args.dtype]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"the process of {side} has died; run: {' '.join(command)}")
    return process


def ask(process: subprocess.Popen[str], case: str) -> dict[str, float]:
    """Run a case on a side."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(case + "\n")
    process.stdin.flush()
    result: dict[str, float] = json.loads(process.stdout.readline())
    return result


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Print the table."""
    clock = "wall_s" if args.wall or args.device != "cpu" else "cpu_s"
    sides = {side: start(side, folder, args) for side in SIDES}
    print(f"| case | {' | '.join(f'{side}, tokens/s (MiB)' for side in SIDES)} | speed | wanted | memory |")
    print("|---|---|---|---|---|---|")
    try:
        for case in args.cases:
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for number in range(args.rounds + 1):
                for side in SIDES if number % 2 else SIDES[::-1]:
                    result = ask(sides[side], case)
                    if number or args.rounds == 0:  # the first warms up
                        runs[side].append(result)
            speeds = {side: statistics.median(r["tokens"] / r[clock] for r in runs[side]) for side in SIDES}
            sizes = {side: max(r["bytes"] for r in runs[side]) / 2**20 for side in SIDES}
            columns = " | ".join(f"{speeds[side]:.2f} ({sizes[side]:,.0f})" for side in SIDES)
            speed, memory = speeds["tessel"] / speeds["transformers"], sizes["tessel"] / sizes["transformers"]
            print(f"| {case} | {columns} | {speed:.2f} x | {WANTED.get(case, '')} | {memory:.2f} x |", flush=True)
    finally:
        for process in sides.values():
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.5B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--wall", action="store_true", help="seconds of the clock on a CPU, too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(args.side, args.folder, args.device, args.dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), args.model)
        print(f"{platform.processor() or platform.machine()}, {args.threads} thread(s), {args.model}, {args.dtype}, ")
        measure(Path(name), args)


if __name__ == "__main__":
    main()

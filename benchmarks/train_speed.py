"""Training speed and memory of tessel against a plain transformers loop, in one run.

    python benchmarks/train_speed.py                     # CPU: 20M-parameter Qwen2.5 shape, 32k vocabulary
    python benchmarks/train_speed.py --device cuda --model 0.5B --dtype bf16 --seq-length 4096

Each side runs in a process of its own, in turn, on the same config, batches, precision and number of
threads; the ratio is of medians over rounds. The peer is the loop that everyone writes: SDPA attention,
`labels=` loss, `clip_grad_norm_`, fused AdamW. Memory is RssAnon + RssShmem on a CPU, allocated bytes on
an accelerator. The ideal is the sum of the step's GEMM and SDPA times, measured alone in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# hidden, layers, heads, key/value heads, MLP width, vocabulary, tied: Qwen2.5's shapes, and one for a CPU.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "20M": (320, 8, 5, 1, 896, 32_000, True),
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
}
SIDES = ("tessel", "transformers")


@dataclass(frozen=True)
class Setting:
    """What both sides do."""

    model: str
    device: str
    dtype: str
    batch: int
    seq_length: int
    steps: int
    threads: int
    compile: bool
    data: str


def hf_config(model: str) -> dict[str, Any]:
    """config.json of a shape."""
    hidden, layers, heads, kv_heads, width, vocab, tied = SHAPES[model]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def run_tessel(s: Setting) -> dict[str, float]:
    """Time whole `tessel pretrain` steps, from the run's own metrics: data, logging and all."""
    import numpy as np

    from tessel.data.indexed import IndexedDatasetWriter

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "model").mkdir()
        (work / "model" / "config.json").write_text(json.dumps(hf_config(s.model)))
        vocab = SHAPES[s.model][5]
        tokens = np.random.default_rng(0).integers(0, vocab - 1, size=(s.steps * s.batch + 8) * s.seq_length)
        with IndexedDatasetWriter(work / "data", np.int32) as writer:
            for document in np.array_split(tokens.astype(np.int32), 64):
                writer.add_document(document)
        command = [sys.executable, "-m", "tessel", "pretrain", "--init-from-config", str(work / "model")]
        command += ["--data-path", str(work / "data"), "--split", "100,0,0", "--save", str(work / "out")]
        command += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab - 1), "--no-save-optim"]
        command += [
            "--seq-length",
            str(s.seq_length),
            "--micro-batch-size",
            str(s.batch),
            "--train-iters",
            str(s.steps),
        ]
        command += ["--global-batch-size", str(s.batch), "--lr", "1e-4", "--lr-decay-style", "constant"]
        command += ["--eval-iters", "0", "--log-interval", "1000", "--device", s.device, "--weight-decay", "0.1"]
        command += [f"--{s.dtype}"] + (["--compile"] if s.compile else [])
        first_step_s = run_and_time_first_step(command, work / "out" / "metrics.jsonl")
        rows = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"][s.steps // 3 :]
    step_s = statistics.median(row["iteration_time"] for row in steps)
    return {
        "step_s": step_s,
        "peak_bytes": max(row["peak_memory_bytes"] for row in steps),
        "loader_share": steps[-1]["loader_stall_s"]
        / sum(row["iteration_time"] for row in rows if "iteration_time" in row),
        "first_step_s": first_step_s,
    }


def run_and_time_first_step(command: list[str], metrics: Path) -> float:
    """Run a command to its end; seconds from its start until it has logged a first iteration."""
    started_s = time.perf_counter()
    first_step_s = float("nan")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None:
        if math.isnan(first_step_s) and metrics.is_file() and metrics.stat().st_size:
            first_step_s = time.perf_counter() - started_s
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return first_step_s


def run_transformers(s: Setting) -> dict[str, float]:
    """The plain loop."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from tessel.runtime import device as devices

    device = devices.resolve(s.device)
    torch.manual_seed(0)
    shape = hf_config(s.model)
    config = Qwen2Config(**{k: v for k, v in shape.items() if k not in ("architectures", "model_type", "torch_dtype")})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).train()
    if s.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    low = s.dtype != "fp32"
    times = []
    devices.reset_peak_memory(device)
    for _ in range(s.steps):
        tokens = torch.randint(0, config.vocab_size - 1, (s.batch, s.seq_length + 1)).to(device)
        begin_s = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            # The model shifts labels itself: give it one token more, to train on as many as tessel.
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        devices.synchronize(device)
        times.append(time.perf_counter() - begin_s)
    return {"step_s": statistics.median(times[s.steps // 3 :]), "peak_bytes": devices.peak_memory_bytes(device)}


def ideal_step_s(s: Setting) -> float:
    """Seconds of the step's matrix products and attention alone, forward and backward."""
    import torch
    from torch.nn import functional

    from tessel.runtime import device as devices

    device = devices.resolve(s.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[s.dtype]
    hidden, layers, heads, kv_heads, width, vocab, _ = SHAPES[s.model]
    head_dim, rows = hidden // heads, s.batch * s.seq_length

    def timed(work: Any) -> float:
        work()
        best = []
        for _ in range(5):
            devices.synchronize(device)
            begin_s = time.perf_counter()
            work()
            devices.synchronize(device)
            best.append(time.perf_counter() - begin_s)
        return statistics.median(best)

    def linear(width_in: int, width_out: int) -> float:
        x, w = (
            torch.randn(rows, width_in, device=device, dtype=dtype),
            torch.randn(width_out, width_in, device=device, dtype=dtype),
        )
        y = torch.randn(rows, width_out, device=device, dtype=dtype)
        return timed(lambda: (x @ w.t(), y @ w, y.t() @ x))

    def attention() -> float:
        shapes = [(s.batch, heads, s.seq_length, head_dim)] * 3
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
        return timed(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())

    kv_width = kv_heads * head_dim
    layer = (
        2 * linear(hidden, hidden) + 2 * linear(hidden, kv_width) + 2 * linear(hidden, width) + linear(width, hidden)
    )
    return layers * (layer + attention()) + linear(hidden, vocab)


def main() -> None:
    """Alternate both sides, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="20M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--side", choices=(*SIDES, "ideal"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    s = Setting(
        args.model, args.device, args.dtype, args.batch, args.seq_length, args.steps, args.threads, args.compile, ""
    )
    if args.side:
        import torch

        torch.set_num_threads(s.threads)
        sides = {"tessel": run_tessel, "transformers": run_transformers, "ideal": lambda s: {"step_s": ideal_step_s(s)}}
        print(json.dumps(sides[args.side](s)))
        return
    report(s, args.rounds)


def report(s: Setting, rounds: int) -> None:
    """Run the rounds and print."""
    env = dict(os.environ, OMP_NUM_THREADS=str(s.threads), PYTHONPATH=str(ROOT))

    def one(side: str) -> dict[str, float]:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        return json.loads(
            subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )

    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            results[side].append(one(side))
            print(f"round {number + 1} {side}: {results[side][-1]['step_s'] * 1000:.1f} ms/step", flush=True)
    ideal_s = one("ideal")["step_s"]
    median = {side: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for side, rows in results.items()}
    ours, theirs = median["tessel"], median["transformers"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    tokens = s.batch * s.seq_length
    print(f"\n{platform.machine()}, {s.threads} threads, {s.device}; commit {commit}")
    print(f"{s.model}, {s.dtype}, {s.batch} x {s.seq_length} tokens, {'compiled' if s.compile else 'not compiled'}")
    for side in SIDES:
        speed, peak_mib = tokens / median[side]["step_s"], median[side]["peak_bytes"] / 2**20
        print(f"{side:12s} {speed:10,.0f} tokens/s   peak {peak_mib:8,.0f} MiB")
    print_mfu(s, tokens / ours["step_s"])
    print(f"speed   tessel / transformers: {theirs['step_s'] / ours['step_s']:.2f}x")
    print(f"memory  tessel / transformers: {ours['peak_bytes'] / theirs['peak_bytes']:.2f}x")
    over = {side: median[side]["step_s"] / ideal_s for side in SIDES}
    print(f"step over its GEMM + SDPA time: tessel {over['tessel']:.2f}x, transformers {over['transformers']:.2f}x")
    print(f"loader: {ours['loader_share'] * 100:.2f}% of the step; start to first step: {ours['first_step_s']:.1f} s")


def print_mfu(s: Setting, tokens_per_s: float) -> None:
    """Both MFUs of tessel."""
    import torch

    from tessel.model.config import ModelConfig
    from tessel.runtime import device as devices
    from tessel.train.flops import flops_per_token

    torch.set_num_threads(s.threads)
    flops = flops_per_token(ModelConfig.from_hf(hf_config(s.model)), s.seq_length)
    peak = devices.peak_flops(devices.resolve(s.device), torch.float32 if s.dtype == "fp32" else torch.bfloat16)
    print(
        f"MFU of tessel: {tokens_per_s * flops.causal / peak:.1%} causal, {tokens_per_s * flops.palm / peak:.1%} PaLM"
    )


if __name__ == "__main__":
    main()

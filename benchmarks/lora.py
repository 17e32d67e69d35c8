"""Adapters against peft on transformers, and packed dialogues against plain text, in one run.

    python benchmarks/lora.py                     # CPU: 20M-parameter Qwen2.5 shape, rank 8 beside every projection
    python benchmarks/lora.py --qlora             # the same beside weights in four bits (tessel alone)
    python benchmarks/lora.py --device cuda --model 0.5B --dtype bf16 --seq-length 4096

Each side runs in a process of its own, in turn, on the same shape, batches, precision and number of threads; ratios
are of medians over rounds, on a CPU of CPU seconds, which other load touches little. `tessel` and `peft` train
adapters; `pretrain` and `packed` train the whole model on text, and on packed dialogues of 8 to a sequence that do not
see each other. Memory as in train_speed.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from train_speed import ROOT, SHAPES, hf_config

SIDES = ("tessel", "peft", "pretrain", "packed")
RANK, ALPHA, DIALOGUES = 8, 16, 8


@dataclass(frozen=True)
class Setting:
    """What all sides do."""

    model: str
    device: str
    dtype: str
    batch: int
    seq_length: int
    steps: int
    qlora: bool


def transformers_model(s: Setting) -> Any:
    """A random model of the shape."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    left_out = ("architectures", "model_type", "torch_dtype")
    config = Qwen2Config(**{key: value for key, value in hf_config(s.model).items() if key not in left_out})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def write_text(prefix: Path, s: Setting) -> None:
    """Random tokens, enough for all steps."""
    import numpy as np

    from tessel.data.indexed import IndexedDatasetWriter

    count = (s.steps * s.batch + 8) * s.seq_length
    tokens = np.random.default_rng(0).integers(0, SHAPES[s.model][5] - 1, size=count)
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for document in np.array_split(tokens.astype(np.int32), 64):
            writer.add_document(document)


def write_packed(prefix: Path, s: Setting) -> None:
    """Packed dialogues as preprocessing writes them with --neat-pack: segments' numbers in the attention mask."""
    import numpy as np

    from tessel.data.indexed import IndexedDatasetWriter

    random = np.random.default_rng(0)
    segments = np.repeat(np.arange(1, DIALOGUES + 1), s.seq_length // DIALOGUES).astype(np.int32)
    for name in ("input_ids", "attention_mask", "labels"):
        with IndexedDatasetWriter(Path(f"{prefix}_packed_{name}_document"), np.int32) as writer:
            for _ in range(s.steps * s.batch + 8):
                tokens = random.integers(0, SHAPES[s.model][5] - 1, size=s.seq_length).astype(np.int32)
                writer.add_document(segments if name == "attention_mask" else tokens)


def run_tessel(s: Setting, side: str) -> dict[str, float]:
    """Whole steps of a verb, from the run's own metrics: data, logging and all."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        transformers_model(s).save_pretrained(work / "model")
        common = f"""--load {work}/model --data-path {work}/data --split 100,0,0 --save {work}/out --no-save-optim
            --tokenizer-type NullTokenizer --vocab-size {SHAPES[s.model][5] - 1} --seq-length {s.seq_length}
            --micro-batch-size {s.batch} --global-batch-size {s.batch} --train-iters {s.steps} --lr 1e-4
            --lr-decay-style constant --eval-iters 0 --log-interval 1000 --device {s.device} --{s.dtype}"""
        more = f"--lora-r {RANK} --lora-alpha {ALPHA}" + (" --qlora" if s.qlora else "") if side == "tessel" else ""
        if side == "packed":
            write_packed(work / "data", s)
            more = "--is-instruction-dataset --pack --neat-pack --reset-attention-mask"
        else:
            write_text(work / "data", s)
        clocks_s = run_counting(["pretrain", *common.split(), *more.split()])
        rows = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"][s.steps // 3 :]
    return {
        "step_s": statistics.median(row["iteration_time"] for row in steps),
        "step_cpu_s": median_interval_s(clocks_s, s),
        "peak_bytes": max(row["peak_memory_bytes"] for row in steps),
    }


def run_counting(arguments: list[str]) -> list[float]:
    """Run tessel in this process; the CPU seconds, of all threads, that it had used when each step began."""
    from tessel.cli import main as tessel
    from tessel.train.step import TrainStep

    begins_s: list[float] = []
    step = TrainStep.__call__

    def counted(self: TrainStep, *batches: Any) -> Any:
        begins_s.append(time.process_time())
        return step(self, *batches)

    with patch.object(TrainStep, "__call__", counted), contextlib.redirect_stdout(io.StringIO()):
        if tessel(arguments) != 0:
            raise SystemExit("tessel failed")
    return begins_s


def median_interval_s(clocks_s: list[float], s: Setting) -> float:
    """Between readings of a clock, the first third of them left out."""
    return statistics.median(later - sooner for sooner, later in pairwise(clocks_s[s.steps // 3 :]))


def run_peft(s: Setting) -> dict[str, float]:
    """The plain loop: peft on transformers, SDPA attention, `labels=` loss, clipping, fused AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tessel.runtime import device as devices

    device = devices.resolve(s.device)
    low = s.dtype != "fp32"
    model = transformers_model(s).to(device, torch.bfloat16 if low else torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    times, clocks_s = [], [time.process_time()]
    devices.reset_peak_memory(device)
    for _ in range(s.steps):
        tokens = torch.randint(0, SHAPES[s.model][5] - 1, (s.batch, s.seq_length + 1)).to(device)
        begin_s = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        devices.synchronize(device)
        times.append(time.perf_counter() - begin_s)
        clocks_s.append(time.process_time())
    return {
        "step_s": statistics.median(times[s.steps // 3 :]),
        "step_cpu_s": median_interval_s(clocks_s, s),
        "peak_bytes": devices.peak_memory_bytes(device),
    }


def report(s: Setting, rounds: int, threads: int) -> None:
    """Run the rounds and print."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT))
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
            last = results[side][-1]
            times = f"{last['step_s'] * 1000:.1f} ms, {last['step_cpu_s'] * 1000:.1f} ms of CPU"
            print(f"round {number + 1} {side}: {times} a step", flush=True)
    median = {side: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for side, rows in results.items()}
    tokens = s.batch * s.seq_length
    what, unit = ("step_cpu_s", "CPU second") if s.device == "cpu" else ("step_s", "second")
    print(f"\n{s.model}, {s.dtype}, {s.batch} x {s.seq_length} tokens, {threads} threads, {s.device}")
    for side in SIDES:
        speed, peak_mib = tokens / median[side][what], median[side]["peak_bytes"] / 2**20
        print(f"{side:9s} {speed:10,.0f} tokens a {unit}   peak {peak_mib:8,.0f} MiB")
    ours, theirs = median["tessel"], median["peft"]
    print(f"adapters, speed   tessel / peft: {theirs[what] / ours[what]:.2f}x (at least 1 wanted)")
    print(f"adapters, memory  tessel / peft: {ours['peak_bytes'] / theirs['peak_bytes']:.2f}x (at most 1 wanted)")
    packed = median["pretrain"][what] / median["packed"][what]
    print(f"packed dialogues / text, tokens a {unit}: {packed:.2f}x (at least 0.90 wanted)")


def main() -> None:
    """Alternate all sides, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="20M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--qlora", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    s = Setting(args.model, args.device, args.dtype, args.batch, args.seq_length, args.steps, args.qlora)
    if args.side:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps(run_peft(s) if args.side == "peft" else run_tessel(s, args.side)))
        return
    report(s, args.rounds, args.threads)


if __name__ == "__main__":
    main()

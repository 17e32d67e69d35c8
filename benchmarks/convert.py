"""Memory and time of conversions of a random model, beside `cp -r` of the same bytes.

    python benchmarks/convert.py [--size 7b] [--folder DIR] [--workers 2] [--repeat 3] [--cold]

A bf16 model of the shape of Qwen2.5 (7b: 15 GB, 3b: 6 GB, 1.5b: 3 GB, 0.5b: 1 GB) with random weights is written to
DIR, and converted hf -> torch (TP1 PP4), hf -> torch_dist, torch -> hf. Before each conversion its source is copied by
`cp -r`, with the copy synced to the disk, as a conversion's result is. Before either, the source is read through once,
so that as much of it as can be is in memory; with --cold it is dropped from the page cache instead. Of each kind the
median run counts: seconds of the copy, of the conversion without its proof, their ratio, seconds of the processor of
both (the conversion's with its proof), seconds of the proof, and the largest sum of RssAnon and RssShmem. Needs about
three times the model on the disk.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tessel.checkpoint.hf_plan import plan, texts
from tessel.checkpoint.stored import Index, StoredModel, Target, bounds
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig

SIZES = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip
LIMIT_GIB = 1.5
LIMIT_RATIO = 1.6
SAMPLE_S = 0.05


@dataclass(frozen=True)
class Random:
    """A stored tensor of random numbers, made when they are read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    path: Path = Path()

    def read(self, index: Index | None = None) -> torch.Tensor:
        """The box `index`, or all of it."""
        sizes = [high - low for low, high in bounds(index, self.shape)]
        words = torch.randint(-(2**63), 2**63 - 1, (-(-math.prod(sizes) // 4),))
        # Exponents of small numbers: nothing is infinite.
        halves = (words.view(torch.int16)[: math.prod(sizes)] & 0x8FFF) | 0x3000
        return halves.view(torch.bfloat16).reshape(sizes)


def write_model(folder: Path, size: str) -> None:
    """A Hugging Face folder with random weights in shards of 5 GB."""
    raw = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16", **SIZES[size]}
    config = ModelConfig.from_hf(raw)
    tensors = {name: Random(name, rule.shape) for name, rule in parameters(config).items()}
    model = StoredModel("hf", folder, config, tensors)
    files = plan(model, Target())
    folder.mkdir(parents=True)
    for file in files:
        file.write(folder / file.name)
    for name, content in texts(model, Target(), files).items():
        (folder / name).write_bytes(content)


def private_bytes(pid: int) -> int:
    """RssAnon + RssShmem of a process; 0 when it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(kib) * 1024 for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text))


@dataclass(frozen=True)
class Timed:
    """Seconds of a copy or a conversion: on the clock, and of the processor; of the proof; and peak memory in bytes."""

    wall_s: float
    cpu_s: float
    proof_s: float = 0.0
    peak_bytes: int = 0


def cpu_of_children() -> float:
    """Seconds of the processor that ended children of this process took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def convert(source: Path, target: Path, flags: list[str]) -> Timed:
    """Run a conversion. `wall_s` is without its proof."""
    command = [sys.executable, "-m", "tessel", "convert", "--load", str(source), "--save", str(target), *flags]
    used_s, started_s, peak = cpu_of_children(), time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(SAMPLE_S)
        assert process.stdout is not None
        text = process.stdout.read()
    elapsed_s = time.perf_counter() - started_s
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    found = re.search(r"verified: .* in ([\d.]+) s", text)
    proof_s = float(found[1]) if found else 0.0
    return Timed(elapsed_s - proof_s, cpu_of_children() - used_s, proof_s, peak)


def copy(source: Path, target: Path) -> Timed:
    """Run `cp -r`, with its bytes on the disk as a conversion leaves them; the copy is removed."""
    used_s, started_s = cpu_of_children(), time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.rglob("*"))], check=True)
    timed = Timed(time.perf_counter() - started_s, cpu_of_children() - used_s)
    shutil.rmtree(target)
    return timed


def prepare(source: Path, is_cold: bool) -> None:
    """Bring a folder's files into the page cache, as far as it goes, or drop them from it."""
    buffer = bytearray(2**23)
    for path in (path for path in sorted(source.rglob("*")) if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            if is_cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not is_cold and file.readinto(buffer):
                pass


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def median(runs: list[Timed]) -> Timed:
    """The run in the middle by seconds on the clock, with the largest peak of all."""
    middle = statistics.median_low(run.wall_s for run in runs)
    found = next(run for run in runs if run.wall_s == middle)
    return replace(found, peak_bytes=max(run.peak_bytes for run in runs))


def machine(folder: Path) -> str:
    """Where and what was measured."""
    info = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    mounted = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True).stdout.strip()
    return (
        f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, {memory / 2**30:.0f} GiB, {mounted}, "
        f"load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"commit {commit.stdout.strip() or 'unknown'}"
    )


def main() -> None:
    """Write the model, run the conversions, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--folder", help="where to write, on the disk to be measured; a temporary one if not given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1, help="copies and conversions of each kind, by turns")
    parser.add_argument("--cold", action="store_true", help="each source out of the page cache")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        write_model(root / "hf", args.size)
        num_bytes = folder_bytes(root / "hf")
        print(machine(root))
        cache = "dropped from the page cache" if args.cold else "read through"
        print(
            f"{args.size}: {num_bytes / 1e9:.2f} GB, --workers {args.workers}, median of {args.repeat}, "
            f"sources {cache} before each run; limits: ratio {LIMIT_RATIO}, peak {LIMIT_GIB} GiB\n"
        )
        print(
            "| conversion | cp -r (CPU) | convert (CPU) | ratio | proof | peak |\n|---|---|---|---|---|---|", flush=True
        )
        for what, source, flags, kept in (
            ("hf -> torch TP1 PP4", "hf", ["--to", "torch", "--pipeline-model-parallel-size", "4"], "torch"),
            ("hf -> torch_dist", "hf", ["--to", "torch_dist"], None),
            ("torch -> hf", "torch", ["--to", "hf"], None),
        ):
            copies, runs = [], []
            for _ in range(args.repeat):
                shutil.rmtree(root / (kept or "result"), ignore_errors=True)
                prepare(root / source, args.cold)
                copies.append(copy(root / source, root / "copy"))
                prepare(root / source, args.cold)
                runs.append(convert(root / source, root / (kept or "result"), [*flags, "--workers", str(args.workers)]))
            shutil.rmtree(root / "result", ignore_errors=True)
            print(row(what, median(copies), median(runs)), flush=True)


def row(what: str, copied: Timed, run: Timed) -> str:
    """A row of the table."""
    return (
        f"| {what} | {copied.wall_s:.1f} s ({copied.cpu_s:.1f} s) | {run.wall_s:.1f} s ({run.cpu_s:.1f} s) "
        f"| {run.wall_s / copied.wall_s:.2f} | {run.proof_s:.1f} s | {run.peak_bytes / 2**30:.2f} GiB |"
    )


if __name__ == "__main__":
    main()

"""Memory and time of conversions of a random model, beside `cp -r` of the same bytes.

    python benchmarks/convert.py [--size 7b] [--folder DIR] [--workers 1]

A bf16 model of the shape of Qwen2.5 (7b: 15 GB, 3b: 6 GB, 0.5b: 1 GB) with random weights is written to DIR, and
converted hf -> torch (TP1 PP4), hf -> torch_dist, torch -> hf, each beside a copy of its source made
just before. Printed of each: seconds of the copy, of the conversion without its proof, their ratio, seconds of the
proof, and the largest sum of RssAnon and RssShmem. Needs about three times the model on the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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


def convert(source: Path, target: Path, flags: list[str]) -> tuple[float, float, int]:
    """Seconds without the proof, seconds of the proof, and the peak of private memory in bytes."""
    command = [sys.executable, "-m", "tessel", "convert", "--load", str(source), "--save", str(target), *flags]
    started_s = time.perf_counter()
    peak = 0
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
    return elapsed_s - proof_s, proof_s, peak


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r`, with its bytes on the disk as a conversion leaves them."""
    started_s = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        subprocess.run(["sync", str(path)], check=True)
    elapsed_s = time.perf_counter() - started_s
    shutil.rmtree(target)
    return elapsed_s


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Write the model, run the conversions, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--folder", help="where to write, on the disk to be measured; a temporary one if not given")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        write_model(root / "hf", args.size)
        print(f"{args.size}: {folder_bytes(root / 'hf') / 1e9:.2f} GB, --workers {args.workers}")
        workers = ["--workers", str(args.workers)]
        rows = []
        for what, source, flags, keep in (
            ("hf -> torch TP1 PP4", "hf", ["--to", "torch", "--pipeline-model-parallel-size", "4"], True),
            ("hf -> torch_dist", "hf", ["--to", "torch_dist"], False),
            ("torch -> hf", "torch", ["--to", "hf"], False),
        ):
            target = root / flags[1] if keep else root / "result"
            copied_s = copy(root / source, root / "copy")
            written_s, proof_s, peak = convert(root / source, target, [*flags, *workers])
            if not keep:
                shutil.rmtree(target)
            rows.append({"what": what, "cp_s": copied_s, "convert_s": written_s, "proof_s": proof_s, "peak": peak})
            print(
                f"{what}: cp {copied_s:.1f} s, conversion {written_s:.1f} s, ratio {written_s / copied_s:.2f} "
                f"(limit {LIMIT_RATIO}); proof {proof_s:.1f} s; peak {peak / 2**30:.2f} GiB (limit {LIMIT_GIB})",
                flush=True,
            )
        print(json.dumps(rows))


if __name__ == "__main__":
    main()

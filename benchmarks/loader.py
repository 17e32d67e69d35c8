"""How long training waits for its data, at a pace of so many tokens a second.

    python benchmarks/loader.py [--tokens-per-s 500000] [--seconds 20] [--workers 2]

A dataset of documents of a few hundred tokens is read by the loader of a training run, as such a run does: fetch a
step, let the next one be read ahead, work. The work is a wait for the time that the step takes at that pace. Printed
is the share of the time that `fetch` took, which the log of a run calls "data wait", the longest wait, which other work
on the machine makes longer, and how fast the loader reads when nobody paces it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from tessel.config.run import Data, RunConfig
from tessel.data.blend import BlendedDataset, normalize
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.loader import Loader
from tessel.data.samples import GPTDataset, SampleOptions

SEQ_LENGTH = 4096
GLOBAL_BATCH_SIZE = 32
MICRO_BATCH_SIZE = 4
VOCAB_SIZE = 50_000
EOD = 0


def datasets(folder: Path, num_documents: int, options: SampleOptions, num_samples: int) -> BlendedDataset:
    """Three datasets, blended."""
    parts = []
    weights = normalize([0.6, 0.3, 0.1])
    for number, weight in enumerate(weights):
        rng = np.random.default_rng(number)
        lengths = np.minimum(rng.lognormal(5.5, 1.0, num_documents), 100_000).astype(np.int32)
        with IndexedDatasetWriter(folder / f"data{number}", np.uint16) as writer:
            writer.add_documents(rng.integers(0, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16), lengths)
        indexed = IndexedDataset(folder / f"data{number}")
        ids = np.arange(len(indexed), dtype=np.int32)
        parts.append(GPTDataset(indexed, ids, int(num_samples * weight) + 2, options))
    return BlendedDataset(parts, weights, num_samples)


def paced(loader: Loader, num_steps: int, step_s: float) -> tuple[float, list[float]]:
    """Seconds in all, and those that each `fetch` took, of a run whose steps take `step_s` each, or nothing."""
    loader.fetch(0, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE)  # the first step of a run has nothing to read it ahead
    loader.prefetch(GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE)
    time.sleep(step_s)
    waits_s, begin_s = [], time.perf_counter()
    for step in range(1, num_steps):
        before_s = loader.stall_s
        loader.fetch(step * GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE)
        waits_s.append(loader.stall_s - before_s)
        loader.prefetch((step + 1) * GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE)
        time.sleep(step_s)
    return time.perf_counter() - begin_s, waits_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-s", type=float, default=500_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each paced run")
    parser.add_argument("--workers", type=int, default=2, help="--num-workers of the run")
    parser.add_argument("--documents", type=int, default=100_000, help="documents of each of three datasets")
    args = parser.parse_args()
    step_tokens = GLOBAL_BATCH_SIZE * SEQ_LENGTH
    step_s = step_tokens / args.tokens_per_s
    num_steps = max(3, int(args.seconds / step_s))
    cfg = RunConfig(data=Data(num_workers=args.workers))
    kinds = {
        "plain": SampleOptions(SEQ_LENGTH),
        "documents apart": SampleOptions(
            SEQ_LENGTH, eod_id=EOD, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True
        ),
    }
    for name, options in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = datasets(Path(folder), args.documents, options, (num_steps + 2) * GLOBAL_BATCH_SIZE)
            with Loader(dataset, cfg, vocab_size=VOCAB_SIZE) as loader:
                all_s, waits_s = paced(loader, num_steps, step_s)
                free_s, _ = paced(loader, num_steps, 0.0)
        print(
            f"{name}: {num_steps} steps of {step_tokens:,} tokens at {args.tokens_per_s:,.0f} tokens/s, "
            f"{args.workers} threads: waited {sum(waits_s) * 1000:.1f} ms of {all_s:.1f} s, "
            f"{sum(waits_s) / all_s:.3%}, in one step {max(waits_s) * 1000:.1f} ms at most; "
            f"unpaced {(num_steps - 1) * step_tokens / free_s:,.0f} tokens/s"
        )


if __name__ == "__main__":
    main()

"""Time to build the sample index, and a blend's, beside megatron-core's.

    python benchmarks/index.py [--documents 1000000] [--blend 10000000] [--datasets 50] [--repeats 5]

Both build all three arrays of one dataset (shuffled documents, samples, shuffled samples) in
memory, turn about; the medians and their ratio are printed, after the arrays were seen to be equal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tessel.data.blend import blending_indices, normalize
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.samples import GPTDataset, SampleOptions

SEQ_LENGTH = 4096
SEED = 1234


def write_dataset(prefix: Path, num_documents: int) -> None:
    """`num_documents` documents of a few hundred tokens, as web text has."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.0, num_documents), 100_000).astype(np.int32)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in range(0, num_documents, 100_000):
            some = lengths[start : start + 100_000]
            writer.add_documents(np.zeros(int(some.sum()), np.uint16), some)


def alternate(functions: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each function, called in turn, and what it returned last."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    results = {}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            results[name] = function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}, results


def report(what: str, medians: dict[str, float]) -> None:
    """One line: the medians and their ratio."""
    ours, theirs = medians["tessel"], medians["megatron-core"]
    print(f"{what}: tessel {ours:.3f} s, megatron-core {theirs:.3f} s, ratio {ours / theirs:.2f}")


def megatron_dataset(prefix: Path, num_samples: int) -> Any:
    """A function that builds megatron-core's index of the same data, without its cache on disk."""
    from megatron.core.datasets.gpt_dataset import GPTDataset as Theirs
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirIndexed
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(eod=0, pad=-1, vocab_size=50_000, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    # Otherwise it writes its index beside the data, and the second time reads it.
    config.mock = True
    indexed = TheirIndexed(str(prefix))
    ids = np.arange(len(indexed), dtype=np.int32)
    return lambda: Theirs(indexed, str(prefix), ids, num_samples, Split.train, config)


def compile_helpers() -> None:
    """megatron-core's C++ helpers; its wheels bring them built."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        from megatron.core.datasets.utils import compile_helpers as build

        build()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--blend", type=int, default=10_000_000, help="samples of the blend")
    parser.add_argument("--datasets", type=int, default=50, help="datasets of the blend")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    compile_helpers()
    from megatron.core.datasets import helpers

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        write_dataset(prefix, args.documents)
        start = time.perf_counter()
        indexed = IndexedDataset(prefix)
        print(f"opened and checked {len(indexed):,} documents in {time.perf_counter() - start:.3f} s")
        ids = np.arange(len(indexed), dtype=np.int32)
        for epochs in (1, 2):
            # A little more than whole epochs would need one more, shuffled apart.
            num_samples = int((epochs - 0.1) * indexed.total_tokens) // SEQ_LENGTH
            functions = {
                "tessel": lambda n=num_samples: GPTDataset(indexed, ids, n, SampleOptions(SEQ_LENGTH, SEED)),
                "megatron-core": megatron_dataset(prefix, num_samples),
            }
            medians, built = alternate(functions, args.repeats)
            for name in ("document_index", "sample_index", "shuffle_index"):
                assert np.array_equal(getattr(built["tessel"], name), getattr(built["megatron-core"], name)), name
            report(f"index of {args.documents:,} documents, {epochs} epoch(s), {num_samples:,} samples", medians)

    weights = normalize(np.random.default_rng(0).random(args.datasets).tolist())

    def theirs() -> tuple[np.ndarray, np.ndarray]:
        datasets, samples = np.zeros(args.blend, np.int16), np.zeros(args.blend, np.int64)
        helpers.build_blending_indices(datasets, samples, np.array(weights), len(weights), args.blend, False)
        return datasets, samples

    medians, built = alternate({"tessel": lambda: blending_indices(weights, args.blend), "megatron-core": theirs}, 3)
    assert all(np.array_equal(a, b) for a, b in zip(built["tessel"], built["megatron-core"], strict=True))
    report(f"blend of {args.blend:,} samples from {args.datasets} datasets", medians)


if __name__ == "__main__":
    main()

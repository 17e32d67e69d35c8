"""Time and memory to build the index of a dataset, and a blend's, beside megatron-core's.

    python benchmarks/index.py [--documents 10000000] [--epochs 10] [--blend 10000000] [--datasets 50] [--repeats 3]

Both build the three arrays of one dataset (shuffled documents, samples, shuffled samples) in memory, turn about; the
medians and their ratio are printed, after the arrays were seen to be equal. Seconds are of the wall and, in brackets,
of the processor, which other work on the machine changes less. Peak memory is that of a process of its own, above what
it held before. Then the same for the order of a blend, with weights of three kinds.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
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


def alternate(
    functions: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Median seconds of wall and processor of each function, called in turn, and what it returned last."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, function in functions.items():
            results.pop(name, None)
            wall_s, processor_s = time.perf_counter(), time.process_time()
            results[name] = function()
            times[name].append((time.perf_counter() - wall_s, time.process_time() - processor_s))
    return {
        name: (statistics.median(wall for wall, _ in some), statistics.median(processor for _, processor in some))
        for name, some in times.items()
    }, results


def report(what: str, medians: dict[str, tuple[float, float]]) -> None:
    """One line: the medians and their ratio."""
    (ours, our_processor), (theirs, their_processor) = medians["tessel"], medians["megatron-core"]
    print(
        f"{what}: tessel {ours:.3f} s ({our_processor:.3f}), megatron-core {theirs:.3f} s ({their_processor:.3f}): "
        f"{theirs / ours:.2f} times as fast ({their_processor / our_processor:.2f})",
        flush=True,
    )


def peak_bytes(build: Callable[[], Any]) -> tuple[int, int]:
    """How far memory rises over what is held before, in a process of its own, and the bytes of the arrays built."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def measure() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory_bytes("VmRSS")
        built = build()
        names = ("document_index", "sample_index", "shuffle_index")
        answers.put((memory_bytes("VmHWM") - before, sum(getattr(built, name).nbytes for name in names)))

    process = context.Process(target=measure)
    process.start()
    answer = answers.get(timeout=600)
    process.join()
    return answer


def memory_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


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


def index(prefix: Path, epochs: int, repeats: int) -> None:
    """Build the index of one dataset."""
    start = time.perf_counter()
    indexed = IndexedDataset(prefix)
    print(f"opened and checked {len(indexed):,} documents in {time.perf_counter() - start:.3f} s")
    ids = np.arange(len(indexed), dtype=np.int32)
    # A little more than whole epochs would need one more, shuffled apart.
    num_samples = int((epochs - 0.1) * indexed.total_tokens) // SEQ_LENGTH
    functions: dict[str, Callable[[], Any]] = {
        "tessel": lambda: GPTDataset(indexed, ids, num_samples, SampleOptions(SEQ_LENGTH, SEED)),
        "megatron-core": megatron_dataset(prefix, num_samples),
    }
    what = f"index of {len(indexed):,} documents, {epochs} epoch(s), {num_samples:,} samples"
    for name, build in functions.items():
        peak, size = peak_bytes(build)
        print(
            f"{what}: {name} peaks at {peak / 1e6:,.0f} MB, {peak / size:.2f} times its arrays ({size / 1e6:,.0f} MB)"
        )
    medians, built = alternate(functions, repeats)
    for name in ("document_index", "sample_index", "shuffle_index"):
        assert np.array_equal(getattr(built["tessel"], name), getattr(built["megatron-core"], name)), name
    report(what, medians)


def blend(num_datasets: int, size: int, repeats: int) -> None:
    """Order the samples of a blend, for weights of several kinds."""
    from megatron.core.datasets import helpers

    rng = np.random.default_rng(0)
    kinds = {
        "even weights": rng.random(num_datasets),
        "weights of whole numbers": rng.integers(1, 20, num_datasets).astype(float),
        "equal weights": np.ones(num_datasets),
    }
    for kind, drawn in kinds.items():
        weights = normalize(drawn.tolist())

        def theirs(weights: list[float] = weights) -> tuple[np.ndarray, np.ndarray]:
            datasets, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
            helpers.build_blending_indices(datasets, samples, np.array(weights), len(weights), size, False)
            return datasets, samples

        functions: dict[str, Callable[[], Any]] = {
            "tessel": lambda weights=weights: blending_indices(weights, size),
            "megatron-core": theirs,
        }
        medians, built = alternate(functions, repeats)
        assert all(np.array_equal(a, b) for a, b in zip(built["tessel"], built["megatron-core"], strict=True))
        report(f"blend of {size:,} samples from {num_datasets} datasets, {kind}", medians)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--blend", type=int, default=10_000_000, help="samples of the blend")
    parser.add_argument("--datasets", type=int, default=50, help="datasets of the blend")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    compile_helpers()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        write_dataset(prefix, args.documents)
        for epochs in sorted({1, args.epochs}):
            index(prefix, epochs, args.repeats)
    blend(args.datasets, args.blend, args.repeats + 2)


if __name__ == "__main__":
    main()

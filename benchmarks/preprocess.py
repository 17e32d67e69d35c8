"""`tessel preprocess` beside Megatron-LM's tools/preprocess_data.py: throughput, memory, scaling, and where time goes.

    python benchmarks/preprocess.py [--megatron DIR] [--mb 200] [--large-mb 2000] [--workers 2] [--text DIR]
                                    [--tokenizer DIR] [--folder DIR]

A jsonl is made by repeating the texts of DIR with some of their words exchanged, so that no two documents are
equal. Both tools write the dataset of it with the same workers, whole processes being timed, and the files are
compared byte for byte. --megatron names a checkout of Megatron-LM; without it, its inner loop is run: json.loads,
the tokenizer of transformers and megatron-core's IndexedDatasetBuilder, in the same pool. Memory is the largest sum
of RssAnon over all processes, sampled, for 20 MB and for --large-mb. The last part runs all stages in one process,
and counts the seconds of the processor in each.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import pickle
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tessel.config.tokenizer import Tokenizer
from tessel.data.indexed import IndexedDatasetWriter, optimal_dtype
from tessel.data.readers import parse_rows, read_blocks
from tessel.data.text_encoder import TextEncoder
from tessel.data.tokenizer import load_fast

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"
SAMPLE_S = 0.05
SMALL_MB = 20
LIMIT_MB = 600
BLOCK_BYTES = 1 << 19


def texts_of(folder: Path) -> list[str]:
    """The documents of a folder's .jsonl, .txt (in pieces of 4,000 characters) and .parquet files."""
    import pyarrow.parquet

    documents: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".jsonl":
            documents += [json.loads(line)["text"] for line in path.read_text().splitlines()]
        elif path.suffix == ".txt":
            text = path.read_text()
            documents += [text[i : i + 4000] for i in range(0, len(text), 4000)]
        elif path.suffix == ".parquet":
            documents += pyarrow.parquet.read_table(path)["text"].to_pylist()
    return documents


def write_corpus(path: Path, documents: list[str], num_bytes: int) -> None:
    """Documents at random, a twentieth of their words exchanged, some for words that are in no other text."""
    random_ = random.Random(1)
    words = sorted({word for document in documents for word in re.findall(r"\w{4,}", document)})
    written = 0
    with open(path, "w") as file:
        while written < num_bytes:
            parts = random_.choice(documents).split(" ")
            for _ in range(len(parts) // 20 + 1):
                word = random_.choice(words)
                new = word + random_.choice(words)[:3] if random_.random() < 0.3 else word
                parts[random_.randrange(len(parts))] = new
            line = json.dumps({"text": " ".join(parts)}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())


def anonymous_bytes(session: int) -> int:
    """Sum of RssAnon over the processes of a session."""
    total = 0
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if int((process / "stat").read_text().rsplit(")", 1)[1].split()[3]) != session:
                    continue
                found = re.search(r"^RssAnon:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
            except OSError:
                continue
            total += int(found[1]) * 1024 if found else 0
    return total


def run(command: list[str]) -> tuple[float, float]:
    """Seconds that a command takes, and its largest memory in MB.

    Raises:
        SystemExit: it fails; what it said is printed.
    """
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        largest = 0
        while process.poll() is None:
            largest = max(largest, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_S)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-4000:]}")
    return time.perf_counter() - start, largest / 1e6


def tessel_command(source: Path, prefix: Path, tokenizer: str, workers: int) -> list[str]:
    """`tessel preprocess` of a jsonl."""
    flags = ["--tokenizer-name-or-path", tokenizer, "--workers", str(workers), "--append-eod"]
    return [
        sys.executable,
        "-m",
        "tessel",
        "preprocess",
        "--input",
        str(source),
        "--output-prefix",
        str(prefix),
        *flags,
    ]


def megatron_command(source: Path, prefix: Path, args: argparse.Namespace) -> list[str]:
    """Megatron-LM's tool, or its inner loop."""
    if args.megatron is None:
        inner = ["--inner-loop", str(source), str(prefix), "--tokenizer", args.tokenizer]
        return [sys.executable, __file__, *inner, "--workers", str(args.workers)]
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", args.tokenizer, "--append-eod"]
    tool = [sys.executable, f"{args.megatron}/tools/preprocess_data.py", "--input", str(source)]
    return [*tool, "--output-prefix", str(prefix), "--workers", str(args.workers), "--log-interval", "100000", *flags]


def inner_loop(source: str, prefix: str, tokenizer: str, workers: int) -> None:
    """json.loads, transformers' tokenizer and megatron-core's builder, in a pool as Megatron-LM's tool has it."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=np.int32)
    with open(source, encoding="utf-8") as file, multiprocessing.Pool(workers, _open_tokenizer, (tokenizer,)) as pool:
        for ids, lengths in pool.imap(_encode, file, 32):
            builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}_text_document.idx")


def _open_tokenizer(folder: str) -> None:
    from transformers import AutoTokenizer

    multiprocessing.current_process().tokenizer = AutoTokenizer.from_pretrained(folder)  # type: ignore[attr-defined]


def _encode(line: str) -> tuple[list[int], list[int]]:
    tokenizer: Any = multiprocessing.current_process().tokenizer  # type: ignore[attr-defined]
    ids = tokenizer(json.loads(line)["text"]).input_ids
    return ([*ids, tokenizer.eos_token_id], [len(ids) + 1]) if ids else ([], [])


def num_tokens(prefix: Path) -> int:
    """Tokens of a dataset of int32."""
    return Path(f"{prefix}_text_document.bin").stat().st_size // 4


def stages(source: Path, prefix: Path, tokenizer_folder: str) -> None:
    """Seconds of the processor in each stage when one process does all, and tokens a second."""
    start = time.perf_counter()
    tokenizer, said = load_fast(Tokenizer(tokenizer_name_or_path=tokenizer_folder), None, [])
    encode = TextEncoder(tokenizer.batch_encoder(), ("text",), tokenizer.eod)
    encode([], "")
    print(f"one process: {said}, ready after {time.perf_counter() - start:.1f} s")
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        begin = time.process_time()
        result = function()
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - begin
        return result

    def blocks() -> Iterator[Any]:
        found = iter(read_blocks(source, BLOCK_BYTES, ("text",)))
        while (block := timed("read", lambda: next(found, None))) is not None:
            yield block

    tokens = 0
    with IndexedDatasetWriter(prefix, optimal_dtype(tokenizer.vocab_size)) as writer:
        for block in blocks():
            sent = timed("transfer", lambda block=block: pickle.loads(pickle.dumps(block)))
            rows = timed("parse", lambda sent=sent: parse_rows(sent, ("text",)))
            encoded = timed("tokenize", lambda rows=rows, path=block.path: encode(rows, path))
            encoded = timed("transfer", lambda encoded=encoded: pickle.loads(pickle.dumps(encoded)))
            timed("write", lambda encoded=encoded: writer.add_documents(*encoded[0]))
            tokens += len(encoded[0].tokens)
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.2f} s ({value / total:.0%})" for name, value in seconds.items())
    print(f"  {parts}")
    print(
        f"  {tokens / total / 1e6:.1f} Mtok/s on one core in all, {tokens / seconds['tokenize'] / 1e6:.1f} tokenizing"
    )
    writing = seconds["write"] + seconds["read"] + seconds["transfer"] / 2
    print(f"  one process that reads and writes keeps up with {(total - writing) / writing:.0f} workers")


def compare(args: argparse.Namespace, folder: Path, documents: list[str]) -> None:
    """The ratio to Megatron-LM's tool, the same bytes, and scaling over workers."""
    source = folder / "corpus.jsonl"
    write_corpus(source, documents, args.mb * 1_000_000)
    ours, theirs = folder / "ours", folder / "theirs"
    seconds = {}
    for workers in dict.fromkeys((1, args.workers)):
        seconds[workers], memory = run(tessel_command(source, ours, args.tokenizer, workers))
        tokens = num_tokens(ours)
        rate = tokens / seconds[workers] / 1e6
        print(
            f"tessel, {args.mb} MB, {workers} worker(s): {seconds[workers]:.1f} s from start to end, {rate:.1f} Mtok/s "
            f"({rate / workers:.1f} a worker), {memory:.0f} MB"
        )
    their_seconds, memory = run(megatron_command(source, theirs, args))
    name = "inner loop of Megatron-LM's tool" if args.megatron is None else "Megatron-LM's tool"
    rate = num_tokens(theirs) / their_seconds / 1e6
    print(f"{name}, {args.workers} workers: {their_seconds:.1f} s, {rate:.2f} Mtok/s, {memory:.0f} MB")
    scaling = seconds[1] / seconds[args.workers]
    print(f"ratio {their_seconds / seconds[args.workers]:.1f}; 1 -> {args.workers} workers: x {scaling:.2f}")
    for end in (".bin", ".idx"):
        assert filecmp.cmp(f"{ours}_text_document{end}", f"{theirs}_text_document{end}", shallow=False), end
    print("the files are equal byte for byte")
    stages(source, folder / "stages", args.tokenizer)


def memory_of_sizes(args: argparse.Namespace, folder: Path, documents: list[str]) -> None:
    """Largest memory for a small and a large input."""
    used = {}
    for size in (SMALL_MB, args.large_mb):
        source = folder / f"{size}.jsonl"
        write_corpus(source, documents, size * 1_000_000)
        seconds, used[size] = run(tessel_command(source, folder / "sized", args.tokenizer, args.workers))
        rate = num_tokens(folder / "sized") / seconds / 1e6
        print(f"memory of {size} MB, {args.workers} workers: {used[size]:.0f} MB ({seconds:.1f} s, {rate:.1f} Mtok/s)")
        source.unlink()
    verdict = "" if max(used.values()) < LIMIT_MB else f", MORE THAN {LIMIT_MB} MB"
    print(f"difference {used[args.large_mb] - used[SMALL_MB]:.0f} MB{verdict}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", help="a checkout of Megatron-LM whose environment this Python has")
    parser.add_argument("--mb", type=int, default=200, help="size of the corpus")
    parser.add_argument(
        "--large-mb", type=int, default=2000, help="size of the input whose memory is compared; 0: none"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--text", type=Path, default=SHARED / "text")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers" / "qwen2.5"))
    parser.add_argument("--folder", help="where to write; a temporary folder if not given")
    parser.add_argument("--inner-loop", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner_loop:
        inner_loop(*args.inner_loop, args.tokenizer, args.workers)
        return
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {args.tokenizer}")
    documents = texts_of(args.text)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        compare(args, Path(folder), documents)
        if args.large_mb:
            memory_of_sizes(args, Path(folder), documents)


if __name__ == "__main__":
    main()

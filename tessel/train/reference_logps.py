"""Reference log-probabilities, computed once for all pairs and kept beside the data: --precompute-ref-log-probs.

The file's name has a key of the model, the data and the precision. In it an answer is known by a digest of its
tokens, labels and loss mask, so that neither the order of pairs nor their padding matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from tessel.data.blend import BlendedDataset
from tessel.data.loader import Loader, MicroBatch
from tessel.errors import TesselError
from tessel.parallel.peers import Peers
from tessel.runtime.files import atomic_write
from tessel.runtime.log import log

_ENDS_BYTES = 1 << 16


@dataclass(frozen=True)
class KnownLogps:
    """Log-probabilities of answers by their digests, out of the file `path`."""

    path: Path
    values: Mapping[int, float]

    def of(self, rows: Sequence[MicroBatch]) -> Tensor:
        """Of `rows` of one answer each, fp64.

        Raises:
            TesselError: an answer is not among them.
        """
        found = [self.values.get(digest_of(row)) for row in rows]
        if any(value is None for value in found):
            raise TesselError(f"{self.path} lacks an answer of the data. Remove it, to have it made again.")
        return torch.tensor(found, dtype=torch.float64)


def digest_of(row: MicroBatch) -> int:
    """Of one answer: its tokens, labels and loss mask up to the last token with loss; padding is left out."""
    mask = row.loss_mask_BS[0].cpu()
    end = int(mask.nonzero().max()) + 1 if mask.any() else 0
    digest = hashlib.blake2b(digest_size=8)
    for values in (row.tokens_BS[0], row.labels_BS[0], mask.to(torch.int64)):
        digest.update(values[:end].cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def folder_digest(folder: Path) -> str:
    """Of the files in a model's folder: names, sizes, and the first and last bytes of each."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(size - _ENDS_BYTES, 0))
            digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()


def place_of(loader: Loader, parts: Sequence[str]) -> Path:
    """Where the file of a model, data and precision, described by `parts`, is: beside the data's first file."""
    dataset = loader.dataset
    first = dataset.datasets[0] if isinstance(dataset, BlendedDataset) else dataset
    key = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
    return Path(f"{first.indexed.prefix}_ref_log_probs_{key}.npz")


def num_pairs_of(loader: Loader, full_shuffle: bool) -> int:
    """Samples, from the first on, among which every pair is: one epoch, or all where epochs are not apart."""
    dataset = loader.dataset
    if full_shuffle or isinstance(dataset, BlendedDataset):
        return len(dataset)
    return len(dataset) // dataset.num_epochs


def read_logps(path: Path, num_pairs: int) -> KnownLogps | None:
    """What the file holds; None where there is none.

    Raises:
        TesselError: it is damaged, or of another number of pairs.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            digests, values, stored = file["digests"], file["logps"], int(file["num_pairs"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise TesselError(f"{path} is damaged ({error}). Remove it, to have it made again.") from error
    if stored != num_pairs or len(digests) != len(values):
        raise TesselError(
            f"{path} is of {stored} pairs, and the run's data has {num_pairs}. Remove it, to have it made again."
        )
    log(f"reference log-probabilities: {path}")
    return KnownLogps(path, dict(zip(digests.tolist(), values.tolist(), strict=True)))


def compute_logps(
    path: Path,
    loader: Loader,
    num_pairs: int,
    micro_batch_size: int,
    peers: Peers,
    rows_of: Callable[[MicroBatch], Sequence[MicroBatch]],
    logps: Callable[[Sequence[MicroBatch]], Tensor],
) -> KnownLogps:
    """Compute them for the first `num_pairs` samples of `loader`, and write the file, on the first process.

    `logps`: of every replica's rows, in the order of replicas.
    """
    log(f"computing the reference log-probabilities of {num_pairs:,} pairs")
    values: dict[int, float] = {}
    step = micro_batch_size * peers.num_replicas
    whole = num_pairs // step * step
    for start in (*range(0, whole, step), *([whole] if whole < num_pairs else [])):
        batches = (
            loader.fetch(start, step, micro_batch_size)
            if start < whole
            else loader.fetch_rest(start, num_pairs - start)
        )
        rows = [row for batch in batches for row in rows_of(batch)]
        found = logps(rows)
        digests = torch.zeros(len(found), dtype=torch.int64, device=peers.device)
        own = slice(peers.replica * len(rows), (peers.replica + 1) * len(rows))
        digests[own] = torch.tensor([digest_of(row) for row in rows], dtype=torch.int64, device=digests.device)
        values |= dict(zip(peers.sum_tokens(digests).tolist(), found.tolist(), strict=True))
    if peers.is_first:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                digests=np.array(list(values), np.int64),
                logps=np.array(list(values.values()), np.float64),
                num_pairs=np.int64(num_pairs),
            )
        log(f"wrote the reference log-probabilities {path}")
    return KnownLogps(path, values)

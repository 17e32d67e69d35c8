"""Megatron's indexed dataset: `prefix.bin` holds tokens, `prefix.idx` says where each sequence is.

The index, little-endian and without padding:

    magic u8[9] | version u64 = 1 | dtype code u8 | S u64 | D u64 |
    lengths i32[S] (tokens) | pointers i64[S] (bytes into .bin) | documents i64[D] | modes i8[S] (multimodal data alone)

S is the number of sequences, D the number of documents + 1; documents[d] is the number of
sequences before document d. Format: Megatron-LM's core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from tessel.data.spool import Spool
from tessel.errors import TesselError
from tessel.runtime.files import atomic_write, claim, disk_errors, remove_unclaimed, require_path
from tessel.runtime.log import warn_once

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Megatron's DType.optimal_dtype: ids under this fit u16 with room to spare.
_U16_VOCAB_SIZE = 65500
_CHECK_CHUNK = 1 << 20


def optimal_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The token type that Megatron writes: u16 for a vocabulary under 65,500, otherwise i32."""
    small = vocab_size is not None and vocab_size < _U16_VOCAB_SIZE
    return DTYPES[8] if small else DTYPES[4]


def strip_suffix(path: str) -> str:
    """The prefix of a dataset; a path that ends in .bin or .idx is accepted, and said once.

    A prefix that itself ends so (`x.bin.bin`) stays as it is.
    """
    stem, suffix = os.path.splitext(path)
    if suffix not in (".bin", ".idx") or os.path.exists(path + ".idx"):
        return path
    warn_once(f"{path}: a dataset is named by its prefix, without {suffix}; taken as {stem}")
    return stem


class IndexedDataset:
    """Memory-mapped reader of one `prefix.bin` and `prefix.idx`.

    Attributes:
        prefix: path without suffix.
        dtype: numpy type of the stored tokens.
        lengths: i32[S], tokens of each sequence. The arrays are views of the file, not aligned.
        pointers: i64[S], byte offset of each sequence in .bin.
        document_indices: i64[D], sequences before each document; the last entry is S.
        modes: i8[S] or None.
        total_tokens: sum of the lengths.

    Raises:
        TesselError: a file is missing, truncated, of another format, or points past .bin.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = strip_suffix(str(prefix))
        self.index_path = f"{self.prefix}.idx"
        self.bin_path = f"{self.prefix}.bin"
        for path in (self.index_path, self.bin_path):
            require_path(path, f"the dataset {self.prefix}")
        index = _map(self.index_path)
        code, num_sequences, num_entries, has_modes = _read_header(index, self.index_path)
        self.dtype = DTYPES[code]
        ends = np.cumsum([HEADER_BYTES, 4 * num_sequences, 8 * num_sequences, 8 * num_entries]).tolist()
        self.lengths = np.frombuffer(index, "<i4", num_sequences, ends[0])
        self.pointers = np.frombuffer(index, "<i8", num_sequences, ends[1])
        self.document_indices = np.frombuffer(index, "<i8", num_entries, ends[2])
        self.modes = np.frombuffer(index, "i1", num_sequences, ends[3]) if has_modes else None
        self._tokens = _map(self.bin_path)
        self.total_tokens = self._check_sequences()
        self._check_documents()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents; one holds one or more sequences, or none."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> np.ndarray:
        """All of .bin: a read-only view of the file."""
        return np.frombuffer(self._tokens, self.dtype, len(self._tokens) // self.dtype.itemsize)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence, or from offset to its end: a read-only view of the file."""
        sequence_tokens = int(self.lengths[sequence])
        if length is None:
            length = sequence_tokens - offset
        if offset < 0 or length < 0 or offset + length > sequence_tokens:
            raise TesselError(
                f"{self.prefix}: tokens {offset} to {offset + length} of sequence {sequence} were asked for, "
                f"which has {sequence_tokens}."
            )
        start_bytes = int(self.pointers[sequence]) + offset * self.dtype.itemsize
        return np.frombuffer(self._tokens, self.dtype, length, start_bytes)

    def span(self, sequence: int, num_tokens: int) -> np.ndarray:
        """`num_tokens` tokens as they lie in .bin from the first of `sequence` on: a read-only view of the file."""
        return np.frombuffer(self._tokens, self.dtype, num_tokens, int(self.pointers[sequence]))

    def _check_sequences(self) -> int:
        """Every sequence lies within .bin; returns the sum of the lengths. By chunks, to bound memory."""
        bin_bytes = len(self._tokens)
        total = 0
        for start in range(0, len(self.lengths), _CHECK_CHUNK):
            lengths = self.lengths[start : start + _CHECK_CHUNK].astype(np.int64)
            pointers = self.pointers[start : start + _CHECK_CHUNK]
            room_bytes = bin_bytes - lengths * self.dtype.itemsize
            bad = (lengths < 0) | (pointers < 0) | (pointers > room_bytes)
            if bad.any():
                at = int(np.argmax(bad))
                raise TesselError(
                    f"{self.index_path}: sequence {start + at} ({int(lengths[at])} tokens at byte {int(pointers[at])}) "
                    f"lies outside {self.bin_path}, which has {bin_bytes} bytes: the two files do not belong together, "
                    "or .bin is truncated. Write the dataset anew."
                )
            total += int(lengths.sum())
        return total

    def _check_documents(self) -> None:
        entries = self.document_indices
        ordered = all(
            bool((np.diff(entries[start : start + _CHECK_CHUNK + 1]) >= 0).all())
            for start in range(0, len(entries), _CHECK_CHUNK)
        )
        if not len(entries) or entries[0] != 0 or entries[-1] != len(self.lengths) or not ordered:
            raise TesselError(
                f"{self.index_path}: the document index does not cover the {len(self.lengths)} sequences in order; "
                "the file is damaged. Write the dataset anew."
            )


def _map(path: str) -> mmap.mmap | bytes:
    """The file's bytes, read-only; an empty file cannot be mapped."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _read_header(index: mmap.mmap | bytes, path: str) -> tuple[int, int, int, bool]:
    """Dtype code, S, D and whether modes follow; sizes are checked against the file's before anything is built."""
    if index[: len(MAGIC)] != MAGIC:
        raise TesselError(
            f"{path} is not an index of a Megatron dataset: it begins with {bytes(index[:9])!r}, not {MAGIC!r}. "
            "Give the prefix of a .bin/.idx pair that `tessel preprocess` or Megatron wrote."
        )
    if len(index) < HEADER_BYTES:
        raise TesselError(f"{path} is truncated: {len(index)} bytes, less than its header. Write the dataset anew.")
    version, code, num_sequences, num_entries = struct.unpack_from("<QBQQ", index, len(MAGIC))
    if version != VERSION:
        raise TesselError(f"{path} is of version {version}; version {VERSION} is the only one known.")
    if code not in DTYPES:
        raise TesselError(f"{path}: the token type has code {code}; known are 1 to {max(DTYPES)}. The file is damaged.")
    needed_bytes = HEADER_BYTES + 12 * num_sequences + 8 * num_entries
    if len(index) not in (needed_bytes, needed_bytes + num_sequences):
        state = "truncated" if len(index) < needed_bytes else "damaged"
        raise TesselError(
            f"{path} is {state}: {num_sequences} sequences and {num_entries} document entries take "
            f"{needed_bytes} bytes, and the file has {len(index)}. Write the dataset anew."
        )
    return code, num_sequences, num_entries, num_sequences > 0 and len(index) != needed_bytes


class IndexedDatasetWriter:
    """Writes one `prefix.bin` and `prefix.idx`; nothing appears under those names before `finalize`.

    A context manager: leaving the block finalizes it, an error inside removes what was written.
    `dtype` is the stored type, one of DTYPES; `multimodal` data has a mode for each sequence.
    Memory does not grow with what is written.

    Raises:
        TesselError: a token does not fit the dtype, or the disk is full.
    """

    def __init__(self, prefix: str | Path, dtype: Any, multimodal: bool = False) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<") if np.dtype(dtype).itemsize > 1 else np.dtype(dtype)
        if self.dtype not in _CODES:
            raise TesselError(f"{prefix}: a .bin file cannot hold {self.dtype}; u16 and i32 are usual.")
        folder = Path(self.prefix).parent
        self.num_tokens = 0
        self._lengths = Spool("<i4", folder)
        self._documents = Spool("<i8", folder)
        self._documents.append(0)
        self._modes = Spool("i1", folder) if multimodal else None
        self._bin = self._open()

    def _open(self) -> IO[bytes]:
        target = Path(f"{self.prefix}.bin")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # What a killed process left of the same dataset.
            remove_unclaimed(target.parent, f".{target.name}.", ".tmp")
            file = tempfile.NamedTemporaryFile(  # noqa: SIM115
                dir=target.parent, prefix=f".{target.name}.", suffix=".tmp", delete=False, buffering=1 << 20
            )
            claim(file.fileno())
            return file

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finalize()
        else:
            self.discard()

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Iterable[int] | None = None) -> None:
        """Append one document: token ids [N], cut into sequences of `lengths` (one sequence of all if not given)."""
        self._write(tokens)
        with disk_errors(self.prefix):
            for length in [len(tokens)] if lengths is None else lengths:
                self._add_length(length, 0)
        self.end_document()

    def add_item(self, tokens: Sequence[int] | np.ndarray, mode: int = 0) -> None:
        """Append one sequence to the document in progress, which `end_document` closes."""
        self._write(tokens)
        with disk_errors(self.prefix):
            self._add_length(len(tokens), mode)

    def end_document(self) -> None:
        """Close the document in progress."""
        with disk_errors(self.prefix):
            self._documents.append(len(self._lengths))

    def add_documents(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        sequences_per_document: np.ndarray | None = None,
        modes: np.ndarray | None = None,
    ) -> None:
        """Append many documents: their tokens back to back [N], the length of each sequence [S].

        Documents have `sequences_per_document` [D], or one each. `modes` [S]: all 0 if not given.
        """
        self._write(tokens)
        first = len(self._lengths)
        if sequences_per_document is None:
            ends = np.arange(first + 1, first + len(lengths) + 1, dtype=np.int64)
        else:
            ends = np.cumsum(sequences_per_document, dtype=np.int64) + first
        with disk_errors(self.prefix):
            self._lengths.extend(np.array(lengths, "<i4"))
            self._documents.extend(ends)
            if self._modes is not None:
                self._modes.extend(np.zeros(len(lengths), "i1") if modes is None else np.array(modes, "i1"))

    def _add_length(self, length: int, mode: int) -> None:
        self._lengths.append(length)
        if self._modes is not None:
            self._modes.append(mode)

    def _write(self, tokens: Sequence[int] | np.ndarray) -> None:
        given = np.asarray(tokens)
        if given.size == 0:
            return
        if self.dtype.kind in "iu" and given.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(given.min()), int(given.max())
            if low < limits.min or high > limits.max:
                bad = low if low < limits.min else high
                raise TesselError(
                    f"{self.prefix}: token id {bad} does not fit {self.dtype.name}; write the dataset as int32."
                )
        with disk_errors(self.prefix):
            self._bin.write(np.ascontiguousarray(given, self.dtype).data)
        self.num_tokens += len(given)

    def discard(self) -> None:
        """Remove what was written; no file of the dataset's name is touched."""
        with contextlib.suppress(OSError):  # of a full disk, in writing out what is still held
            self._bin.close()
        for spool in (self._lengths, self._documents, self._modes):
            if spool is not None:
                spool.close()
        Path(self._bin.name).unlink(missing_ok=True)

    def finalize(self) -> None:
        """Sync and rename .bin, then .idx: a reader finds the pair whole, or no .idx."""
        index_path = Path(f"{self.prefix}.idx")
        try:
            # Both are on the disk before either is renamed: when it is full, an old pair stays.
            with disk_errors(self.prefix), atomic_write(index_path) as temporary:
                self._write_index(temporary)
                self._bin.flush()
                os.fsync(self._bin.fileno())
                umask = os.umask(0)
                os.umask(umask)
                os.fchmod(self._bin.fileno(), 0o666 & ~umask)
                # An old index beside the new tokens would be read as a pair.
                index_path.unlink(missing_ok=True)
                os.replace(self._bin.name, f"{self.prefix}.bin")
        finally:
            self.discard()

    def _write_index(self, path: Path) -> None:
        header = struct.pack("<QBQQ", VERSION, _CODES[self.dtype], len(self._lengths), len(self._documents))
        with open(path, "wb") as file:
            file.write(MAGIC + header)
            for lengths in self._lengths.chunks():
                file.write(lengths.data)
            start = 0
            for lengths in self._lengths.chunks():
                ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize + start
                file.write((ends - lengths.astype("<i8") * self.dtype.itemsize).data)
                start = int(ends[-1]) if len(ends) else start
            for spool in (self._documents, self._modes):
                for values in spool.chunks() if spool is not None else ():
                    file.write(values.data)
            file.flush()
            os.fsync(file.fileno())

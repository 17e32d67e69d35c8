"""A part of the input for each of many machines; the parts in order are the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tessel.data.readers import Block, Span

Piece = Block | Span


def shard_blocks(
    files: Sequence[Path], read: Callable[[Path], Iterator[Piece]], index: int, num_shards: int
) -> Iterator[Piece]:
    """The blocks of shard `index` (from 0).

    The files lie after one another on a line as long as their bytes, which is cut into equal shards. A
    block belongs to the shard where it begins, the blocks of a file being spread evenly over its bytes.
    A file that lies in several shards is read once more, to count its blocks; other shards' files are not read.
    """
    sizes = [file.stat().st_size for file in files]
    total = max(sum(sizes), 1)
    start = 0
    for file, size in zip(files, sizes, strict=True):
        first, last = (position * num_shards // total for position in (start, start + max(size - 1, 0)))
        if first == last == index:
            yield from read(file)
        elif first <= index <= last and first != last:
            num_blocks = sum(1 for _ in read(file))
            for number, block in enumerate(read(file)):
                shard = (start + size * number // num_blocks) * num_shards // total
                if shard == index:
                    yield block
                elif shard > index:
                    break
        start += size

"""Rows of .jsonl, .json, .parquet, .csv, .arrow and .txt files, as a stream of bounded memory.

`find_inputs` says which files are meant. `read_blocks` cuts a file into blocks of about a megabyte
(cheap, done by one process), and a block becomes rows (`parse_rows`: UTF-8, JSON, Python's values;
done by whoever encodes them).
"""

from tessel.data.readers.block import BLOCK_BYTES, SUFFIXES, TEXT_KEY, Block, Format, format_of
from tessel.data.readers.find import check_inputs, columns_of, find_inputs
from tessel.data.readers.read import Document, parse_block, parse_rows, read_blocks
from tessel.data.readers.spans import LineCounter, Span, has_spans, read_spans

__all__ = [
    "BLOCK_BYTES",
    "SUFFIXES",
    "TEXT_KEY",
    "Block",
    "Document",
    "Format",
    "LineCounter",
    "Span",
    "check_inputs",
    "columns_of",
    "find_inputs",
    "format_of",
    "has_spans",
    "parse_block",
    "parse_rows",
    "read_blocks",
    "read_spans",
]

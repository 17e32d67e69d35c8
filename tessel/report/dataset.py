"""What a .bin/.idx dataset holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tessel.config.run import Tokenizer as TokenizerSection
from tessel.data.indexed import IndexedDataset
from tessel.data.metadata import read_metadata
from tessel.data.tokenizer import NULL, Tokenizer, has_tokenizer, load_tokenizer
from tessel.report.facts import Report, bytes_text, clip, count_text
from tessel.runtime.log import warn_once

_SHOWN_TOKENS = 256
_SHOWN_CHARACTERS = 800
_SHOWN_IDS = 24


def dataset_report(path: str, section: TokenizerSection) -> Report:
    """The report on the dataset that `path` names: its prefix, its .bin or its .idx.

    The first document is decoded with the tokenizer that `section` names, or the one that made the
    data where that is still where it was.

    Raises:
        TesselError: the files are missing or damaged, or the named tokenizer is.
    """
    # Either file may be named here; elsewhere that earns a warning.
    stem, suffix = os.path.splitext(path)
    indexed = IndexedDataset(stem if suffix in (".bin", ".idx") and Path(f"{stem}.idx").exists() else path)
    metadata = read_metadata(indexed.prefix)
    lengths = _lengths(indexed)
    num_bytes = Path(indexed.bin_path).stat().st_size + Path(indexed.index_path).stat().st_size
    tokenizer = _tokenizer(section, metadata)
    first = _first_document(indexed, tokenizer)
    data: dict[str, Any] = {
        "kind": "dataset",
        "path": indexed.prefix,
        "dtype": indexed.dtype.name,
        "sequences": len(indexed),
        "documents": indexed.num_documents,
        "empty_documents": _num_empty(indexed),
        "tokens": indexed.total_tokens,
        "lengths": lengths,
        "multimodal": indexed.modes is not None,
        "bytes": num_bytes,
        "metadata": metadata,
        "first_document": first,
    }
    facts = [
        ("tokens", f"{count_text(indexed.total_tokens)}, {indexed.dtype.name}, {bytes_text(num_bytes)} on disk"),
        ("documents", f"{indexed.num_documents:,}, {data['empty_documents']:,} of them empty"),
        ("sequences", f"{len(indexed):,}" + (", with modes (multimodal)" if indexed.modes is not None else "")),
    ]
    if lengths is not None:
        text = f"{lengths['min']:,} to {lengths['max']:,} tokens, mean {lengths['mean']:,.1f}"
        facts.append(("length", f"{text}, median {lengths['median']:,.0f}"))
    if metadata is not None:
        facts.extend(_metadata_facts(metadata))
    return Report(f"{indexed.prefix}: a dataset of Megatron's format", facts, data, _first_lines(first))


def _lengths(indexed: IndexedDataset) -> dict[str, float] | None:
    lengths = indexed.lengths
    if not len(lengths):
        return None
    return {
        "min": int(lengths.min()),
        "mean": indexed.total_tokens / len(lengths),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
    }


def _num_empty(indexed: IndexedDataset) -> int:
    """Documents without sequences; sequences of no tokens are counted among the lengths."""
    return int(np.count_nonzero(np.diff(indexed.document_indices) == 0))


def _tokenizer(section: TokenizerSection, metadata: dict[str, Any] | None) -> Tokenizer | None:
    made_by = (metadata or {}).get("tokenizer") or {}
    if section.tokenizer_type == NULL or (not section.tokenizer_name_or_path and not section.tokenizer_model):
        source = made_by.get("source")
        if not source or not has_tokenizer(source):
            return None
        section = TokenizerSection(tokenizer_name_or_path=source)
    tokenizer = load_tokenizer(section)
    if made_by and tokenizer.identity != made_by.get("identity"):
        warn_once(f"{tokenizer.source} is not the tokenizer that made the data, or it has changed since")
    return tokenizer


def _first_document(indexed: IndexedDataset, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """The first document that holds tokens: its number, how many, the first ids and, if possible, the text."""
    filled = np.flatnonzero(indexed.lengths)
    if not len(filled):
        return None
    sequence = int(filled[0])
    document = int(np.searchsorted(indexed.document_indices, sequence, side="right")) - 1
    first, end = indexed.document_indices[document : document + 2].tolist()
    ids: list[int] = []
    for number in range(first, end):
        if len(ids) < _SHOWN_TOKENS:
            ids.extend(indexed.get(number).tolist()[: _SHOWN_TOKENS - len(ids)])
    return {
        "document": document,
        "tokens": int(indexed.lengths[first:end].sum(dtype=np.int64)),
        "ids": ids,
        "text": tokenizer.decode([int(i) for i in ids]) if tokenizer is not None else None,
    }


def _metadata_facts(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    made_by = metadata.get("tokenizer") or {}
    end = f", end of document {made_by.get('eod')} appended" if metadata.get("append_eod") else ""
    inputs = metadata.get("inputs") or []
    return [
        ("made from", clip(", ".join(str(name) for name in inputs), 200)),
        ("tokenizer", f"{made_by.get('source') or made_by.get('identity')}{end}"),
    ]


def _first_lines(first: dict[str, Any] | None) -> list[str]:
    if first is None:
        return ["  no tokens"]
    head = f"  first document ({first['tokens']:,} tokens)"
    if first["text"] is None:
        ids = clip(" ".join(str(i) for i in first["ids"][:_SHOWN_IDS]), 200)
        return [f"{head}, as ids: {ids}", "  --tokenizer-name-or-path shows it as text"]
    return [f"{head}:", *(f"    {line}" for line in clip(first["text"], _SHOWN_CHARACTERS).splitlines())]

"""What a .bin/.idx dataset holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.indexed import IndexedDataset
from tessel.data.metadata import read_metadata
from tessel.data.tokenizer import NULL, HuggingFaceTokenizer, Tokenizer, has_tokenizer, load_tokenizer
from tessel.report.contents import Contents, scan
from tessel.report.facts import Report, bytes_text, clip, count_text
from tessel.report.histogram import draw_lengths
from tessel.runtime.log import warn_once

_SHOWN_TOKENS = 256
_SHOWN_CHARACTERS = 800
_SHOWN_IDS = 24


class Look(NamedTuple):
    """What of a dataset is shown: so many documents, the first and random ones by `seed`; a picture of lengths."""

    num_documents: int = 1
    seed: int = 1234
    plot: str | None = None


_FIRST = Look()


def dataset_report(path: str, section: TokenizerSection, look: Look = _FIRST) -> Report:
    """The report on the dataset that `path` names: its prefix, its .bin or its .idx.

    Documents are decoded with the tokenizer that `section` names, or the one that made the data
    where that is still where it was.

    Raises:
        TesselError: the files are missing or damaged, or the named tokenizer is.
    """
    # Either file may be named here; elsewhere that earns a warning.
    stem, suffix = os.path.splitext(path)
    indexed = IndexedDataset(stem if suffix in (".bin", ".idx") and Path(f"{stem}.idx").exists() else path)
    metadata = read_metadata(indexed.prefix)
    lengths = lengths_of(indexed)
    num_bytes = Path(indexed.bin_path).stat().st_size + Path(indexed.index_path).stat().st_size
    tokenizer = tokenizer_of(section, metadata)
    shown = [_shown(indexed, number, tokenizer) for number in _chosen(indexed, look)]
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
        "first_document": shown[0] if shown else None,
        "shown_documents": shown,
    }
    facts = [
        ("tokens", f"{count_text(indexed.total_tokens)}, {indexed.dtype.name}, {bytes_text(num_bytes)} on disk"),
        ("documents", f"{indexed.num_documents:,}, {data['empty_documents']:,} of them empty"),
        ("sequences", f"{len(indexed):,}" + (", with modes (multimodal)" if indexed.modes is not None else "")),
    ]
    if lengths is not None:
        facts.append(("length", length_fact(lengths)))
    if indexed.dtype.kind != "f" and indexed.total_tokens:
        found = scan(indexed, _special_ids(tokenizer, metadata))
        data["contents"] = asdict(found)
        facts.extend(_content_facts(found, indexed, tokenizer))
    if metadata is not None:
        facts.extend(_metadata_facts(metadata))
    if look.plot is not None:
        draw_lengths(_document_lengths(indexed), f"{Path(indexed.prefix).name}: lengths of documents", look.plot)
        facts.append(("picture", look.plot))
    tail = [line for number, document in enumerate(shown) for line in _document_lines(document, number == 0)]
    return Report(f"{indexed.prefix}: a dataset of Megatron's format", facts, data, tail or ["  no tokens"])


def lengths_of(indexed: IndexedDataset) -> dict[str, float] | None:
    """Shortest, longest, mean and some quantiles of a dataset's sequences; None where there are none."""
    lengths = indexed.lengths
    if not len(lengths):
        return None
    quantiles = np.quantile(lengths, [0.01, 0.1, 0.5, 0.9, 0.99]).tolist()
    return {
        "min": int(lengths.min()),
        "mean": indexed.total_tokens / len(lengths),
        "median": quantiles[2],
        "max": int(lengths.max()),
        **dict(zip(("p1", "p10", "p50", "p90", "p99"), quantiles, strict=True)),
    }


def length_fact(lengths: Mapping[str, float]) -> str:
    """One line about lengths."""
    return (
        f"{lengths['min']:,} to {lengths['max']:,} tokens, mean {lengths['mean']:,.1f}, "
        f"median {lengths['median']:,.0f}; 80 % have {lengths['p10']:,.0f} to {lengths['p90']:,.0f}"
    )


def _document_lengths(indexed: IndexedDataset) -> np.ndarray:
    """i64[documents]: their tokens."""
    before = np.concatenate(([0], np.cumsum(indexed.lengths, dtype=np.int64)))
    return np.diff(before[indexed.document_indices])


def _special_ids(tokenizer: Tokenizer | None, metadata: dict[str, Any] | None) -> list[int]:
    """The tokenizer's special tokens; without one, what ended the documents, if it was noted."""
    if tokenizer is None:
        eod = ((metadata or {}).get("tokenizer") or {}).get("eod")
        return [eod] if isinstance(eod, int) else []
    ids = {token for token in (tokenizer.eod, tokenizer.pad) if token is not None and token >= 0}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids |= {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
        ids |= set(tokenizer.hf.all_special_ids)
    return sorted(ids)


def _content_facts(found: Contents, indexed: IndexedDataset, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    part = ""
    if found.num_documents < indexed.num_documents:
        part = f" of the first {found.num_documents:,} documents"
    facts = []
    if found.special:
        total = sum(found.special.values())
        most = sorted(((count, token) for token, count in found.special.items() if count), reverse=True)[:4]
        named = ", ".join(
            f"{tokenizer.decode([token]) if tokenizer is not None else token} {count:,}" for count, token in most
        )
        facts.append(
            ("special", f"{total / max(found.num_tokens, 1):.3%} of the tokens{part}" + (named and f": {named}"))
        )
    share = found.num_duplicates / max(found.num_documents, 1)
    facts.append(
        ("duplicates", f"{found.num_duplicates:,} documents ({share:.1%}){part} repeat an earlier one exactly")
    )
    return facts


def _num_empty(indexed: IndexedDataset) -> int:
    """Documents without sequences; sequences of no tokens are counted among the lengths."""
    return int(np.count_nonzero(np.diff(indexed.document_indices) == 0))


def tokenizer_of(section: TokenizerSection, metadata: dict[str, Any] | None) -> Tokenizer | None:
    """The tokenizer that is named, or the one that made the data, if it can be found."""
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


def _chosen(indexed: IndexedDataset, look: Look) -> list[int]:
    """The first document that holds tokens, and others at random, in their order."""
    filled = np.flatnonzero(_document_lengths(indexed))
    if not len(filled) or look.num_documents < 1:
        return []
    others = np.random.default_rng(look.seed).permutation(filled[1:])[: look.num_documents - 1]
    return [int(filled[0]), *sorted(others.tolist())]


def _shown(indexed: IndexedDataset, document: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A document: its number, its tokens, the first ids and, if possible, the text."""
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


def _document_lines(shown: dict[str, Any], is_first: bool) -> list[str]:
    name = "first document" if is_first else f"document {shown['document']:,}"
    head = f"  {name} ({shown['tokens']:,} tokens)"
    if shown["text"] is None:
        ids = clip(" ".join(str(i) for i in shown["ids"][:_SHOWN_IDS]), 200)
        hint = ["  --tokenizer-name-or-path shows it as text"] if is_first else []
        return [f"{head}, as ids: {ids}", *hint]
    return [f"{head}:", *(f"    {line}" for line in clip(shown["text"], _SHOWN_CHARACTERS).splitlines())]

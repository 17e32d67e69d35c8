"""What a folder of instructions holds: PREFIX_packed_input_ids_document and its companions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.indexed import IndexedDataset
from tessel.data.metadata import read_metadata
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError
from tessel.report.dataset import length_fact, lengths_of, tokenizer_of
from tessel.report.facts import Report, clip, count_text

IGNORED = -100
# Ids, their labels, and the mask of those that have one.
_DIALOGUES = (("input_ids", "labels", "attention_mask"),)
_PAIRS = (("chosen_input_ids", "chosen_labels", None), ("rejected_input_ids", "rejected_labels", None))
_SHOWN_TOKENS = 512
_SHOWN_CHARACTERS = 1200


def is_instructions(prefix: str) -> bool:
    """Whether `prefix` is the bare prefix of a dataset of instructions or of pairs of answers."""
    return any(Path(f"{_path(prefix, fields[0][0])}.idx").exists() for fields in (_DIALOGUES, _PAIRS))


def instructions_report(prefix: str, section: TokenizerSection) -> Report:
    """The report on the instructions that `prefix` names.

    Raises:
        TesselError: a file is missing or damaged, or they do not belong together.
    """
    is_pairs = not Path(f"{_path(prefix, 'input_ids')}.idx").exists()
    fields = _PAIRS if is_pairs else _DIALOGUES
    facts: list[tuple[str, str]] = []
    data: dict[str, Any] = {"kind": "pairs" if is_pairs else "instructions", "path": prefix}
    tail: list[str] = []
    for ids_key, labels_key, mask_key in fields:
        ids, labels = IndexedDataset(_path(prefix, ids_key)), IndexedDataset(_path(prefix, labels_key))
        if not np.array_equal(ids.lengths, labels.lengths):
            raise TesselError(
                f"{ids.prefix} and {labels.prefix} are not of the same lengths: they were not made together. "
                "Preprocess the data anew."
            )
        name = ids_key.removesuffix("input_ids").strip("_")
        some = _facts(ids, labels)
        if mask_key is not None and Path(f"{_path(prefix, mask_key)}.idx").exists():
            some |= _packs(IndexedDataset(_path(prefix, mask_key)))
        data |= {f"{name}_{key}" if name else key: value for key, value in some.items()}
        facts += [(f"{name} {label}".strip(), text) for label, text in _texts(some)]
        tokenizer = tokenizer_of(section, read_metadata(ids.prefix))
        tail += _first(ids, labels, tokenizer, name)
    what = "pairs of answers" if is_pairs else "instructions"
    return Report(f"{prefix}: {what}, tokenized", facts, data, tail)


def _path(prefix: str, key: str) -> str:
    return f"{prefix}_packed_{key}_document"


def _facts(ids: IndexedDataset, labels: IndexedDataset) -> dict[str, Any]:
    trained = np.zeros(len(ids), np.int64)
    for number in range(len(ids)):
        trained[number] = np.count_nonzero(labels.get(number) != IGNORED)
    return {
        "samples": len(ids),
        "tokens": ids.total_tokens,
        "lengths": lengths_of(ids),
        "trained_tokens": int(trained.sum()),
        "untrained_samples": int(np.count_nonzero(trained == 0)),
    }


def _packs(mask: IndexedDataset) -> dict[str, Any]:
    """How many dialogues a pack holds, where the mask numbers them (--neat-pack)."""
    counts = [int(mask.get(number).max(initial=0)) for number in range(len(mask))]
    if max(counts, default=0) < 2:
        return {}
    num_filled = sum(int(np.count_nonzero(mask.get(number))) for number in range(len(mask)))
    return {"packed_samples": sum(counts), "filled_tokens": num_filled}


def _texts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    share = facts["trained_tokens"] / max(facts["tokens"], 1)
    texts = [
        ("samples", f"{facts['samples']:,}"),
        ("tokens", count_text(facts["tokens"])),
        ("trained", f"{share:.1%} of the tokens ({count_text(facts['trained_tokens'])})"),
    ]
    if facts["lengths"] is not None:
        texts.append(("length", length_fact(facts["lengths"])))
    if facts["untrained_samples"]:
        texts.append(("no use", f"{facts['untrained_samples']:,} samples have no trained token"))
    if "packed_samples" in facts:
        per_pack = facts["packed_samples"] / max(facts["samples"], 1)
        filled = facts["filled_tokens"] / max(facts["tokens"], 1)
        texts.append(("packs", f"{per_pack:.1f} dialogues in each, {filled:.2%} of the tokens are theirs"))
    return texts


def _first(ids: IndexedDataset, labels: IndexedDataset, tokenizer: Tokenizer | None, name: str) -> list[str]:
    if not len(ids):
        return ["  no samples"]
    some, targets = ids.get(0)[:_SHOWN_TOKENS], labels.get(0)[:_SHOWN_TOKENS]
    if tokenizer is None:
        return ["  --tokenizer-name-or-path shows the first one as text"]
    whole = tokenizer.decode([token for token in some.tolist() if token >= 0])
    trained = tokenizer.decode([token for token in targets.tolist() if token >= 0])
    lines = [f"  first {name or 'sample'}:".replace("  first  ", "  first ")]
    lines += [f"    {line}" for line in clip(whole, _SHOWN_CHARACTERS).splitlines()]
    lines.append("  of which trained:")
    return lines + [f"    {line}" for line in clip(trained, _SHOWN_CHARACTERS).splitlines()]

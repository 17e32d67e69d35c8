"""What a blend of datasets draws from each: `tessel inspect W1 P1 W2 P2 ... --stats`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessel.data.blend import normalize, parse_blend, share_sizes
from tessel.data.indexed import IndexedDataset, strip_suffix
from tessel.errors import UsageError
from tessel.report.facts import Report, count_text

DEFAULT_SEQ_LENGTH = 4096


def blend_report(words: Sequence[str], num_samples: int | None, seq_length: int | None) -> Report:
    """Weights, tokens, epochs and repeats of the datasets of a blend, written as in --data-path.

    `num_samples` of `seq_length` tokens are drawn; if not given, as many as hold each token once on the whole.

    Raises:
        UsageError: the words are no blend, or a number is not positive.
        TesselError: a dataset is missing, damaged or empty.
    """
    for flag, number in (("--num-samples", num_samples), ("--seq-length", seq_length)):
        if number is not None and number < 1:
            raise UsageError(f"{flag} is {number}: it must be at least 1. Raise it, or leave it out.")
    blend = parse_blend(words, "tessel inspect")
    parts = [IndexedDataset(strip_suffix(path)) for path in blend.paths]
    tokens = [part.total_tokens for part in parts]
    for part in parts:
        if not part.total_tokens:
            raise UsageError(f"{part.prefix} holds no tokens, so it cannot be blended. Leave it out.")
    length = seq_length or DEFAULT_SEQ_LENGTH
    size = num_samples or max(1, sum(tokens) // length)
    weights = normalize(blend.weights if blend.weights is not None else tokens)
    taken = share_sizes(weights, size)
    rows: list[dict[str, Any]] = [
        {
            "path": part.prefix,
            "weight": weight,
            "sequences": len(part),
            "tokens": part.total_tokens,
            "samples": samples,
            "epochs": samples * length / part.total_tokens,
            "repeated_tokens": max(0, samples * length - part.total_tokens),
        }
        for part, weight, samples in zip(parts, weights, taken, strict=True)
    ]
    drawn, repeated = sum(taken) * length, sum(row["repeated_tokens"] for row in rows)
    data = {
        "kind": "blend",
        "seq_length": length,
        "samples": sum(taken),
        "tokens": sum(tokens),
        "drawn_tokens": drawn,
        "repeated_tokens": repeated,
        "datasets": rows,
    }
    facts = [
        ("datasets", f"{len(parts)}, {count_text(sum(tokens))} tokens"),
        ("drawn", f"{sum(taken):,} samples of {length:,} tokens, {count_text(drawn)} in all"),
        ("repeated", f"{repeated / drawn:.1%} of what is drawn was drawn before"),
    ]
    return Report("a blend", facts, data, _table(rows))


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each dataset, in columns."""
    head = ("weight", "epochs", "samples", "tokens", "repeated", "dataset")
    lines = [
        (
            f"{row['weight']:.4f}",
            f"{row['epochs']:.2f}",
            f"{row['samples']:,}",
            f"{row['tokens']:,}",
            f"{row['repeated_tokens']:,}",
            row["path"],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    return [
        "  " + "  ".join(text.ljust(width) if i == len(head) - 1 else text.rjust(width) for i, (text, width) in
                         enumerate(zip(line, widths, strict=True))).rstrip()
        for line in [head, *lines]
    ]  # fmt: skip

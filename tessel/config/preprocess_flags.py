"""Flags of the suites' preprocessing tools that have no field in `config.preprocess`, and why."""

from __future__ import annotations

from tessel.config.megatron import ACCEPTED, INSTEAD, LATER, LATER_FAMILIES, SAME_FILES, Accepted, ForeignFlags

_STREAMED = "input is always streamed, and nothing is cached"
_MODEL_ROWS = "stored ids do not depend on the rows of the model"

_OWN_ACCEPTED = {
    "--ai-framework": Accepted(1, SAME_FILES),
    "--streaming": Accepted(0, _STREAMED),
    "--cache-dir": Accepted(1, _STREAMED),
    "--overwrite-cache": Accepted(0, _STREAMED),
    "--dataset-impl": Accepted(1, "there is one format", only=("mmap",)),
    "--make-vocab-size-divisible-by": Accepted(1, _MODEL_ROWS),
    "--pad-vocab-size-to": Accepted(1, _MODEL_ROWS),
    "--no-pad-vocab-size": Accepted(0, _MODEL_ROWS),
    "--debug": Accepted(0, "errors name file and line"),
    "--use-gigatoken": Accepted(0, "the fast tokenizer that is proved equal is taken"),
}
_OWN_INSTEAD = {
    "--find-optimal-num-workers": "throughput grows with --workers up to the number of cores",
    "--workers-to-check": "throughput grows with --workers up to the number of cores",
    "--max-documents": "throughput grows with --workers up to the number of cores",
    "--performance-dir": "throughput grows with --workers up to the number of cores",
    "--chat-template": "a tokenizer's own template is read from its folder (--prompt-type hf)",
    "--model-name-or-path": "use --tokenizer-name-or-path",
    "--script-data-dir": "scripts of data sets are never run; give their files with --input",
    "--datasets": "name the files with --input",
    "--no-shuffle": "documents keep their order without --shuffle",
}
_OWN_LATER = {
    "--hf-datasets-params": "arguments of datasets.load_dataset",
    **dict.fromkeys(("--data-obfuscation", "--obf-seed-content"), "obfuscation of data"),
    "--reward-tokens": "reward models",
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces": "this setting of a tokenizer",
}
_FIELDS = frozenset(
    {
        "--handler-name", "--partitions", "--keep-sequential-samples", "--pack", "--neat-pack", "--prompt-type",
        "--enable-thinking", "--pad-to-multiple-of", "--train-on-prompt", "--mask-history", "--map-keys", "--n-subs",
        "--merge-group-keys", "--split-sentences", "--keep-newlines", "--lang", "--input", "--output-prefix",
        "--workers", "--append-eod", "--extra-vocab-size", "--patch-tokenizer-type", "--mix-strategy",
    }
)  # fmt: skip
"""Fields of `PreprocessConfig` that other verbs do without."""
_OWN = _FIELDS | set(_OWN_ACCEPTED) | set(_OWN_INSTEAD) | set(_OWN_LATER)

PREPROCESSING = ForeignFlags(
    {**{flag: row for flag, row in ACCEPTED.items() if flag not in _OWN}, **_OWN_ACCEPTED},
    {**{flag: remedy for flag, remedy in INSTEAD.items() if flag not in _OWN}, **_OWN_INSTEAD},
    {**{flag: what for flag, what in LATER.items() if flag not in _OWN}, **_OWN_LATER},
    LATER_FAMILIES,
)
"""For `tessel preprocess`."""

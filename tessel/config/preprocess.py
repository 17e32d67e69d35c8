"""What `tessel preprocess`, `tessel merge-datasets` and `tessel split` are asked to do.

Every flag of Megatron-LM's, MindSpeed-LLM's and Pai-Megatron-Patch's preprocessing tools is a field
here, or stands in `config.preprocess_flags` with the reason why it has no effect or is refused. A
docstring's first sentence is the heading of the fields in `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tessel.config.field import REQUIRED, option
from tessel.config.tokenizer import Tokenizer

TOOLS = ("megatron", "mindspeed", "pai", "pai-sft")
"""Tools whose bytes can be asked for: Megatron-LM's preprocess_data.py, MindSpeed-LLM's, Pai's two."""
PATCH_TOKENIZERS = (
    "Qwen3Tokenizer",
    "Qwen2Tokenizer",
    "LLamaTokenizer",
    "DeepSeekV2Tokenizer",
    "LLama3Tokenizer",
    "LLama2Tokenizer",
    "GPT2BPETokenizer",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is read."""

    input: tuple[str, ...] = option(
        REQUIRED,
        "files, folders or globs of .jsonl (also .gz, .zst), .json, .parquet, .csv, .arrow or .txt; with --dataset-dir "
        "names of data sets",
        nargs="+",
        metavar="FILE",
    )
    json_keys: tuple[str, ...] = option(
        ("text",), "keys or columns that hold text; a dataset each", nargs="+", metavar="KEY"
    )
    dataset_additional_keys: tuple[str, ...] = option(
        (), "further columns to keep beside an instruction, a dataset each", nargs="+", metavar="KEY"
    )
    split_sentences: bool = option(False, "cut documents into sentences (needs nltk)")
    keep_newlines: bool = option(False, "with --split-sentences: keep newlines between sentences")
    lang: str = option("english", "language of --split-sentences")
    on_error: str = option(
        "stop", "a row that cannot be read or encoded: stop, or skip and count", choices=("stop", "skip")
    )
    shard: str | None = option(None, "only part I of N (I from 1) of the input, for many machines", metavar="I/N")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is written."""

    output_prefix: str = option(
        "", "where to write: PREFIX_KEY_document.bin and .idx; needed but for --preview", metavar="PREFIX"
    )
    compatible: str | None = option(None, "write the bytes of that tool where they differ", choices=TOOLS)
    append_eod: bool = option(False, "end each document with the end-of-document token")
    seq_length: int | None = option(None, "most tokens of an instruction sample, or the size of a pack")
    pad_to_multiple_of: int = option(1, "with --compatible mindspeed: pad documents with the id after the vocabulary")
    shuffle: bool = option(False, "write documents in an order drawn from --seed")
    seed: int = option(1234, "seed of --shuffle and of --interleave-probs")
    merge_group_keys: tuple[str, ...] = option(
        (), "no text: merge the datasets in the folder --input whose names hold a key", nargs="+", metavar="KEY"
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """How it is done. None of these changes the bytes, but for --partitions and --n-subs as their tools have it."""

    workers: int = option(1, "processes that tokenize")
    partitions: int = option(1, "with --compatible megatron or pai: parts that documents are dealt to in turn")
    keep_sequential_samples: bool = option(False, "with --partitions: keep the order of the input")
    n_subs: int = option(1, "with --compatible mindspeed: blocks that are packed each for itself")
    log_interval: int | None = option(None, "documents between lines of progress; a line every 10 s if not given")


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Instructions and dialogues."""

    handler_name: str | None = option(None, "how rows are read: a handler of MindSpeed-LLM, or FILE.py:Class")
    prompt_type: str | None = option(None, "template of the dialogues; hf: the tokenizer's own")
    prompt_type_path: str | None = option(None, "YAML of a template, or a templates.json", metavar="FILE")
    enable_thinking: str = option(
        "none", "thoughts in the answers of reasoning templates", choices=("true", "false", "none")
    )
    reasoning_effort: str | None = option(None, "effort that a reasoning template names", choices=("max", "high"))
    drop_thinking: str | None = option(
        None, "leave thoughts out of all answers but the last of a dialogue", choices=("true", "false")
    )
    dataset_dir: str | None = option(
        None, "folder of a LLaMA-Factory dataset_info.json, whose data sets --input names", metavar="DIR"
    )
    mix_strategy: str = option(
        "concat",
        "of several data sets: one after another, or in turn until one is used up (under) or all are (over)",
        choices=("concat", "interleave_under", "interleave_over"),
    )
    interleave_probs: str | None = option(
        None, "draw the data set of each sample with these probabilities, not in turn", metavar="P,P,..."
    )
    max_samples: int | None = option(None, "with --dataset-dir: only so many first rows of each data set")
    map_keys: str | None = option(
        None, "JSON: which columns hold prompt, query, response, history, ...", metavar="JSON"
    )
    pack: bool = option(False, "join samples up to --seq-length")
    neat_pack: bool = option(False, "with --pack: number the samples of a pack, so that they do not see each other")
    sequence_packing: bool = option(False, "with --compatible pai-sft: join samples in the order of the file")
    train_on_prompt: bool = option(False, "train on the prompts, too")
    mask_history: bool = option(False, "train on the last answer of a dialogue alone")
    preview: int | None = option(None, "write nothing: show so many samples, the trained tokens marked")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Vocabulary."""

    load: str | None = option(None, "Hugging Face folder whose tokenizer is used (Pai-Megatron-Patch)", metavar="DIR")
    patch_tokenizer_type: str | None = option(None, "kind of tokenizer in Pai-Megatron-Patch", choices=PATCH_TOKENIZERS)
    vocab_size: int | None = option(None, "vocabulary of a NullTokenizer: the end-of-document id")
    extra_vocab_size: int = option(0, "ids after the tokenizer's that Pai-Megatron-Patch counts in")
    padded_vocab_size: int | None = option(None, "rows of the model's embedding; stored ids do not depend on it")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(Vocabulary, Instructions, Work, Target, Source):
    """Preprocessing."""

    tokenizer: Tokenizer = field(default_factory=Tokenizer)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Datasets to merge."""

    input: tuple[str, ...] = option(
        REQUIRED, "folder whose datasets are merged in the order of their names, or prefixes", nargs="+", metavar="DIR"
    )
    output_prefix: str = option(REQUIRED, "where to write: PREFIX.bin and .idx", metavar="PREFIX")
    merge_group_keys: tuple[str, ...] = option(
        (), "merge those whose names hold a key into PREFIX_KEY, for each key", nargs="+", metavar="KEY"
    )
    multimodal: bool = option(False, "the datasets hold a mode for each sequence (found by itself; refused if not so)")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Dataset to split."""

    prefix: str = option(REQUIRED, "prefix of a .bin/.idx, or the bare prefix of instructions", positional=True)
    split: str = option(
        REQUIRED, "shares of train, valid and test (or of more parts), such as 90,5,5", metavar="N,N,..."
    )
    seed: int | None = option(None, "draw the documents of each part with this seed; in their order if not given")
    output_prefix: str | None = option(
        None, "PREFIX of PREFIX_train and so on; that of the dataset if not given", metavar="PREFIX"
    )

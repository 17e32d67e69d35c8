"""The tokenizer's section of the configuration: a frozen dataclass, as in `run.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option

TOKENIZER_TYPES = (
    "PretrainedFromHF",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "NullTokenizer",
)


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer. The one in --load unless another is named."""

    tokenizer_type: str | None = option(None, "kind of tokenizer", choices=TOKENIZER_TYPES)
    tokenizer_name_or_path: str | None = option(None, "Hugging Face tokenizer folder", metavar="PATH")
    tokenizer_model: str | None = option(
        None,
        "Hugging Face tokenizer folder, or its tokenizer.json; or the file of a SentencePiece or TikTokenizer",
        metavar="PATH",
    )
    vocab_file: str | None = option(None, "vocab.json of a GPT2BPETokenizer", metavar="FILE")
    merge_file: str | None = option(None, "merges.txt of a GPT2BPETokenizer", metavar="FILE")
    tiktoken_pattern: str = option("v2", "how a TikTokenizer splits text", choices=("v1", "v2"))
    tiktoken_num_special_tokens: int = option(1000, "ids that a TikTokenizer keeps for special tokens, the first ones")
    tokenizer_special_tokens: tuple[str, ...] = option(
        (),
        "special tokens of a TikTokenizer, in the order of their ids",
        nargs="+",
        metavar="TOKEN",
        aliases=("--tiktoken-special-tokens", "--special-tokens"),
    )
    tokenizer_not_use_fast: bool = option(False, "use the slow tokenizer", aliases=("--tokenizer-hf-no-use-fast",))
    tokenizer_hf_no_include_special_tokens: bool = option(
        False, "leave out the special tokens that the tokenizer adds to every text by itself"
    )
    legacy_tokenizer: bool = option(
        False,
        "ids of megatron-core 0.12: Llama2Tokenizer begins texts with a token; special tokens spelled out are plain text to TikTokenizer and GPT2BPETokenizer",
    )
    eod_id: int | None = option(
        None, "end-of-document id, instead of the tokenizer's", aliases=("--null-tokenizer-eod-id",)
    )
    pad_id: int | None = option(
        None, "padding id, instead of the tokenizer's; -1 for none", aliases=("--null-tokenizer-pad-id",)
    )
    allow_ambiguous_pad_tokens: bool = option(False, "keep a pad id that is also another special id")

"""Tokenizers: text to ids and back, with the two ids that training needs to know."""

from tessel.data.tokenizer.apart import load_fast
from tessel.data.tokenizer.base import NO_PAD, BatchEncoder, Tokenizer
from tessel.data.tokenizer.hugging_face import VOCABULARY_FILES, HuggingFaceTokenizer, has_tokenizer
from tessel.data.tokenizer.load import check_fits, load_tokenizer
from tessel.data.tokenizer.null import NULL, NullTokenizer

__all__ = [
    "NO_PAD",
    "NULL",
    "VOCABULARY_FILES",
    "BatchEncoder",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "Tokenizer",
    "check_fits",
    "has_tokenizer",
    "load_fast",
    "load_tokenizer",
]

"""SentencePiece, TikTokenizer and GPT-2 files: ids of the libraries that define them, by Megatron's rules."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.cli import main
from tessel.config.tokenizer import Tokenizer as Section
from tessel.data.indexed import IndexedDataset
from tessel.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tessel.errors import TesselError, UsageError

TEXTS = [
    "",
    " ",
    "the quick brown fox",
    "two  spaces\n\ttabs ",
    "\u4f60\u597d e\u0301 \U0001f600",
    "</s> <s>a<unk>",
    "123 45",
]
WORDS = ["the quick brown fox jumps over the lazy dog", "a quick word and another one", "numbers 12 34 567"] * 20


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece BPE model with byte fallback, as Llama 2's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def reference(path: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece(piece_model: Path, kind: str) -> None:
    tokenizer = load_tokenizer(Section(tokenizer_type=kind, tokenizer_model=str(piece_model)))
    expected = reference(piece_model)
    encoder = pickle.loads(pickle.dumps(tokenizer.batch_encoder()))
    assert encoder(TEXTS) == [expected.encode(text) for text in TEXTS]
    assert tokenizer.vocab_size == expected.get_piece_size() == tokenizer.max_id + 1
    assert (tokenizer.eod, tokenizer.pad) == (expected.eos_id(), -1)
    assert tokenizer.decode([*tokenizer.encode("the fox"), 5_000_000]) == "the fox"
    assert tokenizer.speed_up(TEXTS) is None
    folder = load_tokenizer(Section(tokenizer_type=kind, tokenizer_name_or_path=str(piece_model.parent)))
    assert folder.identity == tokenizer.identity


def test_llama2_of_megatron_core_0_12_begins_texts(piece_model: Path) -> None:
    section = Section(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(piece_model), legacy_tokenizer=True)
    tokenizer = load_tokenizer(section)
    expected = reference(piece_model)
    assert [tokenizer.encode(text) for text in TEXTS] == [[expected.bos_id(), *expected.encode(text)] for text in TEXTS]
    assert tokenizer.batch_encoder(add_special_tokens=False)(["the"]) == [expected.encode("the")]
    assert tokenizer.identity != load_tokenizer(Section(**{**section.__dict__, "legacy_tokenizer": False})).identity


def ranks_file(path: Path, tokens: list[bytes]) -> Path:
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for i, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return path


TOKENS = [*(bytes([i]) for i in range(256)), b"th", b"the", b" the", b"qu", b"aB"]


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    return ranks_file(tmp_path / "ranks.json", TOKENS)


def tik(ranks: Path, vocab_size: int | None = 281, **flags: Any) -> Tokenizer:
    flags = {"tiktoken_num_special_tokens": 20, **flags}
    return load_tokenizer(Section(tokenizer_type="TikTokenizer", tokenizer_model=str(ranks), **flags), None, vocab_size)


def test_tiktoken(ranks: Path) -> None:
    tokenizer = tik(ranks)
    assert (tokenizer.vocab_size, tokenizer.max_id, tokenizer.eod, tokenizer.pad) == (281, 280, 2, 4)
    assert tokenizer.encode("the the") == [277, 278]
    assert tokenizer.encode("a</s><SPECIAL_19>") == [20 + ord("a"), 2, 19]
    assert tokenizer.decode([277, 2, 278, 999]) == "the</s> the"
    assert tokenizer.decode([277, 2, 278], skip_special_tokens=True) == "the the"
    encoder = pickle.loads(pickle.dumps(tokenizer.batch_encoder()))
    assert encoder(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiktoken_of_megatron_core_0_12_reads_special_tokens_as_text(ranks: Path) -> None:
    tokenizer = tik(ranks, legacy_tokenizer=True)
    assert tokenizer.encode("</s>") == [20 + byte for byte in b"</s>"]
    assert (tokenizer.eod, tokenizer.pad) == (2, -1)


def test_tiktoken_patterns_differ(ranks: Path) -> None:
    # v2 ends a word before a capital letter.
    assert tik(ranks, tiktoken_pattern="v1").encode("aB") == [280]
    assert tik(ranks).encode("aB") == [20 + ord("a"), 20 + ord("B")]
    assert tik(ranks, tiktoken_pattern="v1").identity != tik(ranks).identity


@pytest.mark.parametrize(
    ("flags", "vocab_size", "message"),
    [
        ({}, None, "--vocab-size 281"),
        ({}, 300, "has 261 tokens.*--vocab-size 281"),
        ({"tokenizer_special_tokens": ("<s>",)}, 281, "lacks <unk> </s> <mask>"),
        ({"tokenizer_special_tokens": ("<s>", "<s>")}, 281, "names one twice"),
        ({"tiktoken_num_special_tokens": 3}, 281, "--tiktoken-num-special-tokens 3: at least the 7"),
        ({"tiktoken_num_special_tokens": 281}, 281, "fewer than --vocab-size 281"),
    ],
)
def test_tiktoken_settings_must_fit(ranks: Path, flags: dict[str, Any], vocab_size: int | None, message: str) -> None:
    with pytest.raises(TesselError, match=message):
        tik(ranks, vocab_size, **flags)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("{"), "is no vocabulary of a TikTokenizer"),
        (lambda path: path.write_text('{"model": {}}'), "is no vocabulary of a TikTokenizer"),
        (lambda path: path.write_text('[{"rank": 0, "token_bytes": "?"}]'), "is no vocabulary of a TikTokenizer"),
        (lambda path: ranks_file(path, TOKENS[1:]), "is damaged: ranks count from 0"),
        (lambda path: ranks_file(path, [*TOKENS[:-1], b"the"]), "is damaged: ranks count from 0"),
    ],
)
def test_damaged_ranks(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "vocab.json"
    write(path)
    with pytest.raises(TesselError, match=message):
        tik(path)


@pytest.fixture
def gpt2_files(tiny_tokenizer_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The two files of a byte-level BPE."""
    model = json.loads((tiny_tokenizer_folder / "tokenizer.json").read_text())["model"]
    vocab = {**model["vocab"]}
    vocab.setdefault("<|endoftext|>", max(vocab.values()) + 1)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


def gpt2(files: tuple[Path, Path], **flags: Any) -> Tokenizer:
    return load_tokenizer(
        Section(tokenizer_type="GPT2BPETokenizer", vocab_file=str(files[0]), merge_file=str(files[1]), **flags)
    )


def test_gpt2(gpt2_files: tuple[Path, Path]) -> None:
    from transformers import GPT2TokenizerFast

    tokenizer = gpt2(gpt2_files)
    vocab = json.loads(gpt2_files[0].read_text())
    expected = GPT2TokenizerFast(*map(str, gpt2_files))
    texts = [*TEXTS, "it's we'll <|endoftext|>x 2024"]
    assert tokenizer.batch_encoder()(texts) == [expected(text).input_ids for text in texts]
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (len(vocab), vocab["<|endoftext|>"], -1)
    assert "fastokens" in str(tokenizer.speed_up(texts))
    assert tokenizer.batch_encoder()(texts) == [expected(text).input_ids for text in texts]


def test_gpt2_of_megatron_core_0_12_reads_end_of_text_as_text(gpt2_files: tuple[Path, Path]) -> None:
    tokenizer = gpt2(gpt2_files, legacy_tokenizer=True)
    before = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod not in before
    assert tokenizer.decode(before) == "a<|endoftext|>b"
    tokenizer.speed_up([])
    assert tokenizer.encode("a<|endoftext|>b") == before
    assert tokenizer.identity != gpt2(gpt2_files).identity


def test_errors_name_the_remedy(gpt2_files: tuple[Path, Path], piece_model: Path, tmp_path: Path) -> None:
    def load(kind: str | None, **flags: Any) -> None:
        load_tokenizer(Section(tokenizer_type=kind, **flags))

    vocab, merges = map(str, gpt2_files)
    with pytest.raises(UsageError, match="needs --vocab-file vocab.json and --merge-file"):
        load("GPT2BPETokenizer", vocab_file=vocab)
    with pytest.raises(UsageError, match="reads no tokenizer folder"):
        load("GPT2BPETokenizer", vocab_file=vocab, merge_file=merges, tokenizer_model=vocab)
    with pytest.raises(UsageError, match="are those of --tokenizer-type GPT2BPETokenizer"):
        load(None, vocab_file=vocab, merge_file=merges)
    (tmp_path / "bad.txt").write_text("no such\nmerges here\n")
    with pytest.raises(TesselError, match="are no GPT-2 tokenizer: .* Give the vocab.json"):
        load("GPT2BPETokenizer", vocab_file=vocab, merge_file=str(tmp_path / "bad.txt"))
    with pytest.raises(TesselError, match="are no GPT-2 tokenizer"):
        load("GPT2BPETokenizer", vocab_file=merges, merge_file=merges)
    with pytest.raises(UsageError, match="Llama2Tokenizer needs --tokenizer-model FILE"):
        load("Llama2Tokenizer")
    with pytest.raises(TesselError, match="does not exist"):
        load("Llama2Tokenizer", tokenizer_model=str(tmp_path / "absent.model"))
    with pytest.raises(TesselError, match="is no SentencePiece model, or is damaged"):
        load("Llama2Tokenizer", tokenizer_model=vocab)
    with pytest.raises(TesselError, match="cannot be read: No such file"):
        load("Llama2Tokenizer", tokenizer_model=str(tmp_path))
    with pytest.raises(UsageError, match="use --tokenizer-type GPTSentencePieceTokenizer"):
        load("SentencePieceTokenizer", tokenizer_model=str(piece_model), legacy_tokenizer=True)


def test_half_characters_are_refused_by_all(
    tiny_tokenizer_folder: Path, piece_model: Path, ranks: Path, gpt2_files: tuple[Path, Path]
) -> None:
    tokenizers = [
        HuggingFaceTokenizer(tiny_tokenizer_folder),
        load_tokenizer(Section(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(piece_model))),
        tik(ranks),
        gpt2(gpt2_files),
    ]
    for tokenizer in tokenizers:
        for _ in range(2):
            with pytest.raises(TesselError, match=r"half of a surrogate pair \(.ud800 at character 1\)"):
                tokenizer.batch_encoder().encode_flat(["fine", "a\ud800b"])
            tokenizer.speed_up([])


def test_megatron_counts_the_end_of_document_in(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "1 2 3"}\n')
    common = f"--input {tmp_path}/in.jsonl --tokenizer-type NullTokenizer --vocab-size 100 --append-eod"
    for name, flags, eod in (("own", "", 100), ("megatron", "--compatible megatron", 99)):
        argv = f"preprocess {common} {flags} --output-prefix {tmp_path}/{name}".split()
        assert main(argv) == 0
        assert IndexedDataset(tmp_path / f"{name}_text_document").get(0).tolist() == [1, 2, 3, eod]

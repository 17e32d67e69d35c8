"""Text to ids by the rules of each tool, against loops that say the same one document at a time."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.data.encoding import BlockEncoder, Encoded, RowError, join
from tessel.data.finishing import DropLongRows, KeepAll, MindSpeedRows
from tessel.data.readers import Block
from tessel.data.rows import Row
from tessel.data.sentences import SentenceSplitter
from tessel.data.text_encoder import HANDLERS, TextEncoder, TextRules
from tessel.data.tokenizer.base import EachText
from tessel.errors import TesselError

EOD = 99
WORDS = ["a", "bb", "ccc", "\n", "x"]


def ids_of(text: str) -> list[int]:
    """The length of each word; a text may have characters and no ids."""
    if "refuse" in text:
        raise TesselError("this text is refused")
    return [len(word) for word in text.split()]


def encoder(keys: Sequence[str] = ("text",), eod: int | None = EOD, **options: Any) -> TextEncoder:
    return TextEncoder(EachText(ids_of), tuple(keys), eod, **options)


def random_rows(num_rows: int, keys: Sequence[str], seed: int = 3) -> list[Row]:
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(0, 9)))

    def value() -> Any:
        return [text() for _ in range(rng.integers(0, 4))] if rng.random() < 0.4 else text()

    return [Row(i + 1, {key: value() for key in keys}) for i in range(num_rows)]


def documents(encoded: Encoded) -> list[list[list[int]]]:
    """Sequences of each document."""
    tokens, lengths = encoded.tokens.tolist(), encoded.lengths.tolist()
    found = []
    for count in encoded.sequences_per_document.tolist():
        own = []
        for _ in range(count):
            length = lengths.pop(0)
            own.append(tokens[:length])
            del tokens[:length]
        found.append(own)
    assert not tokens and not lengths
    return found


def sentences_of(row: Row, key: str) -> list[str]:
    value = row.values[key]
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("eod", [None, EOD])
def test_megatrons_rules(eod: int | None) -> None:
    rows = random_rows(300, ["text", "other"])
    for key, encoded in zip(("text", "other"), encoder(["text", "other"], eod)(rows, "f"), strict=True):
        expected = []
        for row in rows:
            own = [ids for ids in map(ids_of, sentences_of(row, key)) if ids]
            if own and eod is not None:
                own[-1].append(eod)
            expected.append(own)
        assert documents(encoded) == expected
        assert [] in expected and any(len(own) > 1 for own in expected)
        assert encoded.tokens.dtype == encoded.lengths.dtype == encoded.sequences_per_document.dtype == np.int32


def test_pais_rules_leave_out_sequences_beyond_the_vocabulary() -> None:
    rows = random_rows(300, ["text"])
    (encoded,) = encoder(rules=TextRules(vocab_size=3))(rows, "f")
    expected = []
    for row in rows:
        own = [ids for ids in map(ids_of, sentences_of(row, "text")) if ids and max(ids) < 3]
        if own:
            own[-1].append(EOD)
        expected.append(own)
    assert documents(encoded) == expected
    assert 3 not in encoded.tokens


@pytest.mark.parametrize("eod", [None, EOD])
@pytest.mark.parametrize("multiple", [1, 4])
def test_mindspeeds_rules(eod: int | None, multiple: int) -> None:
    """By the text, not its ids; padding first and end of document behind it, together at least one more token."""
    rows = random_rows(300, ["text"])
    (encoded,) = encoder(eod=eod, rules=TextRules(by_text=True, pad_id=50, multiple=multiple))(rows, "f")
    expected = []
    for row in rows:
        own = [ids_of(text) for text in sentences_of(row, "text") if text]
        if own and multiple > 1:
            num_pads = (len(own[-1]) // multiple + 1) * multiple - len(own[-1]) - (eod is not None)
            own[-1] += [50] * num_pads
        if own and eod is not None:
            own[-1].append(eod)
        expected.append(own)
    assert documents(encoded) == expected
    assert any([] in own for own in expected) or eod is not None or multiple > 1


def mindspeed_writer(rows: Sequence[Row], keys: Sequence[str], limit: int | None) -> list[list[list[list[int]]]]:
    """What its writer keeps of encoded rows: by batches of 50, and for all keys by the places of long sequences."""
    kept: list[list[list[list[int]]]] = [[] for _ in keys]
    encoded = [documents(part) for part in encoder(keys, rules=TextRules(by_text=True))(rows, "f")]
    for start in range(0, len(rows), 50):
        batches = [[own for own in one[start : start + 50] if own] for one in encoded]
        long = {
            (j, k)
            for batch in batches
            for j, own in enumerate(batch)
            for k, sequence in enumerate(own)
            if limit is not None and len(sequence) >= limit
        }
        for one, batch in zip(kept, batches, strict=True):
            for j, own in enumerate(batch):
                one.append([sequence for k, sequence in enumerate(own) if (j, k) not in long])
    return kept


@pytest.mark.parametrize("keys", [("text",), ("text", "other")])
@pytest.mark.parametrize("limit", [None, 6])
def test_mindspeeds_writer(keys: tuple[str, ...], limit: int | None) -> None:
    rows = random_rows(333, keys)
    finisher = MindSpeedRows(limit)
    encode = encoder(keys, rules=TextRules(by_text=True))
    blocks = [rows[start : start + 27] for start in range(0, len(rows), 27)]
    parts = [part for block in blocks for part in finisher.add(encode(block, "f"))] + list(finisher.end())
    expected = mindspeed_writer(rows, keys, limit)
    assert [documents(one) for one in join(parts)] == expected
    assert (finisher.num_long > 0) == (limit is not None)
    if limit is not None:
        assert any([] in one for one in expected), "a document whose sequences all go keeps its entry"


def test_long_rows_go_whole() -> None:
    rows = random_rows(100, ["text", "other"])
    finisher = DropLongRows(7)
    encoded = encoder(["text", "other"])(rows, "f")
    (parts,) = finisher.add(encoded)
    one, other = documents(encoded[0]), documents(encoded[1])
    keeps = [all(len(sequence) <= 7 for sequence in [*one[i], *other[i]]) for i in range(100)]
    assert documents(parts[0]) == [own for own, keep in zip(one, keeps, strict=True) if keep]
    assert documents(parts[1]) == [own for own, keep in zip(other, keeps, strict=True) if keep]
    assert finisher.num_long == 100 - sum(keeps) > 0
    assert list(finisher.end()) == []
    assert list(KeepAll().add(encoded)) == [encoded]


def test_handlers() -> None:
    """AlpacaPretrainHandler writes the word None for an input that is not there."""
    values = {"instruction": "Add.", "input": "1 2", "output": "3"}
    text = HANDLERS["AlpacaPretrainHandler"](Row(1, values), "text")
    assert isinstance(text, str) and text.startswith("A chat between a curious user")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response: ASSISTANT: 3")
    without = HANDLERS["AlpacaPretrainHandler"](Row(1, values | {"input": ""}), "text")
    assert isinstance(without, str) and "\n\n###None\n\n### Response" in without
    turns = [{"from": "human", "value": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for key in ("text", "conversations"):
        assert HANDLERS["SharegptPretrainHandler"](Row(1, {"conversations": turns}), key) == "HiYes"
    asked = {"title": "t", "question_body": "q", "answer_body": "a"}
    made = HANDLERS["StackOverflowPythonPretrainHandler"](Row(1, asked), "text")
    assert made == "In python, t\n### Question:\nq\n### Response:\na\n"
    for handler, bad in (
        ("SharegptPretrainHandler", {"conversations": [{"from": "human"}]}),
        ("SharegptPretrainHandler", {"text": "no turns"}),
        ("StackOverflowPythonPretrainHandler", {"title": "t"}),
        ("AlpacaPretrainHandler", values | {"output": "\ud800"}),
        ("GeneralPretrainHandler", {"text": None}),
    ):
        with pytest.raises(RowError):
            HANDLERS[handler](Row(1, bad), "text")


def block_of(*lines: str) -> Block:
    return Block("f.jsonl", 1, "".join(f"{line}\n" for line in lines).encode(), "jsonl")


def test_bad_rows_are_skipped_and_named() -> None:
    lines = [f'{{"text": "{"a " * i}"}}' for i in range(40)]
    lines[3], lines[17], lines[30], lines[31] = "{", '{"text": 5}', '{"text": "refuse"}', '{"no": 1}'
    with pytest.raises(TesselError, match=r"f.jsonl, line 4: invalid JSON"):
        BlockEncoder(encoder())(block_of(*lines))
    with pytest.raises(TesselError, match=r"f.jsonl, line 31: this text is refused"):
        BlockEncoder(encoder())(block_of(*lines[:3], lines[0], *lines[4:17], lines[0], *lines[18:31]))
    result = BlockEncoder(encoder(), skip=True)(block_of(*lines))
    assert [row.number for row in result.bad] == [4, 18, 31, 32]
    assert "invalid JSON" in result.bad[0].reason and "'text' is a number" in result.bad[1].reason
    good = [i for i in range(40) if i not in (3, 17, 30, 31)]
    assert documents(result.encoded[0]) == [[[1] * i + [EOD]] if i else [] for i in good]


def test_a_row_error_survives_the_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(RowError(7, "why")))
    assert (error.number, error.reason, str(error)) == (7, "why", "row 7: why")


@pytest.fixture
def punkt_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parameters in NLTK's format that know one abbreviation."""
    pytest.importorskip("nltk")
    folder = tmp_path / "tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("dr\n")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    return tmp_path


def test_sentences(punkt_folder: Path) -> None:
    text = "Dr. Who came.\n\nHe left. Why?"
    assert SentenceSplitter()(text) == ["Dr. Who came.", "He left.", "Why?"]
    kept = SentenceSplitter(keep_newlines=True)(text)
    assert "".join(kept) == text and len(kept) == 3
    # Pieces of a long text are cut each for themselves.
    assert SentenceSplitter(piece_chars=8)("One two. Three four.") == ["One two.", " Three f", "our."]
    copy = pickle.loads(pickle.dumps(SentenceSplitter()))
    (encoded,) = encoder(splitter=copy)([Row(1, {"text": text})], "f")
    assert documents(encoded) == [[[3, 3, 5], [2, 5], [4, EOD]]]


def test_sentences_without_nltks_parameters_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("nltk")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    with pytest.raises(TesselError, match=r"needs NLTK's parameters for english.*nltk.downloader punkt_tab.*NLTK_DATA"):
        SentenceSplitter().check()

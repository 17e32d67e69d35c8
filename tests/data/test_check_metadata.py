"""What is noted beside a dataset against the run's tokenizer and the model's vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tessel.config.tokenizer import Tokenizer as Section
from tessel.data import check
from tessel.data.indexed import IndexedDataset
from tessel.data.preprocess import preprocess_files
from tessel.data.samples import GPTDataset
from tessel.data.tokenizer import NullTokenizer
from tessel.errors import TesselError


def made(folder: Path, tokenizer: NullTokenizer) -> str:
    (folder / "a.txt").write_text("1 2 3\n" * 20)
    (written,) = preprocess_files([folder / "a.txt"], folder / "d", tokenizer, ["text"], append_eod=True)
    return written.prefix


def test_the_model_has_a_row_for_every_id_of_the_tokenizer(tmp_path: Path) -> None:
    prefix = made(tmp_path, NullTokenizer(999))
    check.check_metadata(prefix, 1_000, None)
    with pytest.raises(
        TesselError, match=r"was made with the tokenizer NullTokenizer:999, which has 1000 entries, and "
    ):
        check.check_metadata(prefix, 999, None)
    Path(f"{prefix}.meta.json").unlink()
    check.check_metadata(prefix, 1, None)


def test_another_tokenizer_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = made(tmp_path, NullTokenizer(999))
    check.check_metadata(prefix, None, NullTokenizer(999))
    assert capsys.readouterr().err == ""
    check.check_metadata(prefix, None, NullTokenizer(500))
    assert "(1000 entries, end of document 999), and this run has NullTokenizer:500" in capsys.readouterr().err
    other = NullTokenizer(999, Section(eod_id=5))
    other.identity = "Another:1"
    check.check_metadata(prefix, None, other)
    assert "end of document 5): ids may mean other words" in capsys.readouterr().err


def test_large_data_is_judged_by_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data is read: its ids are what counts."""
    (tmp_path / "a.txt").write_text("1 2 3\n" * 20)
    (written,) = preprocess_files([tmp_path / "a.txt"], tmp_path / "d", NullTokenizer(999), ["text"], append_eod=False)
    indexed = IndexedDataset(written.prefix)
    dataset = GPTDataset.__new__(GPTDataset)
    dataset.indexed = indexed
    assert int(np.max(indexed.tokens)) == 3
    check.check_dataset(dataset, 4)
    monkeypatch.setattr(check, "SCAN_LIMIT_TOKENS", 10)
    with pytest.raises(TesselError, match="which has 1000 entries, and the model has 4 rows"):
        check.check_dataset(dataset, 4)

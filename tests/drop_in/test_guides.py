"""Every command of docs/guides, in order, on tiny random models of the guides' families."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main
from tests.drop_in.guides import GUIDES, Session, blocks
from tests.evaluate.sets import write_letter_set

NAMES = sorted(path.stem for path in GUIDES.glob("*.md") if not path.stem.endswith("_zh") and path.stem != "README")
SMALL = {"SEQ_LEN": "32", "SEQ_LENGTH": "32", "TRAIN_ITERS": "2", "WORKERS": "1", "MAX_NEW_TOKENS": "8"}

MakeModel = Callable[..., Path]


@pytest.fixture
def model(tiny_hf_folder: MakeModel, tiny_tokenizer_folder: Path) -> Callable[..., None]:
    """`model(folder, family, **config)`: a model that can be cut as the guides cut theirs, in `folder`."""

    def make(folder: Path, family: str, **config: object) -> None:
        shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "eos_token_id": 305}
        made = tiny_hf_folder(family, tokenizer=tiny_tokenizer_folder, max_position_embeddings=4096, **(shape | config))
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, folder)

    return make


def write_parquet(path: Path) -> None:
    """Documents as the guides' data sets have them."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"the quick brown fox jumps over line {number} of plain text"} for number in range(200)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["lm_loss"] if "lm_loss" in row else row["lm loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_have_the_same_commands(name: str) -> None:
    fenced = re.compile(r"^```(?:bash|shell)\n.*?^```$", flags=re.DOTALL | re.MULTILINE)
    english, chinese = (fenced.findall((GUIDES / f"{name}{end}.md").read_text()) for end in ("", "_zh"))
    assert english == chinese
    assert len(blocks(f"{name}.md")) >= 3


def test_pais_guide(
    model: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkout"
    work = root / "work"
    session = Session(root, monkeypatch)
    monkeypatch.setattr("tessel.drop_in.use._has_harness", lambda: False)  # to load it takes longer than all the rest
    model(work / "qwen-ckpts" / "Qwen2.5-0.5B-Instruct", "qwen2")
    write_letter_set(root / "drop_in" / "pai" / "cmmlu", "cmmlu", ("agronomy",), number=2)
    write_letter_set(root / "drop_in" / "pai" / "ceval", "ceval", ("accountant",), number=2)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"line {number} of a plain text"}) for number in range(400)))
    prefix = work / "qwen-datasets" / "wudao_qwenbpe"
    make = f"--input {text} --output-prefix {prefix} --append-eod --tokenizer-type PretrainedFromHF"
    tokenizer = work / "qwen-ckpts" / "Qwen2.5-0.5B-Instruct"
    assert main(["preprocess", *make.split(), "--tokenizer-name-or-path", str(tokenizer)]) == 0
    for block in blocks("pai-qwen2.5.md"):
        session.run(block)
    (made,) = (work / "output_mcore_qwen2.5_pretrain" / "checkpoint").iterdir()
    assert len(losses(made)) == 9 and list((made / "iter_0000009").glob("*.distcp"))
    assert (work / "qwen-ckpts" / "Qwen2.5-0.5B-Instruct-back" / "model.safetensors").exists()
    said = capsys.readouterr()
    assert "agronomy" in said.out and "accountant" in said.out and "trust_remote_code is left out" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mindspeed-qwen2.5", "mindspeed-qwen2.5-mindspore"])
def test_mindspeeds_guides_of_qwen25(
    name: str,
    model: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    session = Session(tmp_path / "checkout", monkeypatch, SMALL | {"GBS": "8"})
    root = tmp_path / "checkout" / "drop_in" / "mindspeed-llm"
    model(root / "model_from_hf" / "qwen2.5-7b-hf", "qwen2")
    write_parquet(root / "dataset" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    write_letter_set(root / "mmlu", "mmlu", ("anatomy",), number=2)
    for block in blocks(f"{name}.md"):
        session.run(block)
    parts = sorted(path.name for path in (root / "model_weights" / "qwen2.5_mcore" / "iter_0000001").glob("mp_*"))
    assert parts == [f"mp_rank_00_00{stage}" for stage in range(4)]
    assert (root / "dataset" / "alpaca_text_document.bin").exists()
    assert len(losses(root / "ckpt" / "qwen25-7b")) == 2
    if name == "mindspeed-qwen2.5":
        assert (root / "model_from_hf" / "qwen2.5-7b-hf" / "mg2hf" / "model.safetensors").exists()
        assert re.search(r"mmlu acc = \d/2=", capfd.readouterr().out)


@pytest.mark.slow
def test_mindspeeds_guide_of_qwen3(model: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tmp_path / "checkout", monkeypatch, SMALL | {"GBS": "4"})
    root = tmp_path / "checkout" / "drop_in"
    model(root / "qwen3-1point7b-base", "qwen3")
    write_parquet(root / "dataset" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    for block in blocks("mindspeed-qwen3.md"):
        session.run(block)
    assert (root / "qwen3-1point7b-mcore" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt").exists()
    parts = [f"mp_rank_0{rank}" for rank in range(8)]
    for folder in ("ckpt", "ckpt-base"):
        found = sorted(path.name for path in (root / "mindspeed-llm" / folder / "iter_0000002").glob("mp_rank*"))
        assert found == parts
    assert losses(root / "mindspeed-llm" / "ckpt") != losses(root / "mindspeed-llm" / "ckpt-base")


@pytest.mark.slow
def test_modellinks_guide(
    model: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    session = Session(tmp_path / "checkout", monkeypatch, SMALL | {"GBS": "4", "EVAL_ITERS": "1"})
    root = tmp_path / "checkout" / "drop_in" / "modellink"
    model(root / "model_from_hf" / "llama2-hf", "llama")
    write_parquet(root / "dataset" / "train-00000-of-00042-d964455e17e96d5a.parquet")
    write_letter_set(root / "mmlu" / "data", "mmlu", ("anatomy",), number=2)
    for block in blocks("modellink-llama2.md"):
        session.run(block)
    parts = sorted(path.name for path in (root / "model_weights" / "llama2-legacy" / "iter_0000001").glob("mp_*"))
    assert parts == [f"mp_rank_0{tp}_00{pp}" for tp in range(2) for pp in range(4)]
    assert len(losses(root / "ckpt")) == 2
    assert (root / "model_from_hf" / "llama2-hf" / "mg2hg" / "model.safetensors").exists()
    assert re.search(r"mmlu acc = \d/2=", capfd.readouterr().out)

"""Ids equal to transformers' own, special ids by Megatron's rules, and errors that say what to do."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tessel.config.tokenizer import Tokenizer as Section
from tessel.data.tokenizer import HuggingFaceTokenizer, NullTokenizer, check_fits, has_tokenizer, load_tokenizer
from tessel.errors import TesselError, UsageError

NASTY = [
    "",
    " ",
    "the quick brown fox",
    "two  spaces\n\n\ttab \r\n",
    "emoji \U0001f469\u200d\U0001f4bb and e\u0301 combining",
    "\u4f60\u597d\uff0c\u4e16\u754c \u0645\u0631\u062d\u0628\u0627",
    "<|endoftext|> inside <|pad|> text<|endoftext|>",
    "\x00\x07 control \ufffd",
    "1234567890 3.14 " + "9" * 50,
]


def changed(source: Path, target: Path, settings: dict[str, Any] | None = None, post: Any = None) -> Path:
    """A copy of a tokenizer folder with other settings, or another post-processor."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (settings or {})))
    if post is not None:
        path = target / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": post}))
    return target


@pytest.fixture
def with_bos(tiny_tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer that begins every text with a token of its own, as Llama's."""
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [306], "tokens": ["<|pad|>"]}},
    }
    return changed(tiny_tokenizer_folder, tmp_path / "bos", post=post)


def reference_ids(folder: Path, text: str) -> list[int]:
    """What Megatron's HuggingFaceTokenizer stores."""
    import transformers

    return list(transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids)


@pytest.mark.parametrize("text", NASTY)
def test_ids_are_those_of_transformers(tiny_tokenizer_folder: Path, text: str) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    assert tokenizer.encode(text) == reference_ids(tiny_tokenizer_folder, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_own_special_tokens_are_added(with_bos: Path) -> None:
    tokenizer = HuggingFaceTokenizer(with_bos)
    ids = tokenizer.encode("the fox")
    assert ids == reference_ids(with_bos, "the fox")
    assert ids[0] == 306 and 306 not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the fox"


def test_special_tokens_in_text_can_be_plain_text(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = changed(tiny_tokenizer_folder, tmp_path / "split", {"split_special_tokens": True})
    tokenizer = HuggingFaceTokenizer(folder)
    ids = tokenizer.encode("a<|endoftext|>")
    assert ids == reference_ids(folder, "a<|endoftext|>")
    assert tokenizer.eod not in ids
    # A worker process must do the same.
    assert pickle.loads(pickle.dumps(tokenizer.batch_encoder()))(["a<|endoftext|>"]) == [ids]


def test_truncation_and_padding_settings_of_the_file_are_ignored(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = changed(tiny_tokenizer_folder, tmp_path / "cut")
    cut = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    cut.save(str(folder / "tokenizer.json"))
    text = "one more line of plain text"
    assert HuggingFaceTokenizer(folder).encode(text) == HuggingFaceTokenizer(tiny_tokenizer_folder).encode(text)


def test_batch_encoder_works_in_a_process_without_transformers(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    (tmp_path / "encoder").write_bytes(pickle.dumps(tokenizer.batch_encoder()))
    code = (
        "import pickle, sys; encode = pickle.load(open(sys.argv[1], 'rb')); "
        "print(encode(['the fox']), [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "encoder")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == f"{[tokenizer.encode('the fox')]} []"


def test_facts(tiny_tokenizer_folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    assert (tokenizer.vocab_size, tokenizer.max_id) == (307, 306)
    assert tokenizer.decode([tokenizer.eod or 0]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.pad]) == "<|pad|>"
    assert tokenizer.decode([5000, -100, tokenizer.pad]) == "<|pad|>"
    assert tokenizer.source == tiny_tokenizer_folder


@pytest.mark.parametrize(
    ("settings", "section", "eod", "pad"),
    [
        ({}, Section(), 305, 306),
        ({"pad_token": "<|endoftext|>"}, Section(), 305, -1),
        ({"pad_token": "<|endoftext|>"}, Section(allow_ambiguous_pad_tokens=True), 305, 305),
        ({"pad_token": None}, Section(), 305, -1),
        ({"bos_token": "<|pad|>"}, Section(), 305, -1),
        ({}, Section(eod_id=7), 7, 306),
        ({}, Section(eod_id=306), 306, -1),
        ({}, Section(pad_id=9), 305, 9),
        ({}, Section(pad_id=305), 305, -1),
        ({"eos_token": None}, Section(), None, 306),
        ({"eos_token": None, "sep_token": "<|endoftext|>"}, Section(), 305, 306),
    ],
)
def test_end_of_document_and_padding(
    tiny_tokenizer_folder: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    section: Section,
    eod: int | None,
    pad: int,
) -> None:
    folder = changed(tiny_tokenizer_folder, tmp_path / "changed", settings)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = HuggingFaceTokenizer(folder, section)
    assert (tokenizer.eod, tokenizer.pad) == (eod, pad)


def test_identity_is_of_the_content(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    here = HuggingFaceTokenizer(tiny_tokenizer_folder).identity
    shutil.copytree(tiny_tokenizer_folder, tmp_path / "moved")
    assert HuggingFaceTokenizer(tmp_path / "moved").identity == here
    assert HuggingFaceTokenizer(changed(tiny_tokenizer_folder, tmp_path / "other", {"x": 1})).identity != here


def test_the_one_in_load_unless_another_is_named(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_tokenizer_folder, tmp_path / "other")
    assert load_tokenizer(Section(), tiny_tokenizer_folder).source == tiny_tokenizer_folder
    named = Section(tokenizer_name_or_path=str(tmp_path / "other"))
    assert load_tokenizer(named, tiny_tokenizer_folder).source == tmp_path / "other"
    file = Section(tokenizer_model=str(tmp_path / "other" / "tokenizer.json"))
    assert load_tokenizer(file).encode("the") == load_tokenizer(named).encode("the")
    assert load_tokenizer(file).eod == 305


def test_a_tokenizer_json_under_another_name(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_tokenizer_folder / "tokenizer.json", tmp_path / "mine.json")
    tokenizer = load_tokenizer(Section(tokenizer_model=str(tmp_path / "mine.json"), eod_id=305))
    assert tokenizer.encode("the fox") == HuggingFaceTokenizer(tiny_tokenizer_folder).encode("the fox")
    assert tokenizer.eod == 305


def test_null_tokenizer() -> None:
    tokenizer = load_tokenizer(Section(tokenizer_type="NullTokenizer"), None, 100)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad, tokenizer.source) == (101, 100, -1, None)
    assert tokenizer.encode("3 1  4\n100") == [3, 1, 4, 100]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([3, 1, 100]) == "3 1 100"
    assert tokenizer.decode([3, 1, 100], skip_special_tokens=True) == "3 1"
    assert NullTokenizer(101).identity != tokenizer.identity
    assert load_tokenizer(Section(tokenizer_type="NullTokenizer", eod_id=5, pad_id=5), None, 9).pad == -1


@pytest.mark.parametrize("text", ["1 two 3", "101", "-1", "1_0", "\u0663", "1.5"])
def test_null_tokenizer_takes_ids_alone(text: str) -> None:
    with pytest.raises(TesselError, match="not an id from 0 to 100"):
        NullTokenizer(100).encode(text)


def test_vocabulary_must_fit_the_model(tiny_tokenizer_folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    check_fits(tokenizer, 307)
    with pytest.raises(TesselError, match=r"ids up to 306.*only 306 rows.*--vocab-size 307"):
        check_fits(tokenizer, 306)
    with pytest.raises(TesselError, match="ids up to 5000"):
        check_fits(HuggingFaceTokenizer(tiny_tokenizer_folder, Section(eod_id=5000)), 307)
    check_fits(NullTokenizer(100), 101)
    with pytest.raises(TesselError, match="ids up to 100"):
        check_fits(NullTokenizer(100), 100)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_errors_name_what_was_looked_for(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    def load(**flags: Any) -> None:
        load_tokenizer(Section(**flags))

    with pytest.raises(UsageError, match="No tokenizer is named: give --tokenizer-name-or-path"):
        load()
    with pytest.raises(UsageError, match="name two tokenizers"):
        load(tokenizer_name_or_path=str(tmp_path), tokenizer_model=str(tiny_tokenizer_folder))
    with pytest.raises(UsageError, match="needs --vocab-size"):
        load(tokenizer_type="NullTokenizer")
    with pytest.raises(UsageError, match="--vocab-size 0"):
        load_tokenizer(Section(tokenizer_type="NullTokenizer"), None, 0)
    with pytest.raises(TesselError, match="does not exist"):
        load(tokenizer_name_or_path=str(tmp_path / "absent"))
    with pytest.raises(TesselError, match="holds no tokenizer: looked for tokenizer.json, tokenizer.model"):
        load(tokenizer_name_or_path=str(tmp_path))
    with pytest.raises(TesselError, match="is no tokenizer: a folder or a tokenizer.json is expected"):
        load(tokenizer_model=str(write(tmp_path / "qwen.tiktoken", "x")))
    with pytest.raises(TesselError, match="is damaged.*Copy it again"):
        load(tokenizer_name_or_path=str(write(tmp_path / "cut" / "tokenizer.json", '{"model": ').parent))
    with pytest.raises(TesselError, match='it has no "model"'):
        load(tokenizer_name_or_path=str(write(tmp_path / "list" / "tokenizer.json", "[1]").parent))
    with pytest.raises(TesselError, match="cannot be opened"):
        load(tokenizer_name_or_path=str(write(tmp_path / "odd" / "tokenizer.json", '{"model": {"type": "X"}}').parent))


def test_remote_code_is_not_run(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    folder = changed(tiny_tokenizer_folder, tmp_path / "remote", settings)
    mark = tmp_path / "was_run"
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Mine: pass\n")
    try:
        HuggingFaceTokenizer(folder)
    except TesselError as error:
        assert "cannot be opened" in str(error)
    assert not mark.exists()


def test_has_tokenizer(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    assert has_tokenizer(tiny_tokenizer_folder)
    assert not has_tokenizer(tmp_path)


def test_qwen_ids(shared: Path) -> None:
    folder = shared / "data/tokenizers/qwen2.5"
    tokenizer = HuggingFaceTokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (151665, 151643, -1)
    for text in NASTY:
        assert tokenizer.encode(text) == reference_ids(folder, text)


def test_flat_ids_are_those_of_each_text(tiny_tokenizer_folder: Path) -> None:
    tokenizers = (HuggingFaceTokenizer(tiny_tokenizer_folder), NullTokenizer(100))
    for tokenizer, texts in zip(tokenizers, (NASTY, ["1 2", "", "3"]), strict=True):
        tokens, lengths = tokenizer.batch_encoder().encode_flat(texts)
        expected = [tokenizer.encode(text) for text in texts]
        assert (tokens.dtype, lengths.dtype) == ("int32", "int32")
        assert tokens.tolist() == sum(expected, []) and lengths.tolist() == [len(ids) for ids in expected]
        tokens, lengths = tokenizer.batch_encoder().encode_flat([])
        assert tokens.shape == lengths.shape == (0,)

"""The fast path gives the ids of `tokenizers`, or is not taken and says why."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tessel.config.tokenizer import Tokenizer as Section
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.data.tokenizer.encoders import FastEncoder, ReferenceEncoder, prove_fast
from tessel.data.tokenizer.nasty import nasty_texts

REPOSITORY = Path(__file__).resolve().parents[2]


def backend_of(folder: Path) -> Backend:
    return Backend.from_file(str(folder / "tokenizer.json"))


def random_texts(seed: int, count: int, specials: Sequence[str]) -> Iterator[str]:
    """Texts of one to eighty characters: anywhere in Unicode, in one script, and runs."""
    random_ = random.Random(seed)
    starts = (
        0x0,
        0x20,
        0x80,
        0x300,
        0x400,
        0x600,
        0x900,
        0xE00,
        0x1100,
        0x2000,
        0x3040,
        0x4E00,
        0xAC00,
        0xE000,
        0x1F600,
    )
    for _ in range(count):
        kind, size = random_.randrange(5), random_.choice((1, 2, 5, 20, 80))
        if kind == 0:
            codes = [random_.randrange(0x110000) for _ in range(size)]
        elif kind == 1:
            start = random_.choice(starts)
            codes = [start + random_.randrange(96) for _ in range(size)]
        elif kind == 2:
            codes = [random_.choice(starts) + random_.randrange(96)] * (size * random_.choice((1, 30)))
        else:
            codes = [random_.choice(b"ab AZ'st109 .,\n\t\r-") for _ in range(size)]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        if specials and kind == 4:
            cut = random_.randrange(len(text) + 1)
            text = text[:cut] + random_.choice(specials) + text[cut:]
        yield text


def shapes(tiny: Backend) -> dict[str, Backend]:
    """Tokenizers of the kinds that models have, with the vocabulary of a small one."""
    found = {"tiny": tiny}
    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(llama), "isolated")
    for name, normalizer, parts in (
        ("llama3", None, [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        ("qwen", normalizers.NFC(), [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        ("gpt2", None, [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        ("digits", None, [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]),
    ):
        backend = Backend.from_str(tiny.to_str())
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        backend.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("word", single_word=True)])
        found[name] = backend
    bos = Backend.from_str(tiny.to_str())
    bos.post_processor = processors.TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", 306)])
    found["bos"] = bos
    return found


@pytest.mark.parametrize("name", ["tiny", "llama3", "qwen", "gpt2", "digits", "bos"])
def test_ids_are_those_of_tokenizers_or_the_fast_way_is_not_taken(tiny_tokenizer_folder: Path, name: str) -> None:
    backend = shapes(backend_of(tiny_tokenizer_folder))[name]
    reference = ReferenceEncoder(backend)
    fast = prove_fast(reference, ["the fox"])
    if isinstance(fast, str):
        assert "fastokens" in fast
        return
    specials = [token.content for token in backend.get_added_tokens_decoder().values()]
    for seed in range(6):
        texts = list(random_texts(seed, 250, specials))
        tokens, lengths = fast.encode_flat(texts)
        expected = reference(texts)
        assert tokens.tolist() == sum(expected, []) and lengths.tolist() == [len(ids) for ids in expected]
        assert (tokens.dtype, lengths.dtype) == ("int32", "int32")
        assert fast.adding(False)(texts) == ReferenceEncoder(backend, False)(texts)


def test_shapes_of_models_are_fast(tiny_tokenizer_folder: Path) -> None:
    for name, backend in shapes(backend_of(tiny_tokenizer_folder)).items():
        if name != "digits":
            assert isinstance(prove_fast(ReferenceEncoder(backend), []), FastEncoder), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": normalizers.BertNormalizer()}, "does not read this tokenizer .*BertNormalizer"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "does not read this tokenizer .*Whitespace"),
    ],
)
def test_what_the_fast_library_lacks_falls_back(
    tiny_tokenizer_folder: Path, change: dict[str, Any], reason: str
) -> None:
    backend = backend_of(tiny_tokenizer_folder)
    for name, value in change.items():
        setattr(backend, name, value)
    assert re.search(reason, str(prove_fast(ReferenceEncoder(backend), [])))
    other = Backend(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    assert "WordLevel" in str(prove_fast(ReferenceEncoder(other), []))


class Wrong(FastEncoder):
    """A fast encoder that gets one character wrong."""

    wrong = "\u0301"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [*ids, 0] if self.wrong in text else ids for text, ids in zip(texts, super().__call__(texts), strict=True)
        ]


@pytest.mark.parametrize(
    "wrong", ["\u0301", "\U0001f600", "\x00", "   ", "9", "\u0645", "\u4e2d", "<|endoftext|>", "Zebra"]
)
def test_a_difference_falls_back(
    tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    from tessel.data.tokenizer import encoders

    monkeypatch.setattr(encoders, "FastEncoder", Wrong)
    monkeypatch.setattr(Wrong, "wrong", wrong)
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    said = tokenizer.speed_up(["A Zebra of the input"])
    assert said is not None and said.startswith("tokenizing with tokenizers (slower): fastokens reads '")
    assert said.count("\n") == 0
    assert isinstance(tokenizer.batch_encoder(), ReferenceEncoder)


def test_without_the_library(tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    assert "fastokens is not installed (pip install fastokens)" in str(tokenizer.speed_up([]))
    assert tokenizer.encode("the") == tokenizer.batch_encoder()(["the"])[0]


def test_settings_survive_pickling(tiny_tokenizer_folder: Path) -> None:
    backend = backend_of(tiny_tokenizer_folder)
    for split in (False, True):
        backend.encode_special_tokens = split
        fast = prove_fast(ReferenceEncoder(backend), [])
        assert isinstance(fast, FastEncoder)
        texts = nasty_texts(backend)
        sent = pickle.loads(pickle.dumps(fast.adding(False)))
        assert sent(texts) == ReferenceEncoder(backend, False)(texts)


def test_leaving_out_special_tokens(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bos"
    shutil.copytree(tiny_tokenizer_folder, folder)
    shapes(backend_of(tiny_tokenizer_folder))["bos"].save(str(folder / "tokenizer.json"))
    begins, plain = (
        HuggingFaceTokenizer(folder, Section(tokenizer_hf_no_include_special_tokens=flag)) for flag in (False, True)
    )
    for _ in range(2):
        assert begins.encode("the") == [306, *plain.encode("the")]
        assert begins.batch_encoder(add_special_tokens=False)(["the"]) == [plain.encode("the")]
        assert "fastokens" in str(begins.speed_up([])) and plain.speed_up([])


PROGRAM = """
import json, sys
from tessel.config.tokenizer import Tokenizer as Section
from tessel.data.tokenizer import load_fast
from tessel.errors import TesselError
if __name__ == "__main__":
    try:
        tokenizer, said = load_fast(Section(**json.loads(sys.argv[1])), None, ["the fox"])
        kind, ids = type(tokenizer).__name__, tokenizer.batch_encoder()(["the <|endoftext|>"])
        print(json.dumps([kind, said, ids, tokenizer.eod, tokenizer.identity, "transformers" in sys.modules]))
        assert tokenizer.decode(ids[0]) == "the <|endoftext|>"
    except TesselError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def run_apart(tmp_path: Path, **flags: Any) -> list[Any]:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), json.dumps(flags)],
        capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(REPOSITORY), "PATH": ""}, check=True,
    )  # fmt: skip
    values: list[Any] = json.loads(done.stdout.splitlines()[0])
    return values


def test_opened_in_a_process_of_its_own(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    here = HuggingFaceTokenizer(tiny_tokenizer_folder)
    kind, said, ids, eod, identity, has_transformers = run_apart(
        tmp_path, tokenizer_name_or_path=str(tiny_tokenizer_folder)
    )
    assert (kind, ids, eod, identity) == (
        "ProvedTokenizer",
        [here.encode("the <|endoftext|>")],
        here.eod,
        here.identity,
    )
    assert not has_transformers and said == here.speed_up(["the fox"])


def test_errors_of_that_process(tmp_path: Path) -> None:
    assert run_apart(tmp_path)[:1] == ["UsageError"]
    kind, text = run_apart(tmp_path, tokenizer_name_or_path=str(tmp_path))
    assert kind == "TesselError" and "holds no tokenizer" in text


def test_qwen_is_fast(shared: Path) -> None:
    tokenizer = HuggingFaceTokenizer(shared / "data/tokenizers/qwen2.5")
    reference = tokenizer.batch_encoder()
    docs = [json.loads(line)["text"] for line in (shared / "data/text/c4_demo.jsonl").read_text().splitlines()[:40]]
    assert tokenizer.speed_up(docs) == "tokenizing with fastokens, seen to give the ids of tokenizers"
    texts = [*docs, *random_texts(99, 3000, ["<|im_start|>", "<|endoftext|>", "<tool_call>"])]
    texts += [row["output"] for row in json.loads((shared / "data/instruct/alpaca_zh_demo.json").read_text())[:300]]
    assert tokenizer.batch_encoder()(texts) == reference(texts)

"""`tessel generate --prompt-file`: files in and out, and each text the one that its prompt gets alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.cli import main
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.generate.batcher import Batcher
from tessel.generate.beam import BeamOptions, beam_search
from tessel.generate.engine import generate_tokens, load_model
from tessel.generate.request import Request
from tessel.generate.sampling import GREEDY, Sampling, allowed_logits

MakeFolder = Callable[..., Path]
PROMPTS = ["the quick brown fox", "line", "one more line of plain text while the model reads", "dog"]


@pytest.fixture
def folder(tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path) -> Path:
    return tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "question": text}) + "\n" for i, text in enumerate(PROMPTS)))
    return path


def rows_of(folder: Path, prompts: Path, *more: str) -> list[dict[str, Any]]:
    output = prompts.parent / "out.jsonl"
    argv = [
        "generate",
        "--load",
        str(folder),
        "--device",
        "cpu",
        "--prompt-file",
        str(prompts),
        "--output",
        str(output),
    ]
    assert main([*argv, "--prompt-key", "question", "--ignore-eos", *more]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def alone(folder: Path, text: str, number: int) -> str:
    """What follows a text by itself, greedy."""
    model, _ = load_model(folder)
    tokenizer = HuggingFaceTokenizer(folder)
    ids = tokenizer.encode(text)
    new = list(generate_tokens(model, ids, max_new_tokens=number, sampling=GREEDY))
    return tokenizer.decode([*ids, *new])[len(text) :]


def test_rows_keep_their_fields_and_their_order(folder: Path, prompts: Path) -> None:
    rows = rows_of(folder, prompts, "--greedy", "--max-new-tokens", "12", "--max-running", "2", "--logprobs", "2")
    assert [(row["id"], row["index"], row["question"]) for row in rows] == [(i, i, t) for i, t in enumerate(PROMPTS)]
    for row, text in zip(rows, PROMPTS, strict=True):
        assert row["completion"] == alone(folder, text, 12)
        assert (row["finish_reason"], row["completion_tokens"], len(row["logprobs"])) == ("length", 12, 12)
        # Greedy: each token is the likeliest one.
        assert all([entry["token"], entry["logprob"]] == entry["top"][0] for entry in row["logprobs"])


def test_lines_of_text_are_prompts_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("the quick\n\nline\r\n")
    rows = rows_of(folder, path, "--greedy", "--max-new-tokens", "5")
    assert [row["question"] for row in rows] == ["the quick", "line"]
    assert [row["completion"] for row in rows] == [alone(folder, text, 5) for text in ("the quick", "line")]


def test_a_stop_string_ends_a_text_before_it(folder: Path, prompts: Path) -> None:
    free = rows_of(folder, prompts, "--greedy", "--max-new-tokens", "30")
    (prompts.parent / "out.jsonl").unlink()
    stop = free[0]["completion"][6:9]
    stopped = rows_of(folder, prompts, "--greedy", "--max-new-tokens", "30", "--stop", stop)
    for before, after in zip(free, stopped, strict=True):
        text, met, _ = before["completion"].partition(stop)
        assert after["completion"] == text
        assert after["finish_reason"] == ("stop" if met else "length")
    assert stopped[0]["completion"] != free[0]["completion"]


def test_rows_that_are_there_are_kept(folder: Path, prompts: Path) -> None:
    whole = rows_of(folder, prompts, "--seed", "3", "--num-samples", "2", "--max-new-tokens", "6")
    output = prompts.parent / "out.jsonl"
    lines = output.read_text().splitlines(keepends=True)
    kept = json.loads(lines[5]) | {"completion": "made before"}
    output.write_text(json.dumps(kept) + "\n" + lines[1] + lines[3][:20])
    again = rows_of(folder, prompts, "--seed", "3", "--num-samples", "2", "--max-new-tokens", "6")
    assert again == [*whole[:5], kept, *whole[6:]]
    assert whole[0]["completion"] != whole[1]["completion"]


def test_prompts_longer_than_the_context_are_refused_or_cut(folder: Path, prompts: Path, capsys: Any) -> None:
    row = {"id": 9, "question": "the lazy dog " * 100}
    prompts.write_text(json.dumps(row) + "\n")
    argv = ["generate", "--load", str(folder), "--device", "cpu", "--prompt-file", str(prompts), "--greedy"]
    argv += ["--prompt-key", "question", "--output", str(prompts.parent / "out.jsonl"), "--max-new-tokens", "8"]
    assert main(argv) == 1
    assert f"{prompts}, prompt 0:" in capsys.readouterr().err
    assert not (prompts.parent / "out.jsonl").exists()
    (cut,) = rows_of(folder, prompts, "--greedy", "--max-new-tokens", "8", "--truncate-prompts")
    assert (cut["prompt_tokens"], cut["completion_tokens"]) == (128 - 8 + 1, 8)
    assert "cut to their last tokens" in capsys.readouterr().err


def test_beams_of_a_file(folder: Path, prompts: Path) -> None:
    rows = rows_of(folder, prompts, "--num-beams", "3", "--num-samples", "2", "--max-new-tokens", "7")
    model, _ = load_model(folder)
    tokenizer = HuggingFaceTokenizer(folder)
    for index, text in enumerate(PROMPTS):
        beams = beam_search(model, tokenizer.encode(text), BeamOptions(3), max_new_tokens=7)
        mine = [row for row in rows if row["index"] == index]
        assert [row["score"] for row in mine] == pytest.approx([beam.score for beam in beams[:2]], abs=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is no JSON object"),
        ('{"prompt": "x"}', "has no field 'question'; it has prompt"),
        ('{"question": "x", "index": 4}', "has a field 'index', which the output uses itself"),
    ],
)
def test_rows_that_are_no_prompts(line: str, message: str, folder: Path, prompts: Path, capsys: Any) -> None:
    prompts.write_text(line + "\n")
    argv = ["generate", "--load", str(folder), "--device", "cpu", "--prompt-file", str(prompts)]
    assert main([*argv, "--prompt-key", "question", "--output", str(prompts.parent / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err


def test_texts_drawn_together_follow_the_models_distribution(tiny_hf_folder: MakeFolder) -> None:
    """First and second tokens of 1,200 texts in batches of 32 against the probabilities by transformers."""
    from transformers import AutoModelForCausalLM

    folder = tiny_hf_folder("llama", vocab_size=11)
    sampling = Sampling(temperature=0.9, top_k=6, top_p=0.95)
    model, _ = load_model(folder)

    class NoText:
        def decode(self, ids: Any) -> str:
            return ""

    batcher = Batcher(model, NoText(), max_running=32)
    texts: dict[int, list[int]] = {batcher.add(Request((1, 2, 3), sampling, 2, seed=seed)): [] for seed in range(1200)}
    while batcher.num_running or batcher.num_waiting:
        for event in batcher.step():
            texts[event.request].append(event.token or 0)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def expected(ids: list[int], number: int) -> dict[int, float]:
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0, -1]
        probabilities = allowed_logits(logits, sampling).softmax(-1)
        return {token: number * p for token, p in enumerate(probabilities.tolist()) if p}

    def chi_square(found: Counter[int], wanted: dict[int, float]) -> float:
        assert found.keys() <= wanted.keys()
        return sum((found[token] - number) ** 2 / number for token, number in wanted.items())

    first = Counter(text[0] for text in texts.values())
    # 5 degrees of freedom: above 20.5 with a chance of 0.1 %, and the seeds are fixed.
    assert chi_square(first, expected([1, 2, 3], 1200)) < 20.5
    (most, number), *_ = first.most_common(1)
    second = Counter(text[1] for text in texts.values() if text[0] == most)
    assert chi_square(second, expected([1, 2, 3, most], number)) < 20.5

"""The commands of the README run as they stand, at a small size, and both languages have the same ones."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
# Given after a command's own flags, these win: the same command at a size for tests.
SMALL = {
    "pretrain": "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 4 --lr-warmup-iters 0 "
    "--save-interval 2 --eval-interval 4 --eval-iters 1 --log-interval 2 --data-cache-path cache --device cpu",
    "samples": "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 4 --data-cache-path cache",
    "generate": "--max-new-tokens 4 --device cpu",
    "preprocess": "--workers 1",
    "plan": "--seq-length 32 --global-batch-size 8",
    "evaluate": "--limit 2 --num-fewshot 1 --device cpu",
}
TUNED = (
    "--seq-length 128 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --data-cache-path cache --device cpu"
)
SMALL |= {"sft": TUNED, "dpo": TUNED}
SMALL_SHAPE = (
    "--num-layers 1 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 "
    "--max-position-embeddings 64 --lr-wsd-decay-iters 2"
)

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def blocks(name: str, language: str) -> list[str]:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """Each command of the bash blocks as words, continuation lines joined."""
    joined = "\n".join(blocks(name, "bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.strip()]


def small(words: list[str]) -> list[str]:
    verb, *flags = words[1:]
    more = SMALL.get(verb, "").split()
    if "--num-layers" in flags:
        more += SMALL_SHAPE.split()
    if "--exit-interval" in flags:
        more += ["--exit-interval", "2"]
    if "--expert-model-parallel-size" in flags:
        more += "--nproc-per-node 2 --expert-model-parallel-size 2".split()
    if "--epochs" in flags:
        flags = [flag for flag in flags if flag not in ("--epochs", "3")]
    if "--preview" in flags:
        more = []
    if "--lr-warmup-fraction" in flags:
        more = [word for word in more if word != "--lr-warmup-iters"]
        more.remove("0")
    return [verb, *flags, *more]


def test_both_languages_show_the_same_commands() -> None:
    for language in ("bash", "yaml", "sh"):
        assert blocks("README.md", language) == blocks("README_zh.md", language)


def test_both_languages_have_the_same_sections_and_links() -> None:
    shapes, links = [], []
    for name in ("README.md", "README_zh.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        shapes.append([line.split()[0] for line in text.splitlines() if line.startswith("#")])
        found = {link.replace("_zh.md", ".md") for link in re.findall(r"\]\(([^)]+)\)", text)}
        links.append(sorted(found - {"README.md"}))
    assert shapes[0] == shapes[1]
    assert links[0] == links[1]


@pytest.mark.parametrize(
    "name",
    ["README.md", "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(map(str, Path("docs").glob("*.md")))],
)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    document = REPOSITORY / name
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (document.parent / link).exists(), link


def test_every_command_runs_as_it_stands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_hf_folder: Callable[..., Path],
    tiny_tokenizer_folder: Path,
) -> None:
    tokenizer = chat_tokenizer(tiny_tokenizer_folder, tmp_path / "tokenizer")
    tiny_hf_folder("qwen2", tokenizer=tokenizer, vocab_size=309).rename(tmp_path / "Qwen2.5-0.5B")
    experts = tiny_hf_folder("qwen3_moe", tokenizer=tiny_tokenizer_folder, num_experts=4)
    experts.rename(tmp_path / "Qwen3-30B-A3B")
    documents = [f"Document {number} holds {number * number} words, and some more of them." for number in range(200)]
    (tmp_path / "corpus.txt").write_text("\n".join(documents))
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    write_dialogues(tmp_path)
    (tmp_path / "run.yaml").write_text(blocks("README.md", "yaml")[0])
    monkeypatch.chdir(tmp_path)
    found = commands("README.md")
    assert {words[1] for words in found} >= {
        "pretrain",
        "preprocess",
        "generate",
        "plot",
        "samples",
        "inspect",
        "doctor",
        "plan",
        "convert",
        "verify",
        "sft",
        "dpo",
        "merge",
        "templates",
        "evaluate",
    }
    for words in found:
        assert words[0] == "tessel"
        status = main(small(words))
        out, err = capsys.readouterr()
        assert status == 0, f"{shlex.join(words)}\n{out}\n{err}"
    for name in ("first", "mixed", "scratch", "second", "two", "from-mcore", "mixture", "tuned", "preferred"):
        assert (tmp_path / "runs" / name / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "loss.png").stat().st_size > 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "scores" / "mmlu" / "results.json").is_file()


def chat_tokenizer(plain: Path, folder: Path) -> Path:
    """The tokenizer in `plain` with ChatML's template and tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_dialogues(folder: Path) -> None:
    """Questions with an answer, with a good and a bad one, and with four to choose from, where the README has them."""
    numbers = range(12)
    answers = [{"instruction": f"How much is {n} and 1?", "input": "", "output": f"It is {n + 1}."} for n in numbers]
    (folder / "dialogues.json").write_text(json.dumps(answers))
    pairs = [
        {
            "conversations": [{"from": "human", "value": f"How much is {n} and 1?"}],
            "chosen": {"from": "gpt", "value": f"It is {n + 1}."},
            "rejected": {"from": "gpt", "value": "Who knows?"},
        }
        for n in numbers
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    for part, number in (("test", 3), ("dev", 2)):
        (folder / "mmlu" / part).mkdir(parents=True)
        rows = [f"How much is {n} and 1?,{n},{n + 1},{n + 2},{n + 3},B" for n in range(number)]
        (folder / "mmlu" / part / f"astronomy_{part}.csv").write_text("\n".join(rows))

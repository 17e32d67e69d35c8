"""`tessel demo`: the whole line at the size of a laptop, with the real commands.

Text, a tokenizer trained on it and a random Qwen2.5-shaped model go through `tessel preprocess`,
`tessel pretrain`, `tessel plot` and `tessel generate`, each printed before it runs, so that the
same steps can be taken by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessel.config.verbs import DemoConfig
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import atomic_write, require_path, require_writable
from tessel.runtime.log import log

SETTINGS_FILE = "demo.json"
VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
SEQ_LENGTH = 128
BATCH_SIZE = 16
# A tokenizer this small learns nothing more from more text.
TOKENIZER_CHARACTERS = 20_000_000
# Qwen2.5's shape with small numbers: grouped queries, bias on q, k and v, tied embeddings.
MODEL_CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "max_window_layers": 4,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    # Wider than large models have it: at this width 0.02 would make them learn slowly at first.
    "initializer_range": 0.07,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "float32",
}
PROMPTS = ("The for statement is used to", "If the object is", "A class definition")


def demo(cfg: DemoConfig) -> None:
    """Run the demo in --output. The folder of an earlier demo with the same settings goes on where it stopped.

    Raises:
        UsageError: the folder holds something else, or a demo with other settings.
        TesselError: the text cannot be used, or one of the commands failed.
    """
    started_s = time.monotonic()
    _check(cfg)
    folder = Path(cfg.output)
    model, data, run = folder / "model", folder / "data", folder / "run"
    text = Path(cfg.data) if cfg.data is not None else data / "topics.jsonl"
    goes_on = _claim(folder, cfg)
    if cfg.data is None and not text.exists():
        _write_topics(text)
    _say(f"The text: {text}, {text.stat().st_size / 1e3:,.0f} kB" + _origin(cfg))
    if not (model / "config.json").exists():
        _write_model(model, text, cfg.seed)
    _say(f"A tokenizer of up to {VOCAB_SIZE} entries trained on it, and a random Qwen2.5-shaped model: {model}")

    prefix = data / text.stem
    dataset = Path(f"{prefix}_text_document")
    if goes_on and dataset.with_suffix(".idx").exists():
        _say(f"The dataset is there from last time: {dataset}.bin and .idx")
    else:
        _say("From text to tokens:")
        _tessel("preprocess", _preprocess_flags(text, prefix, model))
    _say("Training. The same command goes on where it stopped, if it is interrupted:")
    _tessel("pretrain", _pretrain_flags(cfg, model, dataset, run))
    _say("The loss curve:")
    picture = folder / "loss.png"
    _tessel("plot", [str(run), "--output", str(picture), "--title", "tessel demo"])
    _say("What the trained model makes of a few beginnings:")
    _tessel("generate", _generate_flags(cfg, text, run / "hf"))
    _summary(cfg, run, picture, time.monotonic() - started_s)


def _check(cfg: DemoConfig) -> None:
    """What can be wrong from the start, before anything is written."""
    from tessel.data.readers import TEXT_KEY, check_inputs
    from tessel.runtime import device

    if cfg.train_iters < 1:
        raise UsageError(f"--train-iters is {cfg.train_iters}: it must be at least 1. Raise it, or leave it out.")
    if cfg.data is not None:
        text = require_path(cfg.data, "--data")
        if text.is_dir():
            raise UsageError(f"--data {text} is a folder, and the demo reads one file of text. Name one.")
        check_inputs([text], [TEXT_KEY])
    if not Path(cfg.output).is_file():  # of which `_claim` says more
        require_writable(cfg.output, "--output")
    device.resolve(cfg.device)


def _say(text: str) -> None:
    log(f"\n{text}")


def _origin(cfg: DemoConfig) -> str:
    return "" if cfg.data is not None else " (the language reference that comes with Python, pydoc_data.topics)"


def _claim(folder: Path, cfg: DemoConfig) -> bool:
    """Make the folder of this demo; whether one with the same settings was there."""
    settings = {
        "data": str(Path(cfg.data).absolute()) if cfg.data is not None else None,
        "train_iters": cfg.train_iters,
        "seed": cfg.seed,
    }
    file = folder / SETTINGS_FILE
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        return False
    if not file.exists():
        raise UsageError(f"--output {folder}: it is there and no demo's folder. Choose another, so nothing is lost.")
    earlier = json.loads(file.read_text())
    if earlier != settings:
        differing = [
            f"{name} {earlier.get(name)} -> {settings[name]}"
            for name in settings
            if earlier.get(name) != settings[name]
        ]
        raise UsageError(
            f"--output {folder} holds a demo with other settings ({', '.join(differing)}). "
            "Choose another folder, or delete that one."
        )
    _say(f"{folder} holds this demo from an earlier start: going on from there.")
    return True


def _write_topics(path: Path) -> None:
    from pydoc_data.topics import topics

    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in topics.values())


def _documents(path: Path) -> Iterator[str]:
    """The documents that `tessel preprocess` will find."""
    from tessel.data.readers import check_inputs, parse_block, read_blocks

    for file in check_inputs([path], ("text",)):
        for block in read_blocks(file):
            for document in parse_block(block, ("text",)):
                text = document.texts[0]
                yield text if isinstance(text, str) else " ".join(text)


def _write_model(folder: Path, text: Path, seed: int) -> None:
    """A folder as one would download: tokenizer, config.json, weights. The weights are random."""
    from tessel.checkpoint.huggingface import export
    from tessel.checkpoint.metadata import read_side_files
    from tessel.model.config import ModelConfig
    from tessel.model.init import initialize_
    from tessel.model.transformer import Transformer

    with tempfile.TemporaryDirectory() as temporary:
        vocab_size, end_of_text = _write_tokenizer(Path(temporary), text)
        tokenizer_files = read_side_files(Path(temporary))
    raw = dict(MODEL_CONFIG, vocab_size=vocab_size, bos_token_id=end_of_text, eos_token_id=end_of_text)
    config = ModelConfig.from_hf(raw)
    model = Transformer(config)
    initialize_(model, config, MODEL_CONFIG["initializer_range"], seed)
    export(model.named_parameters(), config, folder, next(model.parameters()).dtype, tokenizer_files)


def _write_tokenizer(folder: Path, text: Path) -> tuple[int, int]:
    """Train a byte-level BPE tokenizer; returns its size and the id of its end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(_documents(text), TOKENIZER_CHARACTERS), trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_CONFIG["max_position_embeddings"],
    )
    whole.save_pretrained(folder)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None, "it is among the special tokens"
    return len(whole), end_of_text


def _limited(documents: Iterator[str], num_characters: int) -> Iterator[str]:
    for document in documents:
        yield document[:num_characters]
        num_characters -= len(document)
        if num_characters <= 0:
            return


def _preprocess_flags(text: Path, prefix: Path, model: Path) -> list[str]:
    return [
        *("--input", str(text), "--output-prefix", str(prefix)),
        *("--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", str(model), "--append-eod"),
    ]


def _pretrain_flags(cfg: DemoConfig, model: Path, dataset: Path, run: Path) -> list[str]:
    interval = max(1, cfg.train_iters // 4)
    values: dict[str, Any] = {
        "load": model,
        "data-path": dataset,
        "split": "95,5,0",
        "seq-length": SEQ_LENGTH,
        "micro-batch-size": BATCH_SIZE,
        "global-batch-size": BATCH_SIZE,
        "train-iters": cfg.train_iters,
        "lr": 6e-3,
        "min-lr": 6e-4,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": max(1, cfg.train_iters // 20),
        "weight-decay": 0.1,
        "adam-beta2": 0.95,
        "eval-interval": interval,
        "eval-iters": 2,
        "save": run,
        "save-interval": interval,
        "keep-last-k": 1,
        "log-interval": max(1, cfg.train_iters // 20),
        "seed": cfg.seed,
        "device": cfg.device,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [*flags, "--calculate-per-token-loss"]


def _generate_flags(cfg: DemoConfig, text: Path, model: Path) -> list[str]:
    prompts = PROMPTS if cfg.data is None else _beginnings(text)
    return [
        *("--load", str(model), "--prompt", *prompts),
        *("--max-new-tokens", "48", "--temperature", "0.7", "--top-p", "0.9"),
        *("--seed", str(cfg.seed), "--device", cfg.device),
    ]


def _beginnings(text: Path, num_prompts: int = 3, num_words: int = 5) -> list[str]:
    """The first words of the first documents that have as many."""
    found: list[str] = []
    for document in _documents(text):
        words = document.split()[:num_words]
        if len(words) == num_words and not words[0].startswith("-") and " ".join(words) not in found:
            found.append(" ".join(words))
        if len(found) == num_prompts:
            break
    return found or ["The"]


def _tessel(verb: str, flags: Sequence[str]) -> None:
    """Print `tessel VERB FLAGS` as it could be typed, and run it.

    Raises:
        TesselError: it failed; it has said why.
        KeyboardInterrupt: the user interrupted it, and it has ended.
    """
    log(f"$ {_as_typed(['tessel', verb, *flags])}\n")
    here = Path(__file__).resolve().parent.parent
    search_path = os.pathsep.join(part for part in (str(here), os.environ.get("PYTHONPATH")) if part)
    child = subprocess.Popen(
        [sys.executable, "-m", "tessel", verb, *flags], env=os.environ | {"PYTHONPATH": search_path}
    )
    interrupted = False
    while True:
        try:
            status = child.wait()
            break
        except KeyboardInterrupt:
            # The terminal interrupts the child as well: let it save what it has.
            interrupted = True
    if interrupted or status == -signal.SIGINT:
        raise KeyboardInterrupt
    if status != 0:
        raise TesselError(
            f"tessel {verb} ended with status {status}, so the demo stops here; its own message is above."
        )


def _as_typed(words: Sequence[str]) -> str:
    """A command for a shell, a flag and its values to a line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and len(lines[-1]) > 0:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    joined, text = [" ".join(line) for line in lines], ""
    for part in joined:
        last_line = text.rpartition("\n")[2]
        text += (" " if text else "") + part if len(last_line) + len(part) < 96 else f" \\\n    {part}"
    return text


def _summary(cfg: DemoConfig, run: Path, picture: Path, elapsed_s: float) -> None:
    from tessel.train.sinks import TRAIN, read_metrics

    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == TRAIN and row.get("lm_loss")]
    if rows:
        _say(
            f"The loss went from {rows[0]['lm_loss']:.2f} to {rows[-1]['lm_loss']:.2f} in {cfg.train_iters} iterations."
        )
    log(f"Written in {elapsed_s:.0f} s:")
    log(f"  {run / 'hf'}  the trained model, a Hugging Face folder")
    log(f"  {picture}  the loss curve")
    log(f"  {run}  checkpoints and metrics.jsonl")
    log("Open the model with transformers:")
    log(f"  AutoModelForCausalLM.from_pretrained({str(run / 'hf')!r})")

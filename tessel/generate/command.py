"""`tessel generate`: the prompts and what the model makes of them on stdout, everything else on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tessel.config.verbs import GenerateConfig
from tessel.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from tessel.errors import TesselError
from tessel.generate.engine import ModelSource, find_model, generate_tokens, load_model, stop_ids
from tessel.generate.sampling import Sampling
from tessel.generate.text import TextStream
from tessel.model.config import ModelConfig
from tessel.model.kernels import choose
from tessel.model.transformer import Transformer
from tessel.runtime import device as devices


def generate(cfg: GenerateConfig) -> None:
    """Continue each prompt, and say how fast.

    Raises:
        TesselError: no model, no tokenizer, or a prompt that the model cannot take.
    """
    device = devices.resolve(cfg.device)
    source = find_model(cfg.load, cfg.hf_dir)
    config = source.config()
    tokenizer = load_tokenizer(cfg.tokenizer, source.folder, config.vocab_size - 1)
    check_fits(tokenizer, config.vocab_size)
    prompts = [_encode(tokenizer, text, config) for text in cfg.prompt]
    if source.stored is not None or Path(cfg.load) != source.folder:
        _say(_describe(source))
    dtype = _dtype(cfg)
    kernels = choose(device, dtype, head_dim=config.head_dim)
    _say(kernels.describe())
    model, _ = load_model(source, device, dtype, kernels)
    eos_ids = frozenset() if cfg.ignore_eos else _eos_ids(source, config, tokenizer)
    num_tokens, elapsed_s = 0, 0.0
    for number, ids in enumerate(prompts):
        if number:
            print()
        started_s = time.perf_counter()
        num_tokens += _continue(cfg, model, tokenizer, cfg.prompt[number], ids, eos_ids, cfg.seed + number)
        elapsed_s += time.perf_counter() - started_s
    speed = num_tokens / elapsed_s if elapsed_s > 0 else 0.0
    _say(f"{num_tokens} tokens in {elapsed_s:.2f} s: {speed:.1f} tokens/s on {devices.describe(device)}")


def _continue(
    cfg: GenerateConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    prompt_ids: Sequence[int],
    eos_ids: frozenset[int],
    seed: int,
) -> int:
    """Print a prompt and its continuation; returns the number of new tokens."""
    sampling = Sampling(cfg.greedy, cfg.temperature, cfg.top_k, cfg.top_p)
    tokens = generate_tokens(
        model,
        prompt_ids,
        max_new_tokens=cfg.max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        seed=seed,
    )
    stream = TextStream(tokenizer, prompt_ids)
    pieces = [prompt]
    num_tokens = 0
    if not cfg.no_stream:
        print(prompt, end="", flush=True)
    for token in tokens:
        num_tokens += 1
        piece = stream.push(token)
        if cfg.no_stream:
            pieces.append(piece)
        else:
            print(piece, end="", flush=True)
    pieces.append(stream.finish())
    print("".join(pieces) if cfg.no_stream else pieces[-1], flush=True)
    room = model.config.max_position_embeddings - len(prompt_ids) + 1
    if num_tokens == room < cfg.max_new_tokens:
        _say(f"stopped where the model's context of {model.config.max_position_embeddings} tokens is full")
    return num_tokens


def _encode(tokenizer: Tokenizer, text: str, config: ModelConfig) -> list[int]:
    ids = tokenizer.encode(text)
    if not ids:
        raise TesselError(f"--prompt {text!r} has no tokens, and there is nothing to continue. Give at least a word.")
    if len(ids) > config.max_position_embeddings:
        raise TesselError(
            f"--prompt {text[:30]!r}... has {len(ids)} tokens, more than the model's context of "
            f"{config.max_position_embeddings} (max_position_embeddings). Shorten it."
        )
    return ids


def _eos_ids(source: ModelSource, config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """What the model's files name, else the tokenizer's end-of-document id."""
    found = stop_ids(source.folder, config)
    return found if found or tokenizer.eod is None else frozenset({tokenizer.eod})


def _dtype(cfg: GenerateConfig) -> torch.dtype:
    if cfg.bf16:
        return torch.bfloat16
    return torch.float16 if cfg.fp16 else torch.float32


def _describe(source: ModelSource) -> str:
    if source.stored is not None:
        return "; ".join([f"a checkpoint in the {source.stored.format} format", *source.stored.guessed])
    if source.run is None:
        return f"the run's Hugging Face folder: {source.folder}"
    return f"the run has written no Hugging Face folder yet: its checkpoint of iteration {source.iteration}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

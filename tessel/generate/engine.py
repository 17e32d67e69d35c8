"""A model that continues tokens: loading one for use, and the loop over new tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tessel.checkpoint import huggingface
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.detect import companion_folder, format_of, open_model
from tessel.checkpoint.fill import fill_model
from tessel.checkpoint.stored import StoredModel
from tessel.errors import TesselError
from tessel.generate.cache import KeyValueCache
from tessel.generate.sampling import Sampling, next_token
from tessel.model.config import ModelConfig
from tessel.model.kernels import Kernels, choose
from tessel.model.transformer import Transformer
from tessel.runtime.files import require_path

# More would be allocated in vain where a text ends early; the cache doubles when it is full.
_FIRST_CAPACITY_TOKENS = 256


@dataclass(frozen=True)
class ModelSource:
    """`folder` has config.json, tokenizer and weights.

    Where it is a run's checkpoint, the weights are those of `run` at `iteration` instead; where it is one of
    another suite, those of `stored`, and `folder` is what stands beside them.
    """

    folder: Path
    run: Path | None = None
    iteration: int | None = None
    stored: StoredModel | None = None

    def config(self) -> ModelConfig:
        """What the model is."""
        return ModelConfig.from_folder(self.folder) if self.stored is None else self.stored.config


def find_model(path: str | Path, hf_dir: str | Path | None = None) -> ModelSource:
    """The Hugging Face folder at `path`; or a run's own, hf/, the newest hf_*, its latest checkpoint; or a foreign one.

    `hf_dir`: config.json and tokenizer of a checkpoint that has none.

    Raises:
        TesselError: there is no model.
    """
    path = require_path(path, "--load")
    if (path / "config.json").is_file():
        return ModelSource(path)
    exports = sorted(
        folder for folder in path.glob(f"{run_checkpoint.EXPORT_FOLDER}_*") if (folder / "config.json").is_file()
    )
    if (path / run_checkpoint.EXPORT_FOLDER / "config.json").is_file():
        exports.append(path / run_checkpoint.EXPORT_FOLDER)
    if exports:
        return ModelSource(exports[-1])
    if format_of(path) not in (None, "torch_dcp"):
        stored = open_model(path, hf_dir=hf_dir)
        return ModelSource(companion_folder(path, hf_dir=hf_dir) or path, iteration=stored.iteration, stored=stored)
    iteration = run_checkpoint.latest_iteration(path)
    if iteration is not None:
        return ModelSource(
            run_checkpoint.iteration_folder(path, iteration) / run_checkpoint.HF_FOLDER, run=path, iteration=iteration
        )
    raise TesselError(
        f"--load {path} is neither a Hugging Face folder (config.json), nor the folder of a run "
        f"({run_checkpoint.EXPORT_FOLDER}/, or {run_checkpoint.TRACKER} with iter_* folders), nor Megatron's."
    )


def load_model(
    source: str | Path | ModelSource,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
) -> tuple[Transformer, ModelConfig]:
    """The model of a Hugging Face folder or of a run, in eval mode, on `device` in `dtype`.

    Without `kernels`, the fastest that are there.

    Raises:
        TesselError: see `find_model` and `huggingface.load_into`.
    """
    if not isinstance(source, ModelSource):
        source = find_model(source)
    device = torch.device(device)
    config = source.config()
    with torch.device("meta"):
        model = Transformer(config, kernels or choose(device, dtype, head_dim=config.head_dim)).to(dtype)
    if source.stored is not None:
        fill_model(model, source.stored.tensors, device)
    elif source.run is None or source.iteration is None:
        huggingface.load_into(model, source.folder, device)
    else:
        model.to_empty(device=device)
        weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        run_checkpoint.load_tensors(source.run, source.iteration, weights)
    return model.eval().requires_grad_(False), config


def stop_ids(folder: Path, config: ModelConfig) -> frozenset[int]:
    """Tokens that end a text, by generation_config.json, else by config.json; empty where neither names one.

    Raises:
        TesselError: generation_config.json is not JSON.
    """
    path = folder / "generation_config.json"
    found = None
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise TesselError(f"{path}: not a JSON object ({error}). Mend or remove it.") from error
    if found is None:
        found = config.raw.get("eos_token_id")
    if found is None:
        return frozenset()
    tokens = found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in tokens):
        raise TesselError(
            f"eos_token_id in {folder} is {found!r}: it must be a number or a list of them. Mend the file."
        )
    return frozenset(tokens)


def generate_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New tokens one by one, each computed when it is asked for.

    Ends after `max_new_tokens`, before a token of `eos_ids` (it is not given), or where the
    model's context is full. `generator` is a CPU generator; None takes torch's own.

    Raises:
        TesselError: the prompt is empty, longer than the context, or holds an id that the model lacks.
    """
    _check_prompt(model.config, prompt_ids)
    return _tokens(model, prompt_ids, max_new_tokens, sampling, frozenset(eos_ids), generator)


def _check_prompt(config: ModelConfig, prompt_ids: Sequence[int]) -> None:
    if not prompt_ids:
        raise TesselError("The prompt has no tokens, and there is nothing to continue. Give at least one.")
    if len(prompt_ids) > config.max_position_embeddings:
        raise TesselError(
            f"The prompt has {len(prompt_ids)} tokens, and the model's context (max_position_embeddings) "
            f"{config.max_position_embeddings}. Shorten the prompt."
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size:
        raise TesselError(
            f"The prompt holds ids from {min(prompt_ids)} to {max(prompt_ids)}, and the model's go from 0 to "
            f"{config.vocab_size - 1}. Use the tokenizer that the model was trained with."
        )


def _tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: frozenset[int],
    generator: torch.Generator | None,
) -> Iterator[int]:
    # The last token takes no position: it is never fed back.
    num_tokens = min(max_new_tokens, model.config.max_position_embeddings - len(prompt_ids) + 1)
    cache = KeyValueCache(len(prompt_ids) + min(num_tokens, _FIRST_CAPACITY_TOKENS))
    new_ids = list(prompt_ids)
    for _ in range(num_tokens):
        token = next_token(_next_logits(model, new_ids, cache), sampling, generator)
        if token in eos_ids:
            return
        yield token
        new_ids = [token]


@torch.inference_mode()
def _next_logits(model: Transformer, new_ids: Sequence[int], cache: KeyValueCache) -> Tensor:
    """Logits [V] after the cached positions and `new_ids`, which are cached as well."""
    device = model.head_weight.device
    begin = cache.num_tokens
    tokens_BS = torch.tensor([list(new_ids)], dtype=torch.int64, device=device)
    positions_BS = torch.arange(begin, begin + len(new_ids), device=device)[None]
    logits_BSV: Tensor = model(tokens_BS, positions_BS, cache=cache, logits="last")
    return logits_BSV[0, -1]

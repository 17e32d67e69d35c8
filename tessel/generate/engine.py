"""A model that continues tokens: loading one for use, and the loop over new tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tessel.checkpoint import huggingface
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.adapters import open_adapter
from tessel.checkpoint.detect import companion_folder, format_of, open_model
from tessel.checkpoint.fill import fill_adapters, fill_model
from tessel.checkpoint.stored import StoredModel
from tessel.errors import TesselError
from tessel.generate.batcher import Batcher, Model
from tessel.generate.request import Request
from tessel.generate.sampling import Sampling
from tessel.layout.adapters import is_adapter
from tessel.model.config import ModelConfig
from tessel.model.kernels import Kernels, choose
from tessel.model.layers import Embedding, Linear
from tessel.model.transformer import Transformer
from tessel.runtime.files import require_path


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
    adapter: str | Path | None = None,
) -> tuple[Transformer, ModelConfig]:
    """The model of a Hugging Face folder or of a run, in eval mode, on `device` in `dtype`.

    Without `kernels`, the fastest that are there. `adapter`: the folder of one, put beside the weights, unmerged.

    Raises:
        TesselError: see `find_model` and `huggingface.load_into`.
    """
    if not isinstance(source, ModelSource):
        source = find_model(source)
    device = torch.device(device)
    config = source.config()
    stored = None if adapter is None else open_adapter(adapter, config)
    if stored is not None:
        config = replace(config, adapters=stored.spec)
    with torch.device("meta"):
        model = Transformer(config, kernels or choose(device, dtype, head_dim=config.head_dim)).to(dtype)
    suit_few_rows(model, device)
    if source.stored is not None:
        fill_model(model, source.stored.tensors, device)
    elif source.run is None or source.iteration is None:
        huggingface.load_into(model, source.folder, device)
    else:
        model.to_empty(device=device)
        weights = {f"model.{name}": p.detach() for name, p in model.named_parameters() if not is_adapter(name)}
        run_checkpoint.load_tensors(source.run, source.iteration, weights)
    if stored is not None:
        fill_adapters(model, stored.tensors, device)
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


def suit_few_rows(model: nn.Module, device: torch.device) -> None:
    """Arrange the output matrix of a model on the meta device for products with one row, or a few, of activations.

    On a CPU, in fp32, it is stored column by column, the embedding that it may be, too: a product then adds up long
    columns instead of many short dot products, and takes half to nine tenths of the time. Other matrices are put
    into blocks when they are there (`generate/packed.py`).
    """
    if device.type != "cpu":
        return
    for name, module in model.named_modules():
        if isinstance(module, Embedding) or (isinstance(module, Linear) and name.endswith("lm_head")):
            weight = module.weight
            if weight.dtype == torch.float32:
                module.weight = nn.Parameter(weight.detach().t().contiguous().t(), weight.requires_grad)


class _NoText:
    """For those who want tokens alone."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def generate_tokens(
    model: Model,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """New tokens of one text, each computed when it is asked for.

    Ends after `max_new_tokens`, before a token of `eos_ids` (it is not given), or where the
    model's context is full. Without a `seed`, draws are from torch's own generator.

    Raises:
        TesselError: the prompt is empty, longer than the context, or holds an id that the model lacks.
    """
    batcher = Batcher(model, _NoText(), device=device_of(model), max_running=1)
    batcher.add(Request(tuple(prompt_ids), sampling, max_new_tokens, frozenset(eos_ids), seed=seed))
    return _tokens(batcher)


def _tokens(batcher: Batcher) -> Iterator[int]:
    while batcher.num_running or batcher.num_waiting:
        for event in batcher.step():
            if event.token is not None:
                yield event.token


def device_of(model: Model) -> torch.device:
    """Where a model takes its tokens."""
    assert isinstance(model, torch.nn.Module)
    return next(model.parameters()).device

"""Reading Megatron's `torch` format with Megatron-core's names: mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt.

Every tensor of every rank is matched with the table of names (mcore_names.py) before anything is read; what is
missing, unknown or of another shape is named. Parameters are then put together out of the ranks' parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tessel.checkpoint import companion
from tessel.checkpoint.fused import pieces
from tessel.checkpoint.mcore_args import config_of
from tessel.checkpoint.mcore_files import CORE, Dialect, RankFiles, open_files
from tessel.checkpoint.mcore_match import BIAS_OF_CHOICE, Held, check_tied, copy_of, is_copy, match, whole_parameters
from tessel.checkpoint.mcore_names import EMBEDDING, EMBEDDING_KEY
from tessel.checkpoint.mcore_optimizer import read_optimizer
from tessel.checkpoint.megatron_folder import Iteration, companions, find_iteration
from tessel.checkpoint.stored import Format, StoredModel, StoredTensor
from tessel.checkpoint.weights import named
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig


def open_torch(folder: str | Path, *, ckpt_step: int | None = None, hf_dir: str | Path | None = None) -> StoredModel:
    """A checkpoint in the `torch` format: an iteration, a release, or the folder above them with its tracker.

    `hf_dir` gives the model's config.json where none travels along; without one it is derived from the args.

    Raises:
        TesselError: files are missing or damaged, contradict each other, or are not those of the config.
    """
    return open_ranks("torch", CORE, folder, ckpt_step, hf_dir)


def open_ranks(
    kind: Format, dialect: Dialect, folder: str | Path, ckpt_step: int | None, hf_dir: str | Path | None
) -> StoredModel:
    """What `open_torch` does, of files whose names are of `dialect`."""
    iteration = find_iteration(folder, ckpt_step)
    files = open_files(iteration.path, dialect)
    config, guessed, side_files = _config(iteration, files, hf_dir)
    held = match(files, config)
    tensors = _parameters(held, config)
    copies = [copy_of(item, item.tensor, item.original.tensor) for item in held if item.original is not None]
    optimizer = read_optimizer(files, held, config, is_release=iteration.number is None)
    config = _with_expert_bias(config, files)
    return StoredModel(
        kind,
        Path(folder),
        config,
        tensors,
        guessed=guessed,
        iteration=iteration.number,
        degrees=files.degrees,
        args=files.args,
        optimizer=optimizer.tensors,
        state=optimizer.state,
        side_files=side_files,
        left_out=optimizer.left_out,
        notes=_notes(config, held),
        copies=(*copies, *optimizer.copies),
    )


def _config(
    iteration: Iteration, files: RankFiles, hf_dir: str | Path | None
) -> tuple[ModelConfig, tuple[str, ...], Mapping[str, bytes]]:
    source = companions(iteration, hf_dir)
    guessed: tuple[str, ...] = ()
    side_files: Mapping[str, bytes] = {}
    if source is not None:
        config, side_files = ModelConfig.from_folder(source), companion.read(source)
        where = str(source / companion.CONFIG)
    else:
        if not files.args:
            raise TesselError(f"{iteration.path}: its files have no args, so the model is not known. Give --hf-dir.")
        config, guessed = config_of(files.args, files.files[0].path)
        where = "args"
    if config.num_hidden_layers != files.num_layers:
        raise TesselError(
            f"{iteration.path} holds {files.num_layers} layers, and {where} says {config.num_hidden_layers}: they are "
            "not of the same model, or a stage's layers are missing."
        )
    return config, guessed, side_files


def _parameters(held: list[Held], config: ModelConfig) -> dict[str, StoredTensor]:
    """Every parameter out of the ranks' parts.

    Raises:
        TesselError: a tied embedding's copy differs from it, or parts leave gaps.
    """
    tensors = whole_parameters(((item, item.tensor) for item in held), config)
    lacking = [name for name in parameters(config) if name not in tensors]
    if lacking:
        raise TesselError(f"The files hold nothing of {named(lacking)}. Take the whole checkpoint again.")
    for item in held:
        if item.is_used and is_copy(item, config):
            _check_copy(tensors[EMBEDDING], item)
    return tensors


def _check_copy(embedding: StoredTensor, held: Held) -> None:
    for _, copy in pieces(held.entry.fused, held.tensor, {EMBEDDING: embedding.shape}):
        check_tied(embedding, copy, held.tensor.name)


def _with_expert_bias(config: ModelConfig, files: RankFiles) -> ModelConfig:
    """The router's bias of the choice, which a config.json has and Megatron keeps beside the weights."""
    rows: dict[int, tuple[float, ...]] = {}
    for layers in files.chunks:
        file = next(file for file in files.files if file.place.pp == layers.pp)
        for number, layer in layers.layers.items():
            bias = file.chunks[layers.chunk].get(f"decoder.layers.{number}{BIAS_OF_CHOICE}")
            if isinstance(bias, torch.Tensor) and tuple(bias.shape) == (config.num_experts,):
                rows[layer] = tuple(float(value) for value in bias)
    if not rows:
        return config
    zeros = (0.0,) * config.num_experts
    return replace(config, expert_bias=tuple(rows.get(layer, zeros) for layer in range(config.num_hidden_layers)))


def _notes(config: ModelConfig, held: list[Held]) -> tuple[str, ...]:
    rows = sum(item.tensor.shape[0] for item in held if item.entry.key == EMBEDDING_KEY and item.is_used)
    said = []
    if rows > config.vocab_size:
        said.append(
            f"The vocabulary is padded from {config.vocab_size} to {rows} rows in the files; the padding is left out."
        )
    return tuple(said)

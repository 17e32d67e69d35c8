"""When a run writes checkpoints and Hugging Face folders, and what is in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessel.checkpoint import adapters, huggingface, run_formats
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.gather import write_whole
from tessel.checkpoint.run_formats import HUGGING_FACE, OWN, Formats
from tessel.checkpoint.stored import Target
from tessel.checkpoint.tiles import tiled
from tessel.config.run import Checkpoint
from tessel.layout.adapters import AdapterSpec, is_adapter
from tessel.model.config import ModelConfig
from tessel.model.mixture import beyond_the_family
from tessel.runtime import random as random_state
from tessel.runtime.log import log, warn_once
from tessel.runtime.team import Team
from tessel.runtime.watchdog import unlimited
from tessel.train import metrics
from tessel.train.learner import Learner
from tessel.train.optimizer import group_numbers
from tessel.train.schedule import Scheduler


class RunSaver:
    """Writes under --save; does nothing without it. All processes call it together, and each adds what it holds.

    `team` are the processes of the run, and `background_team` the same ones once more, for --async-save: a
    thread talks to the others over groups of its own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        learner: Learner,
        scheduler: Scheduler,
        model_config: ModelConfig,
        tokenizer_source: Path | None,
        description: Mapping[str, Any],
        device: torch.device,
        resumed_iteration: int | None,
        model_source: Path | None = None,
        formats: Formats | None = None,
        team: Team | None = None,
        background_team: Team | None = None,
    ) -> None:
        self._flags = checkpoint
        self._folder = Path(checkpoint.save) if checkpoint.save else None
        self._learner = learner
        self._scheduler = scheduler
        self._model_config = model_config
        # Read now: a run that goes on has them from a checkpoint, which --keep-last-k removes in time.
        self._side_files = huggingface.read_side_files(tokenizer_source, model_source)
        self._has_tokenizer = tokenizer_source is not None
        self._description = dict(description)
        self._device = device
        self._formats = formats or Formats((OWN,), Target(), not checkpoint.no_save_optim, checkpoint.keep_last_k)
        self._saved_iteration = resumed_iteration
        self._team = team or Team()
        self._background_team = background_team or Team()
        self._background = run_checkpoint.BackgroundSave()

    def on_new_batch_size(self, iteration: int, consumed_samples: int) -> None:
        """As Megatron, save where the batch ramp takes a step."""
        self._save(iteration, consumed_samples)

    def after_iteration(self, iteration: int, consumed_samples: int) -> None:
        """Save what is due after this iteration."""
        if self._flags.save_interval and iteration % self._flags.save_interval == 0:
            self._save(iteration, consumed_samples)
        if iteration == self._saved_iteration and HUGGING_FACE in self._formats.names:
            return  # it is there, or on its way
        if self._folder is not None and self._flags.save_hf_interval and iteration % self._flags.save_hf_interval == 0:
            suffix = f"_{iteration:07d}"
            self._export(suffix)

    def before_exit(self, iteration: int, consumed_samples: int) -> None:
        """Save the last iteration, and wait until it is on disk."""
        self._save(iteration, consumed_samples)
        self.wait()

    def wait(self) -> None:
        """Wait for a save in the background."""
        with unlimited("saving a checkpoint"):
            self._background.wait()

    def last_good(self) -> Path | None:
        """The newest whole checkpoint, after waiting for one that is being written."""
        self.wait()
        if self._folder is None or self._saved_iteration is None:
            return None
        return self._formats.place(self._formats.first or HUGGING_FACE, self._folder, self._saved_iteration)

    def _save(self, iteration: int, consumed_samples: int) -> None:
        folder = self._folder
        if folder is None or iteration == self._saved_iteration:
            return
        started_s = time.perf_counter()
        state = self._state(iteration, consumed_samples)
        rng = None if self._flags.no_save_rng else random_state.get_state(self._device)
        tensors = tiled(self._learner.tensors(with_optimizer=not self._flags.no_save_optim), self._learner.tiles)
        config = self._learner.balance.config_now(self._model_config)
        for name in self._formats.names:
            root = self._formats.place(name, folder, iteration)
            log(metrics.saving_line(iteration, root if name == HUGGING_FACE else root.parent, name))
        topology = self._learner.peers.topology

        def say(name: str, path: Path) -> None:
            root = path if name == HUGGING_FACE else path.parent
            log(metrics.saved_line(iteration, root, topology.tp, topology.pp))

        def write(team: Team, on_copied: Callable[[], None] | None) -> None:
            run_formats.save(
                self._formats,
                folder,
                iteration,
                tensors,
                state,
                rng,
                lambda target: self._write_hf_metadata(target, config),
                team,
                on_copied,
                say,
            )

        with unlimited("saving a checkpoint"):
            if self._flags.async_save:
                self._background.start(lambda on_copied: write(self._background_team, on_copied))
            else:
                write(self._team, None)
        self._saved_iteration = iteration
        elapsed_ms = (time.perf_counter() - started_s) * 1000.0
        log(metrics.timer_lines({"save-checkpoint": (elapsed_ms, elapsed_ms)}))

    def _state(self, iteration: int, consumed_samples: int) -> dict[str, Any]:
        scaler = self._learner.scaler
        return self._description | {
            "iteration": iteration,
            "consumed_train_samples": consumed_samples,
            "scheduler": self._scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "param_groups": group_numbers(self._learner.optimizer),
        }

    def _write_hf_metadata(self, folder: Path, config: ModelConfig) -> None:
        huggingface.write_metadata(folder, config, self._learner.dtype, self._side_files)

    def export_trained(self) -> None:
        """Write what has been trained for other tools: the model's Hugging Face folder, or PEFT's of the adapters."""
        self._export("")

    def _export(self, suffix: str) -> None:
        assert self._folder is not None
        if self._learner.adapters is None:
            self.export(self._folder / f"{run_checkpoint.EXPORT_FOLDER}{suffix}")
        else:
            self._export_adapters(self._folder / f"{adapters.EXPORT_FOLDER}{suffix}", self._learner.adapters)

    def _export_adapters(self, folder: Path, spec: AdapterSpec) -> None:
        base = self._description["adapters"]["base"]
        tiles = {name: tile for name, tile in self._learner.tiles.items() if is_adapter(name)}

        def write(weights: Iterator[tuple[str, Tensor]]) -> None:
            adapters.write_peft(folder, weights, spec, base, self._side_files)

        with unlimited("writing the adapter"):
            write_whole(self._learner.weights(), tiles, torch.float32, write, self._team)
        log(f"wrote the adapter {folder}, as peft opens it; tessel merge puts it into the model")

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder in the precision of training, on the first process, and say so."""

        config = self._learner.balance.config_now(self._model_config)

        def write(weights: Iterator[tuple[str, Tensor]]) -> None:
            huggingface.export(weights, config, folder, self._learner.dtype, self._side_files)

        with unlimited("writing the Hugging Face folder"):
            write_whole(self._learner.weights(), self._learner.tiles, self._learner.dtype, write, self._team)
        without = " (without tokenizer: none was used)" if not self._has_tokenizer else ""
        log(f"wrote the Hugging Face folder {folder}{without}")
        ways = beyond_the_family(config)
        if ways:
            warn_once(
                f"transformers does not know of {', '.join(ways)} in a {config.family} model: logits differ there"
            )

"""`tessel pretrain`: from what was asked for to a trained model on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.stored import StoredModel
from tessel.checkpoint.tiles import tiled
from tessel.config.run import RunConfig, Schedule
from tessel.data.build import Splits
from tessel.data.loader import Loader
from tessel.errors import TesselError
from tessel.layout.topology import Topology
from tessel.parallel.groups import Groups
from tessel.runtime import device as devices
from tessel.runtime import random as random_state
from tessel.runtime.log import log, warn_once
from tessel.runtime.memory import shortage_named
from tessel.runtime.process import Processes, on_every_node, process_group
from tessel.runtime.team import Team
from tessel.runtime.world import World
from tessel.train import foreign, frugal
from tessel.train.batch_size import BatchSize, batch_size_of, train_iters_for
from tessel.train.evaluation import Evaluator
from tessel.train.flops import flops_per_token
from tessel.train.formats import formats_of
from tessel.train.found import Found, build_splits, find, with_length
from tessel.train.identity import check_same_run, model_differences, run_identity
from tessel.train.learner import Learner
from tessel.train.metrics import TrainingLog, tensorboard_tags_off
from tessel.train.preference import Preferences
from tessel.train.reference import build_preferences
from tessel.train.saving import RunSaver
from tessel.train.schedule import Scheduler, build_schedules
from tessel.train.setup import build_learner, compute_dtype, groups_of, largest_gradient
from tessel.train.sinks import build_sinks
from tessel.train.source import Kind, agreed, asked_model
from tessel.train.step import TrainStep
from tessel.train.trainer import Parts, Position, Trainer, metrics_path

_SMALLER = (
    "Less is needed with a smaller --micro-batch-size or --seq-length, --recompute-granularity, sharding "
    "(--data-parallel-sharding-strategy optim_grads_params) or more --tensor-model-parallel-size; `tessel plan` lists "
    "the layouts that fit."
)


def pretrain(
    cfg: RunConfig, given: frozenset[str] = frozenset(), build: Callable[..., Learner] = build_learner
) -> None:
    """Train as `cfg` says; `given` names the fields that the user set.

    `build` makes what is trained, as `train.setup.build_learner` does: the engine of the run.

    Raises:
        UsageError: what was asked for cannot be.
        TesselError: a file is missing or wrong, or the run cannot go on.
    """
    started_s = time.monotonic()
    world = World.from_environment()
    look = on_every_node(lambda: find(cfg, given, world), world)
    device = devices.resolve(cfg.runtime.device, world)
    if cfg.precision.deterministic_mode:
        devices.set_deterministic()
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(process_group(device, cfg.launch.distributed_timeout_minutes, world))
        found = processes.together(look)
        log(f"device: {devices.describe(device)}")
        for line in devices.environment_remarks(device):
            log(line)
        if world.world_size > 1:
            log(f"layout: {found.topology.describe()}")
        log(found.source.describe())
        if found.adapting is not None:
            log(found.adapting.describe())
        cfg = processes.together(lambda: with_length(cfg, found, processes))
        batch_size = batch_size_of(cfg.batch, found.topology.dp)
        train_iters = cfg.batch.train_iters or train_iters_for(cfg.batch.train_samples or 0, batch_size)
        groups = groups_of(cfg, found.topology, found.model_config, device)
        splits = processes.together(lambda: build_splits(cfg, found, train_iters, processes))
        random_state.seed_all(cfg.precision.seed, found.topology.place(world.rank).pp)
        with shortage_named("in training", _SMALLER):
            run = _Run(cfg, found, splits, device, groups, processes, _teams(cfg, processes), stack, build)
            run.train(batch_size, train_iters, started_s)


def _teams(cfg: RunConfig, processes: Processes) -> tuple[Team, Team]:
    """The processes as readers and writers of folders; and once more, for a save in the background."""
    nodes = processes.nodes if cfg.launch.no_shared_storage else None
    return Team.of(nodes), Team.of(nodes) if cfg.checkpoint.async_save else Team()


def _layout_of(cfg: RunConfig, topology: Topology, processes: Processes) -> dict[str, Any]:
    """What a checkpoint says of the layout: the pieces of a node are another layout's only together with the others."""
    return asdict(cfg.layout) | asdict(topology) | {"nodes": [list(ranks) for ranks in processes.nodes]}


class _Run:
    """What is built once for a run, and the order in which it is used."""

    def __init__(
        self,
        cfg: RunConfig,
        found: Found,
        splits: Splits,
        device: torch.device,
        groups: Groups | None,
        processes: Processes,
        teams: tuple[Team, Team],
        stack: contextlib.ExitStack,
        build: Callable[..., Learner],
    ) -> None:
        self._cfg = cfg
        self._team, self._background_team = teams
        self._layout = _layout_of(cfg, found.topology, processes)
        self._source = agreed(found.source, self._layout, self._team)
        self._model_config = found.model_config
        self._tokenizer = found.tokenizer
        self._splits = splits
        self._device = device
        self._processes = processes
        self._stack = stack
        self._adapting, self._groups = found.adapting, groups
        self._identity = run_identity(cfg, found.model_config, splits)
        self._saved_state = self._read_saved_state()
        self._learner: Learner = build(cfg, found.model_config, self._source, device, groups, stack, self._adapting)
        self._scheduler = self._build_scheduler()

    def _read_saved_state(self) -> dict[str, Any] | None:
        """The state of the checkpoint that the run goes on from; refused if it is of another run."""
        source = self._source
        if self._adapting is not None and source.kind is not Kind.RESUME:
            return None  # its model is where adapters start, and not a run that goes on
        if source.kind is Kind.FOREIGN:
            assert source.stored is not None
            return self._foreign_state(source.stored)
        if source.kind not in (Kind.RESUME, Kind.RUN):
            return None
        assert source.folder is not None and source.iteration is not None
        state = run_checkpoint.read_state(source.folder, source.iteration)
        if state.get("weights_only"):
            return None  # converted, not trained
        flags = self._cfg.checkpoint
        if source.kind is Kind.RESUME and not self._cfg.batch.skip_train:
            where = str(run_checkpoint.iteration_folder(source.folder, source.iteration))
            asked = asked_model(source, flags.load or self._cfg.model.init_from_config)
            others = [] if asked is None else model_differences(self._model_config, asked)
            for difference in check_same_run(state["identity"], self._identity, where, flags.override, others):
                warn_once(f"--override: {difference}")
        if source.kind is Kind.RUN and flags.finetune:
            return None
        if self._restores_optimizer and not source.holds_optimizer():
            raise TesselError(
                f"{run_checkpoint.iteration_folder(source.folder, source.iteration)} was saved without the "
                "optimizer's state (--no-save-optim). Pass --no-load-optim to go on with a fresh optimizer."
            )
        return state

    def _foreign_state(self, stored: StoredModel) -> dict[str, Any] | None:
        taken = foreign.is_of_a_run(stored) and not self._cfg.checkpoint.finetune
        if taken and self._restores_optimizer:
            optimizer = self._cfg.optimizer
            foreign.require_optimizer(stored, optimizer.optimizer == "adam" or optimizer.sgd_momentum > 0)
        for line in foreign.account(stored, taken, self._restores_optimizer):
            log(line)
        return foreign.run_state(stored, self._identity, self._layout) if taken else None

    @property
    def _restores_optimizer(self) -> bool:
        return not self._cfg.checkpoint.no_load_optim and not self._cfg.batch.skip_train

    def _build_scheduler(self) -> Scheduler:
        cfg, schedule = self._cfg, self._cfg.schedule
        if cfg.batch.skip_train:  # nothing moves it, and its flags may be left out
            cfg = replace(cfg, schedule=Schedule(), batch=replace(cfg.batch, train_iters=1, train_samples=None))
        return Scheduler(
            *build_schedules(cfg),
            override=schedule.override_opt_param_scheduler,
            use_checkpoint=schedule.use_checkpoint_opt_param_scheduler,
        )

    def train(self, batch_size: BatchSize, train_iters: int, started_s: float) -> None:
        """Restore what there is to restore, train, save and export."""
        cfg = self._cfg
        position = self._restore()
        self._check_restored_order(position)
        self._describe_loss()
        saver = self._saver(position if self._source.kind is Kind.RESUME else None)
        folder = metrics_path(cfg.checkpoint.save)
        off = tensorboard_tags_off(cfg.logging)
        peers = self._learner.peers
        sinks = build_sinks(cfg.logging, cfg.to_dict(), folder, position.iteration, off) if peers.is_first else []
        for sink in sinks:
            self._stack.callback(sink.close)
        trains = not cfg.batch.skip_train and position.iteration < train_iters
        loaders = {
            name: self._loader(data)
            for name, data in self._splits.by_name().items()
            if data is not None and (trains or name != "train")
        }
        preferences = build_preferences(
            cfg, self._learner, self._model_config, self._adapting, self._device, self._groups, self._stack, loaders
        )
        evaluator = self._evaluator(sinks, position, loaders, preferences)
        if not trains:
            if not cfg.batch.skip_train:
                log(f"all {train_iters} iterations are done already; raise --train-iters to go on")
            evaluator.final(position.iteration, position.consumed_samples)
            reason = None
        else:
            if "train" not in loaders:
                raise TesselError("The data has no training split. Give --split a first share, or --train-data-path.")
            step = self._step(preferences.get("train"))
            parts = self._parts(batch_size, train_iters, loaders["train"], step, evaluator, saver, sinks)
            trainer = Trainer(parts, position, started_s)
            reason = trainer.run()
            if reason is None:
                reason = trainer.finish()
        if cfg.checkpoint.save and reason is None and not cfg.batch.skip_train:
            saver.export_trained()

    def _step(self, preferences: Preferences | None) -> TrainStep:
        cfg = self._cfg
        return TrainStep(
            self._learner.runner,
            self._learner.optimizer,
            self._learner.gradients,
            self._learner.peers,
            self._learner.balance,
            scaler=self._learner.scaler,
            clip_grad=cfg.optimizer.clip_grad,
            per_token_loss=cfg.batch.calculate_per_token_loss,
            z_loss_coeff=cfg.precision.z_loss_coeff,
            count_zeros=cfg.logging.log_num_zeros_in_grad,
            skip_not_finite=cfg.precision.no_check_for_nan_in_loss_and_grad,
            largest_gradient=largest_gradient(cfg.precision),
            logs_trained_loss=cfg.finetune.reads_dialogues,
            preferences=preferences,
        )

    def _parts(
        self,
        batch_size: BatchSize,
        train_iters: int,
        loader: Loader,
        step: TrainStep,
        evaluator: Evaluator,
        saver: RunSaver,
        sinks: list[Any],
    ) -> Parts:
        cfg = self._cfg
        assert cfg.batch.seq_length is not None
        training_log = TrainingLog(
            train_iters,
            log_throughput=cfg.logging.log_throughput,
            flops_per_token=flops_per_token(self._model_config, cfg.batch.seq_length).causal,
            peak_flops=devices.peak_flops(self._device, compute_dtype(cfg.precision)),
            num_devices=self._learner.peers.num_processes,
        )
        return Parts(
            cfg, self._learner, step, self._scheduler, batch_size, train_iters, loader, evaluator, saver,
            training_log, sinks, self._device, self._processes,
        )  # fmt: skip

    def _loader(self, dataset: Any) -> Loader:
        pin = self._device.type != "cpu"
        peers = self._learner.peers
        loader = Loader(
            dataset,
            self._cfg,
            vocab_size=self._model_config.vocab_size,
            pin_memory=pin,
            rank=peers.replica,
            num_ranks=peers.num_replicas,
        )
        return self._stack.enter_context(loader)

    def _evaluator(
        self,
        sinks: list[Any],
        position: Position,
        loaders: Mapping[str, Loader],
        preferences: Mapping[str, Preferences],
    ) -> Evaluator:
        valid = {name.removeprefix("valid"): loader for name, loader in loaders.items() if name.startswith("valid")}
        pairs = {name.replace("valid", "validation", 1): found for name, found in preferences.items()}
        evaluator = Evaluator(self._cfg, self._learner, valid, loaders.get("test"), sinks, self._device, pairs)
        interval = self._cfg.evaluation.eval_interval
        if interval and position.iteration:
            evaluator.resume(position.iteration // interval)
        return evaluator

    def _saver(self, resumed: Position | None) -> RunSaver:
        description = {"identity": self._identity, "config": self._cfg.to_dict(), "layout": self._layout}
        if self._adapting is not None:
            folders = {"base": self._adapting.base.folder, "start": self._adapting.start}
            description["adapters"] = {
                name: None if folder is None else str(folder.absolute()) for name, folder in folders.items()
            }
        return RunSaver(
            self._cfg.checkpoint,
            self._learner,
            self._scheduler,
            self._model_config,
            self._tokenizer.source,
            description,
            self._device,
            resumed.iteration if resumed is not None else None,
            self._source.model_folder,
            formats_of(self._cfg, self._model_config),
            self._team,
            self._background_team,
        )

    def _restore(self) -> Position:
        """Load counters, schedule, optimizer and random state, as far as the flags want them."""
        state, source, flags = self._saved_state, self._source, self._cfg.checkpoint
        if flags.save:
            run_checkpoint.clear_unfinished(Path(flags.save), self._team)
        if state is None:
            return Position()
        assert source.folder is not None and source.iteration is not None
        if self._restores_optimizer:
            if source.stored is not None:
                foreign.load_optimizer(source.stored, self._learner)
            else:
                tensors = self._learner.optimizer_tensors()
                pieces = tiled(tensors, self._learner.tiles)
                run_checkpoint.load_tensors(source.folder, source.iteration, pieces, self._team)
                self._learner.keep_optimizer(tensors)
            for line in frugal.conversions(state.get("config", {}).get("memory", {}), self._cfg.memory):
                log(line)
            self._scheduler.load_state_dict(state["scheduler"])
            if self._learner.scaler is not None and state["scaler"]:
                self._learner.scaler.load_state_dict(state["scaler"])
        rng = None
        if not flags.no_load_rng and source.kind is not Kind.FOREIGN:
            same = state.get("layout", self._layout) == self._layout
            rng = run_checkpoint.read_rng(source.folder, source.iteration, self._team.rank, same)
        if rng is not None:
            random_state.set_state(rng, self._device)
        return Position(state["iteration"], state["consumed_train_samples"])

    def _check_restored_order(self, position: Position) -> None:
        """A longer run over the same data may need another epoch, which changes the order of all samples."""
        before = self._saved_state
        train = self._splits.train
        if before is None or train is None or position.iteration == 0:
            return
        layout = before.get("layout", self._layout)
        num_replicas = Topology(*(layout[degree] for degree in ("world_size", "tp", "pp", "cp"))).dp
        if self._cfg.data.dataloader_type == "cyclic" and num_replicas != self._learner.peers.num_replicas:
            warn_once(
                "--dataloader-type cyclic deals samples out by data-parallel replicas, as Megatron does, and there "
                f"were {num_replicas}: some samples of this epoch may be seen twice before others once"
            )
        order = self._identity["order"]
        if before["identity"].get("order", order) != order:
            warn_once(
                "the number of epochs has changed with the length of the run, and with it the order of the samples, "
                "as in Megatron: some may be seen twice before others once"
            )

    def _describe_loss(self) -> None:
        """Say which rule weighs tokens, where masks make the rules differ, and which positions count for nothing."""
        cfg = self._cfg
        if cfg.data.reset_position_ids and not cfg.data.reset_attention_mask:
            warn_once("--reset-position-ids without --reset-attention-mask: RoPE is not reset, as in Megatron")
        if not (cfg.data.eod_mask_loss or self._tokenizer.pad >= 0):
            return
        per_token = "each token of the global batch counts alike (--calculate-per-token-loss)"
        micro_batches = (
            "the mean of each micro-batch's mean, Megatron's default; "
            "--calculate-per-token-loss counts each token alike, and is recommended"
        )
        log(f"loss: {per_token if cfg.batch.calculate_per_token_loss else micro_batches}")

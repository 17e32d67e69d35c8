"""The training loop: steps, log lines, evaluations, checkpoints, and when to stop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tessel.config.run import RunConfig
from tessel.data.loader import Loader, MicroBatch
from tessel.errors import TesselError
from tessel.runtime import device as devices
from tessel.runtime import watchdog
from tessel.runtime.log import log
from tessel.runtime.process import Processes
from tessel.train import metrics
from tessel.train.batch_size import BatchSize
from tessel.train.evaluation import Evaluator
from tessel.train.learner import Learner
from tessel.train.metrics import LM_LOSS, StepMetrics, TrainingLog
from tessel.train.optimizer import learning_rates
from tessel.train.profiling import Profiler
from tessel.train.progress import RunProgress
from tessel.train.saving import RunSaver
from tessel.train.schedule import Scheduler
from tessel.train.sinks import Sink
from tessel.train.step import StepResult, TrainStep
from tessel.train.stop import StopRequest, signals_stop


@dataclass
class Position:
    """How far a run is."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True)
class Parts:
    """What a trainer works with; built by `pretrain`."""

    cfg: RunConfig
    learner: Learner
    step: TrainStep
    scheduler: Scheduler
    batch_size: BatchSize
    train_iters: int
    train_loader: Loader
    evaluator: Evaluator
    saver: RunSaver
    training_log: TrainingLog
    sinks: list[Sink]
    device: torch.device
    processes: Processes = field(default_factory=Processes)


class Trainer:
    """Runs from a position to the last iteration, or to a reason to stop."""

    def __init__(self, parts: Parts, position: Position, started_s: float) -> None:
        self._parts = parts
        self.position = position
        self._stalled_before_s = 0.0
        self._stop = StopRequest(
            parts.cfg.batch.exit_duration_in_mins,
            parts.cfg.batch.exit_interval,
            started_s=started_s,
            largest=parts.learner.peers.largest_number,
        )

    def run(self) -> str | None:
        """Train. Returns why it stopped early, or None when all iterations are done."""
        parts = self._parts
        devices.reset_peak_memory(parts.device)
        log(metrics.datetime_line("before the start of training step"))
        with (
            _garbage_collection(parts.cfg.kernels.manual_gc),
            signals_stop(self._stop),
            RunProgress(parts.train_iters, self.position.iteration) as progress,
            Profiler(parts.cfg, parts.device, parts.processes.world, self.position.iteration) as profiler,
        ):
            reason = self._loop(progress, profiler)
        log(metrics.datetime_line("after training is done" if reason is None else "exiting program"))
        return reason

    def _loop(self, progress: RunProgress, profiler: Profiler) -> str | None:
        parts, position = self._parts, self.position
        last_size = parts.batch_size.at(position.consumed_samples)
        clock_s = time.perf_counter()
        while position.iteration < parts.train_iters:
            size = parts.batch_size.at(position.consumed_samples)
            if size != last_size:
                self._save(parts.saver.on_new_batch_size)
                last_size = size
            with profiler.iteration(position.iteration + 1):
                result = self._train_on(self._fetch(size), size)
            position.iteration += 1
            position.consumed_samples += size
            now_s = time.perf_counter()
            self._record(result, size, now_s - clock_s, progress)
            clock_s = now_s
            paused_s = time.perf_counter()
            stop = self._after_step()
            # As in Megatron, evaluating and saving are not part of an iteration's time.
            clock_s += time.perf_counter() - paused_s
            if stop is not None:
                return stop
        return None

    def _fetch(self, size: int) -> list[MicroBatch]:
        parts, position = self._parts, self.position
        micro_batch_size = parts.cfg.batch.micro_batch_size
        batches = parts.train_loader.fetch(position.consumed_samples, size, micro_batch_size)
        following = position.consumed_samples + size
        if position.iteration + 1 < parts.train_iters:
            parts.train_loader.prefetch(following, parts.batch_size.at(following), micro_batch_size)
        # From page-locked memory, copies go on beside the computing.
        return [batch.to(parts.device, non_blocking=parts.device.type != "cpu") for batch in batches]

    def _train_on(self, batches: list[MicroBatch], size: int) -> StepResult:
        parts, position = self._parts, self.position
        watchdog.at(position.iteration + 1, "training step")
        parts.scheduler.apply(parts.learner.optimizer.param_groups)
        result = parts.step(batches)
        if not result.is_finite and not result.skipped:
            raise TesselError(self._not_finite(result, batches))
        if not result.skipped:
            parts.scheduler.advance(size)
            parts.scheduler.apply(parts.learner.optimizer.param_groups)
        interval = parts.cfg.kernels.manual_gc_interval
        if parts.cfg.kernels.manual_gc and interval and (position.iteration + 1) % interval == 0:
            gc.collect()
        return result

    def _not_finite(self, result: StepResult, batches: list[MicroBatch]) -> str:
        saved = self._parts.saver.last_good()
        ids = [int(i) for batch in batches for i in batch.sample_ids]
        shown = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        what = f"loss {result.loss}" + ("" if result.grad_norm is None else f", grad norm {result.grad_norm}")
        return (
            f"iteration {self.position.iteration + 1}: {what} is not finite; the step was not taken. "
            f"It trained on samples {shown} (tessel samples shows them). "
            f"The last good checkpoint is {saved if saved is not None else 'none: nothing was saved yet'}. Lower --lr, "
            "look at the data, or pass --no-check-for-nan-in-loss-and-grad to skip such steps."
        )

    def _record(self, result: StepResult, size: int, elapsed_s: float, progress: RunProgress) -> None:
        parts, position = self._parts, self.position
        rate, decoupled_rate = learning_rates(parts.learner.optimizer)
        norm = None
        if parts.cfg.logging.log_params_norm:
            norm = parts.learner.gradients.params_norm()
        step = StepMetrics(
            iteration=position.iteration,
            consumed_samples=position.consumed_samples,
            global_batch_size=size,
            num_tokens=result.num_tokens,
            elapsed_s=elapsed_s,
            losses={LM_LOSS: result.loss},
            router=result.router,
            learning_rate=rate,
            decoupled_learning_rate=decoupled_rate,
            loss_scale=parts.step.scaler.scale if parts.step.scaler is not None else 1.0,
            skipped=result.skipped,
            grad_norm=result.grad_norm,
            num_zeros=result.num_zeros,
            params_norm=norm,
            data_wait_s=parts.train_loader.stall_s - self._stalled_before_s,
        )
        self._stalled_before_s = parts.train_loader.stall_s
        parts.training_log.add(step)
        values = step.values() | {
            "tokens-per-s": step.num_tokens / elapsed_s,
            "loader-stall-s": parts.train_loader.stall_s,
            "peak-memory-bytes": devices.peak_memory_bytes(parts.device),
        }
        for sink in parts.sinks:
            sink.log(values, position.iteration, position.consumed_samples)
        interval = parts.cfg.logging.log_interval
        if interval and position.iteration % interval == 0:
            log(parts.training_log.line(step, peak_memory_bytes=devices.peak_memory_bytes(parts.device)))
        progress.update(position.iteration, result.loss, values["tokens-per-s"])

    def _after_step(self) -> str | None:
        """Evaluate and save where it is time to; a reason to stop, if there is one."""
        parts, iteration = self._parts, self.position.iteration
        interval = parts.cfg.evaluation.eval_interval
        if interval and iteration % interval == 0:
            watchdog.at(iteration, "evaluation")
            parts.evaluator.validate(iteration, self.position.consumed_samples, self._stop.signalled)
        self._save(parts.saver.after_iteration)
        reason = self._stop.reason(iteration, is_last=iteration >= parts.train_iters)
        if reason is not None:
            self._save(parts.saver.before_exit)
            log(f"exiting after iteration {iteration}: {reason}")
        return reason

    def finish(self) -> str | None:
        """After the last iteration: the last checkpoint, and evaluation on both sets.

        Returns why it was cut short, or None. The run is whole then, but for what follows the iterations.
        """
        parts, position = self._parts, self.position
        with signals_stop(self._stop):
            self._save(parts.saver.before_exit)
            watchdog.at(position.iteration, "last evaluation")
            parts.evaluator.final(position.iteration, position.consumed_samples, self._stop.signalled)
        if not self._stop.signalled():
            return None
        log(
            f"exiting after iteration {position.iteration}: received {self._stop.signal_name}; the same command "
            "evaluates and writes the Hugging Face folder"
        )
        return f"received {self._stop.signal_name}"

    def _save(self, save: Callable[[int, int], None]) -> None:
        watchdog.at(self.position.iteration, "save")
        save(self.position.iteration, self.position.consumed_samples)


@contextmanager
def _garbage_collection(manual: bool) -> Iterator[None]:
    """Python's collector off while inside, if `manual`."""
    if not manual:
        yield
        return
    gc.disable()
    gc.collect()
    try:
        yield
    finally:
        gc.enable()


def metrics_path(save: str | None) -> Path | None:
    """Where the run's JSONL lies."""
    return Path(save) / "metrics.jsonl" if save else None

"""Evaluation during and after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tessel.config.run import RunConfig
from tessel.data.loader import Loader, MicroBatch
from tessel.parallel.apply import release_gathered
from tessel.runtime import watchdog
from tessel.runtime.log import log
from tessel.train import metrics
from tessel.train.learner import Learner
from tessel.train.metrics import LM_LOSS
from tessel.train.preference import Preferences
from tessel.train.sinks import TEST, VALIDATION, Sink
from tessel.train.step import evaluation_sums

FINAL_VALIDATION = "final_validation"
Stopped = Callable[[], bool]


def never() -> bool:
    """Nothing stops the evaluation."""
    return False


class Evaluator:
    """Goes through the validation sets from one evaluation to the next, as Megatron does.

    `valid` has them by what is added to "validation" in the log: nothing for a single one, "-NAME" for several.
    """

    def __init__(
        self,
        cfg: RunConfig,
        learner: Learner,
        valid: Mapping[str, Loader],
        test: Loader | None,
        sinks: Sequence[Sink],
        device: torch.device,
        preferences: Mapping[str, Preferences] | None = None,
    ) -> None:
        """`preferences`: what measures pairs of answers, by the names of the sets that hold some."""
        self._learner = learner
        self._loaders = {f"validation{suffix}": loader for suffix, loader in valid.items()}
        if test is not None:
            self._loaders["test"] = test
        self._preferences = preferences or {}
        self._sinks = sinks
        self._device = device
        self._micro_batch_size = cfg.batch.micro_batch_size
        self._global_batch_size = cfg.batch.global_batch_size or cfg.batch.micro_batch_size
        self._num_iters = cfg.evaluation.eval_iters or 0
        self._whole_set = cfg.evaluation.full_validation
        self._by_micro_batch = cfg.finetune.reads_dialogues and not cfg.batch.calculate_per_token_loss
        self._has_an_end = cfg.data.dataloader_type != "cyclic"
        self._consumed_samples = dict.fromkeys(self._loaders, 0)

    def resume(self, num_evaluations: int) -> None:
        """Go on after `num_evaluations` evaluations of an earlier start."""
        for split in self._consumed_samples:
            if split != "test":
                self._consumed_samples[split] = num_evaluations * self._num_iters * self._global_batch_size

    def validate(self, iteration: int, consumed_samples: int, stopped: Stopped = never) -> None:
        """Evaluate on the validation sets, print and log it; given up once `stopped()`."""
        self._report(f"iteration {iteration}", iteration, consumed_samples, VALIDATION, stopped)

    def final(self, iteration: int, consumed_samples: int, stopped: Stopped = never) -> None:
        """After training: the validation sets once more, then the test set; given up once `stopped()`."""
        for split, kind in (("validation", FINAL_VALIDATION), ("test", TEST)):
            self._report(f"iteration {iteration} on {split} set", iteration, consumed_samples, kind, stopped)

    def _report(self, where: str, iteration: int, consumed_samples: int, kind: str, stopped: Stopped) -> None:
        values: dict[str, float] = {}
        for name in self._loaders:
            if (name == "test") != (kind == TEST):
                continue
            figures = self._evaluate(name, stopped)
            if figures is None:
                continue
            losses = {LM_LOSS: figures.pop(LM_LOSS)}
            suffix = "" if kind == TEST else name.removeprefix("validation")
            for line in metrics.evaluation_lines(where, losses, suffix, figures):
                log(line)
            values |= metrics.evaluation_values(losses, name)
            values |= {f"{figure} {name}": value for figure, value in figures.items()}
        if values:
            for sink in self._sinks:
                sink.log(values, iteration, consumed_samples, kind)

    def _evaluate(self, split: str, stopped: Stopped) -> dict[str, float] | None:
        """Mean nll over loss-bearing tokens, or of pairs the means of their loss and figures.

        None without data or iterations, or when cut short. The position in the set is then as after a whole
        evaluation, so that a run that goes on takes the next part.
        """
        loader = self._loaders[split]
        if self._num_iters == 0:
            return None
        parts = self._learner.parts
        for part in parts:
            part.eval()
        sums, count = {LM_LOSS: 0.0}, 0.0
        try:
            for start, size, micro_batch_size in self._batches(split, len(loader)):
                if stopped():
                    return None
                batches = [batch.to(self._device) for batch in self._fetch(loader, start, size, micro_batch_size)]
                number, found = self._sums(split, batches)
                count += number
                sums |= {name: sums.get(name, 0.0) + value for name, value in found.items()}
                watchdog.goes_on()
        finally:
            for part in parts:
                release_gathered(part)
                part.train()
        return {name: total / max(count, 1.0) for name, total in sums.items()}

    def _sums(self, split: str, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, float]]:
        """How much counts in a global batch, and the sums over it."""
        if split in self._preferences:
            num_pairs, loss, figures = self._preferences[split].measure(batches)
            return num_pairs, {name: value * num_pairs for name, value in {LM_LOSS: loss, **figures}.items()}
        nll, num_tokens = evaluation_sums(
            self._learner.runner, batches, self._learner.peers, by_micro_batch=self._by_micro_batch
        )
        return num_tokens, {LM_LOSS: nll}

    def _fetch(self, loader: Loader, start: int, size: int, micro_batch_size: int) -> list[MicroBatch]:
        if size % (micro_batch_size * self._learner.peers.num_replicas):
            return loader.fetch_rest(start, size)
        return loader.fetch(start, size, micro_batch_size)

    def _batches(self, split: str, num_samples: int) -> list[tuple[int, int, int]]:
        """(first sample, number of samples, micro-batch size) of what the next evaluation reads."""
        size, micro = self._global_batch_size, self._micro_batch_size
        if self._whole_set:
            rest = num_samples % (micro * self._learner.peers.num_replicas)
            whole = [(start, min(size, num_samples - rest - start)) for start in range(0, num_samples - rest, size)]
            return [(start, count, micro) for start, count in whole] + (
                [(num_samples - rest, rest, rest if self._learner.peers.num_replicas == 1 else micro)] if rest else []
            )
        batches = []
        for _ in range(self._num_iters):
            start = self._consumed_samples[split]
            if self._has_an_end and start + size > num_samples >= size:
                # A resumed run may ask for more than there is: it goes through the set again.
                start = 0
            batches.append((start, size, micro))
            self._consumed_samples[split] = start + size
        return batches

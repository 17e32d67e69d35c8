"""What a rank writes down about its run, beside the run's own output."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tessel.data.loader import MicroBatch
from tessel.train import step as steps


@contextmanager
def recording_samples(folder: Path, rank: int) -> Iterator[None]:
    """The sample ids of every training step, and the replica that this rank belongs to."""
    record: dict[str, Any] = {"replica": 0, "steps": []}
    take_step = steps.TrainStep.__call__

    def recorded(self: steps.TrainStep, batches: Sequence[MicroBatch]) -> steps.StepResult:
        record["replica"] = self._peers.replica
        record["steps"].append([i for batch in batches for i in batch.sample_ids])
        return take_step(self, batches)

    steps.TrainStep.__call__ = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        steps.TrainStep.__call__ = take_step  # type: ignore[method-assign]
        (folder / f"{rank}.samples.json").write_text(json.dumps(record))


def around(recorder: str | None, folder: Path, rank: int) -> AbstractContextManager[None]:
    """The context manager that "module:name" names; one that does nothing for None."""
    if recorder is None:
        return nullcontext()
    module, _, name = recorder.partition(":")
    made: AbstractContextManager[None] = getattr(importlib.import_module(module), name)(folder, rank)
    return made

"""What a training step sends, counted in whole runs: no more than the textbook's volume of each axis."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.model.config import ModelConfig
from tests.layouts.harness import train
from tests.layouts.layouts import arguments, marked, model_folder

SLACK = 1.05
LAYERS, SEQUENCE, HIDDEN, FP32_BYTES = 4, 32, 32, 4
STEP_MICRO_BATCHES = 8
HIDDEN_BYTES = SEQUENCE * HIDDEN * FP32_BYTES  # of one micro-batch of one sequence


def parameter_bytes(work: Path) -> int:
    """All parameters in fp32."""
    from tessel.layout.sharding import parameters

    rules = parameters(ModelConfig.from_folder(model_folder(work, "qwen2")))
    elements = 0
    for rule in rules.values():
        size = 1
        for extent in rule.shape:
            size *= extent
        elements += size
    return elements * FP32_BYTES


def tensor_parallel(work: Path) -> float:
    """4 all-reduces a layer, one of the embedding and one before the head; 8 bytes a token for the loss; n = 2."""
    del work
    return STEP_MICRO_BATCHES * ((4 * LAYERS + 2) * HIDDEN_BYTES + 8 * SEQUENCE)


def all_reduced(work: Path) -> float:
    """One all-reduce of all gradients."""
    return parameter_bytes(work)


def sharded_optimizer(work: Path) -> float:
    """One reduce-scatter of gradients and one all-gather of parameters."""
    return parameter_bytes(work)


def sharded_gradients(work: Path) -> float:
    """A reduce-scatter for each of a replica's 4 micro-batches, and one all-gather."""
    return parameter_bytes(work) / 2 * (4 + 1)


def sharded_parameters(work: Path) -> float:
    """For each of a replica's 4 micro-batches two all-gathers and a reduce-scatter."""
    return parameter_bytes(work) / 2 * 4 * 3


def ring(work: Path) -> float:
    """Half of K and V forward, and half of them and of their gradients back; and the gradients of all parameters."""
    keys_and_values = 2 * SEQUENCE * (2 * 4) * FP32_BYTES  # two heads of four
    return STEP_MICRO_BATCHES * LAYERS * 3 * keys_and_values / 2 + parameter_bytes(work)


def ulysses(work: Path) -> float:
    """Half of this rank's Q, K, V and O, forward and again back; and the gradients of all parameters."""
    own = (2 * HIDDEN + 2 * 2 * 4) * SEQUENCE / 2 * FP32_BYTES
    return STEP_MICRO_BATCHES * LAYERS * 2 * own / 2 + parameter_bytes(work)


def pipeline(work: Path) -> float:
    """Hidden states of every micro-batch one way: forward from the first stage, back from the last."""
    del work
    return STEP_MICRO_BATCHES * HIDDEN_BYTES


_SHARD = "--data-parallel-sharding-strategy "
VOLUMES: dict[str, Callable[[Path], float]] = {
    "--tensor-model-parallel-size 2": tensor_parallel,
    "--tensor-model-parallel-size 2 --sequence-parallel": tensor_parallel,
    _SHARD + "no_shard": all_reduced,
    _SHARD + "optim": sharded_optimizer,
    _SHARD + "optim_grads": sharded_gradients,
    _SHARD + "optim_grads_params": sharded_parameters,
    "--context-parallel-size 2": ring,
    "--context-parallel-size 2 --cp-comm-type a2a": ulysses,
    "--context-parallel-size 2 --cp-comm-type allgather": ring,
    "--pipeline-model-parallel-size 2": pipeline,
}


_QUICK = frozenset(
    {
        "--tensor-model-parallel-size 2 --sequence-parallel",
        _SHARD + "optim",
        "--context-parallel-size 2",
        "--pipeline-model-parallel-size 2",
    }
)


@pytest.mark.parametrize("flags", marked(VOLUMES, _QUICK, key=str))
def test_a_step_sends_no_more_than_the_textbook(flags: str, tmp_path: Path) -> None:
    save = tmp_path / "run"
    recorder = "tests.layouts.recorders:counting_bytes"
    train(2, [*arguments(flags, "qwen2", "plain", tmp_path), "--exit-interval", "2"], save, recorder=recorder)
    textbook = VOLUMES[flags](tmp_path)
    for rank in range(2):
        steps = json.loads((tmp_path / "run.ranks" / f"{rank}.bytes.json").read_text())
        sent = sum(steps[-1].values())
        assert 0.5 * textbook <= sent <= SLACK * textbook, (rank, steps[-1])

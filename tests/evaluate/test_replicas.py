"""Several processes: copies of the model that share the questions, and parts of one that answer together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from tessel.config.evaluate import EvaluateConfig
from tessel.config.verbs import Loading
from tessel.errors import UsageError
from tessel.evaluate.command import evaluate
from tessel.evaluate.replica import Replica
from tessel.generate import load as loads
from tessel.layout.topology import Topology
from tessel.runtime.log import voice
from tests.evaluate.sets import write_letter_set
from tests.parallel.processes import run


@contextmanager
def joined(*_: Any) -> Iterator[Any]:
    """The process group that the test has made already."""
    from tessel.runtime.process import Processes
    from tessel.runtime.world import World

    yield Processes(World.from_environment(), control=distributed.group.WORLD)


def evaluated(cfg: EvaluateConfig, world_size: int) -> dict[str, Any] | None:
    """An evaluation, as one of several processes."""
    rank = str(distributed.get_rank())
    os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    loads.process_group = joined  # type: ignore[assignment]
    voice.speak_as(int(rank))
    return evaluate(cfg)


@pytest.mark.parametrize(("tp", "rule"), [(1, "choice"), (2, "generate")])
def test_processes_together_give_the_results_of_one(
    tp: int, rule: str, tiny_hf_folder: Callable[..., Path], tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, max_position_embeddings=2048)
    data = write_letter_set(tmp_path / "mmlu", "mmlu", ("anatomy", "virology"), number=5)

    def cfg(degree: int, output: Path) -> EvaluateConfig:
        return EvaluateConfig(
            task=("mmlu",), rule=rule, num_fewshot=1, data_path=str(data), output=str(output), max_new_tokens=2,
            loading=Loading(load=str(model), device="cpu", tensor_model_parallel_size=degree),
        )  # fmt: skip

    alone = evaluate(cfg(1, tmp_path / "alone"))
    for found in run(2, evaluated, cfg(tp, tmp_path / "together"), 2):
        assert found == alone
    rows = [(tmp_path / name / "questions.jsonl").read_text().splitlines() for name in ("alone", "together")]
    assert len(rows[0]) == len(rows[1]) == 10
    if rule == "generate":
        assert rows[0] == rows[1]
    assert not list((tmp_path / "together").glob("questions.0*"))


def test_replicas_that_share_experts_are_refused() -> None:
    assert Replica.of(Topology(4, tp=2), 3) == Replica(1, 2, False)
    with pytest.raises(UsageError, match="deals experts out over replicas"):
        Replica.of(Topology(4, ep=2), 0)

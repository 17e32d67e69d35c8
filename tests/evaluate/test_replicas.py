"""Several processes: copies of the model that share the questions, and parts of one that answer together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.config.evaluate import EvaluateConfig
from tessel.config.verbs import Loading
from tessel.evaluate.command import evaluate
from tessel.evaluate.replica import Replica
from tessel.layout.topology import Topology
from tests.evaluate.sets import write_letter_set
from tests.parallel.processes import run
from tests.parallel.verbs import join


def evaluated(cfg: EvaluateConfig) -> dict[str, Any] | None:
    """An evaluation, as one of several processes."""
    join()
    return evaluate(cfg)


LAYOUTS: dict[str, dict[str, int]] = {
    "copies": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
}


@pytest.mark.parametrize(
    ("layout", "rule"),
    [("copies", "choice"), ("TP2", "generate"), ("PP2", "choice"), ("PP2", "generate"), ("EP2", "generate")],
)
def test_processes_together_give_the_results_of_one(
    layout: str, rule: str, tiny_hf_folder: Callable[..., Path], tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    family, more = ("qwen3_moe", {"num_experts": 4}) if layout == "EP2" else ("qwen2", {})
    model = tiny_hf_folder(family, tokenizer=tiny_tokenizer_folder, max_position_embeddings=2048, **more)
    data = write_letter_set(tmp_path / "mmlu", "mmlu", ("anatomy", "virology"), number=5)

    def cfg(output: Path, **degrees: int) -> EvaluateConfig:
        return EvaluateConfig(
            task=("mmlu",), rule=rule, num_fewshot=1, data_path=str(data), output=str(output), max_new_tokens=2,
            loading=Loading(load=str(model), device="cpu", **degrees),
        )  # fmt: skip

    alone = evaluate(cfg(tmp_path / "alone"))
    for found in run(2, evaluated, cfg(tmp_path / "together", **LAYOUTS[layout])):
        assert found == alone
    rows = [(tmp_path / name / "questions.jsonl").read_text().splitlines() for name in ("alone", "together")]
    assert len(rows[0]) == len(rows[1]) == 10
    if rule == "generate":
        assert rows[0] == rows[1]
    assert not list((tmp_path / "together").glob("questions.0*"))


def test_replicas_that_share_experts_are_one() -> None:
    assert [Replica.of(Topology(4, tp=2), rank).number for rank in range(4)] == [0, 0, 1, 1]
    shared = [Replica.of(Topology(4, ep=2), rank) for rank in range(4)]
    assert shared == [Replica(0, 2, True), Replica(0, 2, False), Replica(1, 2, True), Replica(1, 2, False)]

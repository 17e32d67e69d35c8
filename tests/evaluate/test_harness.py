"""lm-evaluation-harness with tessel's model and with its own `--model hf`: question by question the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.cli import main
from tessel.errors import TesselError, UsageError
from tessel.evaluate.harness_data import data_dirs
from tests.evaluate.sets import write_gsm8k, write_letter_set

MakeFolder = Callable[..., Path]


def folders(root: Path) -> list[str]:
    """--data-dir of four sets."""
    write_letter_set(root / "mmlu", "mmlu", ("anatomy", "virology"))
    write_letter_set(root / "ceval", "ceval", ("accountant",))
    write_letter_set(root / "cmmlu", "cmmlu", ("agronomy", "arts"))
    write_gsm8k(root / "gsm8k")
    names = {"mmlu": "mmlu", "ceval-valid": "ceval", "cmmlu": "cmmlu", "gsm8k": "gsm8k"}
    return [f"{task}={root / folder}" for task, folder in names.items()]


TASKS = ["mmlu_anatomy", "mmlu_virology", "ceval-valid_accountant", "cmmlu_agronomy", "cmmlu_arts", "gsm8k"]


def scores_of(rows: list[dict[str, Any]]) -> dict[int, tuple[Any, list[Any]]]:
    """Question -> (what it scored, what the model gave)."""
    found = {}
    for row in rows:
        metric = row.get("acc", row.get("exact_match"))
        key = (row["doc_id"], row["filter"])
        found[key] = (float(metric), [response[0] for response in row["resps"]])
    return found


@pytest.mark.slow
def test_every_question_scores_as_with_the_harness_own_model(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'tessel[harness]')")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from tessel.evaluate.harness_data import write_leaves

    model = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, max_position_embeddings=4096, eos_token_id=305)
    data = folders(tmp_path / "data")
    output = tmp_path / "out"
    arguments = ["--load", str(model), "--task", *TASKS, "--data-dir", *data, "--output", str(output)]
    assert not main(["evaluate", "--harness", *arguments, "--num-fewshot", "2", "--device", "cpu"])

    leaves = tmp_path / "leaves"
    leaves.mkdir()
    known = {name: entry.yaml_path for name, entry in TaskManager().task_index.items() if entry.yaml_path}
    write_leaves(leaves, data_dirs(data), known)
    wanted = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3),
        tasks=TASKS,
        num_fewshot=2,
        task_manager=TaskManager(include_path=str(leaves)),
        bootstrap_iters=0,
    )
    for task in TASKS:
        rows = [json.loads(line) for line in (output / f"samples_{task}.jsonl").read_text().splitlines()]
        ours, theirs = scores_of(rows), scores_of(wanted["samples"][task])
        assert ours.keys() == theirs.keys() and ours
        for key in ours:
            assert ours[key][0] == theirs[key][0]
            for own, other in zip(ours[key][1], theirs[key][1], strict=True):
                if task == "gsm8k":
                    assert own == other
                else:
                    assert float(own[0]) == pytest.approx(float(other[0]), abs=1e-4) and bool(own[1]) == bool(other[1])


@pytest.mark.slow
def test_choice_has_the_prompts_and_scores_of_the_harness(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    """`--rule choice` against the harness's own tasks, whose prompts its YAMLs write."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'tessel[harness]')")
    model = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, max_position_embeddings=4096, eos_token_id=305)
    data, output = folders(tmp_path / "data"), tmp_path / "out"
    common = ["--load", str(model), "--num-fewshot", "3", "--device", "cpu"]
    assert not main(
        ["evaluate", "--harness", *common, "--task", *TASKS[:5], "--data-dir", *data, "--output", str(output)]
    )
    for task, group in (("mmlu", "mmlu"), ("ceval", "ceval-valid"), ("cmmlu", "cmmlu")):
        own = tmp_path / task
        folder = tmp_path / "data" / task
        assert not main(["evaluate", *common, "--task", task, "--data-path", str(folder), "--output", str(own)])
        for row in map(json.loads, (own / "questions.jsonl").read_text().splitlines()):
            samples = (output / f"samples_{group}_{row['subject']}.jsonl").read_text().splitlines()
            (sample,) = (found for found in map(json.loads, samples) if found["doc_id"] == row["index"])
            theirs = [float(response[0][0]) for response in sample["resps"]]
            assert list(row["scores"].values()) == pytest.approx(theirs, abs=1e-4)
            assert row["correct"] == bool(sample["acc"])


def test_data_dir_is_task_and_folder(tmp_path: Path) -> None:
    assert data_dirs([f"ceval={tmp_path}"]) == {"ceval-valid": tmp_path}
    with pytest.raises(UsageError, match="write TASK=DIR"):
        data_dirs([str(tmp_path)])
    with pytest.raises(UsageError, match="twice"):
        data_dirs([f"mmlu={tmp_path}", f"mmlu={tmp_path}"])
    with pytest.raises(TesselError, match="no_such"):
        data_dirs([f"mmlu={tmp_path}/no_such"])

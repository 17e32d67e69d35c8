"""The loss and the rewards of pairs as TRL's own trainer computes them, where that is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessel.cli import main
from tests.train.runs import NULL_TOKENIZER
from tests.train.test_dpo import pairs_of, write_pairs

pytestmark = pytest.mark.slow
NUM_PAIRS = 8


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_a_step_is_trls(
    loss_type: str, tiny_hf_folder: Callable[..., Path], tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl datasets")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [tiny_hf_folder("qwen2", seed=seed) for seed in (0, 1)]
    data = write_pairs(tmp_path / "pairs", NUM_PAIRS)
    rows = [
        {
            "prompt_ids": chosen[0][: int((chosen[1] < 0).sum())].tolist(),
            "chosen_ids": chosen[0][chosen[1] >= 0].tolist(),
            "rejected_ids": rejected[0][rejected[1] >= 0].tolist(),
        }
        for chosen, rejected in pairs_of(data)
    ]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            str(tmp_path / "trl"), loss_type=[loss_type], beta=0.2, use_cpu=True, bf16=False, report_to="none"
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
        processing_class=AutoTokenizer.from_pretrained(tiny_tokenizer_folder),
    )
    loss = trainer.compute_loss(policy.train(), trainer.data_collator(rows))
    figures = trainer._metrics["train"]

    argv = ["dpo", "--load", str(folders[0]), "--ref-model", str(folders[1]), "--data", str(data), *NULL_TOKENIZER]
    argv += ["--dpo-loss-type", loss_type, "--dpo-beta", "0.2", "--save", str(tmp_path / "run"), "--device", "cpu"]
    argv += "--split 100,0,0 --lr 1e-6 --train-iters 1 --no-shuffle --seq-length 64 --no-save-optim".split()
    assert main([*argv, "--global-batch-size", str(NUM_PAIRS), "--micro-batch-size", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line["kind"] == "train")
    assert step["lm_loss"] == pytest.approx(float(loss), rel=1e-5)
    if loss_type == "ipo":
        return  # TRL's rewards are of sums even there, and ours of the means that the loss is of
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert step[name] == pytest.approx(figures[name][0], rel=1e-5, abs=1e-6), name

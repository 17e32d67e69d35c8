"""Ten steps on dialogues beside transformers, and peft: a plain loop over the same samples, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tessel.cli import main
from tessel.data.indexed import IndexedDataset
from tests.data.instruct.dialogues import prefixes, write_dialogues
from tests.train.runs import NULL_TOKENIZER, losses, tessel

MakeFolder = Callable[..., Path]
LENGTHS = [9, 20, 33, 12, 14, 7, 31, 28, 25, 11, 8, 30]
STEPS, GLOBAL_BATCH, MICRO_BATCH = 10, 4, 2
PER_TOKEN = "--calculate-per-token-loss"


def arguments(folder: Path, data: Path, save: Path, *more: str) -> list[str]:
    common = f"""sft --load {folder} --data {data} --save {save} --split 100,0,0 --eval-iters 0 --device cpu
        --no-shuffle --train-iters {STEPS} --global-batch-size {GLOBAL_BATCH} --micro-batch-size {MICRO_BATCH} --lr 3e-3
        --lr-decay-style constant --lr-warmup-fraction 0 --weight-decay 0.1 --seq-length 48"""
    return [*common.split(), *NULL_TOKENIZER, *more]


def plain_loop(model: Any, data: Path, per_token: bool) -> list[float]:
    """The losses; by default the mean over micro-batches of each one's mean over tokens."""
    ids, labels = (IndexedDataset(prefixes(data)[key]) for key in ("input_ids", "labels"))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 3e-3, betas=(0.9, 0.999), eps=1e-8)
    found = []
    for step in range(STEPS):
        sums, counts = [], []
        for i in range(GLOBAL_BATCH):
            sample = (step * GLOBAL_BATCH + i) % len(LENGTHS)
            tokens, wanted = (torch.tensor(dataset.get(sample)).long() for dataset in (ids, labels))
            logits = model(tokens[None, :-1]).logits[0]
            sums.append(F.cross_entropy(logits, wanted[1:], ignore_index=-100, reduction="sum"))
            counts.append((wanted[1:] >= 0).sum())
        size = GLOBAL_BATCH if per_token else MICRO_BATCH
        means = torch.stack(sums).view(-1, size).sum(1) / torch.stack(counts).view(-1, size).sum(1)
        loss = means.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("adapters", "more"), [(False, []), (False, [PER_TOKEN]), (True, [PER_TOKEN])], ids=["full", "per token", "LoRA"]
)
def test_ten_steps(adapters: bool, more: list[str], tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_hf_folder("qwen2")
    data = write_dialogues(tmp_path / "data", LENGTHS, num_turns=2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        model.save_pretrained(tmp_path / "start")
        more = [*more, "--lora-load", str(tmp_path / "start")]
    assert main(arguments(folder, data, tmp_path / "run", *more)) == 0
    assert losses(tmp_path / "run") == pytest.approx(plain_loop(model, data, PER_TOKEN in more), rel=1e-5)


@pytest.mark.layouts
@pytest.mark.parametrize("more", [[], ["--lora-r", "4"]], ids=["full", "LoRA"])
def test_two_by_two_processes_train_as_one(more: list[str], tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    folder = tiny_hf_folder("qwen2")
    data = write_dialogues(tmp_path / "data", LENGTHS, num_turns=2)
    assert main(arguments(folder, data, tmp_path / "one", *more)) == 0
    layout = "--nproc-per-node 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
    tessel(arguments(folder, data, tmp_path / "four", *more, *layout))
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)

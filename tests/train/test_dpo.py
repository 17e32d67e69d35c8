"""Preferences: the losses as published, their gradients, whole runs beside a plain loop, layouts, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tessel.cli import main
from tessel.config.dpo import Preference
from tessel.data.indexed import IndexedDataset
from tessel.train.preference import preference_loss
from tests.data.instruct.dialogues import write_pairs
from tests.train.runs import NULL_TOKENIZER, tessel

MakeFolder = Callable[..., Path]
PAIRS = (torch.tensor([0, 1]), torch.tensor([2, 3]))
POLICY = torch.tensor([-10.0, -20.0, -12.0, -15.0], dtype=torch.float64)
REFERENCE = torch.tensor([-11.0, -19.0, -10.0, -16.0], dtype=torch.float64)
COUNTS = torch.tensor([5.0, 10.0, 4.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # D = (1 - (-2), -1 - 1) = (3, -2)
        (Preference(), [-F.logsigmoid(torch.tensor(0.3)), -F.logsigmoid(torch.tensor(-0.2))]),
        (
            Preference(dpo_label_smoothing=0.1),
            [
                -0.9 * F.logsigmoid(torch.tensor(0.3)) - 0.1 * F.logsigmoid(torch.tensor(-0.3)),
                -0.9 * F.logsigmoid(torch.tensor(-0.2)) - 0.1 * F.logsigmoid(torch.tensor(0.2)),
            ],
        ),
        (Preference(dpo_loss_type="hinge", dpo_beta=0.5), [0.0, 2.0]),
        # means: D = (1/5 - (-2/4), -1/10 - 1/5) = (0.7, -0.3)
        (Preference(dpo_loss_type="ipo"), [(0.7 - 5) ** 2, (-0.3 - 5) ** 2]),
        (
            Preference(pref_ftx=0.5),
            [-F.logsigmoid(torch.tensor(0.3)) + 0.5 * 2, -F.logsigmoid(torch.tensor(-0.2)) + 0.5 * 2],
        ),
    ],
)
def test_losses_are_the_published_ones(options: Preference, expected: list[Any]) -> None:
    loss, gradient, figures = preference_loss(options, POLICY, REFERENCE, COUNTS, PAIRS)
    assert loss == pytest.approx(sum(float(value) for value in expected) / 2, rel=1e-6)
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-6
        up = preference_loss(options, POLICY + step, REFERENCE, COUNTS, PAIRS)[0]
        down = preference_loss(options, POLICY - step, REFERENCE, COUNTS, PAIRS)[0]
        assert float(gradient[i]) == pytest.approx((up - down) / 2e-6, abs=1e-6)
    if options == Preference():
        assert figures["rewards/accuracies"] == 0.5
        assert figures["rewards/margins"] == pytest.approx(0.05)


@pytest.fixture
def flags(tiny_hf_folder: MakeFolder, tmp_path: Path) -> list[str]:
    data = write_pairs(tmp_path / "pairs", 8)
    run = ["dpo", "--load", str(tiny_hf_folder("qwen2")), "--data", str(data), *NULL_TOKENIZER, "--device", "cpu"]
    run += "--split 100,0,0 --lr 1e-2 --lr-decay-style constant --lr-warmup-fraction 0 --weight-decay 0".split()
    return [*run, *"--train-iters 3 --global-batch-size 4 --micro-batch-size 2 --no-shuffle --seq-length 64".split()]


def steps(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


Answer = tuple[torch.Tensor, torch.Tensor]


def pairs_of(prefix: Path) -> list[tuple[Answer, Answer]]:
    """Ids and labels of each chosen and each rejected answer, in order."""
    rows = []
    for side in ("chosen", "rejected"):
        ids, labels = (IndexedDataset(f"{prefix}_packed_{side}_{what}_document") for what in ("input_ids", "labels"))
        rows.append([(torch.tensor(ids.get(i)), torch.tensor(labels.get(i))) for i in range(len(ids))])
    return list(zip(*rows, strict=True))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_a_run_is_a_plain_loop(loss_type: str, flags: list[str], tmp_path: Path) -> None:
    """transformers, autograd through the whole loss, AdamW."""
    from transformers import AutoModelForCausalLM

    assert main([*flags, "--save", str(tmp_path / "run"), "--dpo-loss-type", loss_type]) == 0
    policy, reference = (AutoModelForCausalLM.from_pretrained(flags[2], dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def logp(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logps = model(ids[None].long()).logits[0, :-1].log_softmax(-1)
        mask = labels[1:] >= 0
        found = logps.gather(1, labels[1:].clamp(min=0).long()[:, None])[:, 0][mask]
        return found.mean() if loss_type == "ipo" else found.sum()

    theirs = []
    pairs = pairs_of(tmp_path / "pairs")
    for step in range(3):
        losses = []
        for i in range(4):
            chosen, rejected = pairs[(4 * step + i) % 8]
            with torch.no_grad():
                before = logp(reference, *chosen) - logp(reference, *rejected)
            difference = logp(policy, *chosen) - logp(policy, *rejected) - before
            losses.append(
                {
                    "sigmoid": lambda d: -F.logsigmoid(0.1 * d),
                    "hinge": lambda d: F.relu(1 - 0.1 * d),
                    "ipo": lambda d: (d - 5) ** 2,
                }[loss_type](difference)
            )
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert [line["lm_loss"] for line in steps(tmp_path / "run")] == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize(
    "layout",
    [
        "--nproc-per-node 2 --pipeline-model-parallel-size 2",
        pytest.param("--nproc-per-node 2 --context-parallel-size 2", marks=pytest.mark.layouts),
        pytest.param("--nproc-per-node 2 --tensor-model-parallel-size 2", marks=pytest.mark.layouts),
        pytest.param("--nproc-per-node 2", marks=pytest.mark.layouts),
    ],
)
def test_any_layout_learns_the_same(layout: str, flags: list[str], tmp_path: Path) -> None:
    assert main([*flags, "--save", str(tmp_path / "one")]) == 0
    micro = ["--micro-batch-size", "1"] if layout == "--nproc-per-node 2" else []
    tessel([*flags, *micro, "--save", str(tmp_path / "many"), *layout.split()])
    for one, many in zip(steps(tmp_path / "one"), steps(tmp_path / "many"), strict=True):
        for name in ("lm_loss", "grad_norm", "rewards/margins"):
            assert many[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), (one["iteration"], name)


@pytest.mark.parametrize("known", [[], ["--precompute-ref-log-probs"]])
def test_pairs_are_evaluated(
    known: list[str], flags: list[str], tiny_hf_folder: MakeFolder, tmp_path: Path, capsys: Any
) -> None:
    """On the second half of the data: loss, margins and accuracy of a loop over transformers."""
    from transformers import AutoModelForCausalLM

    other = tiny_hf_folder("qwen2", seed=1)
    more = ["--split", "50,50,0", "--train-iters", "2", "--lr", "1e-12", "--ref-model", str(other), *known]
    more += ["--eval-interval", "2", "--eval-iters", "1", "--dpo-beta", "0.5"]
    assert main([*flags, *more, "--save", str(tmp_path / "run")]) == 0
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (flags[2], other)]

    @torch.no_grad()
    def ratio(answer: Answer) -> float:
        ids, labels = answer
        mask = labels[1:] >= 0
        of = [model(ids[None].long()).logits[0, :-1].log_softmax(-1)[mask] for model in models]
        policy, reference = (logps.gather(1, labels[1:][mask].long()[:, None]).sum() for logps in of)
        return float(policy - reference)

    margins = torch.tensor(
        [0.5 * (ratio(chosen) - ratio(rejected)) for chosen, rejected in pairs_of(tmp_path / "pairs")[4:]]
    )
    (found,) = steps(tmp_path / "run", "validation")
    assert found["lm_loss_validation"] == pytest.approx(float(-F.logsigmoid(margins).mean()), rel=2e-5)
    assert found["rewards/margins_validation"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert found["rewards/accuracies_validation"] == float((margins > 0).double().mean())
    assert "| rewards/accuracies value: " in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--lora-r", "4", "--lora-dropout", "0.1"]])
def test_a_resumed_run_is_the_unbroken_one(more: list[str], flags: list[str], tmp_path: Path) -> None:
    assert main([*flags, *more, "--save", str(tmp_path / "one")]) == 0
    assert main([*flags, *more, "--save", str(tmp_path / "two"), "--exit-interval", "1"]) == 0
    assert main([*flags, *more, "--save", str(tmp_path / "two")]) == 0
    for whole, broken in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        for name in ("lm_loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert broken[name] == whole[name], (whole["iteration"], name)


def test_adapters_are_measured_against_their_model(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main([*flags, "--save", str(tmp_path / "run"), "--lora-r", "4"]) == 0
    assert "reference: the model without its adapters" in "".join(capsys.readouterr())
    found = steps(tmp_path / "run")
    assert found[0]["lm_loss"] == pytest.approx(0.6931472, rel=1e-5)
    assert found[2]["lm_loss"] < found[0]["lm_loss"]
    named = tmp_path / "named"
    assert main([*flags, "--save", str(named), "--lora-r", "4", "--ref-model", flags[2]]) == 0
    assert [s["lm_loss"] for s in steps(named)] == pytest.approx([s["lm_loss"] for s in found], rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        "",
        pytest.param(
            "--nproc-per-node 2 --micro-batch-size 1 --data-parallel-sharding-strategy optim_grads_params",
            marks=pytest.mark.layouts,
        ),
    ],
)
def test_adapters_that_go_on_are_measured_against_their_start(
    layout: str, flags: list[str], tmp_path: Path, capsys: Any
) -> None:
    """As in MindSpeed-LLM: beside what --lora-load names, merged, the run is the same; a resumed one, too."""
    first, merged = tmp_path / "first", tmp_path / "merged"
    assert main([*flags, "--save", str(first), "--lora-r", "4"]) == 0
    assert main(["merge", "--lora-load", str(first), "--save", str(merged)]) == 0
    going_on = [*flags, "--lora-load", str(first)]
    assert main([*going_on, "--save", str(tmp_path / "named"), "--ref-model", str(merged)]) == 0
    capsys.readouterr()
    if layout:
        tessel([*going_on, "--save", str(tmp_path / "run"), *layout.split()])
    else:
        assert main([*going_on, "--save", str(tmp_path / "run"), "--exit-interval", "2"]) == 0
        assert "with which the run begins" in capsys.readouterr().out
        assert main([*flags, "--lora-r", "4", "--save", str(tmp_path / "run")]) == 0
    found, expected = steps(tmp_path / "run"), steps(tmp_path / "named")
    assert found[0]["lm_loss"] == pytest.approx(0.6931472, rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("lm_loss", "grad_norm", "rewards/margins"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), (ours["iteration"], name)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--dpo-beta", "0"], "--dpo-beta 0 must be above 0"),
        (["--dpo-label-smoothing", "0.5"], "below 0.5"),
        (["--dpo-label-smoothing", "0.1", "--dpo-loss-type", "ipo"], "is for --dpo-loss-type sigmoid"),
        (["--pref-ftx", "-1"], "must not be negative"),
    ],
)
def test_numbers_out_of_range(more: list[str], match: str, flags: list[str], capsys: Any) -> None:
    assert main([*flags, *more]) == 2
    assert match in capsys.readouterr().err

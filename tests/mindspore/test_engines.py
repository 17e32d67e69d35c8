"""A run that changes its engine, and what others make of its files."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tessel import cli
from tests.train.runs import flags, losses, metrics, write_data

MINDSPORE = ("--ai-framework", "mindspore")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_goes_on_by_the_other_engine_and_back(optimizer: str, tmp_path: Path) -> None:
    data, more = write_data(tmp_path / "text"), ("--optimizer", optimizer, "--lr", "3e-3")
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    assert cli.main(flags(data, whole, 9, *more)) == 0
    for stop, engine in ((3, ()), (6, MINDSPORE), (9, ())):
        assert cli.main(flags(data, changing, 9, *more, "--exit-interval", str(stop), *engine)) == 0
        assert (changing / "latest_checkpointed_iteration.txt").read_text() == f"{stop}\n"
    assert losses(changing) == pytest.approx(losses(whole), rel=1e-5)
    rates = [[row["learning_rate"] for row in metrics(save)] for save in (changing, whole)]
    assert rates[0] == rates[1]
    validations = [metrics(save, "final_validation")[0]["lm_loss_validation"] for save in (changing, whole)]
    assert validations[0] == pytest.approx(validations[1], rel=1e-5)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_megatrons_formats_are_read_and_written_with_their_moments(form: str, tmp_path: Path) -> None:
    data, whole, first = write_data(tmp_path / "text"), tmp_path / "whole", tmp_path / "first"
    more = ("--lr", "3e-3")
    assert cli.main(flags(data, whole, 6, *more)) == 0
    assert cli.main(flags(data, first, 6, *more, "--exit-interval", "3", "--ckpt-format", form, *MINDSPORE)) == 0
    assert any((first / "iter_0000003").rglob("*.pt")) or any((first / "iter_0000003").rglob("*.distcp"))
    assert cli.main(flags(data, first, 6, *more, "--ckpt-format", form)) == 0
    assert losses(first) == pytest.approx(losses(whole), rel=1e-5)


def test_the_exported_folder_opens_in_transformers_and_in_the_engine(tmp_path: Path) -> None:
    data, save = write_data(tmp_path / "text"), tmp_path / "run"
    assert cli.main(flags(data, save, 2, *MINDSPORE)) == 0
    model = AutoModelForCausalLM.from_pretrained(save / "hf", dtype=torch.float32)
    tokens = torch.arange(12)[None]
    loss = float(model(tokens, labels=tokens).loss.detach())
    assert 0 < loss < 10
    again = tmp_path / "again"
    arguments = flags(data, again, 2, "--load", str(save / "hf"), *MINDSPORE)
    assert cli.main(arguments) == 0
    by_torch = tmp_path / "by_torch"
    assert cli.main(flags(data, by_torch, 2, "--load", str(save / "hf"))) == 0
    assert losses(again) == pytest.approx(losses(by_torch), rel=1e-6)

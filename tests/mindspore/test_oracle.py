"""Dense fp32 runs of Megatron-LM itself, reproduced by MindSpore through the command line."""

import json
import re
from pathlib import Path

import pytest

from tessel import cli
from tests.train.runs import metrics

# Minutes each on a busy machine: micro-batches of one row, several times slower than PyTorch.
pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("case", ["cosine", "blend_eod", "rampup_wsd", "per_token"])
def test_a_run_has_megatrons_losses(
    case: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared / "oracle" / "training"
    expected = json.loads((folder / f"{case}.json").read_text())
    monkeypatch.chdir(folder)
    save = tmp_path / "run"
    arguments = [*expected["flags"], "--load", f"hf/{expected['hf']}", "--save", str(save)]
    own = ["--data-cache-path", str(tmp_path / "cache"), "--device", "cpu", "--ai-framework", "mindspore"]
    assert cli.main(["pretrain", *arguments, *own]) == 0
    rows = metrics(save)
    assert len(rows) == len(expected["iterations"])
    losses = [row["lm_loss"] for row in rows]
    theirs = [row["lm_loss"] for row in expected["iterations"]]
    print(f"{case}: {max(abs(a - b) / b for a, b in zip(losses, theirs, strict=True)):.1e}")
    assert losses == pytest.approx(theirs, rel=1e-4)
    for row, reference in zip(rows, expected["iterations"], strict=True):
        assert row["learning_rate"] == pytest.approx(reference["learning_rate"], rel=1e-6)
        assert row["consumed_samples"] == reference["consumed_samples"]
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], abs=2e-3)
    assert len(re.findall(r"validation loss at", capsys.readouterr().out)) >= 1

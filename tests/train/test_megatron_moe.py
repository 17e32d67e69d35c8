"""Router options of Megatron-LM: short runs of its own, reproduced through the command line.

The figures are in megatron_moe.json; weights and data are those of the reference runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.oracle

RUNS = json.loads((Path(__file__).parent / "megatron_moe.json").read_text())


@pytest.mark.parametrize("case", RUNS["cases"])
def test_run_agrees_with_megatron(shared: Path, case: str, tmp_path: Path) -> None:
    theirs = RUNS["cases"][case]
    save = tmp_path / "out"
    command = [sys.executable, "-m", "tessel", "pretrain", "--load", "hf/mixtral", "--save", str(save)]
    command += [*RUNS["flags"].split(), *theirs["flags"].split(), "--data-cache-path", str(tmp_path / "cache")]
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]), OMP_NUM_THREADS="1")
    folder = shared / "oracle" / "training"
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert len(rows) == len(theirs["iterations"])
    for ours, (loss, norm, balance, z_loss) in zip(rows, theirs["iterations"], strict=True):
        where = f"iteration {ours['iteration']}"
        # Half of the last digit is theirs to lose.
        assert ours["lm_loss"] == pytest.approx(loss, rel=1e-6, abs=5e-7), where
        assert ours["grad_norm"] == pytest.approx(norm, abs=0.00051), where
        assert ours["load_balancing_loss"] == pytest.approx(balance, rel=1e-5, abs=5e-7), where
        assert ours.get("z_loss") == (None if z_loss is None else pytest.approx(z_loss, rel=1e-5, abs=5e-7)), where
    said = "transformers does not know of" in result.stdout + result.stderr
    assert said == (case in ("sigmoid", "pre_softmax")), "where config.json cannot say it to transformers, the run does"
    bias = json.loads((save / "hf" / "config.json").read_text()).get("e_score_correction_bias")
    assert (bias is not None) == (case == "sigmoid")

"""--load of other suites' checkpoints: the same losses as from the folder they came from, or as the other suite's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tessel.checkpoint.detect import open_model
from tessel.cli import main
from tessel.errors import TesselError
from tessel.train.foreign import require_optimizer
from tests.train.runs import NULL_TOKENIZER, loading, write_data

MakeFolder = Callable[..., Path]
LINE = re.compile(r"iteration\s+(\d+)/.*?lm loss: ([0-9.E+-]+)")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "text")


def losses(text: str) -> dict[int, float]:
    """Iteration -> loss, as the log has them."""
    return {int(iteration): float(loss) for iteration, loss in LINE.findall(text)}


def command(load: Path, data: Path, *more: Any, iters: int = 3) -> list[str]:
    return [str(part) for part in (*loading(load, data, None, iters), *NULL_TOKENIZER, *more)]


@pytest.fixture
def run_in(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def start(arguments: list[str]) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return start


@pytest.mark.parametrize("to", ["torch", "torch_dist", "legacy", "torch_dcp"])
def test_training_from_any_format_is_training_from_the_folder(
    to: str, data: Path, tiny_hf_folder: MakeFolder, tmp_path: Path, run_in: Callable[..., Any]
) -> None:
    folder = tiny_hf_folder("llama", vocab_size=64)
    degrees = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    assert run_in(["convert", "--load", folder, "--save", tmp_path / "mg", "--to", to, *degrees])[0] == 0
    status, wanted, _ = run_in(command(folder, data))
    assert status == 0 and sorted(losses(wanted)) == [1, 2, 3]
    status, found, errors = run_in(command(tmp_path / "mg", data))
    assert status == 0, errors
    assert losses(found) == losses(wanted)
    if to != "torch_dcp":
        assert f"starting from the {to} checkpoint" in found
        assert "the weights alone are taken; starting at iteration 0" in found


def test_generating_from_a_megatron_checkpoint(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path, run_in: Callable[..., Any]
) -> None:
    folder = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)
    degrees = ("--tensor-model-parallel-size", "2")
    assert run_in(["convert", "--load", folder, "--save", tmp_path / "mg", *degrees])[0] == 0
    words = ["--prompt", "the fox", "--greedy", "--max-new-tokens", "8", "--device", "cpu"]
    texts = [run_in(["generate", "--load", source, *words])[1] for source in (folder, tmp_path / "mg")]
    assert texts[0] == texts[1] and texts[0].startswith("the fox")


def test_a_state_that_is_not_there_or_not_read(tiny_hf_folder: Callable[..., Path]) -> None:
    stored = replace(open_model(tiny_hf_folder("qwen2")), state={"opt_param_scheduler": {}})
    require_optimizer(stored, has_state=False)
    with pytest.raises(TesselError, match="was saved without the optimizer's state. Pass --no-load-optim"):
        require_optimizer(stored)
    with pytest.raises(TesselError, match="qwen2.*: The optimizer's state: of another kind. Pass --no-load-optim"):
        require_optimizer(replace(stored, left_out=("The optimizer's state: of another kind.",)))
    with pytest.raises(TesselError, match="without the schedule's numbers"):
        require_optimizer(replace(stored, state={}), has_state=False)


class Case:
    """A run that Megatron-LM began and continued."""

    def __init__(self, shared: Path, name: str) -> None:
        self.folder = shared / "oracle" / "continue" / name
        content = json.loads((self.folder / "case.json").read_text())
        training = shared / "oracle" / "training"
        flags = [str(training / flag) if flag.startswith("data/") else flag for flag in content["flags"]]
        self.flags = ["--load", str(self.folder / "checkpoint"), *flags, "--device", "cpu"]
        self.losses = {entry["iteration"]: entry["lm_loss"] for entry in content["iterations"]}


CASES = [("fp32_torch", 1e-6), ("bf16_distopt_torch", 1e-4), ("bf16_torch_dist", 1e-4)]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "relative"), CASES)
def test_a_run_of_megatron_goes_on(
    name: str, relative: float, shared: Path, tmp_path: Path, run_in: Callable[..., Any]
) -> None:
    case = Case(shared, name)
    more = ["--hf-dir", str(case.folder / "hf"), "--data-cache-path", str(tmp_path / "cache")]
    status, out, errors = run_in(["pretrain", *case.flags, *more])
    assert status == 0, errors
    assert losses(out) == pytest.approx(case.losses, rel=relative)
    assert "taken over from the" in out and "not carried over: The random state" in out


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "relative"), CASES)
def test_a_run_of_megatron_goes_on_in_four_processes(name: str, relative: float, shared: Path, tmp_path: Path) -> None:
    case = Case(shared, name)
    num_layers = int(case.flags[case.flags.index("--num-layers") + 1])
    layout = "--nproc-per-node 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layer-list"
    more = [*layout.split(), f"1,{num_layers - 1}", "--hf-dir", str(case.folder / "hf")]
    done = subprocess.run(
        [sys.executable, "-m", "tessel", "pretrain", *case.flags, *more, "--data-cache-path", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout) == pytest.approx(case.losses, rel=relative)


@pytest.mark.oracle
def test_megatrons_weights_without_its_optimizer(shared: Path, tmp_path: Path, run_in: Callable[..., Any]) -> None:
    case = Case(shared, "fp32_torch")
    more = ["--hf-dir", str(case.folder / "hf"), "--data-cache-path", str(tmp_path / "cache"), "--exit-interval", "1"]
    status, out, errors = run_in(["pretrain", *case.flags, *more, "--no-load-optim"])
    assert status == 0, errors
    assert losses(out) == pytest.approx({9: case.losses[9]}, rel=1e-6)  # before a step with other moments
    status, out, _ = run_in(["pretrain", *case.flags, *more, "--finetune"])
    assert status == 0 and sorted(losses(out)) == [1]
    status, _, errors = run_in(["pretrain", *case.flags, *more, "--lr", "1e-3"])
    assert status == 1 and "The schedule contradicts the checkpoint" in errors


@pytest.mark.oracle
@pytest.mark.parametrize("to", ["torch_dcp", "torch_dist", "torch"])
@pytest.mark.parametrize(("name", "relative"), CASES)
def test_a_run_of_megatron_goes_on_after_a_conversion(
    to: str, name: str, relative: float, shared: Path, tmp_path: Path, run_in: Callable[..., Any]
) -> None:
    case = Case(shared, name)
    hf_dir = ["--hf-dir", str(case.folder / "hf")]
    convert = ["convert", "--load", case.folder / "checkpoint", "--save", tmp_path / "to", "--to", to]
    assert run_in([*convert, "--with-optimizer", *hf_dir])[0] == 0
    flags = [str(tmp_path / "to") if flag == str(case.folder / "checkpoint") else flag for flag in case.flags]
    status, out, errors = run_in(["pretrain", *flags, "--data-cache-path", str(tmp_path / "cache")])
    assert status == 0, errors
    assert losses(out) == pytest.approx(case.losses, rel=relative)

"""Layouts on a CPU, started by msrun: the losses, gradient norms, evaluations and weights of one process by torch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tessel import cli
from tests.train.runs import REPOSITORY, flags, metrics, write_data

ITERATIONS = 4
LAYOUTS = {
    "one process": (1, ""),
    "DP2": (2, "--use-distributed-optimizer"),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2 with sequence parallelism": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "TP2 DP2": (4, "--tensor-model-parallel-size 2"),
    "TP2 PP2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
}
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4


def msrun(num_processes: int, arguments: list[str], logs: Path) -> subprocess.CompletedProcess[str]:
    """`tessel ARGUMENTS` by MindSpore's launcher, which takes the path of a script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent
    script = logs.parent / "entry.py"
    script.write_text("import sys\n\nfrom tessel.cli import main\n\nsys.exit(main())\n")
    command = [
        sys.executable, str(programs / "msrun"), "--worker_num", str(num_processes), "--local_worker_num",
        str(num_processes), "--master_addr", "127.0.0.1", "--master_port", str(port), "--log_dir", str(logs),
        "--join", "True", str(script), *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=logs.parent)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process by torch."""
    save = tmp_path_factory.mktemp("torch") / "run"
    assert cli.main(flags(data, save, ITERATIONS)) == 0
    return save


def deviation(ours: Path, theirs: Path, name: str, kind: str = "train") -> float:
    """The largest relative difference of a figure of two runs."""
    own, other = ([row[name] for row in metrics(save, kind)] for save in (ours, theirs))
    assert len(own) == len(other) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(own, other, strict=True))


def test_what_several_processes_hold_is_summed(data: Path, tmp_path: Path) -> None:
    """A tied embedding on two stages, one key/value head on two processes, norms of query and key heads."""
    shape = [flag for flag in flags(data, None, ITERATIONS) if flag != "--untie-embeddings-and-output-weights"]
    shape[shape.index("--num-query-groups") + 1] = "1"
    arguments = [*shape, "--qk-layernorm", "--log-num-zeros-in-grad"]
    expected, save = tmp_path / "torch", tmp_path / "run"
    assert cli.main([*arguments, "--save", str(expected)]) == 0
    more = ["--save", str(save), "--ai-framework", "mindspore", *LAYOUTS["TP2 PP2"][1].split()]
    done = msrun(4, [*arguments, *more], tmp_path / "logs")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert deviation(save, expected, "lm_loss") < LOSS_TOLERANCE
    assert deviation(save, expected, "grad_norm") < NORM_TOLERANCE
    zeros = [[row["num_zeros"] for row in metrics(folder)] for folder in (save, expected)]
    assert zeros[0] == pytest.approx(zeros[1], abs=8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_one_process_does(layout: str, data: Path, expected: Path, tmp_path: Path) -> None:
    num_processes, more = LAYOUTS[layout]
    save = tmp_path / "run"
    arguments = flags(data, save, ITERATIONS, "--ai-framework", "mindspore", *more.split())
    if num_processes == 1:
        assert cli.main(arguments) == 0
    else:
        done = msrun(num_processes, arguments, tmp_path / "logs")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert f"iteration        {ITERATIONS}/       {ITERATIONS} |" in done.stdout, "the log is on msrun's output"
    loss, norm = deviation(save, expected, "lm_loss"), deviation(save, expected, "grad_norm")
    validation = deviation(save, expected, "lm_loss_validation", "final_validation")
    print(f"| {layout} | {num_processes} | {loss:.1e} | {norm:.1e} | {validation:.1e} |")
    assert max(loss, validation) < LOSS_TOLERANCE and norm < NORM_TOLERANCE
    own, other = (load_file(folder / "hf" / "model.safetensors") for folder in (save, expected))
    assert own.keys() == other.keys()
    for name, weight in other.items():
        # Adam moves a weight whose gradient is nearly nothing as far as any other: see docs/MINDSPORE.md.
        assert np.abs(own[name] - weight).mean() < 1e-4, name

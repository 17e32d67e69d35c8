"""What the MindSpore engine refuses, and what it asks to be installed; none of it needs MindSpore."""

import os
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tessel import cli
from tessel.checkpoint import torch_file
from tessel.config.layout import Launch
from tessel.errors import TesselError
from tessel.mindspore_engine import cluster, support
from tessel.runtime.world import World
from tests.train.runs import flags

MINDSPORE = ("--ai-framework", "mindspore")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are found, which a test may change."""
    versions = {"mindspore": "2.8.0", "numpy": "1.26.4"}
    found = metadata.version

    def version(name: str) -> str:
        if name in versions and not versions[name]:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or found(name)

    monkeypatch.setattr("tessel.mindspore_engine.support.metadata.version", version)
    return versions


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *more: str, status: int = 2) -> str:
    assert cli.main(flags(tmp_path / "nothing", None, 2, *MINDSPORE, *more)) == status
    error = capsys.readouterr().err
    assert error.count("tessel: error: ") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--context-parallel-size 2", "--context-parallel-size 2 (leave it out, or take --ai-framework pytorch)"),
        ("--lora-r 8", "--lora-r 8 (leave it out"),
        ("--fp16", "--fp16 (take --bf16 on an Ascend NPU, or --fp32)"),
        ("--z-loss-coeff 1e-4", "--z-loss-coeff 0.0001 (leave"),
        ("--hidden-dropout 0.1", "--hidden-dropout 0.1 (leave"),
        ("--compile", "--compile (leave"),
        ("--recompute-activations", "--recompute-granularity selective (leave it out, or take full)"),
        ("--device cuda", "--device cuda (take cpu or npu"),
        ("--nproc-per-node 2 --nnodes 1:2 --master-addr head --master-port 1234",
         "--nnodes 1:2 (give a number of machines)"),
        ("--profile --profile-step-start 1 --profile-step-end 2", "--profile (leave"),
        ("--optimizer-cpu-offload", "--optimizer-cpu-offload (leave"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
         "--num-layers-per-virtual-pipeline-stage 1 (leave it out: every process has one pipeline stage)"),
        ("--bf16", "--bf16: MindSpore computes in fp32 alone on a CPU. Take --fp32, or an Ascend NPU."),
    ],
)  # fmt: skip
def test_what_the_engine_lacks_is_refused_by_name(
    asked: str, said: str, installed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, tmp_path, *asked.split())


def test_every_refusal_of_a_command_line_is_in_one_message(
    installed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, tmp_path, "--fp16", "--compile")
    assert "--fp16" in error and "--compile" in error


def test_defaults_that_are_written_out_are_no_refusals(installed: dict[str, str]) -> None:
    from tessel.config.parser import parse
    from tessel.config.run import RunConfig
    from tessel.config.validate import validate

    more = "--hidden-dropout 0 --context-parallel-size 1 --use-distributed-optimizer --overlap-grad-reduce"
    parsed = parse(RunConfig, flags(Path("x"), None, 2, *MINDSPORE, *more.split())[1:], "tessel pretrain")
    notes = support.check("pretrain", validate(parsed.value), parsed.given)
    assert notes == [
        "--use-distributed-optimizer changes nothing with MindSpore: every replica holds the optimizer's whole state",
        "--overlap-grad-reduce changes nothing with MindSpore: gradients are summed after the last backward",
    ]


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("mindspore", "", "needs MindSpore, which is not installed: pip install 'tessel[mindspore]'"),
        ("mindspore", "2.7.1", "MindSpore 2.7.1 is installed, and the engine needs 2.8 to before 2.11: pip install"),
        ("mindspore", "2.11.0", "MindSpore 2.11.0 is installed"),
        ("numpy", "2.4.6", "NumPy 2.4.6 is installed, and MindSpore needs one before 2: pip install 'numpy<2'"),
    ],
)
def test_what_is_not_installed_is_named(
    package: str, version: str, said: str, installed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed[package] = version
    assert said in refused(capsys, tmp_path, status=1)


def test_other_verbs_that_train_take_pytorch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sft", "--load", "x", "--data-path", "y", "--train-iters", "1", "--lr", "1e-3", *MINDSPORE]
    assert cli.main(arguments) == 2
    assert "--ai-framework mindspore is for tessel pretrain; tessel sft takes pytorch." in capsys.readouterr().err


def test_a_mixture_is_refused_before_processes_start(
    installed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--num-experts", "4", "--nproc-per-node", "2")
    error = refused(capsys, tmp_path, *more)
    assert "it trains dense qwen2, qwen3, llama. Take --ai-framework pytorch for this one." in error


def test_msruns_environment_says_which_process_this_is() -> None:
    shared = {"MS_WORKER_NUM": "4", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "8118"}
    worker = World.from_environment({**shared, "MS_ROLE": "MS_WORKER", "RANK_ID": "3", "DEVICE_ID": "3"})
    assert (worker.rank, worker.world_size, worker.local_rank, worker.num_nodes) == (3, 4, 3, 1)
    scheduler = World.from_environment({**shared, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"})
    assert scheduler.rank == 4, "it is never taken for the first, which speaks"


def test_a_started_process_takes_its_place_in_the_cluster() -> None:
    environment = {"MS_SCHED_PORT": "8118", "RANK": "1", "LOCAL_RANK": "1", "GLOG_v": "1"}
    cluster.join(environment)
    assert environment["MS_ROLE"] == "MS_WORKER" and environment["MS_NODE_ID"] == "1"
    assert environment["GLOG_v"] == "1"
    alone: dict[str, str] = {}
    cluster.join(alone)
    assert alone == {"GLOG_v": "3"}


def test_one_process_has_no_scheduler() -> None:
    with cluster.scheduler(Launch(nproc_per_node=1), 29500):
        assert "MS_SCHED_PORT" not in os.environ


def test_several_machines_agree_on_the_schedulers_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with cluster.scheduler(Launch(nproc_per_node=2, nnodes="2", node_rank=1, master_addr="head"), 29500):
        found = {name: os.environ[name] for name in ("MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT")}
    assert found == {"MS_WORKER_NUM": "4", "MS_SCHED_HOST": "head", "MS_SCHED_PORT": "29501"}


def test_a_checkpoint_of_mindspores_tensors_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [types.ModuleType(name) for name in ("mindspore", "mindspore.common", "mindspore.common.tensor")]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    modules[-1].Tensor = type("Tensor", (), {"__module__": modules[-1].__name__})  # type: ignore[attr-defined]
    torch.save({"model": {"weight": modules[-1].Tensor()}}, tmp_path / "model_optim_rng.pt")
    with pytest.raises(TesselError, match=r"holds tensors of MindSpore \(mindspore.common.tensor.Tensor\)"):
        torch_file.load(tmp_path / "model_optim_rng.pt")

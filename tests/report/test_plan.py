"""`tessel plan`: the table, the file that pretrain takes, and what it says where nothing can be planned."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.errors import UsageError
from tessel.layout.sharding import parameters
from tessel.model.catalog import CATALOG, known_model
from tessel.train.checks import check_layout

TOTALS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-Coder-480B-A35B": 480_154_875_392,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.3-70B": 70_553_706_496,
    "Mixtral-8x7B": 46_702_792_704,
}
ARGUMENTS = "--model Qwen2.5-7B --devices 8x80GB --seq-length 4096 --global-batch-size 64".split()


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `tessel plan`; later flags win."""
    status = main(["plan", *ARGUMENTS, *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_shapes_have_the_published_totals() -> None:
    found = {name: sum(math.prod(rule.shape) for rule in parameters(known_model(name)).values()) for name in CATALOG}
    assert found == TOTALS


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("qwen2.5-7b", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("meta-llama/Meta-Llama-3.1-8B", "Llama-3.1-8B"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("llama2-7b", "Llama-2-7B"),
        ("Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B"),
        ("mistralai/Mixtral-8x7B-v0.1", "Mixtral-8x7B"),
    ],
)
def test_names_are_matched_loosely(written: str, name: str) -> None:
    assert known_model(written) == known_model(name)


def test_the_table_lists_layouts_and_marks_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--top", "3")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Qwen2.5-7B: 7,615,616,512 (7.62 B) parameters"
    assert "8 devices of 80 GiB, of which 73.6 are usable, 8 on a machine" in lines
    assert "rates: H100, going by the memory; --device-kind and --rates say otherwise" in lines
    (header,) = [line for line in lines if "step s" in line]
    for name in ("TP", "DP", "MBS", "sharding", "recompute", "GiB", "weights", "moments", "activations", "dp GB"):
        assert name in header
    rows = [line for line in lines if "optim" in line and "%" in line]
    assert len(rows) == 3 and [row.strip().startswith("best") for row in rows] == [True, False, False]
    assert "more fit; --top" in out and "activations of the best by recomputation, GiB: none " in out


def test_pretrain_takes_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for model, devices, extra in (
        ("Qwen2.5-7B", 8, ["--pipeline-model-parallel-size", "4", "--tensor-model-parallel-size", "2"]),
        ("Qwen2.5-7B", 8, ["--pipeline-model-parallel-size", "8", "--recompute", "full"]),
        ("Qwen2.5-7B", 8, ["--pipeline-model-parallel-size", "2", "--recompute", "selective", "--fp32"]),
        ("Llama-3.1-405B", 1024, ["--pipeline-model-parallel-size", "16", "--tensor-model-parallel-size", "8"]),
        ("Qwen3-30B-A3B", 16, ["--recompute", "mlp", "--expert-model-parallel-size", "8"]),
        ("Qwen2.5-7B", 8, ["--seq-length", "131072", "--global-batch-size", "8"]),
    ):
        path = tmp_path / "plan.yaml"
        given = ["--model", model, "--devices", f"{devices}x80GB", "--global-batch-size", "512"]
        status, out, err = run(capsys, *given, *extra, "--output", str(path))
        assert status == 0, err
        assert f"written: {path}" in out and f"--config {path}" in out
        argv = ["--config", str(path), "--data-path", "d", "--lr", "1", "--train-iters", "1", "--load", "m"]
        cfg = validate(parse(RunConfig, argv, "tessel pretrain").value)
        topology = check_layout(cfg, known_model(model), devices)
        for flag, value in zip(extra, extra[1:], strict=False):
            if flag.endswith("-parallel-size"):
                assert getattr(cfg.layout, flag[2:].replace("-", "_")) == int(value)
        assert topology.world_size == devices
        assert cfg.precision.bf16 is not ("--fp32" in extra)


def test_a_folder_or_its_config_is_a_model_too(
    tiny_hf_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_hf_folder("llama", hidden_size=64)
    path = tmp_path / "plan.yaml"
    small = ["--seq-length", "64", "--global-batch-size", "8", "--devices", "4 x 1GB", "--output", str(path)]
    assert run(capsys, "--model", str(folder), *small)[0] == 0
    assert f'load: "{folder}"' in path.read_text()
    (folder / "model.safetensors").unlink()
    assert run(capsys, "--model", str(folder / "config.json"), *small)[0] == 0
    assert f'init_from_config: "{folder}"' in path.read_text()
    status, out, _ = run(capsys, "--model", str(folder), *small, "--seq-length", "256")
    assert status == 0 and "note: config.json allows 128 positions, and pretrain refuses more" in out


def test_rates_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text("matmul_tflops: 80\nattention_tflops: 46\nmemory_gb_per_s: 300\nnode_gb_per_s: 36\n")
    status, _, err = run(capsys, "--rates", str(path))
    assert status == 2 and "network_gb_per_s missing" in err
    path.write_text(path.read_text() + "network_gb_per_s: 4\n")
    status, slow, _ = run(capsys, "--rates", str(path))
    assert status == 0 and f"rates: {path}" in slow
    assert step_s(slow) > 5 * step_s(run(capsys, "--device-kind", "H100")[1])


def step_s(table: str) -> float:
    (best,) = [line for line in table.splitlines() if line.strip().startswith("best")]
    return float(best.split()[-2])


BAD = {
    "--model Qwen2.5-9B": (2, "--model Qwen2.5-9B is no folder with a config.json, and no model of that name is known"),
    "--model gpt4": (2, "known: Qwen2.5-0.5B, Qwen2.5-1.5B"),
    "--devices 8x": (2, "--devices is '8x': it must be a number of devices and the memory of one, such as 8x80GB."),
    "--devices 80GB": (2, "--devices is '80GB': it must be"),
    "--devices 0x80GB": (2, "--devices is '0x80GB': it must be"),
    "--seq-length 0": (2, "--seq-length is 0: it must be at least 1."),
    "--tensor-model-parallel-size 0": (2, "--tensor-model-parallel-size is 0: it must be at least 1."),
    "--fp32 --bf16": (2, "--fp32 and --bf16 contradict each other"),
    "--device-kind TPU": (2, "--device-kind TPU is not known"),
    "--rates r.yaml --device-kind H100": (2, "--rates r.yaml and --device-kind H100 both say how fast devices are"),
    "--rates /nowhere/r.yaml": (1, "--rates /nowhere/r.yaml cannot be read: No such file or directory."),
    "--tensor-model-parallel-size 3": (2, "does not divide the number of processes 8"),
    "--tensor-model-parallel-size 8": (2, "--tensor-model-parallel-size 8 does not divide the 28 attention heads: use"),
    "--expert-model-parallel-size 2": (2, "shares experts, and this model has none"),
    "--global-batch-size 3 --pipeline-model-parallel-size 1 --context-parallel-size 1 --tensor-model-parallel-size 1":
        (2, "No layout deals 3 sequences of 4096 tokens out to 8 devices: take a --global-batch-size such as 8"),
    "--output /nowhere/plan.yaml": (1, "--output /nowhere/plan.yaml cannot be written: No such file or directory."),
    # What would fit: more devices, larger ones, a shorter sequence, fewer given degrees.
    "--devices 2x24GB": (2, "which 22.1 are usable. It would fit with 8 devices, or with devices of 69 GB."),
    "--devices 8x24GB --seq-length 131072": (2, "or with --seq-length"),
    "--devices 8x24GB --data-parallel-sharding-strategy no_shard --pipeline-model-parallel-size 1": (2, "fewer given"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_names_the_flag_and_what_would_do(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *arguments.split())
    expected_status, message = BAD[arguments]
    assert status == expected_status, err
    assert message in err and err.count("tessel: error: ") == 1


def test_an_unknown_model_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nearest: Qwen3-8B"):
        known_model("qwen3-8b-x")


def test_planning_needs_no_torch() -> None:
    code = "import sys; from tessel.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "plan", *ARGUMENTS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"

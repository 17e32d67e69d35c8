"""The suites' scripts in drop_in/: what they run, and a tiny model through the guides' steps in each suite."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent / "drop_in"
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.sh") if path.parent != ROOT)
# Bash in place of Python: writes down what it is asked to run, an argument a line, and runs nothing.
RECORDER = '#!/bin/bash\nprintf "%s\\n" "$@" > "$RECORDED"\n'


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`recorded(script, *arguments, NAME=VALUE...)`: the command line of tessel that a script comes to."""
    recorder = tmp_path / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT.parent))  # for the processes that a run starts

    def run(script: str, *arguments: object, **variables: object) -> list[str]:
        path = ROOT / script
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        environment |= {name: str(value) for name, value in variables.items()}
        environment |= {"PYTHON": str(recorder), "RECORDED": str(tmp_path / "recorded")}
        shell = "sh" if path.read_text().startswith("#!/bin/sh") else "bash"
        words = [shell, str(path), *map(str, arguments)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        program, *rest = (tmp_path / "recorded").read_text().splitlines()
        if program == "-m":
            return rest[1:]
        found = re.search(r'main\(\["drop-in", "(\w+)", "([\w.]+)"', Path(program).read_text())
        assert found is not None
        return ["drop-in", *found.groups(), *rest]

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Documents for a few samples."""
    path = tmp_path / "train.jsonl"
    rows = [{"text": f"the quick brown fox jumps over line {number} of plain text"} for number in range(120)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["lm loss"] for row in rows if "lm loss" in row]


def test_no_two_paths_are_the_same_where_case_does_not_count() -> None:
    paths = [path.relative_to(ROOT).as_posix().lower() for path in ROOT.rglob("*") if "__pycache__" not in path.parts]
    assert len(paths) == len(set(paths)) > 40


def test_scripts_are_whole() -> None:
    for shell in ("sh", "bash"):
        named = [
            str(ROOT / script) for script in SCRIPTS if (ROOT / script).read_text().startswith(f"#!/bin/{shell}\n")
        ]
        each = ["-c", 'for script; do "$0" -n "$script" || exit 1; done', shell, *named]
        assert named and subprocess.run([shell, *each], check=False).returncode == 0
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        assert not re.search(r"\\[ \t]+(#.*)?$", text, re.MULTILINE), "nothing may stand after a backslash"
        assert not re.search(r"--(num-layers|hidden-size|ffn-hidden-size|num-attention-heads)(?![\w-])", text), script


def test_variables_come_from_the_guide_or_the_environment(recorded: Callable[..., list[str]]) -> None:
    script = "mindspeed-llm/examples/mcore/qwen25/pretrain_qwen25_7b_32k_ptd.sh"
    argv = recorded(script)
    assert argv[:3] == ["drop-in", "mindspeed", "pretrain_gpt.py"]
    line = " ".join(argv)
    assert "--nproc-per-node 8 --nnodes 1 --node-rank 0 --master-addr localhost --master-port 6000" in line
    assert "--pipeline-model-parallel-size 4 --seq-length 4096 --micro-batch-size 1 --global-batch-size 64" in line
    assert "--load ./model_weights/qwen2.5_mcore/" in line and "--sequence-parallel" not in line
    line = " ".join(recorded(script, "--log-interval", "5", TP=2, MASTER_ADDR="locahost", GPUS_PER_NODE=4))
    assert "--nproc-per-node 4" in line and "--master-addr localhost" in line and "--sequence-parallel" in line
    assert line.endswith("--log-interval 5")


def test_names_of_both_generations_of_variables_count(recorded: Callable[..., list[str]]) -> None:
    folder = "modellink/examples/mcore/llama2/"
    line = " ".join(recorded(folder + "generate_llama2_7b_lora_ptd.sh", CHECKPOINT_LORA="a", CKPT_LOAD_DIR="m"))
    assert "inference.py" in line and "--load m" in line and "--lora-load a" in line
    line = " ".join(recorded(folder + "pretrain_llama2_7b_ptd.sh", CHECKPOINT="m", TOKENIZER_MODEL="t", SEQ_LENGTH=8))
    assert "--load m" in line and "--tokenizer-name-or-path t" in line and "--seq-length 8" in line
    line = " ".join(recorded("modellink/examples/llama2/evaluate_llama2_7b_ptd.sh", TASK="ceval", DATA_PATH="d"))
    assert "--task ceval --task-data-path d" in line
    line = " ".join(recorded("mindspeed-llm/tests/0day/qwen3/qwen3-1.7b/pretrain_qwen3_1point7b_4K_ptd.sh"))
    assert "--tensor-model-parallel-size 8" in line and "--load  --no-load-optim" in line


def test_mindspeeds_guide(
    recorded: Callable[..., list[str]],
    tiny_hf_folder: Callable[..., Path],
    tiny_tokenizer_folder: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    model = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)
    folder = "mindspeed-llm/examples/mcore/qwen25/"
    assert main(recorded(folder + "ckpt_convert_qwen25_hf2mcore.sh", LOAD_DIR=model, SAVE_DIR="mg", PP=2)) == 0
    assert (tmp_path / "mg" / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt").exists()
    data: dict[str, object] = {"INPUT": text, "OUTPUT_PREFIX": "dataset/alpaca", "WORKERS": 1, "TOKENIZER_PATH": model}
    assert main(recorded(folder + "data_convert_qwen25_pretrain.sh", **data)) == 0
    assert (tmp_path / "dataset" / "alpaca_text_document.bin").exists()
    run: dict[str, object] = {
        "CKPT_LOAD_DIR": "mg",
        "CKPT_SAVE_DIR": "out",
        "DATA_PATH": "dataset/alpaca_text_document",
        "PP": 2,
    }
    run |= {"TOKENIZER_PATH": model, "SEQ_LEN": 32, "GBS": 4, "TRAIN_ITERS": 2, "NPUS_PER_NODE": 2}
    assert main(recorded(folder + "pretrain_qwen25_7b_32k_ptd.sh", **run)) == 0
    assert (tmp_path / "out" / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt").exists()
    assert (tmp_path / "out" / "hf" / "model.safetensors").exists()
    assert main(recorded(folder + "ckpt_convert_qwen25_mcore2hf.sh", LOAD_DIR="out", SAVE_DIR=model)) == 0
    assert (model / "mg2hf" / "model.safetensors").exists()
    line = (
        "pretrain --load mg --data-path dataset/alpaca_text_document --split 100,0,0 --save plain --seq-length 32 "
        "--global-batch-size 4 --train-iters 2 --lr 1.25e-6 --min-lr 1.25e-7 --lr-decay-style cosine --bf16 "
        "--lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95 --no-load-optim --eval-iters 0 --log-interval 1"
    )
    assert main(line.split()) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), rel=2e-3)


def test_modellinks_guide(
    recorded: Callable[..., list[str]],
    tiny_hf_folder: Callable[..., Path],
    tiny_tokenizer_folder: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    model = tiny_hf_folder("llama", tokenizer=tiny_tokenizer_folder)
    folder = "modellink/examples/llama2/"
    words = ["--num-layer-list", "1,1"]
    convert: dict[str, object] = {"LOAD_DIR": model, "SAVE_DIR": "legacy", "TP": 2, "PP": 2}
    assert main(recorded(folder + "ckpt_convert_llama2_hf2legacy.sh", *words, **convert)) == 0
    data: dict[str, object] = {"INPUT": text, "OUTPUT_PREFIX": "dataset/enwiki", "WORKERS": 1, "TOKENIZER_PATH": model}
    assert main(recorded(folder + "data_convert_llama2_pretrain.sh", **data)) == 0
    run: dict[str, object] = {
        "CHECKPOINT": "legacy",
        "CKPT_SAVE_DIR": "out",
        "DATA_PATH": "dataset/enwiki_text_document.bin",
    }
    run |= {"TOKENIZER_MODEL": model, "SEQ_LEN": 32, "GBS": 2, "TRAIN_ITERS": 2, "PP": 1, "GPUS_PER_NODE": 1}
    assert main(recorded(folder + "pretrain_llama2_7b_ptd.sh", **run, SPLIT="100,0,0", EVAL_ITERS=0)) == 0
    assert main(recorded(folder + "ckpt_convert_llama2_legacy2hf.sh", LOAD_DIR="out", SAVE_DIR=model)) == 0
    assert (model / "mg2hg" / "model.safetensors").exists()
    line = (
        "pretrain --load legacy --data-path dataset/enwiki_text_document --split 100,0,0 --save plain --seq-length 32 "
        "--global-batch-size 2 --train-iters 2 --lr 1.25e-6 --min-lr 1.25e-7 --lr-decay-style cosine --bf16 "
        "--lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95 --no-load-optim --eval-iters 0 --log-interval 1"
    )
    assert main(line.split()) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "plain")


def test_pais_guide(
    recorded: Callable[..., list[str]],
    tiny_hf_folder: Callable[..., Path],
    tiny_tokenizer_folder: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    model = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)
    tools = "pai/toolkits/"
    converter = tools + "distributed_checkpoints_convertor/scripts/qwen2_5/run_8xH20.sh"
    assert main(recorded(converter, "0.5B", model, "mg", "false", "true", "fp32")) == 0
    make = tools + "pretrain_data_preprocessing/run_make_pretraining_dataset_megatron.sh"
    assert main(recorded(make, text, "Qwen2Tokenizer", "text", "data", model)) == 0
    prefix = "data/mmap_qwen2_datasets_text_document"
    words = (
        f"dsw 0.5B 1 2 1e-5 1e-6 32 32 bf16 1 1 1 true true true false false false 100 {prefix} {prefix} mg 128 0 out"
    )
    assert main(recorded("pai/examples/qwen2_5/run_mcore_qwen.sh", *words.split())) == 0
    (made,) = (tmp_path / "out" / "checkpoint").iterdir()
    assert list((made / "iter_0000002").glob("*.distcp"))
    nine = f"0.5B {made} back 1 1 bf16 true true {model}"
    assert main(recorded(tools + "distributed_checkpoints_convertor/hf2mcore_qwen2.5_convertor.sh", *nine.split())) == 0
    assert (tmp_path / "back" / "model.safetensors").exists()
    line = (
        f"pretrain --load mg --data-path {prefix} --split 99,1,0 --save plain --seq-length 32 --global-batch-size 2 "
        "--train-iters 2 --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-decay-iters 2 --bf16 --weight-decay 0.1 "
        "--adam-beta2 0.95 --no-load-optim --eval-iters 10 --eval-interval 10000 --log-interval 1"
    )
    assert main(line.split()) == 0
    assert losses(made) == losses(tmp_path / "plain")


def test_the_verb_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drop-in", "--help"]) == 0
    assert "SUITE is mindspeed, modellink or pai" in capsys.readouterr().out
    assert main(["drop-in", "mindspeed"]) == 2
    assert "needs SUITE PROGRAM ARGUMENTS" in capsys.readouterr().err

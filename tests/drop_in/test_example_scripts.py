"""Each example script of MindSpeed-LLM and ModelLink in drop_in/: what it comes to is a command that tessel takes."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.drop_in.flags import Kind, refusal
from tessel.drop_in.translate import tidy, translate

ROOT = Path(__file__).resolve().parent.parent.parent / "drop_in"
DOCS = ROOT.parent / "docs" / "SCRIPTS.md"
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for suite in ("mindspeed-llm", "modellink")
    for path in (ROOT / suite).rglob("*.sh")
    if "mindspore" not in path.parts
)
# Bash in place of Python: writes down what it is asked to run, and runs nothing.
RECORDER = '#!/bin/bash\nprintf "%s\\0" "$@" > "$RECORDED"\n'
PROGRAM = re.compile(r'main\(\["drop-in", "(\w+)", "([\w.]+)"')
Run = Callable[[str], list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(script)`: suite, program and arguments that a script comes to, with the variables' own values."""
    recorder = tmp_path / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    environment |= {"PYTHON": str(recorder), "RECORDED": str(tmp_path / "recorded")}

    def run(script: str) -> list[str]:
        done = subprocess.run(
            ["bash", str(ROOT / script)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("drop-in: "), "the path of the result"
        program, *rest = (tmp_path / "recorded").read_text().split("\0")[:-1]
        named = PROGRAM.search(Path(program).read_text())
        assert named is not None
        return [*named.groups(), *rest]

    return run


def first_of_each_kind() -> list[str]:
    """Of each suite, one script of each kind."""
    return list({(script.split("/")[0], Path(script).name.split("_")[0]): script for script in SCRIPTS}.values())


def test_there_are_scripts_of_every_kind() -> None:
    kinds = {Path(script).name.split("_")[0] for script in SCRIPTS}
    assert kinds == {"chat", "ckpt", "data", "dpo", "evaluate", "generate", "pretrain", "tune"}
    assert len(SCRIPTS) > 250


@pytest.mark.parametrize("script", first_of_each_kind())
def test_tessel_takes_what_a_script_comes_to(run: Run, script: str) -> None:
    check(run(script))


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {*first_of_each_kind()}))
def test_tessel_takes_what_any_script_comes_to(run: Run, script: str) -> None:
    check(run(script))


def check(line: list[str]) -> None:
    """The verb takes it, and no flag in it is refused or unknown."""
    suite, program, *argv = line
    done = translate(suite, program, argv)
    assert done.commands
    for command in done.commands:
        command, remarks = tidy(command)
        assert {remark.kind for remark in remarks} <= {Kind.MEANINGLESS}, remarks
        words = [word.replace("localhost", "machine-0") for word in command.arguments.argv]  # as a user of several does
        assert refusal(command.verb, words) is None


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (
            "mindspeed-llm/examples/mcore/qwen25/tune_qwen25_7b_4k_lora_ptd.sh",
            "--finetune --stage sft --is-instruction-dataset --prompt-type qwen --lora-r 8 --lora-alpha 16",
        ),
        (
            "mindspeed-llm/examples/mcore/qwen3_moe/ckpt_convert_qwen3_moe_235b_hf2mcore.sh",
            "--num-layers-per-virtual-pipeline-stage 8 --noop-layers 94,95 --target-expert-parallel-size 32",
        ),
        (
            "mindspeed-llm/examples/mcore/qwen3_moe/tune_qwen3_30b_a3b_4K_full_ptd.sh",
            "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --sequence-parallel --seq-length 4096",
        ),
        ("mindspeed-llm/examples/mcore/qwen25/chat_qwen25_7b_ptd.sh", "--task chat --prompt-type qwen"),
        (
            "mindspeed-llm/examples/mcore/llama2/dpo_llama2_7b_full_ptd.sh",
            "--finetune --stage dpo --is-pairwise-dataset --dpo-loss-type sigmoid",
        ),
        ("modellink/examples/llama2/generate_llama2_7b_lora_ptd.sh", "--lora-load ./ckpt/tune_llama2_7b_lora_ptd"),
        (
            "modellink/examples/llama2/ckpt_convert_llama2_hf2legacy.sh",
            "--loader llama2_hf --saver megatron --target-tensor-parallel-size 2 --target-pipeline-parallel-size 4",
        ),
        ("mindspeed-llm/examples/mcore/qwen25/pretrain_qwen25_14b_32k_ptd.sh", "--nnodes 2"),
    ],
)
def test_scripts_have_the_suites_values(run: Run, script: str, wanted: str) -> None:
    assert wanted in " ".join(run(script))


def test_the_docs_list_the_scripts_that_there_are() -> None:
    """A section names a folder, and lists the names in it."""
    listed = []
    for section in DOCS.read_text(encoding="utf-8").split("\n## ")[1:]:
        head, _, text = section.partition("\n")
        folder = re.fullmatch(r"`(.+)`", head)
        if folder is not None:
            listed += [f"{folder[1]}/{name}" for name in re.findall(r"`([\w.-]+\.sh)`", text.partition("\nNot")[0])]
    own = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.sh") if path.parent != ROOT]
    assert sorted(listed) == sorted(own)

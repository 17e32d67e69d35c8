"""`tessel migrate`: scripts read without being run, and what is printed in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tessel.cli import main
from tessel.drop_in.migrate import Migrated, migrated
from tessel.drop_in.shell import calls

MINDSPEED = """#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
NPUS_PER_NODE=8
NNODES=1
CKPT="your model ckpt path"
DATA="./data/alpaca_text_document"
TP=2
SEQ=$(($TP*2048))

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \\
    --nnodes $NNODES \\
    --master_port 6000
"

GPT_ARGS="
    --use-mcore-models \\
    --tensor-model-parallel-size ${TP} \\
    --seq-length ${SEQ} \\
    --attention-mask-type general \\
    --npu-deterministic \\
    --enable-high-availability
"

torchrun $DISTRIBUTED_ARGS pretrain_gpt.py \\
    $GPT_ARGS \\
    --data-path $DATA \\
    --load ${CKPT} \\
    | tee logs/train.log
"""


def read(text: str, *arguments: str, **environment: str) -> list[tuple[str, ...]]:
    """The calls of a script."""
    return [call.words for call in calls(text, arguments, environment)[0]]


def one(text: str, arguments: Sequence[str] = (), suite: str = "mindspeed") -> Migrated:
    """The only program of a script."""
    (found,) = migrated(text, tuple(arguments), suite)[0]
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python a.py --x 1  # why", ["--x", "1"]),
        ("python a.py \\\n  --x \\\n  --y 2\n", ["--x", "--y", "2"]),
        ('A="--x 1"\npython a.py $A "$A"', ["--x", "1", "--x 1"]),
        ('A="--x 1 \\\n --y"\npython a.py ${A}', ["--x", "1", "--y"]),
        ("A=(\n  --x 1  # one\n  --y 'a b'\n)\nA+=(--z)\npython a.py \"${A[@]}\"", ["--x", "1", "--y", "a b", "--z"]),
        ("python a.py ${B:-5} ${C:-6} $D", ["7", "6"]),
        ("python a.py $((3 * (2 + 1) / 2)) $(( (2 > 1) ? 8 : 9 ))", ["4", "8"]),
        ("if [ $1 = dsw ]; then\nA=1\nelif [ $1 = dlc ]; then\nA=2\nelse\nA=3\nfi\npython a.py $A", ["2"]),
        (
            'if [ -z "$B" ]; then\nA=1\nfi\nif [ 2 -gt 1 ]; then\n if [ a != a ]; then\n  A=2\n fi\nfi\npython a.py $A',
            [],
        ),
        ('C="torchrun --nproc_per_node 2 a.py\n --x ${B}"\neval $C', ["--x", "7"]),
        ("echo python b.py\nmkdir x && python a.py '$B' | tee y", ["$B"]),
        ('P="your path"\npython a.py --x $P --y', ["--x", "your path", "--y"]),
        ("N=$(date +%Y)\npython a.py $N", ["$(date +%Y)"]),
    ],
)
def test_shell(text: str, words: list[str]) -> None:
    (found,) = read(text, "dlc", B="7")
    assert found[found.index("a.py") + 1 :] == tuple(words)


@pytest.mark.parametrize("between", ["# --load x \\", "   # --load x"])
def test_a_comment_does_not_cut_a_command_in_two(between: str) -> None:
    found, remarks = calls(f"python a.py --x 1 \\\n{between}\n  --save y\n", (), {})
    assert found[0].words[1:] == ("a.py", "--x", "1", "--save", "y")
    assert remarks == [
        "line 2: a comment between the lines of a command ends the command there; here the lines below are read as its "
        "rest"
    ]
    found, remarks = calls("python a.py --x 1 \\    # tp1\n  --y 2\n", (), {})
    assert found[0].words[1:] == ("a.py", "--x", "1", "--y", "2")
    assert remarks[0].startswith("line 1: something after a backslash")


def test_what_stands_in_place_of_a_program() -> None:
    found = one(MINDSPEED)
    (command,) = found.commands
    assert command.verb == "pretrain"
    line = " ".join(command.arguments.argv)
    assert line.startswith("--nproc-per-node 8 --tensor-model-parallel-size 2 --seq-length 4096 --deterministic-mode")
    assert "--load your model ckpt path" in line and "--data-path ./data/alpaca_text_document" in line
    said = "\n".join(found.remarks)
    assert "meaningless: --use-mcore-models (there is one model implementation)" in said
    assert "refused: --enable-high-availability (not supported yet: MindIO's service (a run saves before" in said


def test_it_is_printed_as_command_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "pretrain.sh"
    script.write_text(MINDSPEED)
    assert main(["migrate", str(script)]) == 0
    printed = capsys.readouterr().out
    assert "# line 25: pretrain_gpt.py\n" in printed
    assert "tessel pretrain \\\n    --nproc-per-node 8 \\\n    --tensor-model-parallel-size 2" in printed
    file = yaml.safe_load(printed.partition("--config FILE\n")[2])
    assert file["deterministic_mode"] is True
    assert file["data_path"] == ["./data/alpaca_text_document"]
    assert file["seq_length"] == 4096


def test_positional_arguments_and_programs_of_other_suites() -> None:
    text = (
        'if [ $1 = true ]; then\n  W="--mcore2hf"\nfi\n'
        "torchrun impl/convert.py --load-dir $2 --save-dir $3 ${W} --patch-tokenizer-type X"
    )
    found = one(text, ["true", "a", "b"], suite="pai")
    assert found.commands[0].arguments.argv == ("--load-dir", "a", "--save-dir", "b", "--to", "hf")
    found = one("torchrun --nproc_per_node `nproc` postrain_gpt.py --lr 1")
    assert "postrain_gpt.py is taken for posttrain_gpt.py" in found.remarks
    assert "--nproc-per-node is still to be said: the script has `nproc`" in found.remarks
    found = one("python convert_ckpt.py --model-type-hf baichuan2 --load-dir a --save-dir b")
    assert not found.commands and "docs/MIGRATION.md" in found.remarks[0]


def test_arguments_follow_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.sh").write_text("torchrun ../qwen2/pretrain_qwen2_moe.py --lr $2 --patch-tokenizer-type $1")
    assert main(["migrate", str(tmp_path / "a.sh"), "Qwen2Tokenizer", "1e-5"]) == 0
    assert "tessel pretrain \\\n    --lr 1e-5\n" in capsys.readouterr().out


def test_several_machines_keep_their_addresses() -> None:
    found = one("torchrun --nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr h --master_port 1 pretrain_gpt.py")
    assert found.commands[0].arguments.argv[:6] == ("--nproc-per-node", "8", "--nnodes", "2", "--node-rank", "1")


def test_what_the_verb_would_refuse_is_said() -> None:
    assert (
        "tessel pretrain would say: --seq-length is 'long': it must be a whole number."
        in one("torchrun pretrain_gpt.py --seq-length long").remarks
    )


def test_scripts_without_a_program_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "a.sh"
    script.write_text("python other.py\n")
    assert main(["migrate", str(script)]) == 1
    assert "calls no program that tessel stands for" in capsys.readouterr().err
    assert main(["migrate", str(tmp_path / "none.sh")]) == 1
    assert "cannot be read" in capsys.readouterr().err

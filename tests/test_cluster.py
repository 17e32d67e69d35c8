"""The commands of docs/CLUSTER.md: their flags exist, and the files that they are in can be read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tessel.config.launch_rules import check_launch
from tessel.config.parser import parse
from tessel.config.run import RunConfig

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "CLUSTER.md").read_text(encoding="utf-8")
VALUES = {"$SLURM_NNODES": "4", "$(PET_NNODES)": "4", "$SLURM_NODEID": "1", "$(PET_NODE_RANK)": "1"}
REST = "--seq-length 8 --train-iters 1 --lr 1e-3 --data-path x".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def with_values(text: str) -> str:
    for name, value in VALUES.items():
        text = text.replace(name, value)
    return re.sub(r"\$\((MASTER_PORT)\)|\$MASTER_PORT", "29500", text)


def commands() -> list[list[str]]:
    """Every command that holds `pretrain`, as words, from all blocks."""
    found = []
    for block in [*blocks("bash"), *blocks("sh")]:
        for line in with_values(block).replace("\\\n", " ").splitlines():
            words = shlex.split(line.rstrip("& "), comments=True)
            if words[:3] == ["srun", "bash", "-c"]:
                words = shlex.split(words[3])
            if "pretrain" in words:
                found.append(words[2:] if words[0] == "ssh" else words)
    return found


def job() -> list[dict[str, list[str]]]:
    (text,) = blocks("yaml")
    specs = yaml.safe_load(with_values(text))["spec"]["pytorchReplicaSpecs"]
    return [spec["template"]["spec"]["containers"][0] for spec in specs.values()]


def check(words: list[str]) -> None:
    flags = words[words.index("pretrain") + 1 :]
    kept = [word for word in flags if not word.startswith("--config=")]
    if "--config" in kept:
        at = kept.index("--config")
        del kept[at : at + 2]
    check_launch(parse(RunConfig, [*kept, *REST], "tessel pretrain").value)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_have_flags_that_exist_and_go_together(words: list[str]) -> None:
    check(words)
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        parsed = parse_args(words[1:])
        assert (parsed.module, parsed.training_script, parsed.training_script_args[0]) == (True, "tessel", "pretrain")


def test_the_jobs_containers_are_alike_and_start() -> None:
    master, worker = job()
    assert master == worker
    check([*master["command"], *master["args"]])


def test_there_are_recipes_for_each_way_of_starting() -> None:
    starts = {words[0] for words in commands()}
    assert starts == {"tessel", "torchrun"} and len(commands()) >= 9
    assert any(line.startswith("#SBATCH") for block in blocks("sh") for line in block.splitlines())

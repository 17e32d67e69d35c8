"""Flags that documents mention exist, and the commands of docs/LAYOUTS.md and docs/CHECKPOINTS.md can be read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.commands import VERBS
from tessel.config.convert import CONVERSION, ConvertConfig, VerifyConfig, validate_convert, validate_verify
from tessel.config.generate_rules import validate_generate
from tessel.config.megatron import MEGATRON
from tessel.config.parser import parse
from tessel.config.plan_rules import validate_plan
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.config.verbs import GenerateConfig, InspectConfig, PlanConfig

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "README_zh.md",
    "docs/LAYOUTS.md",
    "docs/CLUSTER.md",
    "docs/CHECKPOINTS.md",
    "docs/ASCEND.md",
    "docs/MIGRATION.md",
    "docs/RECIPES.md",
    "docs/FAQ.md",
    "docs/STATUS.md",
)
FLAG = re.compile(r"--[a-z][a-z0-9-]+")
# Of torchrun, Slurm, docker and pytest.
FOREIGN = re.compile(
    r"--(privileged|rdzv|ntasks|gpus|cpus|nodes|job-name|time|signal|requeue|standalone|shutdown|layouts-)"
)
# What a misspelt flag looks like.
MISSPELT = {"--gloabl-batch-size"}
# In place of the file that the commands read.
FILE = (
    "--load m --seq-length 64 --micro-batch-size 1 --global-batch-size 8 --train-iters 1 --lr 1e-3 --data-path x"
).split()


def commands(name: str) -> list[list[str]]:
    """The commands of a document in docs, as words."""
    text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def known(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Every flag that `--help` of some verb shows, or that is accepted without effect or refused by name."""
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
    # Lines end within a long word, after a hyphen.
    shown = re.sub(r"-\n +", "-", capsys.readouterr().out)
    return {*FLAG.findall(shown), *MEGATRON.accepted, *CONVERSION.names()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_that_are_mentioned_exist(name: str, known: set[str]) -> None:
    mentioned = set(FLAG.findall((REPOSITORY / name).read_text(encoding="utf-8")))
    assert {flag for flag in mentioned - known - MISSPELT if not FOREIGN.match(flag)} == set()


@pytest.mark.parametrize("words", commands("LAYOUTS.md"), ids=" ".join)
def test_commands_of_layouts_can_be_given(words: list[str]) -> None:
    assert words[0] == "tessel"
    if words[1] == "plan":
        validate_plan(parse(PlanConfig, words[2:], "tessel plan").value)
        return
    assert words[1:3] == ["pretrain", "--config"]
    validate(parse(RunConfig, [*FILE, *words[4:]], "tessel pretrain").value)


@pytest.mark.parametrize("words", commands("CHECKPOINTS.md"), ids=" ".join)
def test_commands_of_checkpoints_can_be_given(words: list[str]) -> None:
    verb, rest = words[1], words[2:]
    title = f"tessel {verb}"
    assert words[0] == "tessel"
    if verb == "convert":
        validate_convert(parse(ConvertConfig, rest, title, CONVERSION).value)
    elif verb == "verify":
        validate_verify(parse(VerifyConfig, rest, title).value)
    elif verb == "inspect":
        parse(InspectConfig, rest, title)
    elif verb == "generate":
        validate_generate(parse(GenerateConfig, rest, title, MEGATRON).value)
    else:
        assert words[1:3] == ["pretrain", "--config"]
        validate(parse(RunConfig, [*FILE, *words[4:]], title).value)

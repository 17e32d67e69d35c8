"""The flags of fine-tuning: those of the suites are read, and what they cannot be together is refused."""

import json
from pathlib import Path

import pytest

from tessel.config.megatron import MEGATRON
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.errors import UsageError

RUN = "--seq-length 16 --train-iters 4 --lr 1e-2 --data-path x --load hf".split()


def read(*argv: str) -> RunConfig:
    return validate(parse(RunConfig, [*RUN, *argv], "tessel pretrain", MEGATRON).value)


@pytest.mark.parametrize("case", ["sft", "sft_padded", "sft_pack", "dpo_sigmoid"])
def test_flags_of_mindspeeds_own_runs_are_read(shared: Path, case: str) -> None:
    flags = json.loads((shared / "oracle" / "finetune" / f"{case}.json").read_text())["flags"]
    if case == "dpo_sigmoid":  # how the preference is learned is no matter of the data
        flags = flags[: flags.index("--dpo-loss-type")] + flags[flags.index("--micro-batch-size") :]
        at = flags.index("--refer-model-iter")
        del flags[at : at + 2]
    cfg = validate(parse(RunConfig, [*flags, "--load", "hf"], "tessel pretrain", MEGATRON).value)
    assert cfg.finetune.reads_dialogues
    assert cfg.finetune.prompt_type == "qwen"
    assert cfg.finetune.padded_samples == (case == "sft_padded")
    assert cfg.finetune.is_pairwise_dataset == (case == "dpo_sigmoid")


def test_flags_of_pai_are_read() -> None:
    cfg = read("--dataset", "MMAP", "--train-mode", "finetune", "--reset-position-ids")
    assert cfg.finetune.reads_pai
    assert not read("--dataset", "MMAP", "--train-mode", "pretrain").finetune.reads_dialogues
    assert read("--dataset", "JSON-SFT", "--max-padding-length", "12").finetune.reads_dialogues


def test_the_older_name_of_variable_lengths() -> None:
    assert read("--is-instruction-dataset", "--variable-seq-lengths").finetune.no_pad_to_seq_lengths


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--is-instruction-dataset --is-pairwise-dataset", "say what the data is: keep one of them"),
        ("--is-instruction-dataset --dataset MMAP", "say what the data is: keep one of them"),
        ("--train-mode finetune", "--train-mode finetune is for --dataset MMAP"),
        ("--dataset JSON-SFT --train-mode pretrain", "leave --train-mode pretrain out"),
        ("--padded-samples", "--padded-samples is for dialogues"),
        ("--stage sft", "--stage sft trains on dialogues: add --is-instruction-dataset"),
        ("--stage dpo", "--stage dpo trains on dialogues: add --is-pairwise-dataset"),
        (
            "--is-instruction-dataset --no-pad-to-seq-lengths --no-cut-token --cut-max-seqlen",
            "--no-cut-token and --cut-max-seqlen contradict each other",
        ),
        ("--is-instruction-dataset --no-cut-token", "--no-cut-token needs --no-pad-to-seq-lengths"),
        ("--is-instruction-dataset --no-shuffle --full-shuffle-instruction-dataset", "contradict each other"),
        ("--is-instruction-dataset --train-on-prompt --mask-history", "contradict each other"),
        ("--is-instruction-dataset --map-keys {", "which is no JSON"),
        ("--is-instruction-dataset --map-keys [1]", "it must be an object"),
        ("--is-instruction-dataset --pad-to-multiple-of 0", "--pad-to-multiple-of is 0: it must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(argv: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        read(*argv.split())

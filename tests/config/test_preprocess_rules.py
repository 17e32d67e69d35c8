"""Flags of `tessel preprocess`: those of every suite's tool are read, and what cannot be together is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessel.config.parser import parse
from tessel.config.preprocess import PreprocessConfig
from tessel.config.preprocess_flags import PREPROCESSING
from tessel.config.preprocess_rules import is_instructions, probabilities_of, shares, validate_preprocess
from tessel.errors import UsageError

NEEDED = ("--input", "a.jsonl", "--output-prefix", "p")
# Whole command lines of the tools' own flags (those of tokenizers are the tokenizer's matter).
MEGATRON = """--json-keys text title --append-eod --workers 4 --partitions 2 --log-interval 1000
--keep-sequential-samples --split-sentences --keep-newlines --lang english --tokenizer-type HuggingFaceTokenizer
--tokenizer-model T --no-pad-vocab-size --make-vocab-size-divisible-by 128""".split()
MINDSPEED = """--handler-name AlpacaStyleInstructionHandler --prompt-type qwen --enable-thinking true
--reasoning-effort max --drop-thinking false --map-keys {"prompt":"q"} --dataset-additional-keys id --pack --neat-pack
--seq-length 4096 --append-eod --streaming --cache-dir C --overwrite-cache --dataset-impl mmap --workers 1 --n-subs 2
--log-interval 100 --tokenizer-type PretrainedFromHF --tokenizer-name-or-path T --tokenizer-not-use-fast
--pad-vocab-size-to 152064 --prompt-type-path templates.json --json-keys text --seed 1234""".split()
PAI = """--patch-tokenizer-type Qwen2Tokenizer --load T --seq-length 2048 --workers 8 --partitions 1
--extra-vocab-size 293 --padded-vocab-size 151936 --sequence-packing --append-eod --debug --json-keys text""".split()

REGISTRY = "--handler-name LlamaFactoryInstructionHandler"


def read(*argv: str) -> PreprocessConfig:
    cfg: PreprocessConfig = parse(PreprocessConfig, [*NEEDED, *argv], "tessel preprocess", PREPROCESSING).value
    return validate_preprocess(cfg)


def test_the_flags_of_every_tool_are_read() -> None:
    assert read(*MEGATRON, "--compatible", "megatron").partitions == 2
    assert read(*MINDSPEED, "--compatible", "mindspeed").map_keys == '{"prompt":"q"}'
    pai = read(*PAI, "--compatible", "pai-sft")
    assert pai.sequence_packing and pai.tokenizer.tokenizer_name_or_path == "T"


@pytest.mark.parametrize("flag", ["--hf-datasets-params", "--datasets", "--data-obfuscation", "--script-data-dir"])
def test_what_is_not_done_is_refused_by_name(flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        read(flag, "x")


def test_of_two_tokenizers_the_folder_counts() -> None:
    section = read("--tokenizer-model", "a", "--tokenizer-name-or-path", "b").tokenizer
    assert (section.tokenizer_model, section.tokenizer_name_or_path) == (None, "b")
    assert read("--tokenizer-model", "a", "--load", "b").tokenizer.tokenizer_name_or_path is None


def test_which_flags_mean_instructions() -> None:
    assert not is_instructions(read())
    assert not is_instructions(read("--handler-name", "AlpacaPretrainHandler"))
    assert is_instructions(read("--handler-name", "own.py:Mine"))
    assert is_instructions(read("--prompt-type", "qwen"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--workers 0", "--workers 0: at least 1"),
        ("--partitions 0", "--partitions 0: at least 1"),
        ("--log-interval 0", "--log-interval 0: at least 1"),
        ("--extra-vocab-size -1", "--extra-vocab-size -1: it must not be negative"),
        ("--seed -1", "--seed -1: it must be from 0"),
        ("--json-keys a b a", "--json-keys names a twice"),
        ("--prompt-type qwen --map-keys {", "--map-keys is '{', which is no JSON"),
        ("--prompt-type qwen --map-keys [1]", r"--map-keys is '\[1\]': it must be an object"),
        ("--prompt-type qwen --neat-pack", "--neat-pack needs --pack"),
        ("--prompt-type qwen --pack", "--pack needs --seq-length"),
        ("--sequence-packing", "--sequence-packing is for --compatible pai-sft"),
        ("--compatible pai-sft --sequence-packing --partitions 2", "--sequence-packing and --partitions"),
        ("--pack --seq-length 8 --compatible mindspeed", "--pack is for instructions: name how rows are read"),
        ("--handler-name GeneralPretrainHandler --prompt-type qwen", "--prompt-type is for instructions"),
        ("--preview 3", "--preview shows instructions"),
        ("--keep-newlines", "--keep-newlines is for --split-sentences"),
        ("--prompt-type qwen --split-sentences", "--split-sentences is for plain text"),
        ("--pad-to-multiple-of 8", "--pad-to-multiple-of 8 is for plain text with --compatible mindspeed"),
        ("--seq-length 8", "--seq-length 8: MindSpeed-LLM's tool drops longer documents"),
        ("--shard 1/2 --shuffle", "--shard 1/2 and --shuffle: that needs the whole input"),
        ("--shard 1/2 --prompt-type qwen --pack --seq-length 8", "--shard 1/2 and --pack"),
        ("--shard 1/2 --partitions 2 --compatible megatron", "--shard 1/2 and --partitions"),
        ("--dataset-dir x", "--dataset-dir is for data sets of a registry"),
        ("--max-samples 3", "--max-samples is for data sets of a registry"),
        ("--mix-strategy interleave_over", "--mix-strategy interleave_over is for data sets of a registry"),
        (REGISTRY, "needs --dataset-dir"),
        (f"{REGISTRY} --dataset-dir x --interleave-probs 1", "--interleave-probs needs --mix-strategy"),
        (f"{REGISTRY} --dataset-dir x --map-keys {{}}", "takes the columns of dataset_info.json"),
        (f"{REGISTRY} --dataset-dir x --shard 1/2", "--shard 1/2: data sets are mixed as a whole"),
        (f"{REGISTRY} --dataset-dir x --max-samples 0", "--max-samples 0: at least 1"),
    ],
)
def test_what_cannot_be_together(argv: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(*argv.split())


@pytest.mark.parametrize(
    ("strategy", "text", "message"),
    [
        ("under", "0.5;0.5", "must be numbers"),
        ("under", "1", "1 for 2 data sets"),
        ("under", "0.5,0.4", "their sum must be 1"),
        ("under", "1.5,-0.5", "none may be negative"),
        ("over", "1,0", "never drawn"),
    ],
)
def test_probabilities(strategy: str, text: str, message: str) -> None:
    registry = [*REGISTRY.split(), "--dataset-dir", "x", "--mix-strategy", f"interleave_{strategy}"]
    assert probabilities_of(read(*registry), 2) is None
    assert probabilities_of(read(*registry, "--interleave-probs", "0.25, 0.75"), 2) == [0.25, 0.75]
    with pytest.raises(UsageError, match=message):
        probabilities_of(read(*registry, "--interleave-probs", text), 2)


def test_shares() -> None:
    assert shares("90,5,5") == [0.9, 0.05, 0.05]
    assert shares("3 / 1") == [0.75, 0.25]


def test_every_flag_of_the_tools_is_known(shared: Path) -> None:
    """As the reference of the formats lists them: a field, without effect, or refused by name."""
    import re

    from tessel.config.schema import normal_flag, options

    text = (shared / "reference" / "data-formats.md").read_text()
    part = text[text.index("### 2.1 Megatron-LM") : text.index("## 3. MindSpeed instruction handlers")]
    flags = {normal_flag(flag) for flag in re.findall(r"`(--[a-z0-9-]+)", part)} - {"--data-path"}  # of training
    assert len(flags) > 60
    known = {spelling for o in options(PreprocessConfig) for spelling in o.spellings}
    unknown = {f for f in flags - known if not (f in PREPROCESSING.accepted or PREPROCESSING.refusal(f))}
    assert not {f for f in unknown if not PREPROCESSING.family_refusal(f)}

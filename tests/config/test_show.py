"""--print-config: what it shows, and that it can be given back."""

from pathlib import Path

import pytest

from tessel.cli import main
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.schema import options, read
from tessel.config.show import format_config, mark_changes
from tessel.config.validate import validate

GOLDEN = Path(__file__).parent / "golden_config.yaml"
RUN = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    "--use-rotary-position-embeddings --normalization RMSNorm --swiglu --disable-bias-linear "
    "--tokenizer-type NullTokenizer --vocab-size 63 --seq-length 16 --micro-batch-size 2 --train-iters 4 --lr 1e-2 "
    "--data-path 0.3 a_text 0.7 b_text --split 90,8,2"
).split()


def shown(*argv: str) -> str:
    parsed = parse(RunConfig, argv, "tessel pretrain")
    cfg = validate(parsed.value)
    return format_config(cfg, mark_changes(parsed.value, cfg, parsed.provenance, "derived"))


def test_the_resolved_configuration_of_a_small_run_is_the_golden_one():
    """A changed default or name shows here; write the new text to the file if it is meant."""
    assert shown(*RUN) + "\n" == GOLDEN.read_text()


def test_what_is_shown_can_be_given_back(tmp_path: Path):
    path = tmp_path / "run.yaml"
    for argv in (RUN, [*RUN, "--save", "on", "--wandb-project", 'a "b": c', "--lr", "3e-05", "--data-path", "1e5"]):
        path.write_text(shown(*argv))
        again = parse(RunConfig, ["--config", str(path)], "tessel pretrain").value
        assert again == validate(parse(RunConfig, argv, "tessel pretrain").value)
        assert validate(again) == again


def test_every_field_is_shown_with_its_source():
    lines = [line for line in shown(*RUN).splitlines() if line.startswith("  ")]
    assert [line.split(":")[0].strip() for line in lines] == [o.name for o in options(RunConfig)]
    sources = {line.rsplit("# ", 1)[1] for line in lines}
    assert sources == {"default", "flag", "derived"}


def test_values_of_the_model_are_told_from_flags_and_defaults(tiny_hf_folder, capsys):
    folder = tiny_hf_folder("qwen2")
    argv = ["pretrain", "--load", str(folder), "--hidden-size", "32", "--data-path", "x", "--seq-length", "8"]
    assert main([*argv, "--train-iters", "1", "--lr", "1", "--print-config"]) == 0
    lines = {line.split(":")[0].strip(): line for line in capsys.readouterr().out.splitlines() if "#" in line}
    assert lines["num_layers"].split() == ["num_layers:", "2", "#", "model"]
    assert lines["add_qkv_bias"].split() == ["add_qkv_bias:", "true", "#", "model"]
    assert lines["padded_vocab_size"].split() == ["padded_vocab_size:", "307", "#", "model"]
    assert lines["hidden_size"].split() == ["hidden_size:", "32", "#", "flag"]
    assert lines["global_batch_size"].split() == ["global_batch_size:", "1", "#", "derived"]
    assert lines["seed"].split() == ["seed:", "1234", "#", "default"]


def test_reading_an_option_goes_through_its_sections():
    by_name = {o.name: o for o in options(RunConfig)}
    assert read(RunConfig(), by_name["adam_beta2"]) == 0.999


@pytest.mark.parametrize("verb", ["doctor", "demo"])
def test_every_verb_shows_its_configuration(verb, capsys):
    assert main([verb, "--print-config"]) == 0
    assert "# default" in capsys.readouterr().out

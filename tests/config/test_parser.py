"""The command line and the file of a run, read into sections."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tessel.config.field import REQUIRED, option
from tessel.config.megatron import MEGATRON
from tessel.config.parser import Parsed, parse
from tessel.config.run import RunConfig
from tessel.config.schema import options
from tessel.errors import TesselError, UsageError


def read(*argv: str) -> Parsed:
    return parse(RunConfig, argv, "tessel pretrain", MEGATRON)


def refused(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(*argv)
    return str(caught.value)


@pytest.fixture
def write_config(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_defaults_are_those_of_the_dataclasses():
    parsed = read()
    assert parsed.value == RunConfig()
    assert parsed.given == frozenset()
    assert set(parsed.provenance.values()) == {"default"}


def test_values_take_the_types_of_their_fields():
    cfg = read(
        "--num-layers", "4", "--lr", "3e-4", "--bf16", "--rampup-batch-size", "4", "2", "60", "--pad-id", "-1",
        "--data-path", "0.3", "a b", "0.7", "c", "--exit-duration-in-mins=1.5", "--json-keys", "text",
    ).value  # fmt: skip
    assert (cfg.model.num_layers, cfg.optimizer.lr, cfg.precision.bf16) == (4, 3e-4, True)
    assert cfg.batch.rampup_batch_size == (4, 2, 60)
    assert cfg.tokenizer.pad_id == -1
    assert cfg.data.data_path == ("0.3", "a b", "0.7", "c")
    assert cfg.data.json_keys == ("text",)
    assert cfg.batch.exit_duration_in_mins == 1.5


def test_underscores_and_aliases_set_the_same_field():
    assert read("--num_layers", "3").value.model.num_layers == 3
    assert read("--use-checkpoint-opt_param-scheduler").value.schedule.use_checkpoint_opt_param_scheduler
    assert read("--layernorm-epsilon=1e-6").value.model.norm_epsilon == 1e-6
    assert read("--persistent-save-interval", "5").given == {"save_interval"}


def test_a_flag_must_be_written_out():
    assert refused("--global-batch", "8") == "unknown flag --global-batch; nearest: --global-batch-size"


def test_a_misspelt_flag_names_what_was_meant():
    assert refused("--gloabl-batch-size", "8") == "unknown flag --gloabl-batch-size; nearest: --global-batch-size"


def test_a_flag_like_no_other_points_to_the_help():
    assert refused("--xyzzy", "8") == "unknown flag --xyzzy; see tessel pretrain --help"


def test_every_misspelt_flag_is_reported_at_once():
    message = refused("--gloabl-batch-size", "8", "--trian-iters", "9", "-lr", "1")
    for wrong, right in (("--gloabl-batch-size", "--global-batch-size"), ("--trian-iters", "--train-iters")):
        assert f"{wrong} (nearest: {right})" in message
    assert "-lr (nearest: --lr)" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "abc"], "--lr is 'abc': it must be a number."),
        (["--lr", "nan"], "--lr is 'nan': it must be a number."),
        (["--num-layers", "2.5"], "--num-layers is '2.5': it must be a whole number."),
        (["--optimizer", "lion"], "--optimizer is 'lion': it must be one of adam, sgd."),
        (["--rampup-batch-size", "4", "x", "60"], "--rampup-batch-size is '4 x 60': it must be 3 whole numbers."),
        (["--rampup-batch-size", "4", "2"], "--rampup-batch-size: it needs 3 values; see tessel pretrain --help."),
        (["--lr"], "--lr: it needs a value; see tessel pretrain --help."),
        (["--bf16", "true"], "unexpected 'true': it belongs to no flag; see tessel pretrain --help."),
        (["--bf16=true"], "--bf16: it is a switch and takes no value, so not 'true'; see tessel pretrain --help."),
    ],
)
def test_a_value_that_does_not_fit_is_refused(argv, message):
    assert refused(*argv) == message


def test_the_last_of_several_values_counts_and_is_told():
    parsed = read("--lr", "1e-3", "--lr", "2e-3", "--seed", "5", "--seed", "5")
    assert parsed.value.optimizer.lr == 2e-3
    assert parsed.notes == ("--lr is given 2 times: 0.002 counts, not 0.001",)


def test_a_file_gives_values_flat_or_by_section(write_config):
    path = write_config(
        "batch:\n  micro-batch-size: 2\n  global_batch_size: 8\nlr: 1e-3\noptimizer: adam\n"
        "data: {data-path: [0.3, a, 0.7, b], split: '90,8,2'}\nbf16: true\nload:\n"
    )
    parsed = read("--config", path)
    cfg = parsed.value
    assert (cfg.batch.micro_batch_size, cfg.batch.global_batch_size) == (2, 8)
    assert (cfg.optimizer.lr, cfg.optimizer.optimizer) == (1e-3, "adam")
    assert cfg.data.data_path == ("0.3", "a", "0.7", "b")
    assert cfg.precision.bf16 and cfg.checkpoint.load is None
    assert parsed.provenance["lr"] == "file" and "load" not in parsed.given


def test_the_command_line_wins_over_the_file(write_config):
    parsed = read("--lr", "5e-3", "--config", write_config("lr: 1e-3\nseed: 7\n"))
    assert (parsed.value.optimizer.lr, parsed.value.precision.seed) == (5e-3, 7)
    assert (parsed.provenance["lr"], parsed.provenance["seed"]) == ("flag", "file")
    assert parsed.provenance["min_lr"] == "default"
    assert parsed.given == {"lr", "seed"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gloabl_batch_size: 8\n", "unknown key gloabl_batch_size in {}; nearest: global_batch_size."),
        ("xyzzy: 8\n", "unknown key xyzzy in {}; nothing is like it."),
        ("batches: {seed: 8}\n", "unknown section batches in {}; nearest: batch."),
        (
            "batch: {seed: 8}\n",
            "seed in {} stands in section batch: move it to section precision, or to the top level.",
        ),
        ("lr: 1\nlr: 2\n", "lr in {} is given twice (line 1); keep one of them."),
        ("lr: 1\noptimizer: {lr: 2}\n", "lr in {} is given twice; keep one of them."),
        ("num_layers: four\n", "num_layers in {} is 'four': it must be a whole number."),
        ("num_layers: 2.5\n", "num_layers in {} is 2.5: it must be a whole number."),
        ("num_layers: true\n", "num_layers in {} is True: it must be a whole number."),
        ("bf16: 1\n", "bf16 in {} is 1: it must be true or false."),
        ("load: 5\n", "load in {} is 5: it must be text."),
        ("rampup_batch_size: [4, 2]\n", "rampup_batch_size in {} is '4 2': it must be 3 whole numbers."),
        ("- lr\n", "--config {} holds a list: it must be a mapping of names to values."),
        (
            "lu_lora_lr: 4\n",
            "lu_lora_lr in {}: --lu-lora-lr is not supported yet: LU-LoRA (--lora-r, --use-rslora and --use-dora are "
            "there); leave it out.",
        ),
    ],
)
def test_a_wrong_file_is_refused(write_config, text, message):
    path = write_config(text)
    assert refused("--config", path) == message.format(path)


def test_a_file_that_is_not_there_or_not_yaml_is_refused(write_config, tmp_path):
    with pytest.raises(TesselError, match=r"nowhere.yaml cannot be read: No such file"):
        read("--config", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(TesselError, match=r"run.yaml, line 2 is not YAML: expected"):
        read("--config", write_config("lr: [1\n"))
    (tmp_path / "latin.yaml").write_bytes(b"save: caf\xe9\n")
    with pytest.raises(TesselError, match="latin.yaml is not UTF-8"):
        read("--config", str(tmp_path / "latin.yaml"))


def test_a_file_takes_over_the_values_of_another(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "all.yaml").write_text("lr: 1e-3\nseed: 7\nuse_mcore_models: true\n")
    (tmp_path / "base" / "bf16.yaml").write_text("config: all.yaml\nbf16: true\nseed: 8\n")
    path = tmp_path / "run.yaml"
    path.write_text("config: base/bf16.yaml\noptimizer: {lr: 2e-3}\n")
    parsed = read("--config", str(path))
    cfg = parsed.value
    assert (cfg.optimizer.lr, cfg.precision.seed, cfg.precision.bf16) == (2e-3, 8, True)
    assert parsed.given == {"lr", "seed", "bf16"} and parsed.provenance["seed"] == "file"
    assert any("--use-mcore-models" in note for note in parsed.notes)


def test_files_that_take_over_each_other_are_refused(tmp_path):
    for one, other in ("ab", "ba"):
        (tmp_path / f"{one}.yaml").write_text(f"config: {other}.yaml\n")
    assert refused("--config", str(tmp_path / "a.yaml")) == (
        f"config: a.yaml in {tmp_path}/b.yaml leads back to where it began; name another file."
    )
    (tmp_path / "c.yaml").write_text("config: nowhere.yaml\n")
    with pytest.raises(TesselError, match=r"nowhere.yaml cannot be read: No such file"):
        read("--config", str(tmp_path / "c.yaml"))


def test_an_empty_file_gives_nothing(write_config):
    assert read("--config", write_config("")).given == frozenset()


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Numbers. The rest of this docstring is not shown."""

    depth: int = option(3, "how deep")


@dataclass(frozen=True, kw_only=True)
class Verb:
    """Files."""

    paths: tuple[str, ...] = option(REQUIRED, "what to read", nargs="+", positional=True, metavar="PATH")
    output: str = option(REQUIRED, "where to write 100% of it", metavar="FILE")
    inner: Inner = field(default_factory=Inner)


def test_positionals_may_stand_anywhere():
    parsed = parse(Verb, ["a", "--output", "o", "b", "--depth", "4", "c"], "tessel verb")
    assert parsed.value == Verb(paths=("a", "b", "c"), output="o", inner=Inner(depth=4))


def test_missing_required_values_are_named_together():
    with pytest.raises(UsageError, match=r"^tessel verb needs PATH and --output; see tessel verb --help\.$"):
        parse(Verb, [], "tessel verb")


def test_help_is_grouped_and_written_from_the_dataclasses(capsys):
    with pytest.raises(SystemExit) as left:
        parse(Verb, ["--help"], "tessel verb")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tessel verb PATH... [flags]\n\nFiles:\n  PATH ")
    assert "\n\nNumbers:\n  --depth N " in shown
    assert "how deep (default: 3)" in shown and "where to write 100% of it" in shown
    assert "not shown" not in shown


def test_help_of_pretrain_has_every_flag_once(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    starts = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    assert sorted(starts) == sorted([*(o.flag for o in options(RunConfig)), "--config", "--print-config"])


def test_no_field_is_named_like_another():
    names = [o.name for o in options(RunConfig)]
    assert len(names) == len(set(names)) > 150


def test_the_command_line_needs_no_torch():
    script = (
        "import sys, tessel.cli\n"
        "assert tessel.cli.main(['--help']) == 0\n"
        "assert tessel.cli.main(['pretrain', '--help']) == 0\n"
        "assert tessel.cli.main(['pretrain', '--lr', 'x']) == 2\n"
        "heavy = {'torch', 'numpy', 'transformers', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

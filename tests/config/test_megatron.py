"""Flags of Megatron-LM and MindSpeed-LLM: each is a field, does nothing for a reason, or is refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from tessel.config import verbs
from tessel.config.megatron import ACCEPTED, INSTEAD, LATER, MEGATRON
from tessel.config.parser import Parsed, parse
from tessel.config.preprocess import PreprocessConfig
from tessel.config.preprocess_flags import PREPROCESSING
from tessel.config.run import RunConfig
from tessel.config.schema import normal_flag, options
from tessel.config.validate import validate
from tessel.errors import UsageError

# Flags that MindSpeed-LLM's scripts for pretraining pass, and that act there.
TRAINING_FLAGS = """
--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels --group-query-attention
--num-query-groups --max-position-embeddings --position-embedding-type --use-rotary-position-embeddings --rotary-base
--rotary-percent --rope-scaling-type --rope-scaling-factor --low-freq-factor --high-freq-factor
--original-max-position-embeddings --disable-bias-linear --add-qkv-bias --qk-layernorm --swiglu --normalization
--norm-epsilon --untie-embeddings-and-output-weights --init-method-std --attention-dropout --hidden-dropout
--micro-batch-size --global-batch-size --seq-length --train-iters --lr --min-lr --lr-decay-style --lr-warmup-fraction
--weight-decay --clip-grad --adam-beta1 --adam-beta2 --adam-eps --bf16 --fp16 --initial-loss-scale --seed
--no-check-for-nan-in-loss-and-grad --manual-gc --manual-gc-interval --recompute-granularity --recompute-method
--recompute-num-layers --data-path --split --num-workers --no-create-attention-mask-in-dataloader
--reset-attention-mask --reset-position-ids --eod-mask-loss --load --save --save-interval --no-load-optim
--no-load-rng --no-save-optim --no-save-rng --exit-on-missing-checkpoint --ckpt-format --finetune --async-save
--log-interval --log-throughput --eval-interval --eval-iters --tokenizer-type --tokenizer-name-or-path
--tokenizer-model --tokenizer-not-use-fast --vocab-size --padded-vocab-size --make-vocab-size-divisible-by
--deterministic-mode --log-timers-to-tensorboard --tensorboard-dir --wandb-project --wandb-exp-name --wandb-save-dir
--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
--sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --no-shared-storage
--num-layer-list --num-layers-per-virtual-pipeline-stage --noop-layers --context-parallel-algo
--expert-tensor-parallel-size
""".split()
NO_EFFECT_FLAGS = """
--use-mcore-models --spec --transformer-impl --attention-softmax-in-fp32 --no-masked-softmax-fusion
--attention-mask-type --distributed-backend --disable-gloo-group --no-gradient-accumulation-fusion --use-flash-attn
--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --use-cp-send-recv-overlap
""".split()
PREPROCESS_FLAGS = "--input --output-prefix --json-keys --workers --append-eod --tokenizer-name-or-path".split()
GENERATE_FLAGS = "--load --prompt --max-new-tokens --temperature --top-p --top-k --seed --bf16 --fp16".split()


def spellings(cls: type) -> set[str]:
    return {spelling for o in options(cls) for spelling in o.spellings}


def read(*argv: str) -> Parsed:
    return parse(RunConfig, argv, "tessel pretrain", MEGATRON)


def test_flags_that_act_are_fields():
    assert set(TRAINING_FLAGS) <= spellings(RunConfig)
    assert set(TRAINING_FLAGS) <= spellings(verbs.SamplesConfig)
    assert set(PREPROCESS_FLAGS) <= spellings(PreprocessConfig)
    assert set(GENERATE_FLAGS) <= spellings(verbs.GenerateConfig)


def test_flags_without_effect_are_accepted_with_their_values_and_told_in_one_line():
    parsed = read(
        "--use-mcore-models", "--spec", "some.module", "layer_spec", "--bf16", "--transformer-impl", "local",
        "--distributed_backend=nccl", "--use-ring-exchange-p2p", "--attention-mask-type", "causal", "--lr", "1",
    )  # fmt: skip
    assert parsed.given == {"bf16", "lr"}
    assert parsed.notes == (
        "accepted without effect: --use-mcore-models --spec --transformer-impl (there is one model implementation); "
        "--distributed-backend --use-ring-exchange-p2p (PyTorch's own parallel engine has no such setting); "
        "--attention-mask-type (always so)",
    )
    assert set(NO_EFFECT_FLAGS) <= set(ACCEPTED)


def test_flags_without_effect_may_stand_in_a_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("use-flash-attn: true\nattention_mask_type: causal\nlr: 1\n")
    parsed = read("--config", str(path))
    assert parsed.given == {"lr"}
    assert "--use-flash-attn" in parsed.notes[0] and "--attention-mask-type" in parsed.notes[0]
    path.write_text("attention_mask_type: general\n")
    with pytest.raises(UsageError, match="--attention-mask-type general is not supported yet: only causal"):
        read("--config", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--moe-router-num-groups", "8"],
            "--moe-router-num-groups is not supported yet: this part of a mixture of experts; leave it out.",
        ),
        (
            ["--moe-tp-extend-ep"],
            "--moe-tp-extend-ep is not a flag of tessel: use --expert-tensor-parallel-size 1 and a larger "
            "--expert-model-parallel-size.",
        ),
        (
            ["--lu_lora_lr", "8"],
            "--lu-lora-lr is not supported yet: LU-LoRA (--lora-r, --use-rslora and --use-dora are there); leave it "
            "out.",
        ),
        (["--batch-size", "8"], "--batch-size is not a flag of tessel: use --micro-batch-size."),
        (
            ["--attention-mask-type", "general"],
            "--attention-mask-type general is not supported yet: only causal, which is what tessel does.",
        ),
        (["--save-intervall", "8"], "unknown flag --save-intervall; nearest: --save-interval"),
        (["--use-mcore-model"], "unknown flag --use-mcore-model; nearest: --use-mcore-models"),
    ],
)
def test_what_tessel_lacks_is_refused_by_name(argv, message):
    with pytest.raises(UsageError) as caught:
        read(*argv)
    assert str(caught.value) == message


def test_several_refusals_come_together():
    with pytest.raises(UsageError) as caught:
        read("--lu-lora-lr", "8", "--gloabl-batch-size", "8", "--mock-data")
    unknown, *refused = str(caught.value).splitlines()
    assert unknown == "unknown flag --gloabl-batch-size; nearest: --global-batch-size"
    assert [line.split()[0] for line in refused] == ["--lu-lora-lr", "--mock-data"]


def test_no_flag_stands_in_two_tables():
    fields = spellings(RunConfig)
    tables = [set(ACCEPTED), set(INSTEAD), set(LATER)]
    for i, table in enumerate(tables):
        assert not table & fields
        assert all(flag == normal_flag(flag) for flag in table)
        for other in tables[i + 1 :]:
            assert not table & other


def test_what_a_remedy_names_exists():
    known = {spelling for cls in vars(verbs).values() if dataclasses.is_dataclass(cls) for spelling in spellings(cls)}
    known |= {"--config"}
    for flag, remedy in INSTEAD.items():
        for named in re.findall(r"--[a-z0-9-]+", remedy):
            assert named in known, f"{flag}: {remedy}"


def test_preprocessing_has_rows_of_its_own():
    argv = ["--input", "a.txt", "--output-prefix", "p", "--handler-name", "GeneralPretrainHandler"]
    parsed = parse(
        PreprocessConfig, [*argv, "--streaming", "--log-interval", "100"], "tessel preprocess", PREPROCESSING
    )
    assert parsed.value.input == ("a.txt",)
    assert parsed.value.log_interval == 100
    assert parsed.notes == ("accepted without effect: --streaming (input is always streamed, and nothing is cached)",)
    with pytest.raises(
        UsageError, match="--script-data-dir is not a flag of tessel: scripts of data sets are never run"
    ):
        parse(PreprocessConfig, [*argv, "--script-data-dir", "x"], "x", PREPROCESSING)
    tables = [set(PREPROCESSING.accepted), set(PREPROCESSING.instead), set(PREPROCESSING.later)]
    for i, table in enumerate(tables):
        assert not table & spellings(PreprocessConfig)
        assert not any(table & other for other in tables[i + 1 :])


def test_no_flag_that_scripts_of_the_suites_use_for_training_is_unknown(shared: Path):
    """Every row of the reference list that pretraining scripts use is a field, without effect, or refused by name."""
    rows = re.findall(r"^\| `(--[\w-]+)` \|(.*)\|$", (shared / "reference" / "flags.md").read_text(), re.MULTILINE)
    pretraining = {normal_flag(flag) for flag, rest in rows if re.search(r":(\w\w/)*pr\b", rest)}
    assert len(pretraining) > 100
    known = spellings(RunConfig) | set(ACCEPTED)
    unknown = {f for f in pretraining - known if not (MEGATRON.refusal(f) or MEGATRON.family_refusal(f))}
    only_in_preprocessing = {"--handler-name", "--workers"}
    assert unknown <= only_in_preprocessing


@pytest.mark.parametrize("case", ["cosine", "blend_eod", "rampup_wsd", "per_token", "bf16", "fp16", "moe_aux"])
def test_flags_of_megatrons_own_runs_are_read(shared: Path, case: str):
    flags = json.loads((shared / "oracle" / "training" / f"{case}.json").read_text())["flags"]
    parsed = read(*flags)
    cfg = validate(parsed.value)
    written = {normal_flag(flag) for flag in flags if re.match(r"--[a-z]", flag)}
    without_effect = {flag for flag in written if flag in ACCEPTED}
    assert {o.flag for o in options(RunConfig) if o.name in parsed.given} == written - without_effect
    assert str(cfg.model.num_layers) == flags[flags.index("--num-layers") + 1]

"""The static rules of a run: each broken in turn, and the values that follow from others."""

import pytest

from tessel.config import rules
from tessel.config.generate_rules import validate_generate
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.schema import options
from tessel.config.validate import advice, validate, validate_samples
from tessel.config.verbs import GenerateConfig, SamplesConfig
from tessel.errors import UsageError

BASE = {
    "--load": "model",
    "--data-path": "data",
    "--seq-length": "16",
    "--micro-batch-size": "2",
    "--global-batch-size": "8",
    "--lr": "1e-2",
    "--train-iters": "100",
}
IN_SAMPLES = "-train_iters train_samples=800"
RAMP = f"{IN_SAMPLES} rampup_batch_size=4,2,60"


def arguments(changes: str) -> list[str]:
    """`BASE` with changes: `name=value`, `name=a,b` for several values, `name` for a switch, `-name` to leave out."""
    base = dict(BASE)
    switches = []
    for change in changes.split():
        name, equals, value = change.removeprefix("-").partition("=")
        flag = "--" + name.replace("_", "-")
        if change.startswith("-"):
            del base[flag]
        elif equals:
            base[flag] = value
        else:
            switches.append(flag)
    several = {"--rampup-batch-size", "--data-path"}
    out = list(switches)
    for flag, value in base.items():
        out += [flag, *(value.split(",") if flag in several else [value])]
    return out


def read(changes: str) -> RunConfig:
    value: RunConfig = parse(RunConfig, arguments(changes), "tessel pretrain").value
    return value


BROKEN = {
    # One number by itself.
    "micro_batch_size=0": "--micro-batch-size is 0: it must be at least 1.",
    "keep_last_k=0 save=out": "--keep-last-k is 0: it must be at least 1.",
    "eval_interval=0": "--eval-interval is 0: it must be at least 1.",
    "train_iters=0": "--train-iters is 0: it must be at least 1.",
    "initial_loss_scale=0": "--initial-loss-scale is 0.0: it must be above 0.",
    "z_loss_coeff=-1": "--z-loss-coeff is -1.0: it must not be negative.",
    "min_lr=-1": "--min-lr is -1.0: it must not be negative.",
    "adam_beta1=1": "--adam-beta1 is 1.0: it must be at least 0 and below 1.",
    "attention_dropout=1.5": "--attention-dropout is 1.5: it must be at least 0 and below 1.",
    "lr_warmup_fraction=1": "--lr-warmup-fraction is 1.0: it must be at least 0 and below 1.",
    "pipeline_model_parallel_size=0": "--pipeline-model-parallel-size is 0: it must be at least 1.",
    "expert_tensor_parallel_size=0": "--expert-tensor-parallel-size is 0: it must be at least 1.",
    "distributed_timeout_minutes=0": "--distributed-timeout-minutes is 0.0: it must be above 0.",
    "decoder_first_pipeline_num_layers=-1": "--decoder-first-pipeline-num-layers is -1: it must not be negative.",
    # The model.
    "-load": "No model is named: give --load",
    "init_from_config=other": "--load model starts from weights and --init-from-config other from random ones",
    "use_rope_scaling rope_scaling_type=yarn": "--use-rope-scaling means llama3, and --rope-scaling-type is yarn",
    "rotary_percent=0.5": "--rotary-percent is 0.5: it must be 1.0",
    # The tokenizer.
    "tokenizer_type=NullTokenizer": "--tokenizer-type NullTokenizer needs --vocab-size",
    "tokenizer_type=NullTokenizer vocab_size=9 tokenizer_model=t": "--tokenizer-type NullTokenizer reads no tokenizer",
    "tokenizer_model=t tokenizer_name_or_path=u": "--tokenizer-name-or-path u and --tokenizer-model t both name one",
    # The data.
    "-data_path": "No data is named: give --data-path",
    "data_args_path=f": "--data-path and --data-args-path both name the data: keep one of them.",
    "train_data_path=t": "--data-path and --train-data-path both name the data",
    "per_split_data_args_path=f": "--data-path and --per-split-data-args-path both name the data",
    "-data_path per_split_data_args_path=f valid_data_path=v": "--per-split-data-args-path and --valid-data-path both",
    "-data_path train_data_path=t split=9,1,0": "--split 9,1,0 divides what --train-data-path names",
    "-seq_length": "--seq-length is not given",
    "max_position_embeddings=8": "--seq-length 16 is more than --max-position-embeddings 8",
    # The batch.
    "global_batch_size=9": "--global-batch-size 9 is not a multiple of --micro-batch-size 2: 8 or 10 would be.",
    "global_batch_size=1": "--global-batch-size 1 is not a multiple of --micro-batch-size 2: 2 would be.",
    "rampup_batch_size=4,2,60": "--rampup-batch-size 4 2 60 needs --train-samples",
    f"{RAMP} rampup_batch_size=4,3,60": "grows in steps of 3 from 4, and --global-batch-size is 8: it must be 4 plus",
    f"{RAMP} rampup_batch_size=12,2,60": "grows in steps of 2 from 12, and --global-batch-size is 8",
    f"{RAMP} -global_batch_size": "--global-batch-size is not given: it must be 4 plus a multiple of 2.",
    f"{RAMP} rampup_batch_size=3,5,60": "the start and the increment must be multiples of --micro-batch-size 2",
    f"{RAMP} rampup_batch_size=4,0,60": "the start and the increment must be at least 1",
    f"{RAMP} rampup_batch_size=4,2,-1": "the samples not negative",
    # The length.
    "train_samples=800": "--train-iters 100 and --train-samples 800 both set the length",
    "-train_iters": "The length of the run is not given",
    "lr_decay_samples=8": "--lr-decay-samples 8 does not go with --train-iters: use --lr-decay-iters",
    "lr_warmup_samples=8": "--lr-warmup-samples 8 does not go with --train-iters: use --lr-warmup-iters",
    "lr_wsd_decay_samples=8": "--lr-wsd-decay-samples 8 does not go with --train-iters",
    f"{IN_SAMPLES} lr_decay_iters=8": "--lr-decay-iters 8 does not go with --train-samples: use --lr-decay-samples",
    f"{IN_SAMPLES} lr_warmup_iters=8": "--lr-warmup-iters 8 does not go with --train-samples",
    # The schedule.
    "lr_warmup_iters=5 lr_warmup_fraction=0.1": "--lr-warmup-fraction 0.1 and --lr-warmup-iters 5 both set the warm-up",
    f"{IN_SAMPLES} lr_warmup_samples=5 lr_warmup_fraction=0.1": "--lr-warmup-fraction 0.1 and --lr-warmup-samples 5",
    "lr_warmup_iters=100": "--lr-warmup-iters 100 must be less than --train-iters 100",
    "lr_warmup_iters=50 lr_decay_iters=50": "--lr-warmup-iters 50 must be less than --lr-decay-iters 50",
    f"{IN_SAMPLES} lr_warmup_samples=900": "--lr-warmup-samples 900 must be less than --train-samples 800",
    "lr_decay_style=WSD": "--lr-decay-style WSD needs --lr-wsd-decay-iters",
    f"{IN_SAMPLES} lr_decay_style=WSD": "--lr-decay-style WSD needs --lr-wsd-decay-samples",
    "lr_decay_style=WSD lr_wsd_decay_iters=101": "--lr-wsd-decay-iters 101 must not be more than --train-iters 100",
    "override_opt_param_scheduler use_checkpoint_opt_param_scheduler": "contradict each other: keep one",
    # The optimizer.
    "-lr": "--lr is not given",
    "min_lr=0.1": "--min-lr 0.1 is more than --lr 0.01",
    "lr_warmup_init=0.1": "--lr-warmup-init 0.1 is more than --lr 0.01",
    "decoupled_min_lr=0.1": "--decoupled-min-lr 0.1 needs --decoupled-lr",
    "decoupled_lr=0.1 decoupled_min_lr=0.2": "--decoupled-lr 0.1 is less than its floor 0.2",
    "decoupled_lr=0.001 min_lr=0.005": "--decoupled-lr 0.001 is less than its floor 0.005",
    "weight_decay_incr_style=linear": "linear needs --start-weight-decay and --end-weight-decay",
    "weight_decay_incr_style=cosine start_weight_decay=0.1": "--weight-decay-incr-style cosine needs",
    "weight_decay_incr_style=linear start_weight_decay=0.2 end_weight_decay=0.1": "weight decay only grows",
    "start_weight_decay=0.2": "--start-weight-decay 0.2 differs from --weight-decay 0.01, which is constant",
    "end_weight_decay=0.2": "--end-weight-decay 0.2 differs from --weight-decay 0.01, which is constant",
    # Precision.
    "bf16 fp16": "--bf16 and --fp16 contradict each other",
    "fp32 bf16": "--fp32 and --bf16 contradict each other",
    "loss_scale=128": "--loss-scale 128.0 is for --fp16",
    "fp16 min_loss_scale=8 initial_loss_scale=4": "--min-loss-scale 8.0 is more than --initial-loss-scale 4.0",
    # Recomputation.
    "recompute_activations recompute_granularity=full": "means --recompute-granularity selective, and full is",
    "recompute_granularity=full": "--recompute-granularity full needs --recompute-method",
    "recompute_granularity=full recompute_method=block": "--recompute-granularity full needs --recompute-method",
    "recompute_method=block": "--recompute-method is for --recompute-granularity full",
    "recompute_granularity=selective recompute_num_layers=1": "--recompute-num-layers is for --recompute-gran",
    # Profiling.
    "profile profile_step_start=-2": "--profile-step-start is -2: iterations count from 1",
    "profile profile_step_end=10": "--profile-step-end 10 must be more than --profile-step-start 10",
    "profile profile_step_start=0 profile_step_end=1": "--profile-step-end 1 must be more than",
    "profile train_iters=5": "--profile-step-start 10 is beyond --train-iters 5: nothing would be recorded",
    "profile profile_ranks=-2": "--profile-ranks -2 is no rank",
    # Checkpoints.
    "-load init_from_config=d finetune": "--finetune takes the weights of --load, which is not given",
    "-load init_from_config=d ckpt_step=5": "--ckpt-step 5 is an iteration of --load, which is not given",
}  # fmt: skip


@pytest.mark.parametrize("changes", BROKEN)
def test_a_broken_rule_names_the_field_its_value_and_the_remedy(changes):
    with pytest.raises(UsageError) as caught:
        validate(read(changes))
    message = str(caught.value)
    assert BROKEN[changes] in message
    assert message.endswith(".") and message.count(". ") <= 1


@pytest.mark.parametrize(
    "changes",
    [
        "",
        IN_SAMPLES,
        RAMP,
        f"{RAMP} lr_decay_style=WSD lr_wsd_decay_samples=80 lr_warmup_samples=24",
        "-load init_from_config=d",
        "-load num_layers=2",
        "-load save=out",
        "-train_iters -lr skip_train",
        "lr_warmup_fraction=0.1 lr_decay_iters=400",
        "lr_warmup_iters=99",
        "min_lr=1e-2",
        "recompute_granularity=full recompute_method=uniform recompute_num_layers=1",
        "fp16 loss_scale=128",
        "-data_path train_data_path=t valid_data_path=v",
        "start_weight_decay=0.01 end_weight_decay=0.01",
        "max_position_embeddings=16",
    ],
)
def test_what_megatron_allows_is_allowed(changes):
    validate(read(changes))


def test_values_that_follow_from_others():
    cfg = validate(read("-global_batch_size decoupled_lr=0.1 min_lr=1e-3 weight_decay=0.3 recompute_activations"))
    assert cfg.batch.global_batch_size == 2
    assert cfg.optimizer.decoupled_min_lr == 1e-3
    assert (cfg.optimizer.start_weight_decay, cfg.optimizer.end_weight_decay) == (0.3, 0.3)
    assert cfg.kernels.recompute_granularity == "selective"
    cfg = validate(read("fp16 loss_scale=0 use_rotary_position_embeddings"))
    assert cfg.precision.loss_scale is None
    assert cfg.model.position_embedding_type == "rope"


def test_values_that_are_given_stay():
    changes = "decoupled_lr=0.1 decoupled_min_lr=0.05 weight_decay_incr_style=linear start_weight_decay=0 "
    cfg = validate(read(changes + "end_weight_decay=0.1"))
    assert cfg.optimizer.decoupled_min_lr == 0.05
    assert (cfg.optimizer.start_weight_decay, cfg.optimizer.end_weight_decay) == (0.0, 0.1)
    assert cfg.batch.global_batch_size == 8


def test_ranges_are_about_fields_that_exist():
    names = {o.name for o in options(RunConfig)}
    tables = [rules.AT_LEAST_ONE, rules.ABOVE_ZERO, rules.NOT_NEGATIVE, rules.BELOW_ONE]
    assert all(table <= names for table in tables)
    assert sum(len(table) for table in tables) == len(frozenset().union(*tables))


def advised(changes: str) -> list[str]:
    parsed = parse(RunConfig, arguments(changes), "tessel pretrain")
    return advice(validate(parsed.value), parsed.given)


def test_flags_that_do_nothing_beside_the_others_are_told():
    assert advised("save=out save_interval=5 keep_last_k=2") == []
    assert "--ckpt-format does nothing without --save" in advised("ckpt_format=torch")
    assert advised(
        "save=out moe_router_load_balancing_type=none moe_aux_loss_coeff=0.1 moe_token_drop_policy=probs"
    ) == [
        "--moe-aux-loss-coeff does nothing without --moe-router-load-balancing-type aux_loss",
        "--moe-token-drop-policy does nothing without --moe-expert-capacity-factor",
    ]
    lines = advised("save_interval=5 manual_gc_interval=10 lr_wsd_decay_iters=5 log_memory_to_tensorboard")
    assert lines == [
        "--save-interval does nothing without --save",
        "--manual-gc-interval does nothing without --manual-gc",
        "--lr-wsd-decay-iters does nothing without --lr-decay-style WSD",
        "--log-memory-to-tensorboard does nothing without --tensorboard-dir",
        "nothing will be saved: there is no --save",
    ]


def test_samples_need_data_and_no_model():
    def read_samples(*argv: str) -> SamplesConfig:
        value: SamplesConfig = parse(SamplesConfig, argv, "tessel samples").value
        return validate_samples(value)

    cfg = read_samples("--data-path", "d", "--seq-length", "8", "--index", "0:8", "--lr", "5", "--train-samples", "9")
    assert (cfg.index, cfg.run.data.data_path, cfg.run.batch.global_batch_size) == ("0:8", ("d",), 1)
    with pytest.raises(UsageError, match="No data is named"):
        read_samples("--seq-length", "8")
    with pytest.raises(UsageError, match="--seq-length is not given"):
        read_samples("--data-path", "d")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--bf16 --fp16", "--bf16 and --fp16 contradict each other"),
        ("--max-new-tokens 0", "--max-new-tokens is 0: it must be at least 1."),
        ("--temperature 0", "--temperature is 0.0: it must be above 0; --greedy takes the likeliest token."),
        ("--top-k -1", "--top-k is -1: it must not be negative"),
        ("--top-p 0", "--top-p is 0.0: it must be above 0 and at most 1."),
        ("--top-p 1.5", "--top-p is 1.5: it must be above 0 and at most 1."),
    ],
)
def test_numbers_of_sampling_are_checked(argv, message):
    value: GenerateConfig = parse(GenerateConfig, ["--load", "m", "--prompt", "a", *argv.split()], "x").value
    with pytest.raises(UsageError) as caught:
        validate_generate(value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("train_iters", "given", "eval_iters", "log_interval"),
    [(20, {}, 20, 2), (5, {}, 5, 1), (5000, {}, 100, 100), (20, {"eval_iters": 100, "log_interval": 7}, 100, 7)],
)
def test_evaluation_and_log_lines_suit_the_length_of_the_run(
    train_iters: int, given: dict[str, int], eval_iters: int, log_interval: int
) -> None:
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    line = f"--num-layers 1 --seq-length 8 --lr 1e-3 --data-path x --train-iters {train_iters}".split() + flags
    cfg = validate(parse(RunConfig, line, "tessel pretrain").value)
    assert (cfg.evaluation.eval_iters, cfg.logging.log_interval) == (eval_iters, log_interval)

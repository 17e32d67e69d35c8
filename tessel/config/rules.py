"""The static rules of a training run: those that need neither files nor torch.

Each function checks one matter and raises a UsageError that names the fields, their values, the
rule and the remedy. Rules are Megatron-LM's (validate_args, OptimizerParamScheduler), and where
Megatron would ignore a value that contradicts another, an error.
"""

from __future__ import annotations

from collections.abc import Callable

from tessel.config.finetune_rules import FINETUNE_RULES
from tessel.config.launch_rules import LAUNCH_RULES
from tessel.config.layout_rules import LAYOUT_RULES
from tessel.config.memory_rules import MEMORY_RULES
from tessel.config.profiling_rules import check_profiling
from tessel.config.run import RunConfig
from tessel.config.schema import flag_of, options, read
from tessel.errors import UsageError

Rule = Callable[[RunConfig], None]


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


AT_LEAST_ONE = _names(
    "micro_batch_size global_batch_size seq_length train_iters train_samples exit_interval num_layers hidden_size "
    "ffn_hidden_size num_attention_heads num_query_groups kv_channels max_position_embeddings vocab_size "
    "padded_vocab_size make_vocab_size_divisible_by original_max_position_embeddings lr_decay_iters lr_decay_samples "
    "lr_wsd_decay_iters lr_wsd_decay_samples loss_scale_window hysteresis recompute_num_layers save_interval "
    "recompute_activation_function_num_layers cpu_offloading_num_layers "
    "save_hf_interval keep_last_k eval_interval log_interval tensorboard_log_interval tensorboard_queue_size "
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
    "expert_tensor_parallel_size num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank "
    "ulysses_degree_in_cp num_distributed_optimizer_instances nproc_per_node "
    "num_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size pad_to_multiple_of "
    "max_padding_length"
)
ABOVE_ZERO = _names(
    "rotary_base norm_epsilon rope_scaling_factor low_freq_factor high_freq_factor exit_duration_in_mins "
    "initial_loss_scale min_loss_scale distributed_timeout_minutes moe_expert_capacity_factor "
    "moe_router_topk_scaling_factor"
)
NOT_NEGATIVE = _names(
    "lr min_lr decoupled_lr decoupled_min_lr lr_warmup_init lr_warmup_iters lr_warmup_samples weight_decay "
    "start_weight_decay end_weight_decay clip_grad adam_eps sgd_momentum z_loss_coeff eval_iters num_workers "
    "manual_gc_interval init_method_std seed mid_level_dataset_surplus ckpt_step loss_scale eod_id "
    "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers node_rank max_restarts "
    "moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate num_dataset_builder_threads"
)
BELOW_ONE = _names("attention_dropout hidden_dropout adam_beta1 adam_beta2 lr_warmup_fraction")


def check_ranges(cfg: RunConfig) -> None:
    """Each number by itself."""
    for o in options(RunConfig):
        value = read(cfg, o)
        if value is None:
            continue
        if o.name in AT_LEAST_ONE and value < 1:
            raise UsageError(f"{o.flag} is {value}: it must be at least 1. Raise it, or leave it out.")
        if o.name in ABOVE_ZERO and value <= 0:
            raise UsageError(f"{o.flag} is {value}: it must be above 0. Raise it, or leave it out.")
        if o.name in NOT_NEGATIVE and value < 0:
            raise UsageError(f"{o.flag} is {value}: it must not be negative. Give 0 or more.")
        if o.name in BELOW_ONE and not 0 <= value < 1:
            raise UsageError(f"{o.flag} is {value}: it must be at least 0 and below 1.")


def check_data(cfg: RunConfig) -> None:
    """One way of naming the data, and a length."""
    data = cfg.data
    per_split = [name for name in ("train_data_path", "valid_data_path", "test_data_path") if getattr(data, name)]
    forms = [name for name in ("data_path", "data_args_path", "per_split_data_args_path") if getattr(data, name)]
    ways = [flag_of(name) for name in [*forms, *per_split[:1]]]
    if len(ways) > 1:
        raise UsageError(f"{' and '.join(ways)} both name the data: keep one of them.")
    if not ways:
        raise UsageError("No data is named: give --data-path (a .txt or .jsonl file, or the prefix of a .bin/.idx).")
    if data.split is not None and (per_split or data.per_split_data_args_path):
        raise UsageError(
            f"--split {data.split} divides what {ways[0]} names for each split already: leave --split out."
        )
    if cfg.batch.seq_length is None:
        raise UsageError("--seq-length is not given: it is the number of tokens in a sequence, such as 1024.")
    longest = cfg.model.max_position_embeddings
    if longest is not None and longest < cfg.batch.seq_length:
        raise UsageError(
            f"--seq-length {cfg.batch.seq_length} is more than --max-position-embeddings {longest}: "
            "lower the first or raise the second."
        )


def check_batch(cfg: RunConfig) -> None:
    """Micro-batches fill global batches, and a ramp arrives."""
    micro, size = cfg.batch.micro_batch_size, cfg.batch.global_batch_size
    if size is not None and size % micro:
        near = [str(n) for n in (size // micro * micro, (size // micro + 1) * micro) if n]
        raise UsageError(
            f"--global-batch-size {size} is not a multiple of --micro-batch-size {micro}: {' or '.join(near)} would be."
        )
    if cfg.batch.rampup_batch_size is None:
        return
    start, increment, samples = cfg.batch.rampup_batch_size
    ramp = f"--rampup-batch-size {start} {increment} {samples}"
    if min(start, increment) < 1 or samples < 0:
        raise UsageError(f"{ramp}: the start and the increment must be at least 1, and the samples not negative.")
    if cfg.batch.train_samples is None:
        raise UsageError(f"{ramp} needs --train-samples: with a growing batch, the run is measured in samples.")
    if size is None or size < start or (size - start) % increment:
        reached = "not given" if size is None else str(size)
        raise UsageError(
            f"{ramp} grows in steps of {increment} from {start}, and --global-batch-size is {reached}: "
            f"it must be {start} plus a multiple of {increment}."
        )
    if start % micro or increment % micro:
        raise UsageError(f"{ramp}: the start and the increment must be multiples of --micro-batch-size {micro}.")


def check_length(cfg: RunConfig) -> None:
    """The run is measured in iterations or in samples, and so is its schedule."""
    batch, schedule = cfg.batch, cfg.schedule
    if cfg.finetune.num_train_epochs is not None and (batch.train_iters or batch.train_samples):
        raise UsageError("--num-train-epochs and --train-iters or --train-samples both set the length: keep one.")
    if batch.train_iters is not None and batch.train_samples is not None:
        raise UsageError(
            f"--train-iters {batch.train_iters} and --train-samples {batch.train_samples} both set the length: "
            "keep one."
        )
    epochs = cfg.finetune.num_train_epochs
    if epochs is not None and (not cfg.finetune.reads_dialogues or not epochs > 0):
        raise UsageError(f"--num-train-epochs {epochs:g} must be above 0, and is for fine-tuning on dialogues alone.")
    if batch.train_iters is None and batch.train_samples is None:
        if batch.skip_train or epochs is not None:
            return
        raise UsageError("The length of the run is not given: give --train-iters, --train-samples or --skip-train.")
    in_samples = batch.train_samples is not None
    unit, other = ("samples", "iters") if in_samples else ("iters", "samples")
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        value = getattr(schedule, f"{name}_{other}")
        if value:
            raise UsageError(
                f"{flag_of(f'{name}_{other}')} {value} does not go with --train-{unit}: "
                f"use {flag_of(f'{name}_{unit}')} in a run that is measured so."
            )


def check_schedule(cfg: RunConfig) -> None:
    """The parts of the learning-rate schedule fit into its length."""
    batch, schedule = cfg.batch, cfg.schedule
    if schedule.override_opt_param_scheduler and schedule.use_checkpoint_opt_param_scheduler:
        raise UsageError(
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other: keep one."
        )
    unit = "samples" if batch.train_samples is not None else "iters"
    length = getattr(batch, f"train_{unit}")
    if length is None:
        return
    warmup, decay = getattr(schedule, f"lr_warmup_{unit}"), getattr(schedule, f"lr_decay_{unit}")
    if schedule.lr_warmup_fraction is not None and warmup:
        raise UsageError(
            f"--lr-warmup-fraction {schedule.lr_warmup_fraction} and --lr-warmup-{unit} {warmup} both set the warm-up: "
            "keep one."
        )
    end = decay if decay is not None else length
    ends = f"--lr-decay-{unit} {end}" if decay is not None else f"--train-{unit} {end}"
    if warmup >= end:
        raise UsageError(f"--lr-warmup-{unit} {warmup} must be less than {ends}, where the decay ends: lower it.")
    if schedule.lr_decay_style != "WSD":
        return
    last_part = getattr(schedule, f"lr_wsd_decay_{unit}")
    if last_part is None:
        raise UsageError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}: the length of its last part.")
    if last_part > end:
        raise UsageError(f"--lr-wsd-decay-{unit} {last_part} must not be more than {ends}: lower it.")


def check_optimizer(cfg: RunConfig) -> None:
    """Learning rates and weight decays in order."""
    optimizer, schedule = cfg.optimizer, cfg.schedule
    lr = optimizer.lr
    if lr is None:
        if cfg.batch.skip_train:
            return
        raise UsageError("--lr is not given: it is the peak learning rate, such as 1e-4.")
    for name, value in (("--min-lr", schedule.min_lr), ("--lr-warmup-init", schedule.lr_warmup_init)):
        if value > lr:
            raise UsageError(f"{name} {value} is more than --lr {lr}: lower it, or raise --lr.")
    if optimizer.decoupled_min_lr is not None and optimizer.decoupled_lr is None:
        raise UsageError(f"--decoupled-min-lr {optimizer.decoupled_min_lr} needs --decoupled-lr: give both or neither.")
    if optimizer.decoupled_lr is not None:
        floor = schedule.min_lr if optimizer.decoupled_min_lr is None else optimizer.decoupled_min_lr
        if floor > optimizer.decoupled_lr:
            raise UsageError(
                f"--decoupled-lr {optimizer.decoupled_lr} is less than its floor {floor}: raise it, or lower "
                "--decoupled-min-lr (--min-lr if not given)."
            )
    _check_weight_decay(cfg)


def _check_weight_decay(cfg: RunConfig) -> None:
    optimizer = cfg.optimizer
    start, end, style = optimizer.start_weight_decay, optimizer.end_weight_decay, optimizer.weight_decay_incr_style
    if style == "constant":
        for name, value in (("--start-weight-decay", start), ("--end-weight-decay", end)):
            if value is not None and value != optimizer.weight_decay:
                raise UsageError(
                    f"{name} {value} differs from --weight-decay {optimizer.weight_decay}, which is constant: "
                    "leave it out, or give --weight-decay-incr-style linear or cosine."
                )
    elif start is None or end is None:
        raise UsageError(f"--weight-decay-incr-style {style} needs --start-weight-decay and --end-weight-decay.")
    elif start > end:
        raise UsageError(
            f"--start-weight-decay {start} is more than --end-weight-decay {end}: weight decay only grows."
        )


def check_precision(cfg: RunConfig) -> None:
    """One precision."""
    precision = cfg.precision
    asked = [f"--{name}" for name in ("fp32", "bf16", "fp16") if getattr(precision, name)]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} contradict each other: keep one of them.")
    if precision.loss_scale and not precision.fp16:
        raise UsageError(f"--loss-scale {precision.loss_scale} is for --fp16: leave it out, or add --fp16.")
    if precision.fp16 and precision.min_loss_scale > precision.initial_loss_scale:
        raise UsageError(
            f"--min-loss-scale {precision.min_loss_scale} is more than --initial-loss-scale "
            f"{precision.initial_loss_scale}: lower the first."
        )


def check_recomputation(cfg: RunConfig) -> None:
    """Which activations are computed twice."""
    kernels = cfg.kernels
    granularity, method, layers = kernels.recompute_granularity, kernels.recompute_method, kernels.recompute_num_layers
    if kernels.recompute_activations and granularity == "full":
        raise UsageError(
            "--recompute-activations means --recompute-granularity selective, and full is given: keep one of them."
        )
    if granularity == "full" and (method is None or layers is None):
        raise UsageError(
            "--recompute-granularity full needs --recompute-method (uniform or block) and --recompute-num-layers."
        )
    if granularity != "full" and (method is not None or layers is not None):
        name = "--recompute-method" if method is not None else "--recompute-num-layers"
        raise UsageError(f"{name} is for --recompute-granularity full: add that, or leave {name} out.")


def check_tokenizer(cfg: RunConfig) -> None:
    """One tokenizer, and of a NullTokenizer the vocabulary."""
    tokenizer = cfg.tokenizer
    folder, model = tokenizer.tokenizer_name_or_path, tokenizer.tokenizer_model
    if folder is not None and model is not None and folder != model:
        raise UsageError(f"--tokenizer-name-or-path {folder} and --tokenizer-model {model} both name one: keep one.")
    if tokenizer.tokenizer_type != "NullTokenizer":
        return
    if folder is not None or model is not None:
        raise UsageError(f"--tokenizer-type NullTokenizer reads no tokenizer: leave {folder or model} out.")
    if cfg.model.vocab_size is None:
        raise UsageError("--tokenizer-type NullTokenizer needs --vocab-size: the id that ends a document.")


def check_model(cfg: RunConfig) -> None:
    """A model to start from. What shape flags must say together is `model.shape`'s matter."""
    load, init, shape = cfg.checkpoint.load, cfg.model.init_from_config, cfg.model
    if load is not None and init is not None:
        raise UsageError(
            f"--load {load} starts from weights and --init-from-config {init} from random ones: keep one of them."
        )
    described = shape.num_layers is not None or shape.hidden_size is not None
    # A run in --save goes on without either.
    if load is None and init is None and not described and cfg.checkpoint.save is None:
        raise UsageError(
            "No model is named: give --load (a Hugging Face folder); or for random weights --init-from-config, or "
            "Megatron's shape flags (--num-layers --hidden-size --num-attention-heads ...)."
        )
    if shape.use_rope_scaling and shape.rope_scaling_type not in (None, "llama3"):
        raise UsageError(
            f"--use-rope-scaling means llama3, and --rope-scaling-type is {shape.rope_scaling_type}: keep one of them."
        )
    if shape.rotary_percent not in (None, 1.0):
        raise UsageError(f"--rotary-percent is {shape.rotary_percent}: it must be 1.0, or left out.")


def check_experts(cfg: RunConfig) -> None:
    """Router options that need one another."""
    experts = cfg.experts
    if experts.moe_pad_expert_input_to_capacity and experts.moe_expert_capacity_factor is None:
        raise UsageError(
            "--moe-pad-expert-input-to-capacity needs --moe-expert-capacity-factor: add it, or leave it out."
        )


def check_checkpoint(cfg: RunConfig) -> None:
    """What is taken from --load."""
    checkpoint = cfg.checkpoint
    if checkpoint.load is None and checkpoint.finetune:
        raise UsageError(
            "--finetune takes the weights of --load, which is not given: give it, or leave --finetune out."
        )
    if checkpoint.load is None and checkpoint.save is None and checkpoint.ckpt_step is not None:
        raise UsageError(f"--ckpt-step {checkpoint.ckpt_step} is an iteration of --load, which is not given.")


SAMPLE_RULES: tuple[Rule, ...] = (check_ranges, check_tokenizer, check_data, check_batch, *FINETUNE_RULES)
RULES: tuple[Rule, ...] = (
    check_ranges,
    check_model,
    check_tokenizer,
    check_data,
    check_length,
    check_batch,
    check_schedule,
    check_optimizer,
    check_precision,
    check_recomputation,
    check_checkpoint,
    check_experts,
    check_profiling,
    *LAUNCH_RULES,
    *LAYOUT_RULES,
    *MEMORY_RULES,
    *FINETUNE_RULES,
)

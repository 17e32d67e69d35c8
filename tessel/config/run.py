"""What a training run is asked to do: sections of frozen dataclasses.

Field names are Megatron's flag names. `None` means "not given": the value is then derived,
or read from the model's config.json. Rules that tie fields together live in `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from tessel.config.dpo import Preference
from tessel.config.experts import Experts
from tessel.config.field import option
from tessel.config.finetune import FineTune
from tessel.config.layout import Launch, Layout
from tessel.config.lora import Lora
from tessel.config.memory import Memory
from tessel.config.profiling import Profiling
from tessel.config.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelShape:
    """Model. Read from config.json where there is one; a value given here must then agree."""

    init_from_config: str | None = option(
        None, "folder whose config.json gives the shape of a randomly initialised model", metavar="DIR"
    )
    num_layers: int | None = option(None, "transformer layers")
    hidden_size: int | None = option(None, "width of the residual stream")
    ffn_hidden_size: int | None = option(None, "inner width of the MLP")
    num_attention_heads: int | None = option(None, "query heads")
    group_query_attention: bool = option(False, "fewer key/value heads than query heads")
    num_query_groups: int | None = option(None, "key/value heads (with --group-query-attention)")
    kv_channels: int | None = option(None, "head dimension; hidden size / heads if not given")
    max_position_embeddings: int | None = option(None, "largest position; at least the sequence length")
    position_embedding_type: str | None = option(None, "kind of position embedding", choices=("rope",))
    use_rotary_position_embeddings: bool = option(False, "the same as --position-embedding-type rope")
    rotary_base: float | None = option(None, "RoPE theta")
    rotary_percent: float | None = option(None, "share of the head dimension that is rotated")
    rope_scaling_type: str | None = option(None, "RoPE scaling", choices=("llama3", "yarn", "linear"))
    use_rope_scaling: bool = option(False, "Llama 3.1's RoPE scaling (Megatron's spelling)")
    rope_scaling_factor: float | None = option(None, "RoPE scaling factor")
    low_freq_factor: float | None = option(None, "llama3 RoPE scaling: low-frequency factor")
    high_freq_factor: float | None = option(None, "llama3 RoPE scaling: high-frequency factor")
    original_max_position_embeddings: int | None = option(None, "context length before RoPE scaling")
    normalization: str | None = option(None, "kind of norm", choices=("RMSNorm",))
    norm_epsilon: float | None = option(None, "epsilon of the norms", aliases=("--layernorm-epsilon",))
    swiglu: bool = option(False, "gated SiLU MLP")
    disable_bias_linear: bool = option(False, "no bias in linear layers")
    add_qkv_bias: bool = option(False, "bias on the query, key and value projections")
    qk_layernorm: bool = option(False, "RMSNorm on each query and key head")
    untie_embeddings_and_output_weights: bool = option(False, "output layer of its own")
    vocab_size: int | None = option(None, "vocabulary before padding (NullTokenizer: the end-of-document id)")
    padded_vocab_size: int | None = option(None, "rows of the embedding, exactly")
    make_vocab_size_divisible_by: int | None = option(
        None, "pad the embedding's rows to a multiple of this (128 for a model from shape flags)"
    )
    num_experts: int | None = option(None, "experts in a layer of a mixture of experts")
    moe_router_topk: int | None = option(None, "experts of each token (2 for a model from shape flags)")
    moe_ffn_hidden_size: int | None = option(
        None, "inner width of one expert; --ffn-hidden-size if not given", aliases=("--moe-intermediate-size",)
    )
    moe_shared_expert_intermediate_size: int | None = option(None, "inner width of the expert that sees every token")
    moe_shared_expert_gate: bool = option(False, "a sigmoid gate on that expert")
    moe_layer_freq: str | None = option(
        None, 'which layers have experts: N is every N-th from the first, "[0]*1+[1]*23" says it layer by layer'
    )
    first_k_dense_replace: int | None = option(None, "the first so many layers have no experts; -1 and 0: all have")
    norm_topk_prob: bool = option(False, "the weights of the chosen experts add up to 1")
    init_method_std: float = option(0.02, "standard deviation of the initial weights")
    attention_dropout: float = option(0.0, "dropout of attention probabilities (Megatron's own default is 0.1)")
    hidden_dropout: float = option(0.0, "dropout of each residual branch (Megatron's own default is 0.1)")


@dataclass(frozen=True)
class Batch:
    """Batch and length of the run."""

    micro_batch_size: int = option(1, "sequences in one forward pass")
    global_batch_size: int | None = option(None, "sequences in one optimizer step; the micro-batch size if not given")
    rampup_batch_size: tuple[int, ...] | None = option(
        None, "START INCREMENT SAMPLES: grow the global batch size over that many samples", nargs=3
    )
    seq_length: int | None = option(None, "tokens in a sequence")
    train_iters: int | None = option(None, "optimizer steps")
    train_samples: int | None = option(None, "training samples, instead of --train-iters")
    exit_interval: int | None = option(None, "save and stop after an iteration that this number divides")
    exit_duration_in_mins: float | None = option(None, "save and stop after this many minutes")
    skip_train: bool = option(False, "evaluate only")
    calculate_per_token_loss: bool = option(
        False, "gradient of the mean over all tokens of the global batch, not of the mean of micro-batch means"
    )


@dataclass(frozen=True)
class Optimizer:
    """Optimizer."""

    optimizer: str = option("adam", "optimizer: adam is AdamW", choices=("adam", "sgd"))
    lr: float | None = option(None, "peak learning rate")
    weight_decay: float = option(0.01, "decoupled weight decay; none on biases and norms")
    start_weight_decay: float | None = option(None, "weight decay at the start, with --weight-decay-incr-style")
    end_weight_decay: float | None = option(None, "weight decay at the end, with --weight-decay-incr-style")
    weight_decay_incr_style: str = option(
        "constant", "how weight decay grows", choices=("constant", "linear", "cosine")
    )
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 turns clipping off")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    adam_eps: float = option(1e-8, "added to the denominator")
    sgd_momentum: float = option(0.9, "momentum of SGD")
    decoupled_lr: float | None = option(None, "learning rate of the embedding and the output layer")
    decoupled_min_lr: float | None = option(None, "smallest learning rate of the embedding and the output layer")


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule."""

    lr_decay_style: str = option(
        "linear", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_wsd_decay_style: str = option(
        "exponential", "shape of WSD's last part", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    min_lr: float = option(0.0, "floor of the learning rate")
    lr_warmup_init: float = option(0.0, "learning rate at the start of the warm-up")
    lr_warmup_iters: int = option(0, "iterations of linear warm-up")
    lr_warmup_samples: int = option(0, "samples of linear warm-up")
    lr_warmup_fraction: float | None = option(None, "warm-up as a fraction of the decay")
    lr_decay_iters: int | None = option(None, "iterations over which the rate decays; all if not given")
    lr_decay_samples: int | None = option(None, "samples over which the rate decays; all if not given")
    lr_wsd_decay_iters: int | None = option(None, "iterations of WSD's last part")
    lr_wsd_decay_samples: int | None = option(None, "samples of WSD's last part")
    override_opt_param_scheduler: bool = option(False, "on resuming, the schedule's values come from the command line")
    use_checkpoint_opt_param_scheduler: bool = option(
        False, "on resuming, the schedule's values come from the checkpoint"
    )


@dataclass(frozen=True)
class Precision:
    """Precision and numerics."""

    fp32: bool = option(False, "fp32 throughout (the default)")
    bf16: bool = option(False, "bf16 compute, fp32 master weights and gradient sums")
    fp16: bool = option(False, "fp16 compute with a loss scale, fp32 master weights and gradient sums")
    loss_scale: float | None = option(None, "fixed loss scale for --fp16")
    initial_loss_scale: float = option(2.0**32, "first dynamic loss scale for --fp16")
    min_loss_scale: float = option(1.0, "smallest dynamic loss scale")
    loss_scale_window: int = option(1000, "clean iterations before the loss scale doubles")
    hysteresis: int = option(2, "overflows before the loss scale halves")
    z_loss_coeff: float = option(0.0, "weight of the squared log-partition of the output softmax; 0 is off")
    accumulate_allreduce_grads_in_fp32: bool = option(
        False, "fp16: an overflow of the fp16 sum of gradients is no overflow (sums are fp32 always)"
    )
    no_check_for_nan_in_loss_and_grad: bool = option(
        False, "skip an iteration whose loss or gradient is not finite, instead of stopping"
    )
    deterministic_mode: bool = option(False, "deterministic kernels: two runs give identical bytes")
    seed: int = option(1234, "seed of data order, initial weights and dropout")


@dataclass(frozen=True)
class Kernels:
    """Kernels, and what is recomputed as a whole."""

    attention_backend: str = option(
        "auto",
        "attention kernel: flash = FlashAttention, fused = SDPA, unfused or local = plain PyTorch",
        choices=("auto", "flash", "fused", "unfused", "local"),
    )
    compile: bool = option(False, "compile each layer with torch.compile")
    recompute_granularity: str | None = option(
        None, "recompute activations in the backward pass", choices=("full", "selective")
    )
    recompute_method: str | None = option(
        None, "which layers --recompute-granularity full recomputes", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = option(
        None, "layers in one recomputed unit (uniform), or layers recomputed (block)"
    )
    recompute_activations: bool = option(False, "the same as --recompute-granularity selective")
    manual_gc: bool = option(False, "collect Python garbage at set steps only")
    manual_gc_interval: int = option(0, "steps between collections with --manual-gc; 0: never")


@dataclass(frozen=True)
class Data:
    """Data."""

    data_path: tuple[str, ...] | None = option(
        None,
        "prefix of a .bin/.idx, or raw .txt, .jsonl, .parquet, ...; or WEIGHT PATH WEIGHT PATH ...",
        nargs="+",
        metavar="PATH",
        aliases=("--data",),
    )
    train_data_path: tuple[str, ...] | None = option(
        None, "as --data-path, for training alone", nargs="+", metavar="PATH"
    )
    valid_data_path: tuple[str, ...] | None = option(
        None, "as --data-path, for validation alone", nargs="+", metavar="PATH"
    )
    test_data_path: tuple[str, ...] | None = option(
        None, "as --data-path, for the test alone", nargs="+", metavar="PATH"
    )
    data_args_path: str | None = option(None, "file that holds what --data-path would", metavar="FILE")
    per_split_data_args_path: str | None = option(
        None, 'JSON file with "train", "valid" and "test", each as --data-path', metavar="FILE"
    )
    split: str | None = option(None, "shares of training, validation and test; 969,30,1 if not given", metavar="SHARES")
    data_cache_path: str | None = option(None, "folder for index caches and preprocessed raw text", metavar="DIR")
    mid_level_dataset_surplus: float = option(0.005, "extra samples built of each dataset of a blend")
    multiple_validation_sets: bool = option(
        False, "evaluate each dataset that is named for validation apart, with a loss of its own"
    )
    validation_set_names: tuple[str, ...] | None = option(
        None, "names of these datasets in the log, in their order; 0, 1, ... if not given", nargs="+", metavar="NAME"
    )
    num_dataset_builder_threads: int = option(
        0, "threads that index the datasets of a blend; 0: as many as there are cores, up to 8"
    )
    eod_mask_loss: bool = option(False, "no loss where the input is an end-of-document token")
    reset_position_ids: bool = option(False, "positions restart after each end of document")
    reset_attention_mask: bool = option(False, "no attention across an end of document")
    dataloader_inter_document_masking: bool = option(
        False, "positions and attention restart at each document's first token"
    )
    no_add_extra_token_to_sequence: bool = option(False, "samples of seq-length tokens, the last one without a label")
    no_drop_last_partial_validation_sequence: bool = option(False, "pad and keep the last validation sequence")
    dataloader_type: str = option(
        "single", "single: in order; cyclic: shuffled anew each epoch", choices=("single", "cyclic")
    )
    no_data_sharding: bool = option(False, "cyclic: shuffle over all samples, not within a rank's share")
    num_workers: int = option(2, "threads that read samples ahead; 0 reads in the training loop")
    json_keys: tuple[str, ...] = option(("text",), "keys of raw .jsonl lines that hold text", nargs="+", metavar="KEY")
    no_append_eod: bool = option(False, "raw text: do not end documents with the end-of-document token")
    no_create_attention_mask_in_dataloader: bool = option(False, "accepted: masks are never built as dense arrays here")


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints."""

    load: str | None = option(
        None, "checkpoint: Hugging Face, a run, Megatron's torch or torch_dist, ModelLink's legacy", metavar="DIR"
    )
    hf_dir: str | None = option(
        None, "config.json and tokenizer of a --load without its own", metavar="DIR", aliases=("--hf-cfg-dir",)
    )
    save: str | None = option(None, "folder to write checkpoints, metrics and the final hf/ folder to", metavar="DIR")
    save_interval: int | None = option(None, "iterations between checkpoints", aliases=("--persistent-save-interval",))
    save_hf_interval: int | None = option(
        None, "iterations between Hugging Face folders; one is always written at the end"
    )
    keep_last_k: int | None = option(None, "keep only so many checkpoints")
    async_save: bool = option(False, "write checkpoints in the background")
    ckpt_step: int | None = option(None, "iteration to load, instead of the latest")
    finetune: bool = option(False, "take only the weights of --load; start at iteration 0")
    no_load_optim: bool = option(False, "do not load the optimizer's state")
    no_load_rng: bool = option(False, "do not load the random state")
    no_save_optim: bool = option(False, "do not save the optimizer's state")
    no_save_rng: bool = option(False, "do not save the random state")
    no_resume: bool = option(False, "start anew although --save holds a checkpoint of this run")
    override: bool = option(False, "resume although model or data contradict the checkpoint")
    exit_on_missing_checkpoint: bool = option(False, "accepted: a --load without weights is always an error here")
    ckpt_format: tuple[str, ...] | None = option(
        None, "formats of the run's checkpoints", nargs="+", choices=("hf", "torch", "torch_dist", "torch_dcp")
    )


@dataclass(frozen=True)
class Evaluation:
    """Evaluation."""

    eval_interval: int | None = option(1000, "iterations between evaluations")
    eval_iters: int | None = option(
        None, "global batches in one evaluation; 0: none. 100, or the iterations of a shorter run"
    )
    full_validation: bool = option(False, "evaluate on the whole validation set each time")


@dataclass(frozen=True)
class Logging:
    """Logging."""

    log_interval: int | None = option(None, "iterations between log lines; 100, or a tenth of a shorter run")
    log_throughput: bool = option(False, "add TFLOP/s per device to the log line")
    log_params_norm: bool = option(False, "add the norm of the weights to the log line")
    log_num_zeros_in_grad: bool = option(False, "add the number of zeros in the gradient to the log line")
    tensorboard_dir: str | None = option(None, "write TensorBoard events here", metavar="DIR")
    tensorboard_log_interval: int = option(1, "iterations between TensorBoard events")
    tensorboard_queue_size: int = option(1000, "TensorBoard's queue")
    log_timers_to_tensorboard: bool = option(False, "TensorBoard: times")
    log_validation_ppl_to_tensorboard: bool = option(False, "TensorBoard: validation perplexity")
    log_memory_to_tensorboard: bool = option(False, "TensorBoard: memory")
    log_world_size_to_tensorboard: bool = option(False, "TensorBoard: number of processes")
    no_log_learning_rate_to_tensorboard: bool = option(False, "TensorBoard: leave out the learning rate")
    no_log_loss_scale_to_tensorboard: bool = option(False, "TensorBoard: leave out the loss scale")
    wandb_project: str | None = option(None, "log to this Weights & Biases project (extra: wandb)", metavar="NAME")
    wandb_exp_name: str | None = option(None, "name of the Weights & Biases run", metavar="NAME")
    wandb_entity: str | None = option(None, "Weights & Biases entity", metavar="NAME")
    wandb_save_dir: str | None = option(None, "Weights & Biases folder", metavar="DIR")
    swanlab_project: str | None = option(None, "log to this SwanLab project (extra: swanlab)", metavar="NAME")


@dataclass(frozen=True)
class Runtime:
    """Device."""

    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "npu"))
    ai_framework: str = option(
        "pytorch", "what computes: mindspore trains dense models (extra: mindspore)", choices=("pytorch", "mindspore")
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything that `tessel pretrain` was asked for."""

    model: ModelShape = field(default_factory=ModelShape)
    experts: Experts = field(default_factory=Experts)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
    memory: Memory = field(default_factory=Memory)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    finetune: FineTune = field(default_factory=FineTune)
    lora: Lora = field(default_factory=Lora)
    preference: Preference = field(default_factory=Preference)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging = field(default_factory=Logging)
    profiling: Profiling = field(default_factory=Profiling)
    layout: Layout = field(default_factory=Layout)
    launch: Launch = field(default_factory=Launch)
    runtime: Runtime = field(default_factory=Runtime)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The values as nested dicts: section -> field -> value; tuples become lists."""
        return {
            section.name: {
                f.name: list(value)
                if isinstance(value := getattr(getattr(self, section.name), f.name), tuple)
                else value
                for f in fields(getattr(self, section.name))
            }
            for section in fields(self)
        }

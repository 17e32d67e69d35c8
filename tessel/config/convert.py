"""What `tessel convert` and `tessel verify` are asked to do.

A docstring's first sentence is the heading of the fields in `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tessel.config.field import REQUIRED, option
from tessel.config.megatron import SAME_FILES, Accepted, ForeignFlags
from tessel.errors import UsageError

FORMATS = ("hf", "torch", "torch_dist", "torch_dcp", "legacy")
PARAMS_DTYPES = ("fp32", "bf16", "fp16")

_DETECTED = "the source's format and family are found by its files"
_TOKENIZER = "the tokenizer travels along with the model"
_COPIED = "tensors are copied from file to file, and compared"
CONVERSION = ForeignFlags(
    {
        **{
            flag: Accepted(1, _DETECTED)
            for flag in ("--model-type", "--model-type-hf", "--load-model-type", "--loader", "--model-name")
        },
        "--ai-framework": Accepted(1, SAME_FILES),
        "--save-model-type": Accepted(1, "--to says what to write"),
        "--saver": Accepted(1, "--to says what to write"),
        "--spec": Accepted(2, _DETECTED),
        "--use-mcore-models": Accepted(0, "--to legacy writes the others"),
        "--add-qkv-bias": Accepted(0, _DETECTED),
        "--add-dense-bias": Accepted(0, _DETECTED),
        "--add-output-layer-bias": Accepted(0, _DETECTED),
        "--w-pack": Accepted(1, _DETECTED),
        "--ckpt-cfg-path": Accepted(1, _DETECTED),
        "--ckpt-format": Accepted(1, _DETECTED),
        "--load-from-legacy": Accepted(0, _DETECTED),
        "--load-hf-from-config": Accepted(0, _DETECTED),
        "--auto-model": Accepted(0, _DETECTED),
        "--model-config-file": Accepted(1, _DETECTED),
        "--model-index-file": Accepted(1, _DETECTED),
        "--hf-ckpt-path": Accepted(1, _DETECTED),
        **dict.fromkeys(("--tokenizer-model", "--vocab-file", "--merge-file"), Accepted(1, _TOKENIZER)),
        "--true-vocab-size": Accepted(1, "config.json says how many rows there are"),
        "--extra-vocab-size": Accepted(1, "config.json says how many rows there are"),
        "--patch-tokenizer-type": Accepted(1, _TOKENIZER),
        **dict.fromkeys(("--use-gpu", "--no-checking", "--debug"), Accepted(0, _COPIED)),
        **dict.fromkeys(("--max-queue-size", "--synchronizer", "--num-hf-saver"), Accepted(1, _COPIED)),
        **dict.fromkeys(("--megatron-path", "--pretrain-script"), Accepted(1, "no other code is needed")),
        "--max-shard-size": Accepted(1, "files of Hugging Face are cut at 5 GB"),
        "--convert-checkpoint-from-megatron-to-transformers": Accepted(0, "--to says what to write"),
        "--save-safetensors": Accepted(0, "always so"),
        "--reset-iterations": Accepted(0, "what is written is iteration 1, or a release with --release"),
    },
    {
        "--load-checkpoint-loosely": "a tensor that is missing is an error",
        "--moe-tp-extend-ep": "use --expert-tensor-parallel-size 1",
        "--save-to-legacy": "use --to legacy",
        "--iteration": "use --ckpt-step",
        "--target-tp-size": "use --tensor-model-parallel-size",
        "--target-pp-size": "use --pipeline-model-parallel-size",
        "--input-tp-rank": "all ranks are written together",
        "--input-pp-rank": "all ranks are written together",
        "--lora-dir": "use --lora-load",
        "--target-params-dtype": "use --params-dtype",
    },
    {
        "--save-lora-to-hf": "adapters alone",
        **dict.fromkeys(("--tp-2d", "--tp-x", "--tp-y"), "two-dimensional tensor parallelism"),
        **dict.fromkeys(
            ("--d-model", "--mamba-d-state", "--mamba2-head-dim", "--mamba2-n-groups"), "state-space models"
        ),
        **dict.fromkeys(("--post-norm", "--embed-layernorm"), "norms in other places than before attention and MLP"),
    },
)
"""Flags of other suites' converters, for `tessel convert`."""


@dataclass(frozen=True, kw_only=True)
class ConvertDegrees:
    """How torch, torch_dist and legacy are cut, and under which names."""

    tensor_model_parallel_size: int = option(
        1, "tensor-parallel ranks", aliases=("--target-tensor-parallel-size", "--target-tensor-model-parallel-size")
    )
    pipeline_model_parallel_size: int = option(
        1, "pipeline stages", aliases=("--target-pipeline-parallel-size", "--target-pipeline-model-parallel-size")
    )
    expert_model_parallel_size: int = option(
        1, "ranks that share the experts", aliases=("--target-expert-parallel-size",)
    )
    expert_tensor_parallel_size: int | None = option(None, "ranks that share each expert; as the tensor-parallel ones")
    num_layers_per_virtual_pipeline_stage: int | None = option(None, "layers of a virtual pipeline stage")
    num_layer_list: str | None = option(None, "layers of each pipeline stage, such as 11,13,19,21", metavar="N,N,...")
    decoder_first_pipeline_num_layers: int | None = option(None, "layers of the first pipeline stage")
    decoder_last_pipeline_num_layers: int | None = option(None, "layers of the last pipeline stage")
    noop_layers: str | None = option(None, "places without a layer, such as 94,95", metavar="N,N,...")
    schedules_method: str | None = option(None, "dualpipev: stages placed in a V", choices=("dualpipev",))
    make_vocab_size_divisible_by: int | None = option(
        None, "pad the embedding's rows to a multiple of this x tensor-parallel ranks; the flavour's own if not given"
    )
    flavour: str = option(
        "mcore",
        "whose padding rows: Megatron's, MindSpeed's first or second converter's, Pai-Megatron-Patch's",
        choices=("mcore", "v1", "v2", "pai"),
    )
    transformer_impl: str = option("local", "whose names for the fused layers", choices=("local", "transformer_engine"))
    moe_grouped_gemm: bool = option(False, "all experts in one matrix")
    qlora_nf4: bool = option(
        False, "torch: linear maps of the layers in four bits, as MindSpeed-LLM 2.3 stores them (rounds the weights)"
    )
    release: bool = option(False, "write a release, which training starts from at iteration 0, instead of iteration 1")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """From where to where. Every format is read and written; the source's is found by its files."""

    load: str = option(REQUIRED, "checkpoint of any format", metavar="DIR", aliases=("--load-dir",))
    save: str = option(REQUIRED, "folder to write", metavar="DIR", aliases=("--save-dir",))
    to: str | None = option(
        None, "format to write; hf for a checkpoint of another format, torch for a Hugging Face folder", choices=FORMATS
    )
    ckpt_step: int | None = option(None, "iteration to read, instead of the latest")
    hf_dir: str | None = option(
        None, "config.json and tokenizer of a checkpoint without its own", metavar="DIR", aliases=("--hf-cfg-dir",)
    )
    params_dtype: str | None = option(None, "dtype to write; as stored if not given", choices=PARAMS_DTYPES)
    with_optimizer: bool = option(
        False, "take moments, fp32 weights, schedule and counters of a training run along (torch_dist, torch_dcp)"
    )
    dry_run: bool = option(False, "print which input makes which output, and write nothing")
    force: bool = option(False, "replace a checkpoint that is already in --save")
    verify: str = option(
        "tensors",
        "proof before the result is put in place: every tensor read back and compared by hash, or logits as well",
        choices=("tensors", "logits", "none"),
    )
    workers: int = option(2, "files written at a time")
    lora_load: str | None = option(
        None, "adapter to merge on the way: a PEFT folder, a run, MindSpeed-LLM's", metavar="DIR"
    )
    lora_r: int | None = option(None, "rank of that adapter, checked if given")
    lora_alpha: float | None = option(None, "alpha of that adapter, checked if given")
    lora_target_modules: tuple[str, ...] | None = option(
        None, "projections of that adapter, checked if given", nargs="+", metavar="NAME"
    )
    degrees: ConvertDegrees = field(default_factory=ConvertDegrees)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """An adapter and its model, and where to write the two as one Hugging Face folder."""

    lora_load: str = option(REQUIRED, "adapter: a PEFT folder, a run, MindSpeed-LLM's", metavar="DIR")
    save: str = option(REQUIRED, "folder to write", metavar="DIR")
    load: str | None = option(None, "model, of any format; the one that the adapter names if not given", metavar="DIR")
    hf_dir: str | None = option(
        None, "config.json and tokenizer of a --load without its own", metavar="DIR", aliases=("--hf-cfg-dir",)
    )
    params_dtype: str | None = option(None, "dtype to write; the model's own if not given", choices=PARAMS_DTYPES)
    lora_r: int | None = option(None, "rank of the adapter, checked if given")
    lora_alpha: float | None = option(None, "alpha of the adapter, checked if given")
    lora_target_modules: tuple[str, ...] | None = option(
        None, "projections of the adapter, checked if given", nargs="+", metavar="NAME"
    )
    force: bool = option(False, "replace a model that is already in --save")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to compare."""

    checkpoints: tuple[str, ...] = option(
        REQUIRED,
        "two checkpoints of any formats; or one, to check its files against its MANIFEST.json",
        nargs="+",
        positional=True,
        metavar="DIR",
    )
    tolerance: float | None = option(
        None, "largest difference of values that is let pass, whatever their dtypes; exact if not given"
    )
    hf_dir: str | None = option(
        None, "config.json of a checkpoint without its own", metavar="DIR", aliases=("--hf-cfg-dir",)
    )
    ckpt_step: int | None = option(None, "iteration of the first one, instead of the latest")
    json: bool = option(False, "print one JSON object")


def validate_convert(cfg: ConvertConfig) -> ConvertConfig:
    """Check the numbers, and that lists are lists of numbers.

    Raises:
        UsageError: a rule is broken.
    """
    degrees = cfg.degrees
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "make_vocab_size_divisible_by",
    ):
        value = getattr(degrees, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
    if cfg.workers < 1:
        raise UsageError(f"--workers is {cfg.workers}: it must be at least 1.")
    numbers_of("--num-layer-list", degrees.num_layer_list)
    numbers_of("--noop-layers", degrees.noop_layers)
    return cfg


def numbers_of(flag: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers with commas between them; None for None.

    Raises:
        UsageError: it is something else.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{flag} is {text!r}: it must be whole numbers with commas between them, such as 11,13.")
    return tuple(int(part) for part in parts)


def validate_verify(cfg: VerifyConfig) -> VerifyConfig:
    """Check how many folders there are.

    Raises:
        UsageError: a rule is broken.
    """
    if len(cfg.checkpoints) > 2:
        raise UsageError(f"{len(cfg.checkpoints)} checkpoints are given: tessel verify compares two.")
    if cfg.tolerance is not None and not cfg.tolerance >= 0:
        raise UsageError(f"--tolerance is {cfg.tolerance}: it must be 0 or more.")
    return cfg

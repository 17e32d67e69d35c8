"""What the verbs other than `tessel pretrain` are asked to do.

A docstring's first sentence is the heading of the fields in `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tessel.config.field import REQUIRED, option
from tessel.config.layout import SHARDING_STRATEGIES, Launch
from tessel.config.run import ModelShape, RunConfig
from tessel.config.tokenizer import Tokenizer

DEVICES = ("auto", "cpu", "cuda", "npu")
TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Which samples.

    `run` takes every flag of `tessel pretrain`, so that the command line or the file of a run can be
    given as it is; those that do not shape its data change nothing, and `--help` leaves them out.
    """

    help_sections: ClassVar[frozenset[str]] = frozenset({"batch", "data", "tokenizer", "evaluation"})

    split_name: str = option("train", "which split", choices=("train", "valid", "test"))
    index: str | None = option(
        None, "samples FIRST:END of the split, in the order of training (END not included)", metavar="FIRST:END"
    )
    step: str | None = option(
        None,
        "samples of the iterations FIRST:END, counted from 1 as the log does (END not included)",
        metavar="FIRST:END",
    )
    num_samples: str | None = option(
        None,
        "size of train, valid and test, such as 600,30,2, instead of --train-iters and the like; None: one epoch",
        metavar="N,N,N",
    )
    json: bool = option(False, "one JSON object a line: index, tokens, labels, loss_mask, position_ids, pieces")
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Model. What is used, and over how many processes it is dealt out."""

    load: str | None = option(
        None, "Hugging Face folder, the folder of a run, an adapter, or a Megatron checkpoint", metavar="DIR"
    )
    hf_dir: str | None = option(
        None, "config.json and tokenizer of a --load without its own", metavar="DIR", aliases=("--hf-cfg-dir",)
    )
    lora_load: str | None = option(
        None, "adapter beside --load: a PEFT folder, a run, or MindSpeed-LLM's checkpoint", metavar="DIR"
    )
    lora_r: int | None = option(None, "rank of the adapter, checked against what is stored")
    lora_alpha: float | None = option(None, "alpha of the adapter, checked against what is stored")
    lora_target_modules: tuple[str, ...] | None = option(
        None, "projections that the adapter is beside, checked against what is stored", nargs="+", metavar="NAME"
    )
    device: str = option("auto", "where to run", choices=DEVICES)
    fp32: bool = option(False, "compute in fp32 (the default)")
    bf16: bool = option(False, "compute in bf16")
    fp16: bool = option(False, "compute in fp16")
    tensor_model_parallel_size: int = option(1, "processes that share each layer")
    pipeline_model_parallel_size: int = option(1, "processes that share the layers")
    expert_model_parallel_size: int = option(1, "processes that share the experts")
    expert_tensor_parallel_size: int | None = option(
        None, "processes that share each expert; the tensor-parallel size if not given"
    )


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Choice of tokens."""

    max_new_tokens: int = option(128, "most tokens to add to a prompt")
    temperature: float = option(1.0, "below 1 likelier, above 1 more varied")
    top_k: int = option(0, "draw among so many likeliest tokens; 0: all")
    top_p: float = option(1.0, "draw among the likeliest tokens that hold this much probability")
    min_p: float = option(0.0, "draw among the tokens with at least this share of the likeliest one's probability")
    repetition_penalty: float = option(1.0, "above 1 tokens that the text has already are less likely")
    greedy: bool = option(False, "always the likeliest token")
    num_beams: int = option(1, "search among so many continuations, instead of drawing, for the likeliest whole")
    draw_beams: bool = option(False, "draw the continuations that are kept, instead of the likeliest")
    length_penalty: float = option(1.0, "of beams: above 0 longer texts are favoured, below 0 shorter ones")
    early_stopping: str = option(
        "false",
        "of beams: end when so many texts have ended; never: when none can become better",
        choices=("true", "false", "never"),
    )
    ignore_eos: bool = option(False, "go on after the end-of-text token")
    stop: tuple[str, ...] = option((), "strings that end a text, which is cut before them", nargs="+", metavar="TEXT")
    stop_token_ids: tuple[int, ...] = option((), "further tokens that end a text", nargs="+", metavar="N")
    add_eos_token: tuple[str, ...] = option(
        (), "further tokens that end a text, as the tokenizer writes them", nargs="+", metavar="TOKEN"
    )
    seed: int = option(1234, "seed of the draws")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generation."""

    help_sections: ClassVar[frozenset[str]] = frozenset({"loading", "drawing", "launch", "tokenizer"})

    prompt: tuple[str, ...] = option((), "texts to continue, one after another", nargs="+", metavar="TEXT")
    prompt_file: str | None = option(
        None, "prompts to continue together: a .txt with one a line, or a .jsonl", metavar="FILE"
    )
    prompt_key: str = option("prompt", "field of --prompt-file's rows that holds the prompt", metavar="NAME")
    output: str | None = option(
        None, "JSON lines to write, a row for each prompt; rows that are there already are kept", metavar="FILE"
    )
    num_samples: int = option(1, "texts for each prompt", aliases=("--num-return-sequences", "-n"))
    logprobs: int | None = option(
        None, "log-probabilities in --output: of the tokens, and of so many likeliest at each step"
    )
    max_running: int = option(32, "texts that are continued together, with --prompt-file")
    truncate_prompts: bool = option(
        False, "keep the end of a prompt that leaves no room in the context, instead of refusing it"
    )
    prompt_type: str | None = option(
        None, "prompts are questions in this template; hf: in the tokenizer's own", metavar="NAME"
    )
    prompt_type_path: str | None = option(None, "templates.json with --prompt-type in it", metavar="FILE")
    system: str | None = option(None, "system text of the template", metavar="TEXT")
    hf_chat_template: bool = option(False, "the same as --prompt-type hf")
    no_stream: bool = option(False, "print a text when it is whole, not as it grows")
    stream: bool = option(False, "print a text as it grows (the default)")
    task: tuple[str, ...] = option(
        (),
        "MindSpeed-LLM's names: greedy is --greedy, do_sample draws, beam_search is --num-beams 2",
        nargs="+",
        choices=TASKS,
    )
    loading: Loading
    drawing: Drawing
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    launch: Launch = field(default_factory=Launch)
    model: ModelShape = field(default_factory=ModelShape)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to look at."""

    path: tuple[str, ...] = option(
        REQUIRED,
        "checkpoint of any format, folder of a run, or a dataset: a .bin/.idx, its prefix, or that of instructions; "
        "with --stats, WEIGHT PATH WEIGHT PATH ...",
        nargs="+",
        positional=True,
        metavar="PATH",
    )
    tensors: bool = option(False, "list every tensor of a model, with its shape, type and norm")
    diff: str | None = option(None, "another checkpoint: say in what settings and tensors they differ", metavar="DIR")
    ckpt_step: int | None = option(None, "iteration to look at, instead of the latest")
    hf_dir: str | None = option(
        None, "config.json of a checkpoint without its own", metavar="DIR", aliases=("--hf-cfg-dir",)
    )
    documents: int = option(1, "documents of a dataset to show: the first, and then random ones")
    seed: int = option(1234, "seed of the choice of documents")
    plot: str | None = option(None, "draw the lengths of a dataset's documents as a PNG", metavar="FILE")
    stats: bool = option(False, "of a blend of datasets: weight, epochs, tokens and repeats of each")
    num_samples: int | None = option(None, "samples that --stats draws; as many as hold all tokens if not given")
    seq_length: int | None = option(None, "tokens in a sample of --stats; 4096 if not given")
    json: bool = option(False, "print one JSON object")
    tokenizer: Tokenizer = field(default_factory=Tokenizer)


@dataclass(frozen=True, kw_only=True)
class PlanLayout:
    """What is given already. The rest is found."""

    micro_batch_size: int | None = option(None, "sequences in one forward pass")
    tensor_model_parallel_size: int | None = option(None, "processes that share each layer")
    pipeline_model_parallel_size: int | None = option(None, "processes that share the layers")
    context_parallel_size: int | None = option(None, "processes that share each sequence")
    expert_model_parallel_size: int | None = option(None, "processes that share the experts")
    expert_tensor_parallel_size: int | None = option(None, "processes that share each expert; 1 if not given")
    data_parallel_sharding_strategy: str | None = option(
        None, "what data-parallel processes share", choices=SHARDING_STRATEGIES
    )
    recompute: str | None = option(
        None, "activations that are computed again", choices=("none", "selective", "mlp", "full")
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is trained, and on what."""

    model: str = option(
        REQUIRED, "Hugging Face folder, its config.json, or a name such as Qwen2.5-7B", metavar="DIR|NAME"
    )
    devices: str = option(REQUIRED, "how many and of which memory, such as 8x80GB", metavar="NxSIZE")
    seq_length: int = option(REQUIRED, "tokens in a sequence")
    global_batch_size: int = option(REQUIRED, "sequences in one optimizer step")
    devices_per_node: int = option(8, "devices on one machine, with fast links between them")
    device_kind: str | None = option(
        None, "rates of H100, H200, A100 or 910B; by the size of the memory if not given", metavar="KIND"
    )
    rates: str | None = option(None, "YAML with measured rates, instead of --device-kind", metavar="FILE")
    fp32: bool = option(False, "compute in fp32, not in bf16")
    bf16: bool = option(False, "compute in bf16 (the default)")
    output: str | None = option(None, "write the best layout here, for tessel pretrain --config", metavar="FILE")
    top: int = option(10, "layouts to list")
    pinned: PlanLayout = field(default_factory=PlanLayout)


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to fetch."""

    repo: str | None = option(
        None, "OWNER/NAME on the hub, or the http(s) address of one file", positional=True, metavar="REPO"
    )
    source: str = option("hf", "which hub", choices=("hf", "modelscope"))
    repo_type: str = option("model", "what the repository is", choices=("model", "dataset"))
    revision: str | None = option(None, "branch, tag or commit; the hub's main branch if not given", metavar="NAME")
    local_dir: str | None = option(
        None, "where to; for a repository its NAME, for an address this folder, if not given", metavar="DIR"
    )
    include: tuple[str, ...] = option(
        (), "only files that match one of these, such as '*.json'", nargs="+", metavar="GLOB"
    )
    exclude: tuple[str, ...] = option((), "not the files that match one of these", nargs="+", metavar="GLOB")
    workers: int = option(4, "files at once")
    sha256: str | None = option(None, "what the file of an address must have", metavar="HEX")
    sha256sums: str | None = option(
        None, "list of sha256sum that the files must agree with; SHA256SUMS of the folder if not given", metavar="FILE"
    )
    unpack: bool = option(False, "unpack the .tar, .tar.gz, .tgz or .zip of an address into the folder")
    verify: str | None = option(
        None, "fetch nothing: check this folder against what the download recorded, offline", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Output."""

    json: bool = option(False, "print one JSON object")


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Plot."""

    runs: tuple[str, ...] = option(
        REQUIRED, "folders of runs, or their metrics files", nargs="+", positional=True, metavar="RUN"
    )
    output: str = option("plot.png", "PNG to write", metavar="FILE")
    metric: tuple[str, ...] = option(
        ("lm loss",), "what to draw, a panel each, by the names of the metrics file", nargs="+", metavar="NAME"
    )
    x: str = option("iteration", "horizontal axis", choices=("iteration", "samples", "tokens", "time"))
    smooth: int = option(0, "mean over so many points; 0: a twentieth of the curve")
    title: str | None = option(None, "title of the picture")


@dataclass(frozen=True, kw_only=True)
class FlagsConfig:
    """Whose flags."""

    suite: str | None = option(
        None, "mindspeed, modellink, pai or megatron; all of them if not given", positional=True, metavar="SUITE"
    )
    markdown: bool = option(False, "print the tables as docs/FLAGS.md has them")


@dataclass(frozen=True, kw_only=True)
class MigrateConfig:
    """What to migrate."""

    script: tuple[str, ...] = option(
        REQUIRED, "shell script of another suite, and what it is given", nargs="+", positional=True, metavar="SCRIPT"
    )
    suite: str | None = option(
        None, "whose it is; found by what it calls if not given", choices=("mindspeed", "modellink", "pai")
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Demo."""

    data: str | None = option(None, "your own text, instead of the Python language reference", metavar="FILE")
    output: str = option("tessel-demo", "folder to write to", metavar="DIR")
    train_iters: int = option(240, "optimizer steps")
    device: str = option("auto", "where to run", choices=DEVICES)
    seed: int = option(1234, "seed of data order and initial weights")

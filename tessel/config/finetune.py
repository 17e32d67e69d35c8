"""What a run that trains on dialogues is asked for.

A docstring's first sentence is the heading of the fields in `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option

PADDING_SIDES = ("right", "left")


@dataclass(frozen=True)
class FineTune:
    """Fine-tuning on dialogues."""

    num_train_epochs: float | None = option(
        None, "how often to go through the data, instead of --train-iters", aliases=("--epochs",)
    )
    stage: str | None = option(None, "kind of fine-tuning; the data flags say the rest", choices=("sft", "dpo"))
    is_instruction_dataset: bool = option(False, "--data-path names instructions: PREFIX_packed_*_document, or raw")
    is_pairwise_dataset: bool = option(False, "--data-path names pairs of a chosen and a rejected answer")
    dataset: str | None = option(
        None, "data of Pai-Megatron-Patch: MMAP, or raw JSON-SFT in --train-data-path", choices=("MMAP", "JSON-SFT")
    )
    train_mode: str | None = option(
        None, "with --dataset MMAP: pretrain reads it as plain text", choices=("pretrain", "finetune")
    )
    handler_name: str | None = option(
        None, "raw instructions: how rows are read, a handler of MindSpeed-LLM or FILE.py:Class; found if not given"
    )
    prompt_type: str | None = option(None, "template of the dialogues; hf: the tokenizer's own")
    prompt_type_path: str | None = option(None, "YAML of a template, or a templates.json", metavar="FILE")
    enable_thinking: str = option(
        "none", "thoughts in the answers of reasoning templates", choices=("true", "false", "none")
    )
    reasoning_effort: str | None = option(None, "effort that a reasoning template names", choices=("max", "high"))
    drop_thinking: str | None = option(
        None, "leave thoughts out of all answers but the last of a dialogue", choices=("true", "false")
    )
    map_keys: str | None = option(
        None, "raw instructions, JSON: which columns hold prompt, query, response, history, ...", metavar="JSON"
    )
    train_on_prompt: bool = option(False, "raw instructions: train on the prompts, too")
    mask_history: bool = option(False, "raw instructions: train on the last answer of a dialogue alone")
    pack: bool = option(False, "raw instructions: join samples up to --seq-length; of files: they are packs")
    neat_pack: bool = option(False, "with --reset-attention-mask: the numbers that are stored tell samples of a pack")
    no_pad_to_seq_lengths: bool = option(
        False, "pad to the longest sample of a micro-batch", aliases=("--variable-seq-lengths",)
    )
    pad_to_multiple_of: int = option(8, "with --no-pad-to-seq-lengths: lengths are multiples of this")
    tokenizer_padding_side: str = option("right", "side of a shorter sample that is padded", choices=PADDING_SIDES)
    no_cut_token: bool = option(False, "never cut a sample that is longer than --seq-length")
    cut_max_seqlen: bool = option(False, "cut at --seq-length, not turn by turn")
    no_shuffle: bool = option(False, "keep the order of the data")
    padded_samples: bool = option(False, "fill each epoch up to whole global batches, with the first samples")
    full_shuffle_instruction_dataset: bool = option(False, "shuffle the samples of all epochs together")
    max_padding_length: int | None = option(None, "with --dataset JSON-SFT: longest sample; --seq-length if not given")
    calculate_per_sequence_loss: bool = option(
        False, "each dialogue counts alike, however long (always so with --dataset)"
    )

    @property
    def reads_pai(self) -> bool:
        """Whether the data is what Pai-Megatron-Patch fine-tunes on."""
        return self.dataset == "JSON-SFT" or (self.dataset == "MMAP" and self.train_mode != "pretrain")

    @property
    def reads_dialogues(self) -> bool:
        """Whether the data is dialogues, not plain text."""
        return self.is_instruction_dataset or self.is_pairwise_dataset or self.reads_pai

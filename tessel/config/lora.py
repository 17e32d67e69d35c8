"""Low-rank adapters: a section of frozen dataclasses, as in `run.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option

DEFAULT_RANK = 16


@dataclass(frozen=True)
class Lora:
    """Adapters (LoRA). Trained beside a frozen model with --lora-r or --lora-target-modules; --lora-load goes on."""

    lora_r: int | None = option(None, "rank of the adapters; 16 if only --lora-target-modules is given")
    lora_alpha: float | None = option(None, "their scale is alpha / r; twice the rank if not given")
    lora_dropout: float = option(0.0, "dropout of what goes into an adapter")
    lora_target_modules: tuple[str, ...] | None = option(
        None,
        "projections, by names of Hugging Face, mcore or legacy Megatron; all if not given. linear_qkv and linear_fc1 "
        "share one A, as in Megatron",
        nargs="+",
        metavar="NAME",
    )
    lora_load: str | None = option(
        None, "adapter beside --load: a PEFT folder, a run, or MindSpeed-LLM's checkpoint", metavar="DIR"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r)")
    use_dora: bool = option(False, "learn the lengths of the adapted weights' rows, too (DoRA)")
    qlora: bool = option(False, "hold the frozen weights of projections in four bits (NF4), as bitsandbytes does")
    qlora_double_quant: bool = option(False, "with --qlora: their scales in 8 bits (double quantisation)")
    lora_ckpt_filter: bool = option(False, "accepted: checkpoints of adapters never hold the frozen model here")

    @property
    def is_on(self) -> bool:
        """Whether adapters are asked for."""
        return self.lora_r is not None or self.lora_target_modules is not None or self.lora_load is not None

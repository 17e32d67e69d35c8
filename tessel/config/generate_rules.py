"""Rules of `tessel generate`, and of what other verbs share with it: the model that is used, the choice of tokens."""

from __future__ import annotations

from dataclasses import replace

from tessel.config.verbs import Drawing, GenerateConfig, Loading
from tessel.errors import UsageError

BEAMS_OF_TASK = 2
"""Of MindSpeed-LLM's --task beam_search."""


def validate_generate(cfg: GenerateConfig) -> GenerateConfig:
    """Check the flags, and put MindSpeed-LLM's names in terms of the others.

    Raises:
        UsageError: a rule is broken.
    """
    cfg = _with_task(cfg)
    if not cfg.prompt and cfg.prompt_file is None:
        raise UsageError("tessel generate needs --prompt; see tessel generate --help.")
    if cfg.prompt and cfg.prompt_file is not None:
        raise UsageError("--prompt and --prompt-file are two sources of prompts: keep one of them.")
    check_loading(cfg.loading)
    check_drawing(cfg.drawing)
    if cfg.prompt_file is not None and cfg.output is None:
        raise UsageError("--prompt-file needs --output FILE.jsonl for what the model makes of the prompts.")
    if cfg.logprobs is not None and cfg.output is None:
        raise UsageError("--logprobs are written to --output FILE.jsonl: give it, or leave them out.")
    if cfg.logprobs is not None and not 0 <= cfg.logprobs <= 1000:
        raise UsageError(f"--logprobs is {cfg.logprobs}: it must be from 0 to 1000.")
    if cfg.max_running < 1:
        raise UsageError(f"--max-running is {cfg.max_running}: it must be at least 1.")
    if cfg.model.init_from_config is not None:
        raise UsageError("--init-from-config makes a random model, which says nothing: give --load.")
    _check_templates(cfg)
    _check_samples(cfg)
    if cfg.hf_chat_template:
        return replace(cfg, prompt_type="hf")
    return cfg


def check_loading(loading: Loading) -> None:
    """What is used is named, and one precision.

    Raises:
        UsageError: a rule is broken.
    """
    if loading.load is None and loading.lora_load is None:
        raise UsageError("No model is named: give --load DIR (or --lora-load of an adapter that says what it is for).")
    asked = [f"--{name}" for name in ("fp32", "bf16", "fp16") if getattr(loading, name)]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} contradict each other: keep one of them.")
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ):
        degree = getattr(loading, name)
        if degree is not None and degree < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {degree}: it must be at least 1.")


def check_drawing(cfg: Drawing) -> None:
    """The numbers of sampling and of beams.

    Raises:
        UsageError: a rule is broken.
    """
    if cfg.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {cfg.max_new_tokens}: it must be at least 1.")
    if cfg.temperature <= 0:
        raise UsageError(f"--temperature is {cfg.temperature}: it must be above 0; --greedy takes the likeliest token.")
    if cfg.top_k < 0:
        raise UsageError(f"--top-k is {cfg.top_k}: it must not be negative; 0 draws among all tokens.")
    if not 0 < cfg.top_p <= 1:
        raise UsageError(f"--top-p is {cfg.top_p}: it must be above 0 and at most 1.")
    if not 0 <= cfg.min_p <= 1:
        raise UsageError(f"--min-p is {cfg.min_p}: it must be from 0 to 1; 0 keeps all tokens.")
    if cfg.repetition_penalty <= 0:
        raise UsageError(f"--repetition-penalty is {cfg.repetition_penalty}: it must be above 0; 1 is none.")
    if cfg.num_beams < 1:
        raise UsageError(f"--num-beams is {cfg.num_beams}: it must be at least 1, which is no search.")
    if cfg.num_beams > 1 and cfg.stop:
        raise UsageError("--stop does not end beams: leave it out, or give --stop-token-ids.")


def _with_task(cfg: GenerateConfig) -> GenerateConfig:
    if not cfg.task:
        return cfg
    if len(cfg.task) > 1:
        raise UsageError(f"--task {' '.join(cfg.task)} names {len(cfg.task)} ways to generate: give one at a time.")
    (task,) = cfg.task
    if task == "chat":
        raise UsageError("--task chat is a verb of its own: use tessel chat.")
    drawing = cfg.drawing
    if task == "greedy":
        drawing = replace(drawing, greedy=True)
    elif task == "do_sample" and drawing.greedy:
        raise UsageError("--task do_sample draws, and --greedy does not: keep one of them.")
    elif task.startswith("beam_search"):
        beams = drawing.num_beams if drawing.num_beams > 1 else BEAMS_OF_TASK
        drawing = replace(drawing, num_beams=beams, draw_beams=task == "beam_search_with_sampling")
    return replace(cfg, drawing=drawing, task=())


def _check_templates(cfg: GenerateConfig) -> None:
    if cfg.hf_chat_template and cfg.prompt_type not in (None, "hf"):
        raise UsageError(f"--hf-chat-template and --prompt-type {cfg.prompt_type} are two templates: keep one of them.")
    has_template = cfg.prompt_type is not None or cfg.hf_chat_template
    if not has_template:
        for flag, value in (("--system", cfg.system), ("--prompt-type-path", cfg.prompt_type_path)):
            if value is not None:
                raise UsageError(f"{flag} is for prompts in a template: add --prompt-type NAME, or leave it out.")


def _check_samples(cfg: GenerateConfig) -> None:
    drawing = cfg.drawing
    if cfg.num_samples < 1:
        raise UsageError(f"--num-samples is {cfg.num_samples}: it must be at least 1.")
    if drawing.num_beams > 1:
        if cfg.num_samples > drawing.num_beams:
            raise UsageError(f"--num-samples {cfg.num_samples} are more than the --num-beams {drawing.num_beams}.")
        if cfg.logprobs is not None:
            raise UsageError("--logprobs are not kept of beams: leave one of the two out.")
    elif cfg.num_samples > 1 and drawing.greedy:
        raise UsageError(f"--greedy gives --num-samples {cfg.num_samples} times the same text: leave one of them out.")

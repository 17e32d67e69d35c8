"""What `tessel chat` is asked to do, and its rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import ClassVar

from tessel.config.field import option
from tessel.config.generate_rules import check_drawing, check_loading
from tessel.config.layout import Launch
from tessel.config.run import ModelShape, Tokenizer
from tessel.config.verbs import Drawing, Loading
from tessel.errors import UsageError

MAX_NEW_TOKENS = 1024
"""Of an answer, where the command line does not say."""


@dataclass(frozen=True, kw_only=True)
class Templating:
    """Template. How dialogues are written for the model."""

    prompt_type: str | None = option(
        None, "template of this name; the tokenizer's own (hf) if not given", metavar="NAME"
    )
    prompt_type_path: str | None = option(None, "YAML of a template, or a templates.json", metavar="FILE")
    hf_chat_template: bool = option(False, "the same as --prompt-type hf")
    enable_thinking: str = option(
        "none", "what reasoning templates are told about thoughts", choices=("true", "false", "none")
    )

    @property
    def thinking(self) -> bool | None:
        """--enable-thinking as templates take it."""
        return {"true": True, "false": False}.get(self.enable_thinking)


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Dialogue."""

    help_sections: ClassVar[frozenset[str]] = frozenset({"templating", "loading", "drawing", "launch", "tokenizer"})

    system: str | None = option(None, "system text; /system changes it", metavar="TEXT")
    history_turns: int | None = option(None, "earlier turns that the model sees; all that fit if not given")
    show_thoughts: bool = option(False, "print what stands between <think> and </think>, instead of folding it")
    history_file: str | None = option(
        None, "lines typed before; ~/.local/state/tessel/chat_history if not given, '' for none", metavar="FILE"
    )
    templating: Templating = field(default_factory=Templating)
    loading: Loading
    drawing: Drawing
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    launch: Launch = field(default_factory=Launch)
    model: ModelShape = field(default_factory=ModelShape)


def validate_chat(cfg: ChatConfig, given: Collection[str]) -> ChatConfig:
    """Check the flags, and fill in how long an answer may be; `given` are the fields that the user set.

    Raises:
        UsageError: a rule is broken.
    """
    check_loading(cfg.loading)
    check_drawing(cfg.drawing)
    if cfg.drawing.num_beams > 1:
        raise UsageError("--num-beams searches for a whole text, and chat shows it as it grows: leave it out.")
    if cfg.history_turns is not None and cfg.history_turns < 0:
        raise UsageError(f"--history-turns is {cfg.history_turns}: it must not be negative; 0 is no memory.")
    if cfg.model.init_from_config is not None:
        raise UsageError("--init-from-config makes a random model, which says nothing: give --load.")
    if "max_new_tokens" not in given:
        cfg = replace(cfg, drawing=replace(cfg.drawing, max_new_tokens=MAX_NEW_TOKENS))
    return replace(cfg, templating=checked_templating(cfg.templating))


def checked_templating(cfg: Templating) -> Templating:
    """`cfg` with --hf-chat-template said as --prompt-type.

    Raises:
        UsageError: two templates are named.
    """
    if not cfg.hf_chat_template:
        return cfg
    if cfg.prompt_type not in (None, "hf"):
        raise UsageError(f"--hf-chat-template and --prompt-type {cfg.prompt_type} are two templates: keep one of them.")
    return replace(cfg, prompt_type="hf")

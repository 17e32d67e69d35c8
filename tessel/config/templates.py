"""What `tessel templates` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option
from tessel.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TemplatesConfig:
    """Prompt types. Without a flag, all of them are listed."""

    show: str | None = option(
        None, "print this one as YAML, which can be changed for --prompt-type-path", metavar="NAME"
    )
    check: str | None = option(
        None, "compare with the chat template of the tokenizer in this folder, token by token", metavar="DIR"
    )
    prompt_type: str | None = option(None, "the one to compare; all if not given", metavar="NAME")
    prompt_type_path: str | None = option(None, "a YAML of a template, or a templates.json", metavar="FILE")
    enable_thinking: str = option(
        "none", "with --check: what both are told about thoughts", choices=("true", "false", "none")
    )


def validate_templates(cfg: TemplatesConfig) -> TemplatesConfig:
    """Check that the flags go together.

    Raises:
        UsageError: they do not.
    """
    if cfg.show is not None and cfg.check is not None:
        raise UsageError("--show and --check are two questions; ask one at a time.")
    if cfg.prompt_type is not None and cfg.check is None:
        raise UsageError(f"--prompt-type {cfg.prompt_type} is for --check DIR; --show {cfg.prompt_type} prints it.")
    return cfg

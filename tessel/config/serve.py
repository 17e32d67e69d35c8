"""What `tessel serve` is asked to do, and its rules."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import ClassVar

from tessel.config.chat import Templating, checked_templating
from tessel.config.field import option
from tessel.config.generate_rules import check_loading
from tessel.config.layout import Launch
from tessel.config.run import ModelShape, Tokenizer
from tessel.config.verbs import Loading
from tessel.errors import UsageError

KEY_VARIABLE = "TESSEL_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits."""

    max_running: int = option(32, "texts that are continued together")
    max_waiting: int = option(128, "texts that wait for a place; requests beyond are refused (429)")
    max_new_tokens: int | None = option(None, "most tokens that a request may ask for; the context if not given")
    max_body_bytes: int = option(4 << 20, "longest body of a request")
    request_timeout_s: float = option(600.0, "seconds after which a request is given up, waiting included")
    cache_tokens: int | None = option(
        None,
        "room for keys and values, in tokens of all running texts; --max-running x min(context, 8192) if not given",
    )
    kept_tokens: int = option(8192, "tokens of ended texts that are kept for prompts that begin alike")
    prefill_tokens: int = option(1024, "prompt tokens that are computed between two tokens of running texts")
    shutdown_timeout_s: float = option(10.0, "seconds that running requests have after SIGTERM")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Server."""

    help_sections: ClassVar[frozenset[str]] = frozenset({"limits", "templating", "loading", "launch", "tokenizer"})

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every one of this machine")
    port: int = option(8000, "port to listen on; 0: a free one")
    served_model_name: str | None = option(
        None, "what clients call the model; the folder's name if not given", metavar="NAME"
    )
    api_key: str | None = option(
        None, f"what clients must send as a bearer token; better in ${KEY_VARIABLE}, which no list of processes shows"
    )
    limits: Limits
    templating: Templating = field(default_factory=Templating)
    loading: Loading
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    launch: Launch = field(default_factory=Launch)
    model: ModelShape = field(default_factory=ModelShape)


def validate_serve(cfg: ServeConfig, given: Collection[str]) -> ServeConfig:
    """Check the flags.

    Raises:
        UsageError: a rule is broken.
    """
    check_loading(cfg.loading)
    if not 0 <= cfg.port <= 65535:
        raise UsageError(f"--port is {cfg.port}: it must be from 0, which is any free one, to 65535.")
    if cfg.api_key == "":
        raise UsageError("--api-key is empty: give one, or leave it out.")
    if cfg.model.init_from_config is not None:
        raise UsageError("--init-from-config makes a random model, which says nothing: give --load.")
    for name in ("max_running", "max_new_tokens", "max_body_bytes", "cache_tokens", "prefill_tokens"):
        _at_least(name, getattr(cfg.limits, name), 1)
    for name in ("max_waiting", "kept_tokens", "shutdown_timeout_s"):
        _at_least(name, getattr(cfg.limits, name), 0)
    if cfg.limits.request_timeout_s <= 0:
        raise UsageError(f"--request-timeout-s is {cfg.limits.request_timeout_s}: it must be above 0.")
    return replace(cfg, templating=checked_templating(cfg.templating))


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}.")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

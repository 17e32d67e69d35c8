"""The static rules of `tessel download`."""

from __future__ import annotations

import re

from tessel.config.schema import flag_of
from tessel.config.verbs import DownloadConfig
from tessel.errors import UsageError

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_ONLY_REPOSITORY = ("revision", "include", "exclude")
_ONLY_ADDRESS = ("sha256", "unpack")
_ONLY_FETCHING = ("revision", "local_dir", "include", "exclude", "sha256", "unpack")


def is_address(text: str) -> bool:
    """Whether it is the address of one file, not a repository."""
    return _ADDRESS.match(text) is not None


def validate_download(cfg: DownloadConfig) -> DownloadConfig:
    """Check the flags of `tessel download` by themselves.

    Raises:
        UsageError: a rule is broken.
    """
    if cfg.workers < 1:
        raise UsageError(f"--workers is {cfg.workers}: it must be at least 1.")
    if cfg.verify is not None:
        named = [flag_of(name) for name in _ONLY_FETCHING if getattr(cfg, name)]
        if cfg.repo is not None or named:
            given = ", ".join(([cfg.repo] if cfg.repo is not None else []) + named)
            raise UsageError(f"--verify checks a folder and fetches nothing: leave out {given}.")
        return cfg
    if not cfg.repo:
        raise UsageError("tessel download needs REPO (OWNER/NAME or an http(s) address), or --verify DIR.")
    if is_address(cfg.repo):
        named = [flag_of(name) for name in _ONLY_REPOSITORY if getattr(cfg, name)]
        if named:
            raise UsageError(f"{', '.join(named)} is for repositories: an address is one file. Leave it out.")
    else:
        named = [flag_of(name) for name in _ONLY_ADDRESS if getattr(cfg, name)]
        if named:
            raise UsageError(
                f"{', '.join(named)} is for an http(s) address: {cfg.repo} is a repository, "
                "whose files the hub's own hashes check. Leave it out, or give --sha256sums."
            )
    if cfg.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", cfg.sha256):
        raise UsageError(f"--sha256 is {cfg.sha256!r}: it must be 64 hexadecimal digits, as sha256sum prints them.")
    return cfg

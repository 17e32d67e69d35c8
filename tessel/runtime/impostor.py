"""What is often saved under the name of a file that was meant: a git-lfs pointer, a web page."""

from __future__ import annotations

from typing import Literal

SNIFFED_BYTES = 512
"""How much of a file's beginning tells."""

Impostor = Literal["a git-lfs pointer", "a web page"]


def impostor(start: bytes) -> Impostor | None:
    """What a file is that begins with `start`, if it is one of these."""
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page"
    return None

"""One request: redirects that keep credentials at home, and failures told apart by whether waiting helps."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from http.client import HTTPMessage, HTTPResponse
from typing import IO
from urllib.parse import urlsplit

from tessel import __version__
from tessel.errors import TesselError, UsageError

TIMEOUT_S = 30.0
# The CDNs in front of the hubs answer no request for more than 50 GB at once.
MAX_PART_BYTES = 16 * 2**30
MAX_ERROR_BYTES = 2**16
_PIECE_BYTES = 2**18
_WORTH_WAITING = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class Broken(Exception):
    """The network or the server failed in a way that may pass."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        """What the server asks to wait."""


class RangeRefused(Exception):
    """The server has nothing from that byte on."""

    def __init__(self, total: int | None) -> None:
        super().__init__(total)
        self.total = total
        """Bytes of its file, if it says."""


class Refused(TesselError):
    """The server said no, and will again."""

    def __init__(self, url: str, status: int, body: bytes) -> None:
        super().__init__(f"{shown(url)} answers with HTTP status {status}: {_meaning(status)}")
        self.status = status
        self.body = body
        """What it sent with it, at most MAX_ERROR_BYTES."""


@dataclass(frozen=True)
class Answer:
    """A response whose body has not been read."""

    response: HTTPResponse
    begin: int
    """Which byte of the file it starts with: 0 where the server ignored the range."""
    end: int | None
    """Which byte it ends before, where it is a part."""
    total: int | None
    """Bytes of the whole file, if the server says."""
    validator: str | None
    """Tells this version of the file from others: a strong ETag, or Last-Modified."""

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes.

        Raises:
            Broken: the connection ended or hung.
        """
        while True:
            try:
                piece = self.response.read1(_PIECE_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise Broken(_reason(error)) from error
            if not piece:
                return
            yield piece


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; credentials go to no host but the one that was asked."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise TesselError(f"{shown(req.full_url)} sends on to {newurl}, which is no web address.")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and _origin(newurl) != _origin(req.full_url):
            for name in ("Authorization", "Cookie"):
                following.remove_header(name)
        return following


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


@cache
def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    for variable in _CERTIFICATE_VARIABLES:
        if os.path.isfile(path := os.environ.get(variable, "")):
            context.load_verify_locations(path)
    return urllib.request.build_opener(_Redirects(), urllib.request.HTTPSHandler(context=context))


def shown(url: str) -> str:
    """An address for messages: without its query and user, which may hold a signature or a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def ask(
    url: str, headers: Mapping[str, str], begin: int = 0, size: int | None = None, only_if: str | None = None
) -> Answer:
    """Ask for a file from byte `begin` on.

    `size` is the whole file's, if it is known. With `only_if`, a validator, a file that has changed comes whole.

    Raises:
        Broken: no answer, or one that may be another later.
        Refused: an HTTP status that will stay.
        UsageError: it is no address.
    """
    sent = {"User-Agent": f"tessel/{__version__}", "Accept-Encoding": "identity", **headers}
    in_parts = size is not None and size - begin > MAX_PART_BYTES
    if begin or in_parts:
        sent["Range"] = f"bytes={begin}-{begin + MAX_PART_BYTES - 1 if in_parts else ''}"
        if only_if is not None:
            sent["If-Range"] = only_if
    try:
        request = urllib.request.Request(url, headers=sent)
        response = _opener().open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        return _unwelcome(error, url, begin)
    except (ValueError, http.client.InvalidURL) as error:
        raise UsageError(f"{url!r} is no web address ({error}).") from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(_reason(error)) from error
    coding = response.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise TesselError(f"{shown(url)} comes as {coding}, though it was asked for as it is. Try another mirror.")
    return _answer(response, url)


def _answer(response: HTTPResponse, url: str) -> Answer:
    validator = response.headers.get("ETag")
    if validator is None or validator.startswith("W/"):
        validator = response.headers.get("Last-Modified")
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return Answer(response, 0, None, int(length) if length.isdecimal() else None, validator)
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if found is None or found[1] is None or int(found[2]) < int(found[1]):
        raise TesselError(f"{shown(url)} answers with a part and does not say which. Try another mirror.")
    total = None if found[3] == "*" else int(found[3])
    return Answer(response, int(found[1]), int(found[2]) + 1, total, validator)


def _unwelcome(error: urllib.error.HTTPError, url: str, begin: int) -> Answer:
    status = error.code
    with error:
        if status in _WORTH_WAITING:
            asked = error.headers.get("Retry-After", "")
            raise Broken(f"HTTP status {status}", float(asked) if asked.isdecimal() else 0.0)
        if status == 416 and begin:
            found = _CONTENT_RANGE.fullmatch(error.headers.get("Content-Range", "").strip())
            raise RangeRefused(int(found[3]) if found is not None and found[3] != "*" else None)
        try:
            body = error.read(MAX_ERROR_BYTES)
        except (OSError, http.client.HTTPException):
            body = b""
        raise Refused(url, status, body)


def _meaning(status: int) -> str:
    if status in (404, 410):
        return "there is no such file. Check the address."
    if status in (401, 403):
        return "it wants a login or a permission. Get one, or take the file from a mirror."
    return "it will not give the file. Check the address, or try a mirror."


def _reason(error: BaseException) -> str:
    """Why there is no answer, in a few words."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {inner.verify_message}; SSL_CERT_FILE can name further ones"
    if isinstance(inner, TimeoutError):
        return f"nothing came for {TIMEOUT_S:.0f} s"
    if isinstance(inner, socket.gaierror):
        return "its name cannot be looked up"
    if isinstance(inner, http.client.IncompleteRead):
        return "the connection ended early"
    return str(inner) or type(inner).__name__

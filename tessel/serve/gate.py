"""What stands before every request: whose it is, where it comes from, and how long it is."""

from __future__ import annotations

import hmac
from collections.abc import MutableMapping
from typing import Any

from fastapi.exceptions import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessel.serve.errors import ApiError

_OPEN_PATHS = ("/", "/health", "/favicon.ico")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """An ASGI middleware that answers for the application where it must not.

    `api_key`: what clients must send, on all paths but the page and /health. `is_local`: the server listens on
    loopback, where a page of the Web may reach it through the user's browser: only names of this machine are answered
    to (a foreign name may have been bound to 127.0.0.1), and bodies must say that they are JSON (which a page of
    another origin may not, unasked).
    """

    def __init__(self, app: ASGIApp, api_key: str | None, is_local: bool, max_body_bytes: int) -> None:
        self._app, self._is_local, self._max_body_bytes = app, is_local, max_body_bytes
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
            await self._app(scope, _Counted(receive, self._max_body_bytes), watched)
        except ApiError as error:
            if has_begun:
                raise
            await error.response()(scope, receive, send)

    def _check(self, scope: MutableMapping[str, Any], headers: Headers) -> None:
        named = headers.get("host", "")
        host = named if named.endswith("]") else named.rsplit(":", 1)[0]
        if self._is_local and host not in _LOCAL_HOSTS:
            raise ApiError(403, f"This server is for this machine alone, which is not called {host!r}.")
        if self._key is not None and scope["path"] not in _OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, self._key):
                said = "Incorrect API key provided." if given else "You didn't provide an API key."
                raise ApiError(401, f"{said} Send it as a bearer token.", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"The body must be application/json, not {kind or 'of no type'}.")
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > self._max_body_bytes:
                raise _too_long(self._max_body_bytes)


class _Counted:
    """Receives a body, and no more of it than is allowed."""

    def __init__(self, receive: Receive, most_bytes: int) -> None:
        self._receive, self._left, self._most_bytes = receive, most_bytes, most_bytes

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            # The one kind of error that FastAPI lets through from where it reads a body.
            raise HTTPException(413, _too_long(self._most_bytes).message)
        return message


def _too_long(most_bytes: int) -> ApiError:
    return ApiError(413, f"The body is longer than this server takes, {most_bytes} bytes.", code="request_too_large")

"""Errors as OpenAI's API words them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_RETRY_AFTER_S = 1


class ApiError(Exception):
    """What a client is told instead of an answer: `param` is the field that is wrong, `code` a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if self.status == 429 else None
        return JSONResponse(self.body(), self.status, headers)


def of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's `problems` with a body, in OpenAI's words."""
    first = problems[0]
    kind, path = str(first["type"]), [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        return ApiError(400, f"The body of the request is not JSON: {first['msg']}.", code="invalid_json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if not param:
        return ApiError(400, "The body of the request must be a JSON object.", code="invalid_type")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", param, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    reason = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"Invalid value for '{param}': {reason}.", param, "invalid_value")

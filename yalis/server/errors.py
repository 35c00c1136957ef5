"""Errors as clients see them: OpenAI's shape, with the right status."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from yalis.errors import EngineDeadError, RequestError

_ENCODER = msgspec.json.Encoder()
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that ends with an error.

    Attributes:
        status: HTTP status.
        param: the field of the request that is to blame.
        code: a word for programs.
        retry_after_s: when to try again, in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status in (401, 408, 413, 415):
            headers["connection"] = "close"  # the rest of the body is not waited for
        return json_response(self.body(), self.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as JSON."""
    return Response(_ENCODER.encode(value), status, headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str = "engine_unavailable", retry_after_s: int | None = None) -> ApiError:
    """503: the engine cannot serve now."""
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)


def refused(error: RequestError | str) -> ApiError:
    """400 for what the engine refuses; its messages begin with the name of the value that is wrong."""
    message = str(error)
    if message.startswith("guided "):
        return bad_request(message, code="invalid_grammar")
    found = re.match(r"(\w+)(?:\[[^\]]*\])?(?==| names | has | token id)", message)
    return bad_request(message, found.group(1) if found else None)


def context_overflow(limit: int, prompt: int, wanted: int | None, param: str) -> ApiError:
    """400 in the words of OpenAI: prompt and output do not fit the model's context."""
    if wanted is None:
        message = (
            f"This model's maximum context length is {limit} tokens, of which at least one is for the output. However, "
            f"your {param} has {prompt} tokens or more. Please reduce the length of the {param}."
        )
    else:
        message = (
            f"This model's maximum context length is {limit} tokens. However, you requested {prompt + wanted} tokens "
            f"({prompt} in the {param}, {wanted} in the completion). Please reduce the length of the {param} or "
            "completion."
        )
    return bad_request(message, param, "context_length_exceeded")


def engine_died(error: EngineDeadError) -> ApiError:
    """503 for a request that the engine's end took along."""
    return unavailable(f"the request was not finished: {error}", "engine_lost", retry_after_s=10)


def from_status(status: int) -> ApiError:
    """An error that is its status and nothing else, such as 404 and 405."""
    return ApiError(status, HTTPStatus(status).phrase, code=HTTPStatus(status).phrase.lower().replace(" ", "_"))

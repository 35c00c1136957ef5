"""Request bodies: bounded in size and time, decoded strictly, every fault a 4xx that names the field."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Collection
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from yalis.config import unknown_key_message
from yalis.server.errors import ApiError, bad_request

T = TypeVar("T")

# Of a body that is too large, so much more is read and dropped: many clients look for the answer only when all is sent.
_DROPPED_BYTES = 8 << 20


async def read_body(request: Request, *, limit: int, timeout_s: float) -> bytes:
    """The body.

    Raises:
        ApiError: it is too large (413), too slow (408), or the client went away.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit + _DROPPED_BYTES:
                    break
                if size <= limit:
                    parts.append(part)
                else:
                    parts.clear()
    except TimeoutError:
        if size > limit:
            raise _too_large(size, limit) from None
        raise ApiError(
            408, f"the request's body did not arrive within {timeout_s:g} s; send it faster", code="request_timeout"
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away", code="client_disconnected") from None
    if size > limit:
        raise _too_large(size, limit)
    return b"".join(parts)


def check_json_type(request: Request) -> None:
    """Refuse other content types: browsers send those to other sites without asking.

    Raises:
        ApiError: 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            f"content-type {kind!r} is not supported; send application/json",
            code="unsupported_media_type",
        )


def check_origin(request: Request, allowed: Collection[str]) -> None:
    """Refuse what a browser sends for a page of another site; for requests that need no content type.

    Raises:
        ApiError: 403.
    """
    origin = request.headers.get("origin")
    if origin is None or origin in allowed or origin.partition("://")[2] == request.headers.get("host"):
        return
    raise ApiError(
        403,
        f"pages of {origin!r:.80} may not call this server; name the origin with --allowed-origins to let them",
        code="origin_not_allowed",
    )


def decode(body: bytes, decoder: msgspec.json.Decoder[T], known: frozenset[str]) -> T:
    """``body`` in the type of ``decoder``.

    Args:
        known: names of its fields, to propose one in place of a mistaken name.

    Raises:
        ApiError: 400, naming the field where one is to blame.
    """
    # Millions of small objects make the collector look through all of them again and again: seconds for 16 MiB of "[]".
    gc.disable()
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), known) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    finally:
        gc.enable()


def _invalid(message: str, known: frozenset[str]) -> ApiError:
    unknown = re.search(r"unknown field `(.*)`", message)
    if unknown is not None and "`$." not in message:
        return bad_request(
            unknown_key_message("field", unknown.group(1), sorted(known)), unknown.group(1), "unknown_parameter"
        )
    path = re.search(r"at `\$\.?(.*)`$", message)
    missing = re.search(r"missing required field `(\w+)`", message)
    param = path.group(1) if path is not None else missing.group(1) if missing is not None else None
    return bad_request(message, param, "invalid_type" if path is not None else None)


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request's body has {size} bytes or more, the limit is {limit}; send less, or raise --max-body-bytes",
        code="request_too_large",
    )

"""Constraints on the output, from the request's fields to those of `SamplingParams`.

Whether a grammar compiles is found out in `yalis.server.grammars`, before the engine hears of the request.
"""

from __future__ import annotations

from typing import Any

from yalis.config import unknown_key_message
from yalis.engine.sampling_params import GuidedParams
from yalis.errors import RequestError
from yalis.server.errors import bad_request
from yalis.server.protocol import SamplingRequest

_FIELDS = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_STRUCTURED = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json_object",
}


def guided_fields(request: SamplingRequest) -> dict[str, Any]:
    """``guided`` for `SamplingParams`, or nothing for free text.

    Raises:
        ApiError: 400, several constraints, or a malformed one.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for name, kind in _FIELDS.items():
        value = getattr(request, name)
        if value is not None:
            found.append((name, {kind: value}))
    if request.response_format is not None:
        constraint = _response_format(request.response_format)
        if constraint is not None:
            found.append(("response_format", constraint))
    if request.structured_outputs is not None:
        found.append(("structured_outputs", _structured_outputs(request.structured_outputs)))
    if not found:
        return {}
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise bad_request(f"{names} each constrain the output; send one of them", found[1][0])
    param, constraint = found[0]
    try:
        return {"guided": GuidedParams(**constraint)}
    except RequestError as error:
        raise bad_request(str(error), param, "invalid_grammar") from None


def _response_format(value: dict[str, Any]) -> dict[str, Any] | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise bad_request(
            f"response_format.type={kind!r:.80}: must be text, json_object or json_schema", "response_format"
        )
    inner = value.get("json_schema")
    if not isinstance(inner, dict) or "schema" not in inner:
        raise bad_request("response_format.json_schema must hold a schema", "response_format")
    return {"json_schema": inner["schema"]}


def _structured_outputs(value: dict[str, Any]) -> dict[str, Any]:
    given = {name: item for name, item in value.items() if item is not None}
    for name in given:
        if name not in _STRUCTURED:
            raise bad_request(
                unknown_key_message("field of structured_outputs", name, list(_STRUCTURED)), "structured_outputs"
            )
    return {_STRUCTURED[name]: item for name, item in given.items()}

"""Requests made from the published OpenAPI description: never a 5xx, and every answer is as described.

YALIS_SCHEMA_EXAMPLES says how many requests are made per operation (default 15): more for a longer search.
"""

from __future__ import annotations

import os
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.server import Server, events
from yalis.server.answer_schemas import ANSWERS
from yalis.server.openapi import openapi

DESCRIPTION = openapi(needs_key=False)
# What a request may ask for takes time on two cores; the number of examples is what keeps the test short.
EXAMPLES = int(os.environ.get("YALIS_SCHEMA_EXAMPLES", "15"))
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_dict(DESCRIPTION)


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@pytest.mark.timeout(120 + 2 * EXAMPLES)
def test_no_request_of_the_description_breaks_the_server(case: Any, one: Server) -> None:
    if isinstance(case.body, dict):
        # Long outputs would only take time.
        for name in ("max_tokens", "max_completion_tokens"):
            if name in case.body or case.path == "/v1/chat/completions":
                value = case.body.get(name)
                case.body[name] = min(value, 4) if isinstance(value, int) and not isinstance(value, bool) else value
        if case.path == "/v1/chat/completions" and case.body.get("max_tokens") is None:
            case.body["max_tokens"] = 4
        if isinstance(case.body.get("model"), str):
            del case.body["model"]  # nothing but 404 would come of it
    if case.path == "/stop_profile":
        one.request("POST", "/start_profile")
    case.validate_response(case.call(base_url=one.url, timeout=30), checks=CHECKS)
    if case.path == "/start_profile":
        one.request("POST", "/stop_profile")
    assert one.get("/health").status == 200


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "May I copy it?"}]
SCORED = {"prompt_logprobs": 2, "return_token_ids": True, "max_tokens": 3, "n": 2}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
ASKED: list[tuple[str, dict[str, Any] | None, str]] = [
    (TEXT, {"prompt": "This program", "max_tokens": 2}, "Completion"),
    (TEXT, {"prompt": ["This", "program"], "echo": True, "logprobs": 2, **SCORED}, "Completion"),
    (TEXT, {"prompt": "x", "stop_token_ids": list(range(1000)), "max_tokens": 2}, "Completion"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 2}, "ChatCompletion"),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **SCORED}, "ChatCompletion"),
    (TEXT, {"prompt": "x", "echo": True, "logprobs": 1, **SCORED, **STREAM}, "CompletionChunk"),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "max_tokens": 2, **STREAM}, "ChatCompletionChunk"),
    ("/tokenize", {"prompt": "free", "return_token_strs": True}, "Tokens"),
    ("/detokenize", {"tokens": [300]}, "Text"),
    *((path, None, answer) for path, answer in (("/v1/models", "Models"), ("/tokenizer_info", "TokenizerInfo"))),
    *((path, None, answer) for path, answer in (("/health", "Healthy"), ("/ready", "ReadyNow"), ("/state", "State"))),
]


@pytest.mark.parametrize(("path", "body", "answer"), ASKED, ids=lambda value: str(value)[:40])
def test_answers_are_as_described(one: Server, path: str, body: dict[str, Any] | None, answer: str) -> None:
    """Requests with everything in them that random ones rarely have right."""
    if body is not None and body.get("stream"):
        with one.stream(body, path) as response:
            *chunks, done = events(response)
        assert done == "[DONE]"
        for chunk in chunks:
            jsonschema_rs.validate(ANSWERS[answer], chunk)
        return
    got = one.request("GET" if body is None else "POST", path, body)
    assert got.status == 200, got.body
    jsonschema_rs.validate(ANSWERS[answer], got.json())


def test_the_description_is_published(one: Server) -> None:
    published = one.get("/openapi.json").json()
    assert published == DESCRIPTION
    for path in published["paths"]:
        assert one.request("OPTIONS", path).status == 405  # they all exist

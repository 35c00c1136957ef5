"""Bodies: what decodes, and how a fault is told."""

from __future__ import annotations

import json

import msgspec
import pytest

from yalis.server.body import decode
from yalis.server.errors import ApiError
from yalis.server.protocol import ChatRequest, CompletionRequest, SamplingRequest

KNOWN = frozenset(f.name for f in msgspec.structs.fields(CompletionRequest))
DECODER = msgspec.json.Decoder(CompletionRequest)


def fault(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode(body, DECODER, KNOWN)
    assert caught.value.status == 400
    return caught.value


def test_null_is_not_given() -> None:
    request = decode(b'{"prompt": "x", "temperature": null, "stop": null}', DECODER, KNOWN)
    assert request == CompletionRequest(prompt="x")


def test_a_field_is_named_with_its_place() -> None:
    assert fault(b'{"prompt": "x", "stop": ["a", 1]}').param == "stop[1]"
    assert fault(b'{"prompt": "x", "stream_options": {"include_usage": 1}}').param == "stream_options.include_usage"
    assert fault(b'{"prompt": "x", "logit_bias": {"1": "a"}}').param == "logit_bias[...]"
    missing = fault(b"{}")
    assert missing.param == "prompt" and "missing required field" in missing.message


def test_an_unknown_field_gets_a_proposal() -> None:
    error = fault(b'{"prompt": "x", "max_token": 5}')
    assert error.param == "max_token" and error.code == "unknown_parameter"
    assert "did you mean 'max_tokens'?" in error.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'"', b"\xff", b'{"prompt": "\xc3"}', b'{"prompt": "\\ud800"}', b'{"prompt": NaN}'],
)
def test_what_is_no_json(body: bytes) -> None:
    assert fault(body).code == "invalid_json"


def test_deep_nesting_of_a_field_that_may_hold_anything() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    assert fault(b'{"prompt": "x", "guided_json": ' + deep + b"}").code == "invalid_json"


def test_every_field_of_openais_client_is_known() -> None:
    """What the official client can send is either served, refused by value, or known to be without effect."""
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    def names(module: object, kind: str) -> set[str]:
        return set(getattr(module, kind).__annotations__)

    def ours(kind: type[SamplingRequest]) -> set[str]:
        return {f.name for f in msgspec.structs.fields(kind)}

    assert names(completion, "CompletionCreateParamsBase") <= ours(CompletionRequest)
    # Other media, other services, and what was replaced years ago: refused as unknown, by name.
    not_served = {"audio", "modalities", "prediction", "web_search_options", "functions", "function_call", "moderation"}
    not_served |= {"prompt_cache_retention", "prompt_cache_options"}
    assert names(chat, "CompletionCreateParamsBase") - not_served <= ours(ChatRequest)


def test_the_error_shape() -> None:
    response = ApiError(429, "full", code="queue_full", retry_after_s=3).response()
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert json.loads(bytes(response.body)) == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }

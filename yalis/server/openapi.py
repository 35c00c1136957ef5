"""The interface's OpenAPI description, made from the types that decode the requests."""

from __future__ import annotations

from typing import Any

import msgspec

from yalis import __version__
from yalis.server.answer_schemas import ANSWERS, ERROR
from yalis.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {
    "description": "one text, several, token ids, or several lists of them",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {**_TOKEN_IDS, "minItems": 1},
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ],
}
# Path, body, name of the answer (`ANSWERS`), summary, whether it streams.
_POSTS = (
    ("/v1/completions", CompletionRequest, "Completion", "continue text", True),
    ("/v1/chat/completions", ChatRequest, "ChatCompletion", "the next message of a conversation", True),
    ("/tokenize", TokenizeRequest, "Tokens", "token ids of a text or a conversation", False),
    ("/detokenize", DetokenizeRequest, "Text", "text of token ids", False),
)
_BARE_POSTS = (
    ("/start_profile", "ProfileStarted", "trace every rank's steps"),
    ("/stop_profile", "ProfileStopped", "end the trace and write it"),
)
_GETS = (
    ("/v1/models", "Models", "the models that are served"),
    ("/tokenizer_info", "TokenizerInfo", "special tokens and chat template"),
    ("/health", "Healthy", "200 while every rank is alive, loaded and heard, else 503"),
    ("/ready", "ReadyNow", "200 while requests are served, else 503"),
    ("/version", "Version", "the server's version"),
    ("/state", "State", "ranks, KV cache, queue, speed"),
)


def openapi(*, needs_key: bool) -> dict[str, Any]:
    """The description, OpenAPI 3.1.

    Args:
        needs_key: whether requests need an API key.
    """
    kinds = [kind for _, kind, *_ in _POSTS]
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components["CompletionRequest"]["properties"]["prompt"] = _PROMPT
    components |= ANSWERS | {"Error": ERROR}
    paths: dict[str, Any] = {}
    for (path, _, answer, summary, streams), reference in zip(_POSTS, references, strict=True):
        good = _json(answer)
        if streams:
            good["text/event-stream"] = {"schema": _events(f"{answer}Chunk")}
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses(good)}}
    for method, entries in (("post", _BARE_POSTS), ("get", _GETS)):
        for path, answer, summary in entries:
            paths[path] = {method: {"summary": summary, "responses": _responses(_json(answer))}}
    good = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": {"summary": "Prometheus metrics", "responses": _responses(good)}}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "yalis", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        components_of_document: dict[str, Any] = document["components"]
        components_of_document["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _events(chunk: str) -> dict[str, Any]:
    # OpenAPI has no way yet to say that a text is JSON of a schema unless it is a certain word.
    words = f'JSON of a {chunk} (#/components/schemas/{chunk}) or of an Error; "[DONE]" at the end'
    return {"type": "object", "properties": {"data": {"type": "string", "description": words}}, "required": ["data"]}


def _responses(good: dict[str, Any]) -> dict[str, Any]:
    error = {"description": "error", "content": _json("Error")}
    return {"200": {"description": "done", "content": good}, "4XX": error, "503": error}

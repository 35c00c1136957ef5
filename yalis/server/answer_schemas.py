"""JSON schemas of what the server answers, as its OpenAPI description publishes them.

Objects are closed, so that the test which validates answers against them notices a field that is not described.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def _by_name(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _object(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


_IDS = _list(_COUNT)
_SCORES = _list(_or_null(_by_name(_object({"logprob": _NUMBER, "rank": _COUNT, "decoded_token": _or_null(_TEXT)}))))
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    }
)
_FINISH: Schema = _one_of("stop", "length", "abort", "error", "tool_calls")
_STOP_REASON: Schema = {"type": ["string", "integer", "null"]}

_COMPLETION_LOGPROBS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_or_null(_NUMBER)),
        "top_logprobs": _list(_or_null(_by_name(_NUMBER))),
        "text_offset": _list(_COUNT),
    }
)
_TOKEN = {
    "token": _TEXT,
    "logprob": _NUMBER,
    "bytes": _or_null(_list({"type": "integer", "minimum": 0, "maximum": 255})),
}
_CHAT_LOGPROBS = _object(
    {
        "content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})),
        "refusal": {"type": "null"},
    }
)
_CALL = _object(
    {"id": _TEXT, "type": _one_of("function"), "function": _object({"name": _TEXT, "arguments": _TEXT})},
)
_MESSAGE = _object(
    {"role": _one_of("assistant"), "content": _or_null(_TEXT), "refusal": {"type": "null"}}, tool_calls=_list(_CALL)
)


_DELTA = _object(
    {"content": _TEXT},
    role=_one_of("assistant"),
    tool_calls=_list(
        _object(
            {"index": _COUNT, "function": _object({"arguments": _TEXT}, name=_TEXT)}, id=_TEXT, type=_one_of("function")
        )
    ),
)


def _answer(kind: str, choice: Schema, **optional: Schema) -> Schema:
    return _object({**_head(kind, choice), "usage": _USAGE}, **optional)


def _chunk(kind: str, choice: Schema) -> Schema:
    return _object(_head(kind, choice), usage=_or_null(_USAGE))


def _head(kind: str, choice: Schema) -> dict[str, Schema]:
    return {"id": _TEXT, "object": _one_of(kind), "created": _COUNT, "model": _TEXT, "choices": _list(choice)}


def _text_choice(finish: Schema) -> Schema:
    return _object(
        {
            "index": _COUNT,
            "text": _TEXT,
            "logprobs": _or_null(_COMPLETION_LOGPROBS),
            "finish_reason": finish,
            "stop_reason": _STOP_REASON,
        },
        token_ids=_IDS,
        prompt_token_ids=_IDS,
        prompt_logprobs=_SCORES,
    )


def _chat_choice(content: dict[str, Schema], finish: Schema) -> Schema:
    return _object(
        {
            "index": _COUNT,
            **content,
            "logprobs": _or_null(_CHAT_LOGPROBS),
            "finish_reason": finish,
            "stop_reason": _STOP_REASON,
        },
        token_ids=_IDS,
        prompt_token_ids=_IDS,
    )


_STATE = _object(
    {
        "model": _TEXT,
        "status": _one_of("starting", "ready", "draining", "restarting", "dead"),
        "message": _or_null(_TEXT),
        "version": _TEXT,
        "uptime_s": _NUMBER,
        "restarts": _COUNT,
        "ranks": _list(
            _object(
                {
                    "rank": _COUNT,
                    "host": _TEXT,
                    "pid": _COUNT,
                    "state": _TEXT,
                    "step": {"type": "integer", "minimum": -1},
                    "beat_age_s": _NUMBER,
                }
            )
        ),
        "kv": _object({"usage": _NUMBER, "num_blocks": _COUNT, "block_size": _COUNT}),
        "running": _COUNT,
        "waiting": _COUNT,
        "open_requests": _COUNT,
        "preemptions": _COUNT,
        "tokens_per_s": _object({"prompt": _NUMBER, "generation": _NUMBER}),
        "step_ms": _by_name(_NUMBER),
        "engine": {"type": "object"},
    }
)

ERROR: Schema = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)})}
)
"""Every answer that is no success."""

ANSWERS: dict[str, Schema] = {
    "Completion": _answer("text_completion", _text_choice(_FINISH)),
    "CompletionChunk": _chunk("text_completion", _text_choice(_or_null(_FINISH))),
    "ChatCompletion": _answer("chat.completion", _chat_choice({"message": _MESSAGE}, _FINISH), prompt_logprobs=_SCORES),
    "ChatCompletionChunk": _chunk("chat.completion.chunk", _chat_choice({"delta": _DELTA}, _or_null(_FINISH))),
    "Models": _object(
        {
            "object": _one_of("list"),
            "data": _list(
                _object(
                    {
                        "id": _TEXT,
                        "object": _one_of("model"),
                        "created": _COUNT,
                        "owned_by": _TEXT,
                        "root": _TEXT,
                        "parent": {"type": "null"},
                        "max_model_len": _or_null(_COUNT),
                    }
                )
            ),
        }
    ),
    "Tokens": _object({"count": _COUNT, "max_model_len": _COUNT, "tokens": _IDS, "token_strs": _or_null(_list(_TEXT))}),
    "Text": _object({"prompt": _TEXT}),
    "TokenizerInfo": _object(
        {
            "tokenizer_class": _TEXT,
            "vocab_size": _COUNT,
            "bos_token": _or_null(_TEXT),
            "eos_token": _or_null(_TEXT),
            "chat_template": _or_null(_TEXT),
        }
    ),
    "Healthy": _object({"status": _one_of("ok")}),
    "ReadyNow": _object({"status": _one_of("ready")}),
    "Version": _object({"version": _TEXT}),
    "State": _STATE,
    "ProfileStarted": _object({"status": _one_of("started")}),
    "ProfileStopped": _object({"status": _one_of("stopped"), "trace": _TEXT}),
}
"""Name of the component to its schema."""

"""Prompts, errors and forms of answers, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from yalis.engine.sampling_params import GuidedParams
from yalis.server.errors import ApiError, context_overflow, refused
from yalis.server.guided import guided_fields
from yalis.server.protocol import CompletionRequest
from yalis.server.requests import as_prompts

PROMPTS: list[tuple[Any, list[Any]]] = [
    ("x", ["x"]),
    (["x", "y"], ["x", "y"]),
    ([1, 2], [[1, 2]]),
    ([[1], [2, 3]], [[1], [2, 3]]),
]


@pytest.mark.parametrize(("sent", "meant"), PROMPTS)
def test_prompts(sent: Any, meant: list[Any]) -> None:
    assert as_prompts(sent) == meant


@pytest.mark.parametrize("sent", [[], [1, "a"], [[1], "a"], [1.0], [True], [None], [{}], [[[1]]]])
def test_no_prompts(sent: Any) -> None:
    with pytest.raises(ApiError) as caught:
        as_prompts(sent)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("temperature=-1: must be a number", "temperature"),
        ("logit_bias[7]=300: must be a number", "logit_bias"),
        ("logit_bias token id='x': must be an integer", "logit_bias"),
        ("stop_token_ids names token 5, but", "stop_token_ids"),
        ("stop has 17 entries, at most 16", "stop"),
        ("the prompt is empty", None),
        ("guided regex cannot be used: x=1", None),
    ],
)
def test_the_value_to_blame(message: str, param: str | None) -> None:
    assert refused(message).param == param


def test_overflow_names_the_numbers() -> None:
    error = context_overflow(1024, 1000, 50, "messages")
    assert error.code == "context_length_exceeded" and error.param == "messages" and error.status == 400
    for number in ("1024", "1050", "1000", "50"):
        assert number in error.message
    assert "1024" in context_overflow(1024, 3000, None, "prompt").message


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, {"json_schema": {}}),
    ({"guided_json": '{"type": "object"}'}, {"json_schema": '{"type": "object"}'}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a"]}, {"choice": ["a"]}),
    ({"guided_grammar": "start: A"}, {"grammar": "start: A"}),
    ({"structured_outputs": {"regex": "a", "json": None}}, {"regex": "a"}),
]


@pytest.mark.parametrize(("fields", "guided"), FORMS)
def test_forms(fields: dict[str, Any], guided: dict[str, Any]) -> None:
    expected = {"guided": GuidedParams(**guided)} if guided else {}
    assert guided_fields(CompletionRequest(prompt="x", **fields)) == expected

"""Answers in a given form: guided decoding and tool calls through the server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from tests.support.checkpoints import DEMO
from tests.support.server import Server, events
from yalis.server.answer_schemas import ANSWERS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_choice": ["yes", "no", "perhaps"]}, r"yes|no|perhaps"),
    ({"guided_regex": r"[0-9]{3}-[a-z]{2}"}, r"[0-9]{3}-[a-z]{2}"),
    ({"guided_grammar": 'start: "a" ("b" | "c") "d"'}, r"a[bc]d"),
    ({"structured_outputs": {"choice": ["left", "right"]}}, r"left|right"),
]


@pytest.mark.parametrize(("fields", "pattern"), FORMS, ids=lambda value: str(value)[:30])
def test_forms(one: Server, fields: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        choice = one.complete("x", max_tokens=32, seed=seed, **fields)["choices"][0]
        assert re.fullmatch(pattern, choice["text"]), choice
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("name", ["response_format", "guided_json", "structured_outputs"])
def test_schema(one: Server, name: str) -> None:
    value: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    fields = {name: {"guided_json": SCHEMA, "structured_outputs": {"json": SCHEMA}}.get(name, value)}
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 100, "seed": 1, **fields}
    answer = one.post(CHAT, body).json()["choices"][0]
    person = json.loads(answer["message"]["content"])
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 150


def test_json_object_in_a_stream(two: Server) -> None:
    body = {"prompt": "x", "max_tokens": 60, "seed": 3, "response_format": {"type": "json_object"}}
    with two.stream(body) as response:
        text = "".join(e["choices"][0]["text"] for e in events(response) if e != "[DONE]")
    assert text.startswith("{")


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
    ({"guided_regex": "("}, None),
    ({"guided_grammar": "start: nothing"}, None),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
    ({"structured_outputs": {"xml": 1}}, "structured_outputs"),
    ({"guided_json": SCHEMA, "ignore_eos": True}, None),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_refused_forms(one: Server, fields: dict[str, Any], param: str | None, stream: bool) -> None:
    answer = one.post(COMPLETIONS, {"prompt": "x", "stream": stream, **fields})
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param, answer.error


# ---- tools ------------------------------------------------------------------------------------------------------

# How a template of each family tells the model to write calls, and two calls written so.
CALL = '"name": "get_weather", "{}": {{"city": "Oslo"}}'
FAMILIES = {
    "hermes": (
        '<tool_call>{"name": ..., "arguments": ...}</tool_call>',
        "\n".join([f"<tool_call>\n{{{CALL.format('arguments')}}}\n</tool_call>"] * 2),
    ),
    "llama3_json": (
        '{"name": function name, "parameters": dictionary of argument name and its value}',
        "; ".join([f"{{{CALL.format('parameters')}}}"] * 2),
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": ..., "arguments": ...}]',
        f"[TOOL_CALLS] [{{{CALL.format('arguments')}}}, {{{CALL.format('arguments')}}}]",
    ),
    "mistral_args": ("[TOOL_CALLS]name[ARGS]{...}", '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}' * 2),
}
TEMPLATE = """{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
Answer with WAY.{% endif %}{% if verbosity %} Let the answer's length be {{ verbosity }}.{% endif %}
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tooled(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose template writes tool calls as the family does; it is recognised by the template."""
    file: Path = tmp_path_factory.mktemp("template") / "tools.jinja"
    file.write_text(TEMPLATE.replace("WAY", FAMILIES[family][0]))
    with Server("--chat-template", str(file)) as server:
        yield server.ready()


def test_enforced_call(tooled: Server, family: str) -> None:
    client = openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0)
    fields: Any = {"model": tooled.get("/v1/models").json()["data"][0]["id"], "messages": MESSAGES, "tools": TOOLS}
    fields |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400, "seed": 1}
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    if family.startswith("mistral"):
        assert len(call.id) == 9 and call.id.isalnum()  # or its templates refuse the history
    fragments = []
    for chunk in client.chat.completions.create(**fields, stream=True):
        fragments += chunk.choices[0].delta.tool_calls or []
        finish = chunk.choices[0].finish_reason
    assert finish == "tool_calls"
    assert "".join(f.function.arguments or "" for f in fragments if f.function) == call.function.arguments
    # The call's result goes back into the conversation.
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = client.chat.completions.create(**{**fields, "messages": history, "tool_choice": "none"})
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_the_model_chose_to_make(tooled: Server, family: str, stream: bool) -> None:
    """The model is made to write the calls as its family does, but nothing tells the parser so."""
    body = {"messages": MESSAGES, "tools": TOOLS, "guided_choice": [FAMILIES[family][1]], "max_tokens": 400}
    if stream:
        with tooled.stream(body, CHAT) as response:
            chunks = [chunk for chunk in events(response) if chunk != "[DONE]"]
        for chunk in chunks:
            jsonschema_rs.validate(ANSWERS["ChatCompletionChunk"], chunk)
        chunks = [chunk["choices"][0] for chunk in chunks]
        content = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
        calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls") or []]
        finish = chunks[-1]["finish_reason"]
    else:
        answer = tooled.post(CHAT, body).json()
        jsonschema_rs.validate(ANSWERS["ChatCompletion"], answer)
        choice = answer["choices"][0]
        content, calls = choice["message"]["content"] or "", choice["message"]["tool_calls"]
        finish = choice["finish_reason"]
    assert (content, finish, len(calls)) == ("", "tool_calls", 2)
    assert len({call["id"] for call in calls}) == 2
    for call in calls:
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


def test_verbosity_reaches_a_template_that_knows_it(tooled: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "return_token_ids": True}
    plain, low = (
        tooled.post(CHAT, {**body, **more}).json()["choices"][0]["prompt_token_ids"]
        for more in ({}, {"verbosity": "low"})
    )
    text = tooled.post("/detokenize", {"tokens": low}).json()["prompt"]
    assert plain != low and "Let the answer's length be low." in text


def test_free_answer_with_tools_at_hand(tooled: Server) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 8, "temperature": 0}
    choice = tooled.post(CHAT, body).json()["choices"][0]
    assert choice["message"]["content"] and "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "length"


BAD_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_TOOLS, ids=lambda value: str(value)[:50])
def test_refused_tools(tooled: Server, fields: dict[str, Any], param: str) -> None:
    answer = tooled.post(CHAT, {"messages": MESSAGES, **fields})
    assert answer.status == 400 and answer.error["param"] == param, answer.body


def test_a_template_without_tools_refuses_them(one: Server) -> None:
    answer = one.post(CHAT, {"messages": MESSAGES, "tools": TOOLS})
    assert answer.status == 400 and answer.error["param"] == "tools" and "--tool-call-parser" in answer.error["message"]


# ---- no tokenizer -----------------------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    with Server("--load-format", "dummy", model=tmp_path) as server:
        server.ready()
        choice = server.complete([1, 2, 3], max_tokens=4, ignore_eos=True, return_token_ids=True, logprobs=1)[
            "choices"
        ][0]
        assert choice["text"] == "" and len(choice["token_ids"]) == 4 and choice["prompt_token_ids"] == [1, 2, 3]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        for path, body in (
            (COMPLETIONS, {"prompt": "text"}),
            (COMPLETIONS, {"prompt": [1], "stop": "x"}),
            (COMPLETIONS, {"prompt": [1], "guided_choice": ["a"]}),
            (CHAT, {"messages": MESSAGES}),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            assert server.post(path, body).status == 400, path

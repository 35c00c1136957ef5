"""OpenAI's own client against a running server: what it gets is what the engine gives offline."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.support.checkpoints import DEMO
from tests.support.server import Server
from yalis import LLM, SamplingParams

PROMPT = "This program is free software"
MESSAGES: list[Any] = [{"role": "user", "content": "What is free software?"}]


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(params=["one", "two"])
def server(request: pytest.FixtureRequest) -> Server:
    value: Server = request.getfixturevalue(request.param)
    return value


def text_of(llm: LLM, prompt: Any, **params: Any) -> str:
    [output] = llm.generate([prompt], llm.sampling_params(params))
    return output.outputs[0].text


def test_completion_is_the_offline_text(one: Server, offline: LLM) -> None:
    answer = client_of(one).completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == text_of(offline, PROMPT, max_tokens=24, temperature=0.0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == len(offline.tokenizer.encode(PROMPT))
    assert answer.model == "demo" and answer.object == "text_completion"


def test_two_ranks_give_the_text_of_two_ranks(two: Server) -> None:
    with LLM(str(DEMO), tensor_parallel_size=2, cpu_threads=1, max_model_len=512) as llm:
        expected = text_of(llm, PROMPT, max_tokens=24, seed=7, temperature=0.8)
    answer = client_of(two).completions.create(model="demo", prompt=PROMPT, max_tokens=24, seed=7, temperature=0.8)
    assert answer.choices[0].text == expected


def test_stream_is_the_whole_in_single_tokens(server: Server) -> None:
    client = client_of(server)
    fields: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "seed": 3, "temperature": 0.9}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    *tokens, last = chunks
    assert "".join(chunk.choices[0].text for chunk in tokens) == whole.choices[0].text
    assert len(tokens) == 12  # one event per token
    assert [chunk.choices[0].finish_reason for chunk in tokens] == [None] * 11 + ["length"]
    assert all(chunk.usage is None for chunk in tokens)
    assert last.choices == []
    assert last.usage == whole.usage or (last.usage is not None and last.usage.completion_tokens == 12)
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat(server: Server) -> None:
    client = client_of(server)
    fields: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens  # type: ignore[union-attr]


def test_chat_is_the_offline_chat(one: Server, offline: LLM) -> None:
    answer = client_of(one).chat.completions.create(
        model="licences", messages=MESSAGES, max_completion_tokens=16, temperature=0
    )
    [expected] = offline.chat(MESSAGES, SamplingParams(max_tokens=16, temperature=0.0))
    assert answer.choices[0].message.content == expected.outputs[0].text


def test_chat_without_a_limit_ends_at_the_end_of_sequence_or_context(one: Server) -> None:
    answer = client_of(one).chat.completions.create(model="demo", messages=MESSAGES, seed=1)
    assert answer.usage is not None
    ended = answer.choices[0].finish_reason == "stop" or answer.usage.total_tokens == 1024
    assert ended and answer.usage.completion_tokens > 16


def test_text_parts_are_joined(one: Server) -> None:
    client = client_of(one)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]}]
    plain: Any = [{"role": "user", "content": "What is it?"}]
    texts = [
        client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0)
        for messages in (parts, plain)
    ]
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content


def test_chat_logprobs(one: Server) -> None:
    answer = client_of(one).chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 3
    for token in logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob  # greedy: the likeliest
        assert bytes(token.bytes or []).decode() == token.token
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content


def test_bytes_of_half_characters_make_whole_ones(one: Server) -> None:
    """The demo model writes these characters as two to four tokens, none of which is text by itself."""
    text = "na\u00efve \u4e16\u754c \U0001f642"
    body = {"messages": MESSAGES, "max_tokens": 40, "guided_choice": [text], "logprobs": True, "top_logprobs": 3}
    choice = one.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["message"]["content"] == text
    tokens = choice["logprobs"]["content"]
    assert any("\ufffd" in token["token"] for token in tokens)
    said = b"".join(bytes(token["bytes"]) for token in tokens)
    assert said.removesuffix(b"<|im_end|>") == text.encode()
    for token in tokens:
        for other in token["top_logprobs"]:
            if "\ufffd" not in other["token"]:
                assert bytes(other["bytes"]).decode() == other["token"]


def test_chat_scores_its_prompt(one: Server) -> None:
    """As vLLM spells it: beside the choices, and the same numbers as those of a completion of the same tokens."""
    fields = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 2}
    chat = one.post("/v1/chat/completions", {"messages": MESSAGES, "return_token_ids": True, **fields}).json()
    ids = chat["choices"][0]["prompt_token_ids"]
    assert chat["prompt_logprobs"] == one.complete(ids, **fields)["choices"][0]["prompt_logprobs"]
    assert chat["prompt_logprobs"][0] is None and len(chat["prompt_logprobs"]) == len(ids)
    assert all(str(token) in entry for token, entry in zip(ids[1:], chat["prompt_logprobs"][1:], strict=True))
    plain = one.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json()
    assert "prompt_logprobs" not in plain


def test_async_client_runs_requests_at_once(one: Server, offline: LLM) -> None:
    prompts = [PROMPT, "You may copy", "The licenses for most software", "NO WARRANTY"]

    async def ask(client: openai.AsyncOpenAI, prompt: str, seed: int) -> str:
        text = ""
        stream = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=20, seed=seed, temperature=0.8, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, p, i) for i, p in enumerate(prompts)))

    alone = [text_of(offline, p, max_tokens=20, seed=i, temperature=0.8, top_p=0.9) for i, p in enumerate(prompts)]
    assert asyncio.run(all_of_them()) == alone


def test_many_prompts_times_n(one: Server, offline: LLM) -> None:
    prompts = [PROMPT, "You may copy"]
    answer = client_of(one).completions.create(model="demo", prompt=prompts, n=3, max_tokens=6, seed=5, temperature=0.9)
    assert [choice.index for choice in answer.choices] == list(range(6))
    expected = offline.generate(
        prompts, offline.sampling_params({"n": 3, "max_tokens": 6, "seed": 5, "temperature": 0.9})
    )
    assert [c.text for c in answer.choices] == [o.text for out in expected for o in out.outputs]
    assert answer.usage is not None and answer.usage.completion_tokens == 36


def test_streams_of_several_choices_are_kept_apart(one: Server) -> None:
    client = client_of(one)
    fields: Any = {"model": "demo", "prompt": [PROMPT, "You may"], "n": 2, "max_tokens": 5, "seed": 9}
    whole = client.completions.create(**fields)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**fields, stream=True):
        assert len(chunk.choices) == 1
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [choice.text for choice in whole.choices]


def test_token_ids_in_any_form(one: Server, offline: LLM) -> None:
    ids = offline.tokenizer.encode(PROMPT)
    expected = one.complete(PROMPT, max_tokens=6, temperature=0)["choices"][0]["text"]
    assert one.complete(ids, max_tokens=6, temperature=0)["choices"][0]["text"] == expected
    assert one.complete([ids], max_tokens=6, temperature=0)["choices"][0]["text"] == expected
    answer = one.complete([PROMPT], max_tokens=6, temperature=0, return_token_ids=True)["choices"][0]
    assert answer["prompt_token_ids"] == ids
    assert offline.tokenizer.decode(answer["token_ids"]) == expected


def test_sampling_parameters_reach_the_engine(one: Server, offline: LLM) -> None:
    fields: dict[str, Any] = {
        "temperature": 1.2,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "seed": 11,
        "max_tokens": 24,
        "min_tokens": 8,
        "ignore_eos": True,
        "logit_bias": {"300": 2.5},
        "stop": ["\n\n\n\n"],
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    expected = text_of(offline, PROMPT, **{**fields, "logit_bias": {300: 2.5}})
    assert one.complete(PROMPT, **fields)["choices"][0]["text"] == expected


def test_stop_text_ends_the_stream(one: Server) -> None:
    full = one.complete(PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"]
    stop = full[10:14]
    chunks = list(
        client_of(one).completions.create(
            model="demo", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == full[: full.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_generation_config_gives_the_defaults_and_the_request_wins(one: Server, offline: LLM) -> None:
    # models/demo says temperature 0.7 and top_p 0.9.
    default = one.complete(PROMPT, max_tokens=16, seed=2)["choices"][0]["text"]
    assert default == text_of(offline, PROMPT, max_tokens=16, seed=2, temperature=0.7, top_p=0.9)
    other = one.complete(PROMPT, max_tokens=16, seed=2, temperature=1.5, top_p=1.0)["choices"][0]["text"]
    assert other == text_of(offline, PROMPT, max_tokens=16, seed=2, temperature=1.5, top_p=1.0)


def test_models(one: Server) -> None:
    client = client_of(one)
    assert [model.id for model in client.models.list()] == ["demo", "licences"]
    assert client.models.retrieve("licences").id == "licences"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_overflow_is_told_in_numbers(one: Server) -> None:
    client = client_of(one)
    for prompt, max_tokens, said in ((PROMPT, 1020, "1026 tokens (6 in the prompt, 1020"), ("a " * 3000, 5, "1024 ")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="demo", prompt=prompt, max_tokens=max_tokens)
        assert caught.value.code == "context_length_exceeded"
        assert said in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "a " * 3000}])
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"

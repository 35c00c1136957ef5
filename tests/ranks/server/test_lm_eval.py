"""lm-evaluation-harness' ``local-completions`` scores prompts through echo and log-probabilities.

It sends batches of token ids and sums ``token_logprobs[ctxlen:-1]``; whether a continuation is the greedy one it tells
by comparing floats with ``max(top_logprobs)``. Its request and its arithmetic are written out here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import ROOT
from tests.support.server import Server
from yalis import LLM, SamplingParams

CONTEXT = "This program is free software; you can redistribute it"
BOS = "<|begin_of_text|>"
CONTINUATIONS = [", a certain responsibilities", " purple monkey dishwasher", " and/or modify it under"]


def harness_request(batch: list[list[int]]) -> dict[str, Any]:
    return {
        "model": "demo",
        "prompt": batch,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def harness_parse(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    results = []
    for choice, length in zip(sorted(answer["choices"], key=lambda c: c["index"]), context_lengths, strict=True):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        top = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(token == max(likeliest.values()) for token, likeliest in zip(own, top, strict=True))
        results.append((sum(own), greedy))
    return results


# Stands in for the harness' program: the same options, the same requests, the same file of samples; two questions.
HARNESS = """#!PYTHON
import json, pathlib, sys, urllib.request

options = dict(zip(sys.argv, sys.argv[1:]))
url = dict(pair.split("=") for pair in options["--model_args"].split(","))["base_url"].removesuffix("/v1/completions")

def post(path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))

def ids(text):
    return post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]

lines = []
for line in pathlib.Path("QUESTIONS").read_text().splitlines()[:2]:
    doc, resps = json.loads(line), []
    for choice in doc["choices"]:
        body = {"prompt": [ids(doc["q"] + choice)], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        scores = post("/v1/completions", body)["choices"][0]["logprobs"]
        part = slice(len(ids(doc["q"])), -1)
        own, top = scores["token_logprobs"][part], scores["top_logprobs"][part]
        resps.append([[str(sum(own)), str(all(a == max(b.values()) for a, b in zip(own, top)))]])
    lines.append(json.dumps({"doc": doc, "resps": resps}))
folder = pathlib.Path(options["--output_path"]) / "demo"
folder.mkdir(parents=True)
(folder / "samples_licences.jsonl").write_text(chr(10).join(lines))
"""


def test_the_check_with_the_harness_writes_what_it_saw(tmp_path: Path) -> None:
    """bench/lm_eval_check.py with a stand-in for the harness, which has an environment of its own."""
    program = tmp_path / "lm_eval"
    questions = str(ROOT / "bench" / "lm_eval" / "licences.jsonl")
    program.write_text(HARNESS.replace("PYTHON", sys.executable).replace("QUESTIONS", questions))
    program.chmod(0o755)
    command = [sys.executable, str(ROOT / "bench" / "lm_eval_check.py"), "--lm-eval", str(program)]
    command += ["--output-json", str(tmp_path / "out" / "scores.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert record["results"]["questions"] == 2 and record["results"]["wrong"] == 0
    assert record["results"]["largest_difference"] < 0.1 and record["machine"]
    assert len(record["scores"]) == 4
    for score in record["scores"]:
        assert score["served"]["loglikelihood"] == pytest.approx(score["offline"]["loglikelihood"], abs=0.1)


@pytest.fixture(scope="module")
def batch(offline: LLM) -> tuple[list[list[int]], list[int]]:
    encode = offline.tokenizer.encode
    context = encode(CONTEXT)
    return [context + encode(text, add_special_tokens=False) for text in CONTINUATIONS], [len(context)] * 3


def test_scores_are_those_of_the_engine(one: Server, offline: LLM, batch: tuple[list[list[int]], list[int]]) -> None:
    prompts, lengths = batch
    answer = one.post("/v1/completions", harness_request(prompts)).json()
    outputs = offline.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=1))
    for choice, prompt, output in zip(answer["choices"], prompts, outputs, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert output.prompt_logprobs is not None
        expected = [
            entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True) if entry
        ]
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(expected, abs=2e-2)  # other batches, other rounding
        assert "".join(logprobs["tokens"]) == choice["text"]
        for token, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert token <= max(top.values())
    scores = harness_parse(answer, lengths)
    assert scores[1][0] < min(scores[0][0], scores[2][0]) - 10  # nonsense is unlikely
    assert not scores[1][1]


def test_greedy_continuation_is_recognised_by_equal_floats(one: Server, offline: LLM) -> None:
    context = offline.tokenizer.encode(CONTEXT)
    [output] = offline.generate([context], SamplingParams(temperature=0.0, max_tokens=8))
    prompt = context + output.outputs[0].token_ids
    answer = one.post("/v1/completions", harness_request([prompt])).json()
    [(score, greedy)] = harness_parse(answer, [len(context)])
    assert greedy and score > -20


def test_offsets_and_ids(one: Server) -> None:
    body = {"prompt": CONTEXT, "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True}
    choice = one.post("/v1/completions", body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][0] == BOS  # the tokenizer adds it; the text does not hold it
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert choice["text"][offset:].startswith(token)
    named = one.post("/v1/completions", {**body, "return_tokens_as_token_ids": True}).json()["choices"][0]["logprobs"]
    assert all(token.startswith("token_id:") for token in named["tokens"])
    assert named["token_logprobs"] == logprobs["token_logprobs"]


def test_echo_without_logprobs_and_without_output(one: Server) -> None:
    answer = one.complete(CONTEXT, echo=True, max_tokens=0, temperature=0)["choices"][0]
    assert answer["text"] == CONTEXT and answer["logprobs"] is None
    answer = one.complete(CONTEXT, echo=True, max_tokens=0, temperature=0, logprobs=1)["choices"][0]
    assert "".join(answer["logprobs"]["tokens"]) == BOS + CONTEXT
    continued = one.complete(CONTEXT, echo=True, max_tokens=3, temperature=0)["choices"][0]
    assert continued["text"].startswith(CONTEXT) and len(continued["text"]) > len(CONTEXT)


def test_streamed_echo_is_the_whole_one(one: Server) -> None:
    from tests.support.server import events

    body = {"prompt": CONTEXT, "max_tokens": 3, "temperature": 0, "logprobs": 1, "echo": True}
    whole = one.post("/v1/completions", body).json()["choices"][0]
    with one.stream(body) as response:
        chunks = [e["choices"][0] for e in events(response) if e != "[DONE]"]
    assert len(chunks) == 3
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    joined = [entry for chunk in chunks for entry in chunk["logprobs"]["token_logprobs"]]
    assert joined == whole["logprobs"]["token_logprobs"]
    offsets = [entry for chunk in chunks for entry in chunk["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]


def test_prompt_logprobs_as_vllm_spells_them(one: Server) -> None:
    choice = one.complete(CONTEXT, max_tokens=1, temperature=0, prompt_logprobs=1)["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert all({"logprob", "rank", "decoded_token"} <= set(entry) for other in others for entry in other.values())


def test_tokenizer_questions(one: Server, offline: LLM) -> None:
    ids = offline.tokenizer.encode(CONTEXT)
    answer = one.post("/tokenize", {"prompt": CONTEXT, "return_token_strs": True}).json()
    assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["max_model_len"] == 1024
    assert "".join(answer["token_strs"]) == BOS + CONTEXT
    assert one.post("/detokenize", {"tokens": ids}).json() == {"prompt": BOS + CONTEXT}
    assert one.post("/detokenize", {"tokens": ids, "skip_special_tokens": True}).json() == {"prompt": CONTEXT}
    messages = [{"role": "user", "content": "hi"}]
    rendered = one.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert rendered == offline.render_chat(messages)
    info = one.get("/tokenizer_info").json()
    assert info["vocab_size"] == 2048 and "<|im_start|>" in info["chat_template"]

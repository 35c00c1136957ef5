"""Sampling parameters and result types: limits, precedence, and the trip through MessagePack."""

from __future__ import annotations

import dataclasses
import logging
import math

import msgspec
import numpy as np
import pytest

from yalis.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, plain_prompt
from yalis.engine.sampling_params import GuidedParams, SamplingParams, log_generation_defaults
from yalis.errors import RequestError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", [1]),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", ["x" * 1025]),
        ("stop", 3),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "ab"),
        ("stop_token_ids", list(range(1025))),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("ignore_eos", 1),
        ("detokenize", "yes"),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", 0),
    ],
)
def test_values_outside_their_limits_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams.from_mapping({name: value})


def test_contradictions_are_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens=5 is above max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_edges_of_the_limits_are_accepted() -> None:
    params = SamplingParams(
        temperature=0, top_p=1e-9, top_k=-1, min_p=1.0, seed=-(2**63), logprobs=0, prompt_logprobs=20, max_tokens=None
    )
    assert params.greedy
    assert not params.has_penalties
    assert SamplingParams(presence_penalty=-2.0).has_penalties
    assert not SamplingParams().greedy


def test_unknown_names_get_the_nearest_known_one() -> None:
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        SamplingParams.from_mapping({"temprature": 1.0})


def test_containers_become_plain_private_ones() -> None:
    stop = ["a", "b"]
    params = SamplingParams(stop=stop, stop_token_ids=[1], logit_bias={"7": 2.0})  # type: ignore[dict-item]
    stop.append("c")
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (1,)
    assert params.logit_bias == {7: 2.0}
    assert SamplingParams(stop="one").stop == ("one",)
    assert SamplingParams.from_mapping({"stop": None}).stop == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9]).check_vocabulary(10)
    with pytest.raises(RequestError, match="logit_bias names token 10"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)
    with pytest.raises(RequestError, match="stop_token_ids names token 10"):
        SamplingParams(stop_token_ids=[10]).check_vocabulary(10)


def test_request_wins_over_generation_config_wins_over_default(caplog: pytest.LogCaptureFixture) -> None:
    config = {"temperature": 0.7, "top_p": 0.9, "top_k": None, "max_new_tokens": 99, "eos_token_id": 3}
    params = SamplingParams.resolve({"temperature": 1.0}, config)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 0.9, 0, 99)
    assert SamplingParams.resolve({}, {}) == SamplingParams()
    with caplog.at_level(logging.INFO, "yalis"):
        logging.getLogger("yalis").propagate = True
        log_generation_defaults(config)
    assert "temperature=0.7, top_p=0.9, max_tokens=99" in caplog.text


def test_params_survive_messagepack() -> None:
    params = SamplingParams(
        n=2, temperature=0.5, stop=["a", "b"], stop_token_ids=[3], logit_bias={5: -1.5}, seed=-7, logprobs=3
    )
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert again == params
    assert isinstance(again.stop, tuple)
    bad = msgspec.msgpack.encode({**dataclasses.asdict(params), "temperature": -1.0})
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        msgspec.msgpack.decode(bad, type=SamplingParams)


def test_numbers_and_texts_of_numpy_become_plain() -> None:
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float64(0.5),
        top_p=np.float32(0.5),
        seed=np.uint8(3),
        stop=[np.str_("a")],
        stop_token_ids=list(np.arange(2)),
        logit_bias={np.int32(5): np.float64(-1.5)},
        logprobs=np.int16(1),
        guided={"regex": np.str_("a+")},
    )
    plain = SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.5,
        seed=3,
        stop=["a"],
        stop_token_ids=[0, 1],
        logit_bias={5: -1.5},
        logprobs=1,
        guided=GuidedParams(regex="a+"),
    )
    assert params == plain
    assert msgspec.msgpack.encode(params) == msgspec.msgpack.encode(plain)
    assert msgspec.msgpack.encode(plain_prompt(np.str_("text"))) == msgspec.msgpack.encode("text")
    with pytest.raises(RequestError, match="temperature"):
        SamplingParams(temperature=np.float64(-1.0))


def test_outputs_survive_messagepack() -> None:
    completion = CompletionOutput(
        0, "hi", [1, 2], -0.5, [{1: Logprob(-0.25, 1, "h")}, {2: Logprob(-0.25, 2)}], "stop", "\n"
    )
    output = RequestOutput(
        "r1",
        None,
        [5],
        [completion],
        True,
        RequestMetrics(1.0, num_output_tokens=2),
        [None, {5: Logprob(-1.0, 9, "x")}],
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=RequestOutput) == output
    assert completion.finished


def test_times_follow_their_definitions() -> None:
    metrics = RequestMetrics(10.0)
    assert metrics.ttft_s is metrics.tpot_s is metrics.e2e_s is metrics.queue_s is None
    metrics = RequestMetrics(10.0, 10.5, 11.0, 13.0, num_output_tokens=5)
    assert (metrics.queue_s, metrics.ttft_s, metrics.e2e_s, metrics.tpot_s) == (0.5, 1.0, 3.0, 0.5)
    assert RequestMetrics(10.0, 10.5, 11.0, 11.0, num_output_tokens=1).tpot_s is None

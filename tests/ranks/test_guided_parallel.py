"""Guided decoding over several real ranks: the tokens of one process, and no rank that strays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.checkpoints import DEMO
from tests.support.joined import generated
from yalis import LLM, GuidedParams, SamplingParams

PROMPT = "This program is free software"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 15}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
GUIDES: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"regex": r"[a-z]{3,20}-\d{2,4}"},
    {"choice": ["yes", "no", "perhaps \u00e9"]},
    {"grammar": 'start: "<" /[a-c]+/ ("," /[d-f]+/)* ">"'},
]
# The last one asks for log-probabilities too, which travel with the tokens between stages.
REQUESTS = [
    SamplingParams(guided=GuidedParams(**fields), temperature=1.5, top_p=top_p, seed=i, n=2, max_tokens=40, logprobs=k)
    for i, fields in enumerate(GUIDES)
    for top_p, k in ((1.0, None), (0.9, 2))
]
REQUESTS += [SamplingParams(guided=GuidedParams(regex="(a{1000}){1000}"), temperature=0.0, max_tokens=9)]
REQUESTS += [SamplingParams(guided=GuidedParams(regex="("), max_tokens=9)]
REQUESTS += [SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True)]


OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "distributed_timeout_s": 20.0}
PROMPTS = [PROMPT] * len(REQUESTS)


def run(*, joined: bool = False, **options: Any) -> list[tuple[bool, list[tuple[list[int], str | None, str]]]]:
    """``joined``: in ranks of the test's own; else `LLM` starts them."""
    if joined:
        outputs, _, stats = generated(DEMO, PROMPTS, REQUESTS, OPTIONS | options)
    else:
        with LLM(str(DEMO), **OPTIONS, **options) as llm:
            outputs = llm.generate(PROMPTS, REQUESTS)
            stats = llm.stats()
    assert (stats.kv_usage, stats.num_running, stats.num_waiting) == (0, 0, 0)
    return [
        (output.error is not None, [(s.token_ids, s.finish_reason, s.text) for s in output.outputs])
        for output in outputs
    ]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    found = run()
    assert [failed for failed, _ in found] == [False] * (len(REQUESTS) - 2) + [True, False]
    assert [reason for _, reason, _ in found[-3][1]] == ["error"]
    assert all(reason == "stop" for _, samples in found[4:6] for _, reason, _ in samples)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 4, "ranks_per_node": 2, "joined": True},
        {"pipeline_parallel_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 8, "joined": True},
        {"tensor_parallel_size": 2, "overlap_scheduling": True, "block_size": 4, "num_kv_blocks": 80},
    ],
    ids=["tp4", "pp2-chunked", "tp2-overlap-scarce"],
)
def test_the_same_tokens_on_every_layout(expected: list[Any], options: dict[str, Any]) -> None:
    assert run(**options) == expected

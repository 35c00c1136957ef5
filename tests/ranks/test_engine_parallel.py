"""`LLM` over several real processes: what one process and transformers give, whatever the layout of the ranks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.checkpoints import cached_checkpoints
from tests.support.joined import generated
from tests.support.ranks import ROOT
from tests.support.reference import CHECKPOINT, ENGINE, VOCAB, Reference, check_logprobs, token_ids
from yalis import LLM, SamplingParams
from yalis.engine.outputs import RequestOutput
from yalis.errors import ConfigError

NUM_TOKENS = 10
# Many blocks, one token, a few, and one that shares its first blocks with the first.
PROMPTS = [token_ids(70, 3), token_ids(1, 0), token_ids(21, 1)]
PROMPTS.append(PROMPTS[0][:50] + token_ids(9, 4))
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SCORED = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=3)
# The longest prompt with its output fills nearly all blocks; at first the next two fit beside it.
SCARCE = {"num_kv_blocks": 25, "block_size": 4}
UNCHUNKED = {"enable_chunked_prefill": False, "max_model_len": 128, "max_num_batched_tokens": 128}
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 6}

SEEDED_PROMPT = token_ids(21, 73)
FILTERED = dict(temperature=0.8, top_p=0.9, top_k=50, min_p=0.1)
PENALTIES = dict(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.3, logit_bias={5: 0.5})
SEEDED = [
    SamplingParams(seed=1234, max_tokens=12, ignore_eos=True, **changes)
    for changes in (
        dict(temperature=0.8),
        dict(temperature=0.8, top_p=0.4),
        {**FILTERED, **PENALTIES},
        {**FILTERED, **PENALTIES, "n": 3},
        dict(temperature=0.0, repetition_penalty=1.6, min_tokens=4, logit_bias={7: 1.0}),
    )
]
NEIGHBOURS = [
    (token_ids(3, 20), GREEDY),
    (token_ids(40, 21), SamplingParams(temperature=1.0, max_tokens=9)),
    (token_ids(9, 23), SamplingParams(temperature=0.9, top_p=0.8, max_tokens=14)),
]

# name -> (checkpoint, its changes, options of the engine). Together: every architecture, TP 1, 2 and 4, PP 1 to 3, both
# attention backends, every all-reduce, KV heads split and copied, chunked prefill or not, prefixes reused or not,
# blocks scarce, one step ahead.
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tp2-rd-chunked": (
        "qwen2",
        {"max_shard_size": "200KB"},
        {"tensor_parallel_size": 2, "all_reduce": "rd", "attention_backend": "native", **CHUNKED},
    ),
    "tp2-torch-overlap-scarce": (
        "llama3",
        {},
        {"tensor_parallel_size": 2, "all_reduce": "torch", "overlap_scheduling": True, **SCARCE},
    ),
    "tp4-shm-unchunked": (
        "qwen3",
        {},
        {"tensor_parallel_size": 4, "all_reduce": "shm", "enable_prefix_caching": False, **UNCHUNKED},
    ),
    "pp2-chunked-scarce": (
        "mistral",
        {},
        {"pipeline_parallel_size": 2, "attention_backend": "sdpa", **CHUNKED, **SCARCE},
    ),
    "pp3-tied": ("llama-tied", {"max_shard_size": "200KB"}, {"pipeline_parallel_size": 3}),
    "tp2-pp2-two-nodes": (
        "llama-bias",
        {},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "ranks_per_node": 2, **CHUNKED},
    ),
    "tp4-two-nodes": ("llama-mha", {}, {"tensor_parallel_size": 4, "ranks_per_node": 2, "all_reduce": "auto"}),
}


class Models:
    """Checkpoints, their references, and what one process draws from them; each made once."""

    def __init__(self, root: Path):
        self._checkpoint = cached_checkpoints(root)
        self._references: dict[Path, Reference] = {}

    def folder(self, variant: str, **changes: Any) -> Path:
        return self._checkpoint(variant, **CHECKPOINT, **changes)

    def reference(self, folder: Path) -> Reference:
        if folder not in self._references:
            self._references[folder] = Reference(folder)
        return self._references[folder]

    def drawn_alone(self, folder: Path) -> list[list[list[int]]]:
        """Samples of each request of `SEEDED`, each alone in an engine of one process."""
        with LLM(str(folder), **ENGINE) as llm:
            return [samples(llm.generate([SEEDED_PROMPT], params)[0]) for params in SEEDED]


def samples(output: RequestOutput) -> list[list[int]]:
    assert output.error is None
    return [s.token_ids for s in output.outputs]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llm(models: Models, layout: str) -> Iterator[LLM]:
    """One engine per layout; it serves every test of this file."""
    variant, changes, options = LAYOUTS[layout]
    with LLM(str(models.folder(variant, **changes)), **{**ENGINE, "distributed_timeout_s": 20.0, **options}) as made:
        yield made


@pytest.fixture(scope="module")
def reference(models: Models, layout: str) -> Reference:
    variant, changes, _ = LAYOUTS[layout]
    return models.reference(models.folder(variant, **changes))


def test_greedy_and_logprobs(llm: LLM, reference: Reference) -> None:
    """In float32: transformers' tokens and log-probabilities; the same tokens again with reused prefixes."""
    config = llm.config
    expected = [reference.greedy(p, NUM_TOKENS, eos_token_id=None) for p in PROMPTS]
    outputs = llm.generate(PROMPTS, SCORED)
    assert [samples(o) for o in outputs] == [[e] for e in expected]
    for output in outputs:
        check_logprobs(output, reference, k=5, prompt_k=3)
    again = llm.generate(PROMPTS, GREEDY)
    assert [samples(o) for o in again] == [[e] for e in expected]
    cached = [o.metrics.num_cached_tokens for o in again]
    if not config.enable_prefix_caching:
        assert cached == [0] * len(PROMPTS)
    elif config.num_kv_blocks is None:
        assert cached == [(len(p) - 1) // config.block_size * config.block_size for p in PROMPTS]
    stats = llm.stats()
    assert stats.kv_usage == 0
    assert (stats.num_preemptions > 0) == (config.num_kv_blocks is not None)
    assert max(o.metrics.num_preemptions for o in outputs + again) <= stats.num_preemptions


def test_the_options_were_taken(llm: LLM) -> None:
    config, info = llm.config, llm.info
    assert info["tensor_parallel_size"] == config.tensor_parallel_size
    assert info["pipeline_parallel_size"] == config.pipeline_parallel_size
    assert info["num_nodes"] == config.world_size // (config.ranks_per_node or config.world_size)
    if config.attention_backend != "auto":
        assert info["attention_backend"] == config.attention_backend
    if config.num_kv_blocks is not None:
        assert info["num_kv_blocks"] == config.num_kv_blocks


def test_a_seed_gives_the_same_tokens(llm: LLM, models: Models, layout: str) -> None:
    """Alone in one process, and here: alone, and among others."""
    variant, changes, _ = LAYOUTS[layout]
    expected = models.drawn_alone(models.folder(variant, **changes))
    assert len({tuple(s) for s in expected[3]}) == 3 and expected[3][0] == expected[2][0]
    assert [samples(llm.generate([SEEDED_PROMPT], params)[0]) for params in SEEDED] == expected
    batch = [NEIGHBOURS[0], *((SEEDED_PROMPT, params) for params in SEEDED), *NEIGHBOURS[1:]]
    before = llm.stats().num_preemptions
    outputs = llm.generate([p for p, _ in batch], [params for _, params in batch])
    assert (llm.stats().num_preemptions > before) == (llm.config.num_kv_blocks is not None)
    assert [samples(o) for o in outputs[1 : 1 + len(SEEDED)]] == expected


def test_an_impossible_request_fails_alone(llm: LLM, reference: Reference) -> None:
    limit = int(llm.info["max_model_len"])
    impossible: list[Any] = [[], token_ids(limit, 30), [5, VOCAB], [-1], [2**70], [5, "a"], None, "half a \ud83d"]
    outputs = llm.generate([PROMPTS[2], *impossible, PROMPTS[1]], GREEDY)
    messages = ["the prompt is empty", f"the limit is {limit - 1}", f"prompt token {VOCAB}", "prompt token -1"]
    messages += [f"prompt token {2**70}", "must be text or a list of token ids", "must be text or", "no valid text"]
    for output, message in zip(outputs[1:-1], messages, strict=True):
        assert output.finished and message in (output.error or "")
        assert [s.finish_reason for s in output.outputs] == ["error"]
    expected = [reference.greedy(p, NUM_TOKENS, eos_token_id=None) for p in (PROMPTS[2], PROMPTS[1])]
    assert [samples(outputs[0]), samples(outputs[-1])] == [[e] for e in expected]
    assert llm.stats().kv_usage == 0


def test_values_of_numpy_are_taken_on_every_layout(llm: LLM) -> None:
    params = SamplingParams(temperature=np.float64(0.5), seed=np.int64(7), max_tokens=np.int32(4), ignore_eos=True)
    [found] = llm.generate([np.array(PROMPTS[0])], params)
    [plain] = llm.generate([PROMPTS[0]], SamplingParams(temperature=0.5, seed=7, max_tokens=4, ignore_eos=True))
    assert found.outputs[0].token_ids == plain.outputs[0].token_ids
    with pytest.raises(ConfigError, match="must be SamplingParams"):
        llm.generate([PROMPTS[0]], [{"temperature": 0.0}])


def test_stream_and_leaving_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    [whole] = llm.generate("Free software", params)
    states = list(llm.stream("Free software", params))
    assert len(states) > 1 and states[-1].outputs == whole.outputs
    texts = [s.outputs[0].text for s in states]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    for state in llm.stream("Free software", SamplingParams(n=2, temperature=0.0, max_tokens=70, ignore_eos=True)):
        assert not state.finished
        break
    stats = llm.stats()
    assert (stats.kv_usage, stats.num_running, stats.num_waiting) == (0, 0, 0)
    # A stop text is found on rank 0 while later steps may be under way.
    stop = whole.outputs[0].text[9:12]
    [stopped] = llm.generate(
        "Free software", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=stop)
    )
    assert stopped.outputs[0].text == whole.outputs[0].text[: whole.outputs[0].text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    stats = llm.stats()
    assert (stats.kv_usage, stats.num_running) == (0, 0)


def test_two_streams_at_once(llm: LLM) -> None:
    expected = [samples(o)[0] for o in llm.generate(PROMPTS[1:3], GREEDY)]
    first, second = llm.stream(PROMPTS[1], GREEDY), llm.stream(PROMPTS[2], GREEDY)
    states = [next(first), next(second), *first, *second]
    assert [s.outputs[0].token_ids for s in states if s.finished] == expected


@pytest.mark.parametrize(
    ("variant", "dtype", "options"),
    [
        ("qwen3-bias", torch.bfloat16, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, **CHUNKED}),
        ("qwen2", torch.bfloat16, {"tensor_parallel_size": 4}),
        ("mistral-window", torch.bfloat16, {"pipeline_parallel_size": 3, **UNCHUNKED}),
        ("llama3", torch.bfloat16, {"tensor_parallel_size": 2, **SCARCE}),
        ("llama-bias", torch.float16, {"tensor_parallel_size": 2}),
    ],
    ids=["tp2-pp2", "tp4", "pp3-window", "tp2-scarce", "tp2-float16"],
)
def test_logprobs_in_16_bits(models: Models, variant: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Each rank rounds its partial sums: within the tolerance for the same tokens, over ranks and stages."""
    folder = models.folder(variant, dtype=dtype)
    outputs, info, stats = generated(folder, PROMPTS, SCORED, {**ENGINE, **options})
    assert info["dtype"] == str(dtype).removeprefix("torch.")
    assert (stats.num_preemptions > 0) == ("num_kv_blocks" in options)
    reference = Reference(folder, dtype)
    for output in outputs:
        assert len(output.outputs[0].token_ids) == NUM_TOKENS
        check_logprobs(output, reference, k=5, prompt_k=3)


# ---- under a launcher -------------------------------------------------------------------------------------------

_SCRIPT = """
import json, os, sys
from yalis import LLM, SamplingParams

model, options, prompts, folder = json.loads(sys.argv[1])
with LLM(model, **options) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=1)
    results = [llm.generate(prompts, params), llm.generate([[], prompts[0]], params)]
    results.append(list(llm.stream(prompts[0], params))[-1:])
    for state in llm.stream(prompts[0], params):
        break
    results.append(llm.generate(prompts[1:], SamplingParams(temperature=0.8, seed=3, n=2, stop="e")))
    found = {
        "root": llm.is_root,
        "errors": [[o.error for o in outputs] for outputs in results],
        "tokens": [[[s.token_ids for s in o.outputs] for o in outputs] for outputs in results],
        "texts": [[[s.text for s in o.outputs] for o in outputs] for outputs in results],
        "logprobs": [[s.cumulative_logprob for s in o.outputs] for o in results[0]],
        "usage": llm.stats().kv_usage if llm.is_root else 0,
    }
with open(os.path.join(folder, os.environ["RANK"]), "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp2", "pp2"])
def test_under_torchrun_every_rank_returns_the_same(models: Models, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = models.folder("llama")
    reference = models.reference(folder)
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    (tmp_path / "found").mkdir()
    call = json.dumps([str(folder), {**ENGINE, **options}, PROMPTS, str(tmp_path / "found")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), call],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / "found" / str(rank)).read_text()) for rank in range(2))
    assert (first.pop("root"), second.pop("root")) == (True, False)
    assert first == second
    expected = [[reference.greedy(p, NUM_TOKENS, eos_token_id=None)] for p in PROMPTS]
    assert first["tokens"][0] == expected
    assert first["tokens"][1] == [[[]], expected[0]] and "the prompt is empty" in first["errors"][1][0]
    assert first["tokens"][2] == [expected[0]]
    assert [len(o) for o in first["tokens"][3]] == [2] * (len(PROMPTS) - 1)
    assert first["usage"] == 0

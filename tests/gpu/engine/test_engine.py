"""The engine on GPUs: transformers' tokens and log-probabilities, whatever the backend, the graphs and the schedule.

    python -m pytest -m gpu tests/gpu/engine

Cases of two ranks need two GPUs and are skipped, with the reason shown, where there is one.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import DEMO, cached_checkpoints
from tests.support.reference import CHECKPOINT, Reference, check_logprobs, token_ids
from yalis import LLM, SamplingParams
from yalis.bench.breakdown import PARTS, break_down, read_trace
from yalis.config import EngineConfig
from yalis.engine.handle import LocalEngine
from yalis.engine.outputs import RequestOutput
from yalis.engine.start import start_rank
from yalis.errors import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def two_gpus(test: Any) -> Any:
    """Skips without a second GPU; ranks that wait for each other on the device must not share it with other tests."""
    return pytest.mark.alone(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")(test))


NUM_TOKENS = 24
PROMPTS = [token_ids(70, 3), token_ids(1, 0), token_ids(21, 1)]
PROMPTS.append(PROMPTS[0][:50] + token_ids(9, 4))
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
SCORED = SamplingParams(
    temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=5, prompt_logprobs=3
)
MIXED = [
    SamplingParams(seed=number, max_tokens=20, ignore_eos=True, detokenize=False, **changes)
    for number, changes in enumerate(
        (
            dict(temperature=0.8),
            dict(temperature=1.3),
            dict(temperature=0.0),
            dict(temperature=0.8, top_p=0.6),
            dict(temperature=0.9, top_k=20, min_p=0.05, repetition_penalty=1.2, presence_penalty=0.3),
            dict(temperature=0.0, repetition_penalty=1.5, min_tokens=4, logit_bias={7: 1.0}),
        )
    )
]
SCARCE = {"num_kv_blocks": 30, "block_size": 4, "max_num_seqs": 4}
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
FLASHINFER = pytest.param(
    "flashinfer",
    marks=pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer is not installed"),
)
BACKENDS = ["sdpa", "triton", FLASHINFER]
WIDE_HEADS = {"head_dim": 64}  # the least that FlashInfer serves


class Models:
    """Checkpoints and references, each made once."""

    def __init__(self, root: Path):
        self.checkpoint = cached_checkpoints(root)
        self._references: dict[Any, Reference] = {}

    def folder(self, variant: str, **changes: Any) -> Path:
        return self.checkpoint(variant, **CHECKPOINT, **changes)

    def reference(self, folder: Path, dtype: torch.dtype = torch.float32) -> Reference:
        key = (folder, dtype)
        if key not in self._references:
            self._references[key] = Reference(folder, dtype, "cuda")
        return self._references[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("checkpoints"))


def engine(folder: Path, **options: Any) -> LLM:
    # Tests run side by side: each takes what it needs, not a share of what is free.
    given = {"tokenizer": str(DEMO), "device": "cuda", "max_num_seqs": 12, "kv_cache_memory_bytes": 1 << 27, **options}
    return LLM(str(folder), **given)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    assert all(o.error is None for o in outputs), [o.error for o in outputs]
    return [o.outputs[0].token_ids for o in outputs]


# ---- against transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama", {"attention_backend": "sdpa"}),
        ("llama", {"attention_backend": "triton"}),
        ("llama", {"attention_backend": "triton", "enforce_eager": True}),
        ("llama3", {"attention_backend": "triton", **CHUNKED}),
        ("llama3", {"attention_backend": "triton", **CHUNKED, "max_cudagraph_prefill": 0}),
        ("qwen3", {"attention_backend": "triton", **CHUNKED, "max_num_seqs": 3}),  # prompts beside decodes
        ("mistral-window", {"attention_backend": "triton", "enable_prefix_caching": False}),
        ("qwen3", {"attention_backend": "triton", **SCARCE}),
        ("qwen2", {"attention_backend": "triton", "overlap_scheduling": False}),
        ("llama-bias", {"attention_backend": "sdpa", **CHUNKED}),
    ],
)
def test_float32_tokens_and_logprobs(models: Models, variant: str, options: dict[str, Any]) -> None:
    folder = models.folder(variant)
    reference = models.reference(folder)
    expected = [reference.greedy(p, NUM_TOKENS, eos_token_id=None) for p in PROMPTS]
    with engine(folder, dtype="float32", **options) as llm:
        scored = llm.generate(PROMPTS, SCORED)
        plain = llm.generate(PROMPTS, GREEDY)
        times = llm.stats().times
        captured = llm.info["cuda_graphs"]
        assert llm.stats().kv_usage == 0
        assert (llm.stats().num_preemptions > 0) == ("num_kv_blocks" in options)
    assert bool(captured) == (options["attention_backend"] == "triton" and "enforce_eager" not in options)
    assert (times.decode_steps > 0) == bool(captured)
    padded = bool(captured) and options.get("max_cudagraph_prefill") != 0
    assert (times.padded_steps > 0) == padded
    assert tokens_of(scored) == tokens_of(plain) == expected
    for output in scored:
        check_logprobs(output, reference, k=5, prompt_k=3)
    if options.get("enable_prefix_caching", True) and "num_kv_blocks" not in options:  # scarce blocks are recycled
        assert plain[0].metrics.num_cached_tokens > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_logprobs(models: Models, backend: str) -> None:
    """Given the same tokens, the log-probabilities of transformers on the same device."""
    folder = models.folder("llama", **WIDE_HEADS)
    reference = models.reference(folder, torch.bfloat16)
    with engine(folder, dtype="bfloat16", attention_backend=backend) as llm:
        assert bool(llm.info["cuda_graphs"]) == (backend != "sdpa")
        for output in llm.generate(PROMPTS, SCORED):
            check_logprobs(output, reference, k=5, prompt_k=3)


@pytest.mark.parametrize("backend", [FLASHINFER])
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama", {}),
        ("llama", {"enforce_eager": True}),
        ("llama", {"overlap_scheduling": False}),
        ("llama", {**CHUNKED, "max_cudagraph_batch": 2}),  # decode steps of three and four are not captured
        ("llama", SCARCE),
        ("mistral-window", {"enable_prefix_caching": False}),
        ("llama-mha", {}),  # no group: its kernels without matrix units
    ],
    ids=str,
)
def test_flashinfer_schedules(models: Models, backend: str, variant: str, options: dict[str, Any]) -> None:
    """Plans made one step ahead, renewed before each replay, with sequences that grow, come, go and are preempted.

    Batches of one to eight, and sequences across many pages: a stale plan would read the wrong keys.
    """
    folder = models.folder(variant, **WIDE_HEADS)
    reference = models.reference(folder, torch.bfloat16)
    prompts = [token_ids(1 + 19 * i % 83, i) for i in range(8)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=8 + 9 * i % 31, ignore_eos=True, detokenize=False, logprobs=5)
        for i in range(8)
    ]
    with engine(folder, dtype="bfloat16", attention_backend=backend, **{"block_size": 4, **options}) as llm:
        assert bool(llm.info["cuda_graphs"]) == ("enforce_eager" not in options)
        for output in llm.generate(prompts, params):
            check_logprobs(output, reference, k=5, prompt_k=None)
        stats = llm.stats()
        assert (stats.num_preemptions > 0) == ("num_kv_blocks" in options)
        assert (stats.times.decode_steps > 0) == ("enforce_eager" not in options)
        assert stats.kv_usage == 0


# ---- graphs, schedules and sampling change no token ---------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_outputs(models: Models) -> list[list[int]]:
    """Seeded and greedy requests in float32 on the CPU."""
    with LLM(str(models.folder("llama")), tokenizer=str(DEMO), device="cpu", dtype="float32", cpu_threads=2) as llm:
        return tokens_of(llm.generate([PROMPTS[i % 4] for i in range(len(MIXED))], MIXED))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"overlap_scheduling": False},
        {"max_cudagraph_batch": 4},
        {"max_cudagraph_batch": 4, "max_cudagraph_prefill": 0},
        {"max_cudagraph_prefill": 48},
        {**SCARCE},
        {**CHUNKED},
        {"attention_backend": "sdpa"},
    ],
    ids=str,
)
def test_seeded_sampling_equals_the_cpus(models: Models, cpu_outputs: list[list[int]], options: dict[str, Any]) -> None:
    with engine(models.folder("llama"), dtype="float32", **options) as llm:
        outputs = llm.generate([PROMPTS[i % 4] for i in range(len(MIXED))], MIXED)
        alone = [llm.generate([PROMPTS[i % 4]], [params])[0] for i, params in enumerate(MIXED[:3])]
    assert tokens_of(outputs) == cpu_outputs
    assert tokens_of(alone) == cpu_outputs[:3]


def test_a_decode_step_of_plain_requests_never_leaves_the_graph(models: Models) -> None:
    with engine(models.folder("llama"), dtype="bfloat16") as llm:
        llm.generate(PROMPTS, [GREEDY, MIXED[0], MIXED[1], GREEDY])
        assert llm.stats().times.sampled_apart == 0
        decode_steps = llm.stats().times.decode_steps
        llm.generate(PROMPTS[:1], MIXED[3])
        times = llm.stats().times
    assert decode_steps >= 19
    assert times.sampled_apart == times.decode_steps - decode_steps > 0


def test_thousands_of_requests_with_aborts_leave_no_block_behind() -> None:
    """2,000 requests of mixed lengths, a third of them aborted at a random moment, over few blocks."""
    config = EngineConfig(
        str(DEMO), device="cuda", max_model_len=512, max_num_seqs=48, num_kv_blocks=300, max_num_batched_tokens=512
    )
    rank = start_rank(config)
    local = LocalEngine(rank)
    rng = random.Random(11)
    waiting = [str(number) for number in range(2000)]
    running: set[str] = set()
    ended = {"length": 0, "stop": 0, "abort": 0}
    while waiting or running:
        while waiting and len(running) < 96:
            name = waiting.pop()
            prompt = [rng.randrange(1, 2000) for _ in range(rng.randrange(1, 200))]
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.7]), max_tokens=rng.randrange(1, 100), detokenize=False
            )
            local.submit(name, prompt, params, stream=False)
            running.add(name)
        if rng.random() < 0.5 and ended["abort"] < 700:
            local.abort([rng.choice(sorted(running))])
        for output in local.poll():
            assert output.error is None
            running.discard(output.request_id)
            ended[output.outputs[0].finish_reason or ""] += 1
    while local.engine.has_unfinished_requests:
        local.poll()
    local.settle()
    stats = local.stats()
    local.close()
    assert sum(ended.values()) == 2000
    assert ended["abort"] >= 300, ended
    assert stats.kv_usage == 0 and stats.num_running == stats.num_waiting == 0
    assert rank.core.blocks.pool.num_free == 300
    assert stats.num_preemptions > 0 and stats.times.decode_steps > 0


# ---- memory, refusals, measurement --------------------------------------------------------------------------------


@pytest.mark.alone
def test_the_kv_cache_takes_the_share_it_may() -> None:
    shape = str(DEMO.parents[1] / "bench" / "shapes" / "llama-254m")
    options: dict[str, Any] = {"load_format": "dummy", "device": "cuda", "max_num_seqs": 2048, "max_model_len": 4096}
    sizes = []
    for share in (0.2, 0.3):
        torch.cuda.empty_cache()
        with LLM(shape, gpu_memory_utilization=share, max_num_batched_tokens=4096, **options) as llm:
            sizes.append(int(llm.info["num_kv_blocks"]))
            free, total = torch.cuda.mem_get_info()
            # More may be free than is asked for: what sampling apart will take is not taken yet.
            assert -0.03 < free / total - (1.0 - share) < 0.08
            [output] = llm.generate([list(range(3000))], GREEDY)
            assert len(output.outputs[0].token_ids) == NUM_TOKENS
            del output
            rules = SamplingParams(
                temperature=1.0, top_p=0.99, repetition_penalty=1.1, logprobs=5, max_tokens=3, detokenize=False
            )
            tokens_of(llm.generate([[5, 6, 7]] * 2048, rules))
            free, total = torch.cuda.mem_get_info()
            assert free / total > 1.0 - share - 0.03
    assert sizes[1] > 1.2 * sizes[0]


def test_a_backend_that_cannot_be_captured(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="max_cudagraph_batch=8.*sdpa.*leave it out"):
        engine(models.folder("llama"), attention_backend="sdpa", max_cudagraph_batch=8)
    with pytest.raises(ConfigError, match="max_cudagraph_prefill=8.*sdpa.*leave it out"):
        engine(models.folder("llama"), attention_backend="sdpa", max_cudagraph_prefill=8)
    with engine(models.folder("llama"), attention_backend="sdpa") as llm:
        assert llm.info["cuda_graphs"] == llm.info["prefill_cuda_graphs"] == ""


@pytest.mark.alone
def test_a_trace_of_decode_steps_sums_up(tmp_path: Path) -> None:
    shape = str(DEMO.parents[1] / "bench" / "shapes" / "llama-254m")
    with LLM(shape, load_format="dummy", device="cuda", max_num_seqs=8, gpu_memory_utilization=0.3) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
        llm.generate([[5, 6, 7]] * 8, params)
        llm.start_profile(tmp_path)
        llm.generate([[5, 6, 7]] * 8, params)
        trace = Path(llm.stop_profile())
    found = break_down(read_trace(trace).events)
    assert found.on_device and found.steps >= 30
    assert set(found.parts_us) == set(PARTS)
    assert sum(found.parts_us.values()) == pytest.approx(found.step_us, rel=0.03)
    assert found.parts_us["GEMM"] > 0 and found.parts_us["attention"] > 0 and found.parts_us["other"] > 0
    assert found.parts_us["all-reduce"] == 0


def test_symmetric_memory_in_a_group_of_one() -> None:
    """torch's own kernels, one-shot, two-shot and in pieces; sums over several ranks need several GPUs."""
    from torch.distributed import HashStore

    from yalis.comm.algorithms.symm_mem import SymmMem
    from yalis.comm.group import Group
    from yalis.comm.resources import Resources
    from yalis.comm.stats import CommStats
    from yalis.comm.topology import Topology

    group = Group(Topology(), [0], torch.device("cuda", 0), 30.0)
    group.store = HashStore()
    algorithm = SymmMem(group, Resources(), CommStats())
    for count in (8, 4096, 12345, 1 << 20, 9 << 20):
        x = torch.randn(count, device="cuda", dtype=torch.bfloat16)
        out = torch.full_like(x, torch.nan)
        algorithm.all_reduce(x, out)
        assert torch.equal(out, x)


# ---- two GPUs -----------------------------------------------------------------------------------------------------


TP, PP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


@two_gpus
@pytest.mark.parametrize(
    "options",
    [
        {**TP, "all_reduce": "nccl"},
        {**TP, "all_reduce": "symm_mem"},
        {**TP, "all_reduce": "two_shot"},
        {**TP, "all_reduce": "nvrar"},
        {**TP, "all_reduce": "nvrar", "ranks_per_node": 1},
        {**TP, "all_reduce": "nvrar", "enforce_eager": True},
        {**TP, "all_reduce": "nvrar", **SCARCE},
        {**TP, "all_reduce": "nvrar", **CHUNKED},
        {**TP, "all_reduce": "nvrar", "max_cudagraph_prefill": 0},
        {**TP, "all_reduce": "nccl", "enforce_eager": True},
        {**TP, "attention_backend": "sdpa"},
        PP,
        {**PP, "enforce_eager": True},
        {**PP, **SCARCE},
        {**PP, **CHUNKED},
    ],
    ids=str,
)
def test_two_ranks(models: Models, cpu_outputs: list[list[int]], options: dict[str, Any]) -> None:
    folder = models.folder("llama")
    reference = models.reference(folder)
    expected = [reference.greedy(p, NUM_TOKENS, eos_token_id=None) for p in PROMPTS]
    captured = "enforce_eager" not in options and "attention_backend" not in options
    scarce = "num_kv_blocks" in options
    with engine(folder, dtype="float32", **options) as llm:
        assert bool(llm.info["cuda_graphs"]) == captured
        # First what a graph can hold: with TP, tokens come from both shards of the vocabulary inside of it.
        plain = llm.generate(PROMPTS, GREEDY)
        again = llm.generate(PROMPTS, GREEDY)
        drawn = [llm.generate([PROMPTS[i % 4]], [params])[0] for i, params in enumerate(MIXED[:3])]
        times = llm.stats().times
        assert times.sampled_apart == 0 and (times.decode_steps > 0) == captured
        assert (times.padded_steps > 0) == (captured and options.get("max_cudagraph_prefill") != 0)
        scored = llm.generate(PROMPTS, SCORED)
        mixed = llm.generate([PROMPTS[i % 4] for i in range(len(MIXED))], MIXED)
        assert llm.stats().kv_usage == 0
        assert (llm.stats().num_preemptions > 0) == scarce
    assert tokens_of(plain) == tokens_of(again) == tokens_of(scored) == expected
    assert tokens_of(drawn) == cpu_outputs[:3]
    assert tokens_of(mixed) == cpu_outputs
    for output in scored:
        check_logprobs(output, reference, k=5, prompt_k=3)
    if not scarce:  # scarce blocks are recycled
        assert again[0].metrics.num_cached_tokens > 0


@two_gpus
@pytest.mark.parametrize("options", [{**TP, "all_reduce": "nvrar"}, {**TP, "all_reduce": "symm_mem"}, PP], ids=str)
def test_two_ranks_bfloat16_logprobs(models: Models, options: dict[str, Any]) -> None:
    folder = models.folder("llama")
    reference = models.reference(folder, torch.bfloat16)
    with engine(folder, dtype="bfloat16", **options) as llm:
        for output in llm.generate(PROMPTS, SCORED):
            check_logprobs(output, reference, k=5, prompt_k=3)

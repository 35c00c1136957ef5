"""Names and values that dashboards look for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from yalis.config import EngineConfig
from yalis.engine.messages import AllReduceStats, CollectiveStats, EngineStats, RankState, Status, StepTimes
from yalis.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.server.frontend import Frontend
from yalis.server.openapi import openapi
from yalis.server.options import ServerOptions

LIST = (Path(__file__).parent / "vllm_metrics.txt").read_text().splitlines()
VLLM = [name for name in LIST if name and not name.startswith("#")]


class FakeClient:
    """Only what the metrics read."""

    failure = None
    info: ClassVar[dict[str, Any]] = {"block_size": 16, "num_kv_blocks": 512, "dtype": "bfloat16"}
    status_age_s = 0.5
    status = Status(
        ranks=[RankState(0, "n0", 1, "idle", 5, 0.0), RankState(1, "n1", 2, "lost", 5, 1.0)],
        verdict="",
        turn_age_s=0.0,
        stats=EngineStats(StepTimes(steps=7, compute_s=1.5), 2, 100, 40, 0.25, 3, 4),
        step_tokens=[],
        collectives=[CollectiveStats("tp", "intra", "shm", 2.0, 10, 4096)],
        all_reduces=[AllReduceStats("tp", "shm", 10, 4096)],
        waited_s={"tp": 0.75},
    )


def samples(frontend: Frontend) -> dict[str, float]:
    lines = frontend.metrics.render().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_names_and_values() -> None:
    client: Any = FakeClient()
    frontend = Frontend(ServerOptions(served_model_names=("demo",)), EngineConfig("m"), {})
    frontend.client = client
    frontend.enter("ready")
    frontend.metrics.steps([10, 20])
    frontend.metrics.first_token(0.1, 12)
    times = RequestMetrics(1.0, first_scheduled_s=1.1, first_token_s=1.2, finished_s=2.2, num_output_tokens=6)
    done = RequestOutput("0", None, [], [CompletionOutput(0, finish_reason="stop")], True, times)
    frontend.metrics.finished(done, SamplingParams(n=2, max_tokens=6), 12, 1.0, 2.2)
    frontend.metrics.gaps([0.1, 0.3])
    frontend.metrics.http("/v1/completions", "POST", 429)
    found = samples(frontend)
    names = {name.partition("{")[0] for name in found}
    assert len(VLLM) > 40 and [name for name in VLLM if name not in names] == []
    label = '{engine="0",model_name="demo"}'
    assert found[f"vllm:num_requests_running{label}"] == 3 and found[f"vllm:num_requests_waiting{label}"] == 4
    assert found[f"vllm:kv_cache_usage_perc{label}"] == 0.25
    assert found[f"vllm:prefix_cache_hits_total{label}"] == 40
    assert found[f"vllm:iteration_tokens_total_sum{label}"] == 30
    assert found[f"vllm:e2e_request_latency_seconds_sum{label}"] == 1.2000000000000002
    assert found[f"vllm:inter_token_latency_seconds_count{label}"] == 2
    assert found[f"vllm:inter_token_latency_seconds_sum{label}"] == 0.4
    assert found[f"vllm:request_params_n_sum{label}"] == 2
    assert found[f"vllm:request_params_max_tokens_sum{label}"] == 6
    assert found[f"vllm:request_max_num_generation_tokens_sum{label}"] == 6
    [cache] = [name for name in found if name.startswith("vllm:cache_config_info")]
    assert 'block_size="16"' in cache and 'num_gpu_blocks="512"' in cache and found[cache] == 1
    assert found['http_requests_total{handler="/v1/completions",method="POST",status="4xx"}'] == 1
    assert round(found[f"vllm:time_per_output_token_seconds_sum{label}"], 6) == 0.2
    assert found['vllm:request_success_total{engine="0",finished_reason="stop",model_name="demo"}'] == 1
    collective = '{algorithm="shm",engine="0",group="tp",model_name="demo",tier="intra"}'
    assert found[f"yalis:collective_seconds_total{collective}"] == 2.0
    assert found[f"yalis:collective_bytes_total{collective}"] == 4096
    assert found['yalis:all_reduces_total{algorithm="shm",engine="0",group="tp",model_name="demo"}'] == 10
    assert found['yalis:all_reduce_bytes_total{algorithm="shm",engine="0",group="tp",model_name="demo"}'] == 4096
    assert found['yalis:collective_wait_seconds_total{engine="0",group="tp",model_name="demo"}'] == 0.75
    assert found['yalis:rank_up{engine="0",host="n1",model_name="demo",rank="1"}'] == 0
    assert found['yalis:rank_beat_age_seconds{engine="0",host="n1",model_name="demo",rank="1"}'] == 1.5
    assert found[f"yalis:healthy{label}"] == found[f"yalis:ready{label}"] == 1


def test_two_servers_in_one_process_do_not_share_metrics() -> None:
    one, two = (Frontend(ServerOptions(), EngineConfig("m"), {}) for _ in range(2))
    one.metrics.tokens(5)
    name = 'vllm:generation_tokens_total{engine="0",model_name="m"}'
    assert samples(one)[name] == 5 and samples(two)[name] == 0


def test_the_description_names_every_request_field() -> None:
    document = openapi(needs_key=True)
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "max_tokens", "echo", "guided_regex", "logit_bias", "stream_options"} <= set(fields)
    assert document["openapi"].startswith("3.1") and document["security"]

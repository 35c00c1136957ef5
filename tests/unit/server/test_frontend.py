"""Admission, phases and speeds of the API process, without ranks."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest

from yalis.config import EngineConfig
from yalis.engine.async_client import Sink
from yalis.engine.messages import EngineStats, Status, StepTimes
from yalis.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.errors import ConfigError, EngineDeadError
from yalis.server import pace as pace_module
from yalis.server.errors import ApiError
from yalis.server.frontend import Frontend, Generation
from yalis.server.options import ServerOptions, read_api_keys, read_template
from yalis.server.pace import Pace


def frontend(**options: Any) -> Frontend:
    return Frontend(ServerOptions(**options), EngineConfig("model", max_num_seqs=4), {})


def test_admission() -> None:
    one = frontend(max_queued_requests=2)
    one.admit(4)
    one.admit(2)
    with pytest.raises(ApiError) as caught:
        one.admit(1)
    assert caught.value.status == 429 and caught.value.retry_after_s == 1
    one.release(2)
    one.admit(1)
    with pytest.raises(ApiError) as caught:
        one.admit(7)
    assert caught.value.status == 400 and one.num_admitted == 5


def test_retry_after_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    one = frontend(max_queued_requests=0)
    clock = iter([0.0, 5.0, 10.0])
    monkeypatch.setattr("yalis.server.frontend.time.monotonic", lambda: next(clock))
    for _ in range(3):  # one end in 5 s
        one.admit(1)
        one.release(1)
    one.admit(4)
    with pytest.raises(ApiError) as caught:
        one.admit(2)
    assert caught.value.retry_after_s == 10


def test_drained_when_the_last_is_over() -> None:
    async def work() -> None:
        one = frontend()
        await asyncio.wait_for(one.drained(), 1)
        one.admit(2)
        waiting = asyncio.create_task(one.drained())
        await asyncio.sleep(0)
        one.release(2)  # the engine is done, but the answer may still be on its way
        await asyncio.sleep(0)
        assert not waiting.done()
        one.leave()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(work())


class FakeEngine:
    """Takes requests; the test says what comes of them."""

    failure = None
    status = None
    info: ClassVar[dict[str, Any]] = {"vocab_size": 10}

    def __init__(self) -> None:
        self.sinks: dict[str, Sink] = {}
        self.aborted: list[str] = []

    def submit(self, request_id: str, prompt: Any, params: Any, sink: Sink, *, stream: bool) -> None:
        self.sinks[request_id] = sink

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def finish(self, request_id: str) -> None:
        outputs = [CompletionOutput(i, token_ids=[5], finish_reason="length", gaps_s=[0.5, 0.25]) for i in range(2)]
        times = RequestMetrics(0.0, num_output_tokens=3)
        self.sinks[request_id](RequestOutput(request_id, None, [], outputs, True, times))


def test_places_are_free_when_the_engine_is_done_whoever_reads() -> None:
    async def work() -> None:
        one, engine = frontend(max_queued_requests=0), FakeEngine()
        one.client, one.phase = engine, "ready"  # type: ignore[assignment]
        generation = await Generation.start(one, [[1], [2]], SamplingParams(n=2), stream=True)
        assert one.num_admitted == 4
        engine.finish("0")
        assert one.num_admitted == 2
        engine.finish("1")
        assert one.num_admitted == 0
        assert b'vllm:inter_token_latency_seconds_count{engine="0",model_name="model"} 8.0' in one.metrics.render()
        assert [(await generation.next() or [None])[0] for _ in range(3)] == [0, 1, None]
        generation.close()
        generation.close()
        assert one.num_admitted == 0 and engine.aborted == []
        other = await Generation.start(one, [[1], [2]], SamplingParams(n=2), stream=True)
        engine.finish("2")
        other.close()
        assert one.num_admitted == 0 and engine.aborted == ["3"]
        last = await Generation.start(one, [[1], [2]], SamplingParams(n=2), stream=True)
        for name in ("4", "5"):
            engine.sinks[name](EngineDeadError("rank 1 was lost"))
        assert one.num_admitted == 0
        with pytest.raises(ApiError, match="rank 1 was lost"):
            await last.next()
        last.close()
        await asyncio.wait_for(one.drained(), 1)

    asyncio.run(work())


def test_phases() -> None:
    one = frontend()
    with pytest.raises(ApiError) as caught:
        one.engine()
    assert caught.value.status == 503 and caught.value.code == "starting" and not one.healthy
    one.enter("draining", "the server is shutting down")
    one.enter("ready")
    assert one.phase == "draining"
    one.enter("dead", "rank 1 was lost")
    one.enter("draining", "x")
    assert one.phase == "dead" and one.trouble == "rank 1 was lost"


def test_model_names() -> None:
    one = frontend(served_model_names=("a", "b"))
    assert one.check_model(None) == "a" and one.check_model("b") == "b"
    with pytest.raises(ApiError) as caught:
        one.check_model("model")
    assert caught.value.status == 404
    assert frontend().check_model("model") == "model"


def status(steps: int, tokens: list[int], total_s: float = 0.0) -> Status:
    times = StepTimes(steps=steps, total_s=total_s, compute_s=total_s / 2)
    return Status([], "", 0.0, EngineStats(times, 0, 0, 0, 0.0, 0, 0), tokens, [])


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    pace = Pace()
    assert pace.tokens_per_s == {"prompt": 0.0, "generation": 0.0} and pace.step_ms["total"] == 0.0
    pace.take(status(0, []))
    now[0] = 0.5
    pace.take(status(10, [50] * 10, total_s=0.1))
    assert pace.tokens_per_s["prompt"] == 1000.0
    assert pace.step_ms["steps"] == 10 and pace.step_ms["total"] == pytest.approx(10.0)
    assert pace.step_ms["compute"] == pytest.approx(5.0)
    now[0] = 5.0  # nothing happened for long
    pace.take(status(10, [], total_s=0.1))
    now[0] = 6.5
    pace.take(status(10, [], total_s=0.1))
    assert pace.tokens_per_s["prompt"] == 0.0 and pace.step_ms["steps"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"port": -1},
        {"max_body_bytes": 10},
        {"restarts": -1},
        {"body_timeout_s": float("inf")},
        {"api_keys": ("with blank",)},
        {"api_keys": ("schlüssel",)},
    ],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerOptions(**options)


def test_loopback() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert ServerOptions(host=host).is_loopback
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert not ServerOptions(host=host).is_loopback


def test_files(tmp_path: Any) -> None:
    file = tmp_path / "file"
    file.write_text("# comment\n\n first-key \nsecond-key\n")
    assert read_api_keys(str(file)) == ("first-key", "second-key")
    file.write_text("\n")
    with pytest.raises(ConfigError):
        read_api_keys(str(file))
    file.write_text("{{ messages }}")
    assert read_template(str(file)) == read_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError):
        read_template(str(tmp_path / "none"))

"""Prometheus metrics under vLLM's names, so that dashboards work, and yalis's own for ranks and collectives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from yalis import __version__
from yalis.engine.handle import Info
from yalis.engine.messages import Status
from yalis.engine.outputs import RequestOutput
from yalis.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from yalis.server.frontend import Frontend

_LABELS = ("model_name", "engine")
_ENGINE = "0"
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_LONG_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_SMALL = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_METHODS = ("GET", "HEAD", "OPTIONS", "POST")  # anything else a client may make up
_TOKENS = tuple(float(2**i) for i in range(18))


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        model_name: value of the label.
        frontend: where the gauges' values are read when somebody scrapes.
    """

    def __init__(self, model_name: str, frontend: Frontend):
        self._values = (model_name, _ENGINE)
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"vllm:{name}", text, _LABELS, registry=self.registry, buckets=buckets)
            return family.labels(*self._values)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_LABELS, *labels), registry=self.registry)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT_S)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of a request.", _ITL_S)
        # Under the name that dashboards ask for, and under the one that later versions have.
        self._tpot = [
            histogram(name, "Mean time per token after a request's first.", _ITL_S)
            for name in ("time_per_output_token_seconds", "request_time_per_output_token_seconds")
        ]
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG_S)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _LONG_S)
        self._prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", _LONG_S)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _LONG_S)
        self._inference = histogram("request_inference_time_seconds", "From the first step to the last token.", _LONG_S)
        self._prompt_sizes = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._output_sizes = histogram("request_generation_tokens", "Tokens of a request's output.", _TOKENS)
        self._longest = histogram("request_max_num_generation_tokens", "Tokens of a request's longest output.", _TOKENS)
        self._n = histogram("request_params_n", "What requests say on n.", _SMALL)
        self._max_tokens = histogram("request_params_max_tokens", "What requests say on max_tokens.", _TOKENS)
        self._iteration = histogram("iteration_tokens_total", "Tokens of a step.", _TOKENS)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens served.").labels(*self._values)
        self._output_tokens = counter("vllm:generation_tokens", "Tokens generated.").labels(*self._values)
        self._success = counter("vllm:request_success", "Sequences that ended.", "finished_reason")
        self._failures = counter("yalis:request_failure", "Requests that ended with an error.", "reason")
        self._http = Counter("yalis:http_requests", "HTTP answers.", ("path", "status"), registry=self.registry)
        # What FastAPI's usual exporter calls them; dashboards for vLLM's server ask for it.
        self._http_classes = Counter(
            "http_requests",
            "HTTP answers, by class of status.",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        info = Gauge("yalis:build", "Always 1; the label tells the version.", ("version",), registry=self.registry)
        info.labels(__version__).set(1)
        for reason in ("stop", "length", "abort"):  # series exist from the start
            self._success.labels(*self._values, reason)
        for reason in ("engine_lost", "client_stalled"):
            self._failures.labels(*self._values, reason)
        self.registry.register(_EngineState(self._values, frontend))

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def steps(self, tokens: list[int]) -> None:
        """Steps ended; their numbers of tokens."""
        for count in tokens:
            self._iteration.observe(count)

    def http(self, path: str, method: str, status: int) -> None:
        """An answer left."""
        self._http.labels(path, str(status)).inc()
        self._http_classes.labels(path, method if method in _METHODS else "other", f"{status // 100}xx").inc()

    def first_token(self, ttft_s: float, prompt_tokens: int) -> None:
        """A request's first token is known."""
        self._ttft.observe(ttft_s)
        self._prompt_tokens.inc(prompt_tokens)

    def gaps(self, gaps_s: list[float]) -> None:
        """Further tokens of a sequence; seconds between each and the one before."""
        for gap_s in gaps_s:
            self._itl.observe(gap_s)

    def tokens(self, count: int) -> None:
        """Tokens arrived."""
        self._output_tokens.inc(count)

    def aborted(self, requests: int) -> None:
        """Requests were ended from outside."""
        self._success.labels(*self._values, "abort").inc(requests)

    def lost(self, requests: int) -> None:
        """The engine's end took requests along."""
        self._failures.labels(*self._values, "engine_lost").inc(requests)

    def stalled(self) -> None:
        """A client did not read its answer, and was hung up on."""
        self._failures.labels(*self._values, "client_stalled").inc()

    def finished(
        self, output: RequestOutput, params: SamplingParams, prompt_tokens: int, arrived_s: float, now_s: float
    ) -> None:
        """A request ended well; the engine's clock is this process's clock."""
        times = output.metrics
        end = times.finished_s or now_s
        self._e2e.observe(end - arrived_s)
        self._prompt_sizes.observe(prompt_tokens)
        self._output_sizes.observe(times.num_output_tokens)
        self._longest.observe(times.num_output_tokens)
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        if times.first_scheduled_s is not None and times.first_token_s is not None:
            self._queue.observe(max(0.0, times.first_scheduled_s - arrived_s))
            self._prefill.observe(times.first_token_s - times.first_scheduled_s)
            self._decode.observe(end - times.first_token_s)
            self._inference.observe(end - times.first_scheduled_s)
        if times.tpot_s is not None:
            for histogram in self._tpot:
                histogram.observe(times.tpot_s)
        for sample in output.outputs:
            self._success.labels(*self._values, sample.finish_reason or "stop").inc()


class _EngineState:
    """Gauges and counters that the ranks keep; read from the latest status when somebody scrapes."""

    def __init__(self, values: tuple[str, str], frontend: Frontend):
        self._values = values
        self._frontend = frontend

    def describe(self) -> list[Metric]:
        """Nothing: the families depend on the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families as of now."""
        frontend = self._frontend
        yield self._gauge("yalis:healthy", "1 while every rank is alive and heard.", float(frontend.healthy))
        yield self._gauge("yalis:ready", "1 while requests are welcome.", float(frontend.phase == "ready"))
        yield self._counter("yalis:engine_restarts", "Times that the engine was started again.", frontend.restarts)
        yield self._gauge("yalis:admitted_sequences", "Sequences that run or wait.", frontend.num_admitted)
        # Nothing here sleeps to free memory: awake is well.
        awake = GaugeMetricFamily("vllm:engine_sleep_state", "1 if so.", labels=(*_LABELS, "sleep_state"))
        awake.add_metric((*self._values, "awake"), float(frontend.healthy))
        yield awake
        client = frontend.client
        status = client.status if client is not None else None
        if client is None or status is None:
            return
        yield self._cache_config(client.info)
        stats = status.stats
        yield self._gauge("vllm:num_requests_running", "Sequences that hold KV blocks.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait for them.", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", stats.kv_usage)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits)
        yield self._counter("vllm:num_preemptions", "Times that a sequence lost its KV blocks.", stats.num_preemptions)
        yield from self._steps(status)
        yield from self._ranks(status)
        yield from self._collectives(status)

    def _cache_config(self, info: Info) -> Metric:
        config = self._frontend.config
        values = {
            "block_size": str(info.get("block_size", "")),
            "cache_dtype": str(info.get("dtype", "")),
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
            "num_gpu_blocks": str(info.get("num_kv_blocks", "")),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Always 1; the labels tell of the KV cache.", labels=(*_LABELS, *values)
        )
        family.add_metric((*self._values, *values.values()), 1.0)
        return family

    def _steps(self, status: Status) -> Iterator[Metric]:
        times = status.stats.times
        family = CounterMetricFamily(
            "yalis:step_seconds", "Where the time of steps went on rank 0.", labels=(*_LABELS, "part")
        )
        for part in ("compute", "intra", "inter", "flat", "pipeline", "host"):
            family.add_metric((*self._values, part), getattr(times, f"{part}_s"))
        yield family
        yield self._counter("yalis:steps", "Steps that ended.", times.steps)

    def _ranks(self, status: Status) -> Iterator[Metric]:
        age = GaugeMetricFamily(
            "yalis:rank_beat_age_seconds", "Since a rank was last heard.", labels=(*_LABELS, "rank", "host")
        )
        up = GaugeMetricFamily("yalis:rank_up", "1 while a rank is there.", labels=(*_LABELS, "rank", "host"))
        extra = self._frontend.client.status_age_s if self._frontend.client is not None else 0.0
        for rank in status.ranks:
            labels = (*self._values, str(rank.rank), rank.host)
            age.add_metric(labels, rank.beat_age_s + extra)
            up.add_metric(labels, float(rank.state not in ("lost", "left") and self._frontend.healthy))
        yield age
        yield up

    def _collectives(self, status: Status) -> Iterator[Metric]:
        labels = (*_LABELS, "group", "tier", "algorithm")
        families = {
            "seconds": CounterMetricFamily(
                "yalis:collective_seconds", "Time in collectives, with the wait for late ranks.", labels=labels
            ),
            "bytes": CounterMetricFamily("yalis:collective_bytes", "Payload of collectives.", labels=labels),
            "calls": CounterMetricFamily("yalis:collective_calls", "Stages of collectives.", labels=labels),
        }
        for entry in status.collectives:
            for name, family in families.items():
                values = (*self._values, entry.group, entry.tier, entry.algorithms)
                family.add_metric(values, getattr(entry, name))
        yield from families.values()
        served = {
            "calls": CounterMetricFamily("yalis:all_reduces", "All-reduces.", labels=(*_LABELS, "group", "algorithm")),
            "bytes": CounterMetricFamily(
                "yalis:all_reduce_bytes", "Payload of all-reduces.", labels=(*_LABELS, "group", "algorithm")
            ),
        }
        for count in status.all_reduces:
            for name, family in served.items():
                family.add_metric((*self._values, count.group, count.algorithm), getattr(count, name))
        yield from served.values()
        waited = CounterMetricFamily(
            "yalis:collective_wait_seconds",
            "Time in collectives spent waiting for late ranks.",
            labels=(*_LABELS, "group"),
        )
        for group, seconds in status.waited_s.items():
            waited.add_metric((*self._values, group), seconds)
        yield waited

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

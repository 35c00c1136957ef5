"""``yalis bench serve``: options, table and record of a load test; names and JSON keys are those of vLLM's."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.bench.datasets import Dataset, Sample
    from yalis.bench.openai_client import Target
    from yalis.bench.serve import Run

_COMPLETIONS = ("yalis", "vllm", "openai")
_CHAT = "openai-chat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``yalis bench serve``."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--backend",
        choices=(*_COMPLETIONS, _CHAT),
        default="openai",
        help="kind of endpoint: completions (yalis, vllm, openai) or chat (openai-chat) (default: openai)",
    )
    server.add_argument("--base-url", metavar="URL", help="http://HOST:PORT, in place of --host and --port")
    server.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    server.add_argument("--endpoint", metavar="PATH", help="default: /v1/completions, or /v1/chat/completions for chat")
    server.add_argument("--model", metavar="NAME", help="model to ask for, or its folder (default: the server's first)")
    server.add_argument("--served-model-name", metavar="NAME", help="name in requests where it is not --model")
    server.add_argument("--tokenizer", metavar="FOLDER", help="vocabulary of random prompts (default: --model)")
    server.add_argument(
        "--vocab-size", type=int, metavar="N", help="draw random token ids below N, without a tokenizer"
    )
    server.add_argument("--header", nargs="*", default=[], metavar="NAME=VALUE", help="further HTTP headers")
    server.add_argument(
        "--ready-check-timeout-sec",
        type=float,
        default=60.0,
        metavar="S",
        help="how long to wait for the answer to a test request; 0 sends none (default: 60)",
    )
    server.add_argument(
        "--request-timeout", type=float, default=600.0, metavar="S", help="most seconds of one request (default: 600)"
    )

    data = parser.add_argument_group("data set")
    data.add_argument(
        "--dataset-name",
        choices=("random", "jsonl", "custom", "burstgpt"),
        default="random",
        help="random tokens, prompts of a JSONL file (vLLM calls it custom), or BurstGPT's CSV (default: random)",
    )
    data.add_argument("--dataset-path", type=Path, metavar="FILE", help="of jsonl and burstgpt")
    data.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="requests to send (default: 1000)")
    for name, default in (("input", 1024), ("output", 128)):
        data.add_argument(
            f"--random-{name}-len",
            f"--{name}-len",
            dest=f"{name}_len",
            type=int,
            metavar="N",
            help=f"{name} tokens per request (default: {default})",
        )
    data.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths vary by this share (default: 0)"
    )
    data.add_argument(
        "--random-prefix-len", type=int, default=0, metavar="N", help="common tokens in front of each prompt"
    )
    data.add_argument(
        "--burstgpt-time-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="play the trace X times faster than it was recorded (default: 1)",
    )
    data.add_argument("--burstgpt-models", nargs="+", metavar="NAME", help="rows of these models only, such as GPT-4")
    data.add_argument("--burstgpt-max-len", type=int, metavar="N", help="leave out rows of more tokens in all")
    data.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: 0)")

    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=float, default=math.inf, metavar="RPS", help="(default: inf, all at once)")
    load.add_argument(
        "--burstiness", type=float, default=1.0, help="shape of gamma gaps; 1 is Poisson, less is burstier (default: 1)"
    )
    load.add_argument("--max-concurrency", type=int, metavar="N", help="most requests in flight (default: no limit)")
    load.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="change the rate over the run")
    load.add_argument("--ramp-up-start-rps", type=float, metavar="RPS")
    load.add_argument("--ramp-up-end-rps", type=float, metavar="RPS")
    load.add_argument(
        "--self-timed",
        action=argparse.BooleanOptionalAction,
        help="send at the data set's own times (default: where it has them and no rate is named)",
    )
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="uncounted requests before (default: 0)")
    load.add_argument("--profile", action="store_true", help="/start_profile before, /stop_profile after")

    body = parser.add_argument_group("request body")
    body.add_argument("--ignore-eos", action="store_true", help="generate to the full length (always so for random)")
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float)):
        body.add_argument(f"--{name}", type=kind, help="(default: the server's)")
    body.add_argument("--extra-body", metavar="JSON", help="further fields of the body, an object")
    body.add_argument("--request-id-prefix", default="bench-", metavar="TEXT", help="of x-request-id (default: bench-)")

    out = parser.add_argument_group("results")
    out.add_argument(
        "--percentile-metrics",
        metavar="LIST",
        default="ttft,tpot,itl,e2el",
        help="of ttft, tpot, itl, e2el, client_queue_time, e2el_including_client_queue (default: the first four)",
    )
    out.add_argument("--metric-percentiles", metavar="LIST", default="99", help="such as 50,90,99 (default: 99)")
    out.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="such as ttft:300 tpot:50")
    out.add_argument("--save-result", action="store_true", help="write a JSON file")
    out.add_argument("--save-detailed", action="store_true", help="keep raw times, texts and errors in it")
    out.add_argument("--result-dir", type=Path, metavar="DIR", help="(default: here)")
    out.add_argument("--result-filename", metavar="NAME", help="(default: BACKEND-RATEqps-MODEL-DATE.json)")
    out.add_argument("--label", help="of the result (default: the backend)")
    out.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of the result")
    out.add_argument("--plot", type=Path, metavar="FILE", help="distributions and throughput over time, as PNG")
    out.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Send the load, print the table, write what was asked for; 1 if not one request succeeded."""
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise ConfigError("yalis bench serve needs aiohttp; pip install 'yalis[serve]'") from error
    from yalis.bench.serve_metrics import DETAILED_KEYS, failures, summarize_run
    from yalis.cli.bench_serve_output import check_result, header, own_keys, print_result, result_path, write_result

    plan = Plan(args)
    if args.save_result:
        check_result(args)
    run_, target, dataset, arrivals_text = asyncio.run(_measure(args, plan))
    result = summarize_run(
        run_.results, run_.duration_s, metrics=plan.metrics, percentiles=plan.percentiles, goodput=plan.goodput
    )
    failed = failures(run_.results)
    print_result(plan, result, run_, failed, f"{target.model} at {target.url}: {dataset.description}; {arrivals_text}")
    if args.plot is not None:
        from yalis.bench.serve_plot import plot_run

        rate = f"{result['output_throughput']:.1f} output tokens/s"
        plot_run(args.plot, run_.results, f"{target.model}: {result['completed']} requests, {rate}\n{arrivals_text}")
        sys.stderr.write(f"wrote {args.plot}\n")
    if args.save_result:
        record = header(args, plan, target) | result
        record["yalis"] = own_keys(run_, dataset, arrivals_text, target, failed)
        if not args.save_detailed:
            record = {key: value for key, value in record.items() if key not in DETAILED_KEYS}
        write_result(result_path(args, target.model), record)
    return 0 if result["completed"] else 1


class Plan:
    """Options that are checked before anything is sent."""

    def __init__(self, args: argparse.Namespace):
        from yalis.bench.arrivals import Arrivals, RampUp
        from yalis.bench.serve import checked_url
        from yalis.bench.serve_metrics import METRICS, parse_goodput

        for name, least in (("num_prompts", 1), ("num_warmups", 0), ("max_concurrency", 1), ("burstgpt_max_len", 2)):
            value = getattr(args, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if not 0 < args.request_timeout < math.inf:
            raise ConfigError(f"--request-timeout {args.request_timeout}: must be a positive number of seconds")
        if not 0 <= args.ready_check_timeout_sec < math.inf:
            raise ConfigError(f"--ready-check-timeout-sec {args.ready_check_timeout_sec}: must be 0 or more seconds")
        self.chat = args.backend == _CHAT
        self.base_url = checked_url(args.base_url or f"http://{_bracketed(args.host)}:{args.port}")
        endpoint = args.endpoint or ("/v1/chat/completions" if self.chat else "/v1/completions")
        if endpoint.endswith("chat/completions") != self.chat:
            raise ConfigError(
                f"--backend {args.backend} does not fit --endpoint {endpoint}: {_CHAT} goes with .../chat/completions"
            )
        self.url = f"{self.base_url}/{endpoint.lstrip('/')}"
        self.metrics = _listed("--percentile-metrics", args.percentile_metrics)
        for name in self.metrics:
            if name not in METRICS:
                raise ConfigError(f"--percentile-metrics {name}: must be one of {', '.join(METRICS)}")
        self.percentiles = [_percentile(text) for text in _listed("--metric-percentiles", args.metric_percentiles)]
        self.goodput = parse_goodput(args.goodput)
        self.metadata = _pairs("--metadata", args.metadata)
        self.headers = _pairs("--header", args.header)
        key = os.environ.get("OPENAI_API_KEY")
        if key and not any(name.lower() == "authorization" for name in self.headers):
            self.headers["Authorization"] = f"Bearer {key}"
        self.extra = _extra_body(args)
        if args.dataset_name != "random" and args.dataset_path is None:
            raise ConfigError(f"--dataset-name {args.dataset_name} needs --dataset-path FILE")
        ramp = None
        if args.ramp_up_strategy is not None:
            if args.ramp_up_start_rps is None or args.ramp_up_end_rps is None:
                raise ConfigError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
            ramp = RampUp(args.ramp_up_strategy, args.ramp_up_start_rps, args.ramp_up_end_rps)
        elif args.ramp_up_start_rps is not None or args.ramp_up_end_rps is not None:
            raise ConfigError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
        self.arrivals = Arrivals(args.request_rate, args.burstiness, ramp)
        rated = ramp is not None or not math.isinf(args.request_rate)
        if args.self_timed and rated:
            raise ConfigError("--self-timed sends at the data set's own times; leave out the rate and the ramp")
        self.self_timed: bool = args.self_timed if args.self_timed is not None else not rated


async def _measure(args: argparse.Namespace, plan: Plan) -> tuple[Run, Target, Dataset, str]:
    from yalis.bench.openai_client import Target
    from yalis.bench.serve import post, run_load, served_model, wait_until_ready
    from yalis.utils.progress import count_progress

    name, root = args.model, None
    if name is None:
        name, root = await served_model(plan.base_url, plan.headers, max(args.ready_check_timeout_sec, 1.0))
    dataset, probe = _load_dataset(args, plan, args.tokenizer or args.model or root)
    arrivals_s, arrivals_text = _arrivals(args, plan, dataset.samples)
    target = Target(
        url=plan.url,
        chat=plan.chat,
        model=args.served_model_name or name,
        # Random prompts are there for their lengths, and a model asked nonsense may end at once.
        ignore_eos=args.ignore_eos or args.dataset_name in ("random", "burstgpt"),
        extra=plan.extra,
        headers=plan.headers,
        timeout_s=args.request_timeout,
        request_id_prefix=args.request_id_prefix,
    )
    if args.ready_check_timeout_sec > 0:
        await wait_until_ready(target, probe, args.ready_check_timeout_sec)
    if args.num_warmups:
        warm = await run_load(
            replace(target, request_id_prefix=f"{target.request_id_prefix}warmup-"),
            [probe] * args.num_warmups,
            [0.0] * args.num_warmups,
            max_concurrency=args.max_concurrency,
        )
        bad = next((r for r in warm.results if not r.success), None)
        if bad is not None:
            raise ConfigError(f"a warm-up request failed: {bad.kind}: {bad.error}")
    if args.profile:
        await post(f"{plan.base_url}/start_profile", plan.headers)
    try:
        with count_progress("requests", args.num_prompts, enabled=not args.disable_tqdm) as progress:
            run_ = await run_load(
                target, dataset.samples, arrivals_s, max_concurrency=args.max_concurrency, progress=progress
            )
    finally:
        if args.profile:
            try:
                await post(f"{plan.base_url}/stop_profile", plan.headers)
            except ConfigError as error:  # what was measured is worth more than the trace
                sys.stderr.write(f"warning: {error}\n")
    return run_, target, dataset, arrivals_text


def _load_dataset(args: argparse.Namespace, plan: Plan, folder: str | None) -> tuple[Dataset, Sample]:
    """The samples, and one more like the first for tests and warm-ups: new tokens, so that it warms no prefix cache."""
    import random

    from yalis.bench.datasets import Vocabulary, burstgpt_dataset, jsonl_dataset, random_dataset

    if args.dataset_name in ("jsonl", "custom"):
        dataset = jsonl_dataset(args.dataset_path, args.num_prompts, output_len=args.output_len, chat=plan.chat)
        return dataset, dataset.samples[0]
    vocabulary = Vocabulary(Path(folder) if folder is not None else None, args.vocab_size)
    if args.dataset_name == "random":
        dataset = random_dataset(
            args.num_prompts,
            vocabulary,
            input_len=1024 if args.input_len is None else args.input_len,
            output_len=128 if args.output_len is None else args.output_len,
            range_ratio=args.random_range_ratio,
            prefix_len=args.random_prefix_len,
            chat=plan.chat,
            seed=args.seed,
        )
    else:
        dataset = burstgpt_dataset(
            args.dataset_path,
            args.num_prompts,
            vocabulary,
            time_scale=args.burstgpt_time_scale,
            models=args.burstgpt_models,
            max_len=args.burstgpt_max_len,
            chat=plan.chat,
            seed=args.seed,
        )
    probe = dataset.samples[0]
    if not plan.chat:
        probe = replace(probe, prompt=vocabulary.draw(random.Random(f"probe {args.seed}"), probe.prompt_len or 1))
    return dataset, probe


def _arrivals(args: argparse.Namespace, plan: Plan, samples: Sequence[Sample]) -> tuple[list[float], str]:
    own = [s.arrival_s for s in samples if s.arrival_s is not None]
    if len(own) == len(samples) and plan.self_timed:
        return own, f"at the data set's own times, {own[-1]:.1f} s"
    if args.self_timed:
        raise ConfigError(f"--self-timed: {args.dataset_path or 'the random data set'} has no times for every request")
    text = plan.arrivals.describe()
    return plan.arrivals.times(len(samples), args.seed), f"{text} (the data set's times are not used)" if own else text


def _extra_body(args: argparse.Namespace) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if getattr(args, name) is not None:
            extra[name] = getattr(args, name)
    if args.extra_body is not None:
        try:
            further = json.loads(args.extra_body)
        except ValueError as error:
            raise ConfigError(f"--extra-body is no JSON: {error}") from None
        if not isinstance(further, dict):
            raise ConfigError(f"--extra-body {args.extra_body}: must be an object")
        extra |= further
    return extra


def _pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ConfigError(f"{option} {word}: expected KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def _listed(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option} names nothing")
    return words


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise ConfigError(f"--metric-percentiles {text}: must be numbers from 0 to 100")
    return value


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host

"""Load on an OpenAI-compatible server: requests at given times, at most so many at once, each timed token by token."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import aiohttp

from yalis.bench.datasets import Sample
from yalis.bench.openai_client import CONNECT_S, RequestResult, Target, send_request
from yalis.errors import ConfigError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

_READY_PAUSE_S = 0.25
_LEAST_WAIT_S = 0.1


@dataclass(frozen=True)
class Run:
    """A finished load test.

    Attributes:
        results: one per sample, in their order.
        duration_s: from the first arrival to the end of the last request.
        max_arrival_lag_s: how late the load generator itself was at worst; where it is not small against TTFT, the
            machine of the client was the bottleneck.
    """

    results: list[RequestResult]
    duration_s: float
    max_arrival_lag_s: float


async def run_load(
    target: Target,
    samples: Sequence[Sample],
    arrivals_s: Sequence[float],
    *,
    max_concurrency: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Send every sample at its time and wait for all answers; each request ends within ``target.timeout_s``.

    Args:
        arrivals_s: seconds from the start, ascending, one per sample.
        max_concurrency: most requests in flight; others wait here, and their wait is `RequestResult.queue_s`.
        progress: called with 1 after each request.
    """
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
    results = [RequestResult() for _ in samples]
    tasks: list[asyncio.Task[None]] = []
    lag = 0.0

    async def one(index: int, arrived: float) -> None:
        result = results[index]
        if slots is not None:
            await slots.acquire()
        result.queue_s = time.perf_counter() - arrived
        try:
            await send_request(session, target, samples[index], index, result)
        finally:
            if slots is not None:
                slots.release()
            if progress is not None:
                progress(1)

    # No limit of connections here: `slots` is the only one, so that nothing waits unseen.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        gc.collect()
        gc.freeze()  # a collection over all the prompts would show up as a gap between tokens
        try:
            started = time.perf_counter()
            for index, at in enumerate(arrivals_s):
                wait = started + at - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                now = time.perf_counter()
                lag = max(lag, now - started - at)
                tasks.append(asyncio.create_task(one(index, now)))
            await asyncio.gather(*tasks)
            duration = time.perf_counter() - started
        finally:
            gc.unfreeze()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return Run(results, duration, lag)


async def wait_until_ready(target: Target, sample: Sample, timeout_s: float) -> None:
    """Return once the server has answered ``sample``.

    Raises:
        ConfigError: it did not within ``timeout_s``, or refuses the request itself.
    """
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession() as session:
        while True:
            # A server that takes the request and never answers is not ready either: the deadline bounds the request.
            left = max(deadline - time.monotonic(), _LEAST_WAIT_S)
            result = await send_request(session, replace(target, timeout_s=min(target.timeout_s, left)), sample, 0)
            if result.success:
                return
            refused = result.kind.startswith("http_4") and result.kind not in ("http_408", "http_429")
            if refused or time.monotonic() >= deadline:
                when = "refuses a test request" if refused else f"gave no answer within {timeout_s:g} s"
                raise ConfigError(f"{target.url} {when}: {result.kind}: {result.error}")
            await asyncio.sleep(_READY_PAUSE_S)


async def post(url: str, headers: dict[str, str], timeout_s: float = 60.0) -> None:
    """POST without a body (``/start_profile``).

    Raises:
        ConfigError: the server did not answer with 2xx.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, headers=headers) as response,
        ):
            if not response.ok:
                raise ConfigError(f"{url}: {response.status} {response.reason}; does the server profile?")
    except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
        raise ConfigError(f"{url}: {error or type(error).__name__}") from error


async def served_model(base_url: str, headers: dict[str, str], timeout_s: float) -> tuple[str, str | None]:
    """Name of the first model that the server lists, and the folder or hub id it was loaded from, if it tells.

    Raises:
        ConfigError: the server could not be asked within ``timeout_s``.
    """
    url = f"{base_url}/v1/models"
    deadline = time.monotonic() + timeout_s
    while True:
        left = max(deadline - time.monotonic(), _LEAST_WAIT_S)
        timeout = aiohttp.ClientTimeout(total=min(CONNECT_S, left))
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, headers=headers) as response,
            ):
                response.raise_for_status()
                model = (await response.json(content_type=None))["data"][0]
                root = model.get("root")
                return str(model["id"]), str(root) if root else None
        except (TimeoutError, aiohttp.ClientError, ConnectionError, ValueError, LookupError, TypeError) as error:
            if time.monotonic() >= deadline:
                words = f"{type(error).__name__}: {error}"
                raise ConfigError(f"cannot learn the model's name from {url} ({words}); name --model") from error
        await asyncio.sleep(_READY_PAUSE_S)


def checked_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises:
        ConfigError: it is no http(s) URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url {url}: expected http://HOST:PORT or https://HOST:PORT")
    return url.rstrip("/")

"""The API process's view of the engine: whether it serves, how much it has to do, and the requests in it."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from yalis.config import EngineConfig
from yalis.engine.async_client import AsyncEngineClient
from yalis.engine.messages import Status
from yalis.engine.outputs import RequestOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import EngineDeadError
from yalis.server.errors import ApiError, bad_request, engine_died, refused, unavailable
from yalis.server.grammars import Grammars
from yalis.server.metrics import Metrics
from yalis.server.options import ServerOptions
from yalis.server.pace import Pace

Phase = Literal["starting", "ready", "draining", "restarting", "dead"]
_RATE_WINDOW = 64


class Frontend:
    """What request handlers work with.

    Args:
        options: of the server.
        config: of the engine.
        generation_config: the checkpoint's defaults of requests.

    Attributes:
        client: the present engine; None while there is none.
        phase: see `GET /state`.
        message: why the phase is not ``ready``.
        restarts: how often the engine was started again.
        metrics: counters for Prometheus.
        pace: speeds of the last second.
    """

    def __init__(self, options: ServerOptions, config: EngineConfig, generation_config: Mapping[str, Any]):
        self.options = options
        self.config = config
        self.generation_config = generation_config
        self.client: AsyncEngineClient | None = None
        self.phase: Phase = "starting"
        self.message: str | None = "the model is being loaded"
        self.restarts = 0
        self.model_names = options.served_model_names or (config.model,)
        self.created = int(time.time())
        self.started = time.monotonic()
        self.pace = Pace()
        self.metrics = Metrics(self.model_names[0], self)
        self._grammars: Grammars | None = None
        self._num_admitted = 0
        self._num_answers = 0
        self._ids = itertools.count()
        self._finish_times: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- the engine's state -----------------------------------------------------------------------------------

    def attach(self, client: AsyncEngineClient) -> None:
        """From now on requests go to ``client``, once the phase is ``ready``."""
        self.client = client
        self._grammars = None
        self.pace = Pace()
        client.on_status = self._on_status
        client.on_outputs = self.pace.count

    def _on_status(self, status: Status) -> None:
        self.pace.take(status)
        self.metrics.steps(status.step_tokens)

    def enter(self, phase: Phase, message: str | None = None) -> None:
        """Change the phase. Draining and death are final but for the second after the first."""
        if self.phase == "dead" or (self.phase == "draining" and phase != "dead"):
            return
        self.phase, self.message = phase, message

    @property
    def healthy(self) -> bool:
        """Whether every rank is alive and well, loaded, and heard."""
        return self.phase in ("ready", "draining") and self.client is not None and self.client.failure is None

    @property
    def trouble(self) -> str:
        """Why the server is not well or not ready."""
        if self.client is not None and self.client.failure is not None:
            return self.client.failure
        return self.message or ""

    def engine(self) -> AsyncEngineClient:
        """The engine, to give it a request.

        Raises:
            ApiError: 503, it is not ready.
        """
        client = self.client
        if self.phase != "ready" or client is None or client.failure is not None:
            codes = {"starting": "starting", "restarting": "restarting", "draining": "draining"}
            raise unavailable(
                f"the server is not ready: {self.trouble}",
                codes.get(self.phase, "engine_lost") if client is None or client.failure is None else "engine_lost",
                retry_after_s=5,
            )
        return client

    def loaded(self) -> AsyncEngineClient:
        """The engine, for what needs only its tokenizer and limits.

        Raises:
            ApiError: 503, nothing was loaded yet.
        """
        client = self.client
        if client is None or not client.info:
            raise unavailable(f"the server is not ready: {self.trouble}", retry_after_s=5)
        return client

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence."""
        return int(self.loaded().info["max_model_len"])

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's, None where there is none."""
        return self.loaded().tokenizer

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ApiError: 400, there is none.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise bad_request("the model has no tokenizer: send token ids, and expect token ids (return_token_ids)")
        return tokenizer

    def grammars(self) -> Grammars:
        """Where grammars are tried.

        Raises:
            ApiError: 400, there is no tokenizer.
        """
        if self._grammars is None:
            info = self.loaded().info
            eos = [int(token) for token in str(info["eos_token_ids"]).split(",") if token]
            self._grammars = Grammars(self.need_tokenizer(), int(info["vocab_size"]), eos)
        return self._grammars

    def check_model(self, name: str | None) -> str:
        """The name under which the request is answered.

        Raises:
            ApiError: 404, another model.
        """
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; served: {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )
        return name

    # ---- admission --------------------------------------------------------------------------------------------

    @property
    def num_admitted(self) -> int:
        """Sequences in the engine: running and waiting."""
        return self._num_admitted

    def check_count(self, count: int) -> None:
        """Refuse more sequences than ever fit.

        Raises:
            ApiError: 400.
        """
        limit = self.config.max_num_seqs + self.options.max_queued_requests
        if count > limit:
            raise bad_request(
                f"the request has {count} sequences (prompts times n), the server takes at most {limit} "
                f"(--max-num-seqs {self.config.max_num_seqs} + --max-queued-requests "
                f"{self.options.max_queued_requests}); split it",
                code="too_many_sequences",
            )

    def admit(self, count: int) -> None:
        """Take an answer with ``count`` sequences in; `release` gives their places back, `leave` ends the answer.

        Raises:
            ApiError: 400, so many never fit; 429, not now.
        """
        self.check_count(count)
        limit = self.config.max_num_seqs + self.options.max_queued_requests
        if self._num_admitted + count > limit:
            raise ApiError(
                429,
                f"the queue is full: {self._num_admitted} sequences run or wait, at most {limit} may; try again later",
                code="queue_full",
                retry_after_s=self._retry_after_s(self._num_admitted + count - limit),
            )
        self._num_admitted += count
        self._num_answers += 1
        self._idle.clear()

    def release(self, count: int) -> None:
        """``count`` sequences are over."""
        self._num_admitted -= count
        now = time.monotonic()
        self._finish_times.extend([now] * min(count, _RATE_WINDOW))

    def leave(self) -> None:
        """An answer is over: all of it was sent, or nobody wants it."""
        self._num_answers -= 1
        if self._num_answers == 0:
            self._idle.set()

    async def drained(self) -> None:
        """Wait until every answer is over."""
        await self._idle.wait()

    def next_id(self) -> str:
        """A name for an engine request."""
        return str(next(self._ids))

    def _retry_after_s(self, excess: int) -> int:
        """How long until ``excess`` places are free at the pace of the latest ends, 1 to 60 s."""
        times = self._finish_times
        if len(times) < 2 or times[-1] <= times[0]:
            return 1
        return max(1, min(60, math.ceil(excess * (times[-1] - times[0]) / (len(times) - 1))))


class Generation:
    """The engine's requests for one HTTP request: one per prompt. Make with `start`, and `close` in any case.

    What the engine does is counted as it comes, and places in the queue are free as soon as it is done: neither has to
    wait for a client that reads slowly.
    """

    def __init__(self, frontend: Frontend, prompts: Sequence[list[int]], params: SamplingParams):
        self._engine = frontend.engine()
        self._frontend = frontend
        self._prompts = prompts
        self._params = params
        self._queue: asyncio.Queue[tuple[int, RequestOutput] | EngineDeadError] = asyncio.Queue()
        self._open: dict[str, int] = {}
        self._num_unread = len(prompts)
        self._closed = False
        self._arrived = time.monotonic()
        self._begun: set[int] = set()
        frontend.admit(len(prompts) * params.n)
        self._num_places = len(prompts)  # each is one for every of the n sequences

    @classmethod
    async def start(
        cls, frontend: Frontend, prompts: Sequence[list[int]], params: SamplingParams, *, stream: bool
    ) -> Generation:
        """Give the engine its requests.

        Args:
            frontend: of the server.
            prompts: token ids.
            params: the same for all.
            stream: whether progress is wanted.

        Raises:
            ApiError: not now, or never.
        """
        generation = cls(frontend, prompts, params)
        try:
            if params.guided is not None:
                await frontend.grammars().check(params.guided)
            generation._submit(stream)
        except BaseException as error:
            generation.close()
            if isinstance(error, EngineDeadError):
                raise engine_died(error) from error
            raise
        return generation

    def _submit(self, stream: bool) -> None:
        for index, prompt in enumerate(self._prompts):
            request_id = self._frontend.next_id()
            self._open[request_id] = index
            self._engine.submit(request_id, prompt, self._params, self._take, stream=stream)

    def _take(self, item: RequestOutput | EngineDeadError) -> None:
        if isinstance(item, EngineDeadError):
            if self._open:  # it tells each of them
                self._frontend.metrics.lost(len(self._open))
                self._release(len(self._open))
                self._open.clear()
            self._queue.put_nowait(item)
            return
        index = self._open[item.request_id]
        if item.finished:
            del self._open[item.request_id]
            self._release(1)
        if item.error is None:
            self._measure(index, item)
        self._queue.put_nowait((index, item))

    async def next(self) -> tuple[int, RequestOutput] | None:
        """The next output and the index of its prompt; None after the last.

        Raises:
            ApiError: 503, the engine was lost; 400, the engine refuses a prompt.
        """
        if not self._num_unread:
            return None
        item = await self._queue.get()
        if isinstance(item, EngineDeadError):
            raise engine_died(item)
        index, output = item
        if output.finished:
            self._num_unread -= 1
        if output.error is not None:
            raise refused(output.error)
        return index, output

    def close(self) -> None:
        """Abort what is not finished and give everything back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._open:
            self._engine.abort(list(self._open))
            self._frontend.metrics.aborted(len(self._open))
            self._open.clear()
        self._release(self._num_places)
        self._frontend.leave()

    def _release(self, prompts: int) -> None:
        self._num_places -= prompts
        self._frontend.release(prompts * self._params.n)

    def _measure(self, index: int, output: RequestOutput) -> None:
        metrics, now = self._frontend.metrics, time.monotonic()
        size = len(self._prompts[index])
        tokens = sum(len(sample.token_ids) for sample in output.outputs)
        if tokens and index not in self._begun:
            self._begun.add(index)
            metrics.first_token((output.metrics.first_token_s or now) - self._arrived, size)
        metrics.tokens(tokens)
        for sample in output.outputs:
            metrics.gaps(sample.gaps_s)
        if output.finished:
            metrics.finished(output, self._params, size, self._arrived, now)

"""Runs the server: the HTTP socket first, then the engine behind it, until a signal or the engine's end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from typing import Any

from yalis.comm.liveness import EXIT_PEER_LOST
from yalis.config import EngineConfig
from yalis.engine.async_client import AsyncEngineClient
from yalis.engine.outputs import RequestOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.tokenizer import generation_config
from yalis.errors import ConfigError, EngineDeadError
from yalis.launch import Nodes
from yalis.server.app import create_app
from yalis.server.frontend import Frontend
from yalis.server.http import HttpServer, listen, url
from yalis.server.options import ServerOptions
from yalis.utils.logging import get_logger
from yalis.weights.hub import resolve_model_path

logger = get_logger(__name__)

# After a loss, answers that are under way (503s, last events of streams) have so long to leave.
_LAST_ANSWERS_S = 3
# A client that takes nothing of its answer for so long has stalled.
_READ_TIMEOUT_S = 30.0
_RESTART_PAUSE_S = 1.0


def serve(config: EngineConfig, options: ServerOptions, *, nodes: Nodes | None = None, join: bool = False) -> int:
    """Serve until SIGTERM, SIGINT or the loss of the engine; the process's exit code.

    Args:
        config: of the engine.
        options: of the server.
        nodes: this node's share of a launch over several.
        join: this process was started by a launcher as rank 0.

    Raises:
        ConfigError: the address cannot be listened on, the model's folder cannot be read, or the one for traces made.
        EngineDeadError: the engine did not come up.
    """
    if options.restarts and (nodes is not None or join):
        raise ConfigError(
            f"restarts={options.restarts}: the ranks of other nodes and launchers cannot be started again from here; "
            "let the launcher or the service manager restart the whole run"
        )
    defaults = generation_config(resolve_model_path(config.model))
    if options.profile_dir is not None:
        try:
            os.makedirs(options.profile_dir, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"profile_dir={options.profile_dir}: {error}; choose another --profile-dir") from error
    listener = listen(options.host, options.port)  # before the model is loaded: a taken port costs no time
    _warn_if_open(options)
    _raise_descriptor_limit()
    sys.stderr.write(f"yalis: listening on {url(listener)}, loading {config.model}\n")
    return asyncio.run(_Serving((options, config, defaults), listener, nodes=nodes, join=join).run())


class _Serving:
    """One run of the server."""

    def __init__(
        self,
        frontend_args: tuple[ServerOptions, EngineConfig, dict[str, Any]],
        listener: socket.socket,
        *,
        nodes: Nodes | None,
        join: bool,
    ):
        self._frontend_args = frontend_args
        self._options = frontend_args[0]
        self._listener = listener
        self._nodes = nodes
        self._join = join
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        frontend = Frontend(*self._frontend_args)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        server = HttpServer(
            create_app(frontend),
            head_timeout_s=self._options.body_timeout_s,
            read_timeout_s=_READ_TIMEOUT_S,
            on_stalled=frontend.metrics.stalled,
            shutdown_s=_LAST_ANSWERS_S,
        )
        http = asyncio.create_task(server.serve(sockets=[self._listener]))
        try:
            return await self._keep_engine(frontend)
        finally:
            # Whatever happened, nobody is left waiting: answers under way leave, then the socket closes.
            server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(http, _LAST_ANSWERS_S + 2)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def _keep_engine(self, frontend: Frontend) -> int:
        """Start the engine, again as often as allowed; the exit code."""
        while True:
            client = AsyncEngineClient(frontend.config, nodes=self._nodes, join=self._join)
            try:
                words = await self._run_engine(frontend, client)
            finally:
                await client.close()
            if words is None:
                return 0
            left = self._options.restarts - frontend.restarts
            if left <= 0 or self._stopping.is_set():
                frontend.enter("dead", words)
                sys.stderr.write(f"yalis: error: {words}\n")
                return EXIT_PEER_LOST
            frontend.restarts += 1
            frontend.client = None
            frontend.enter("restarting", f"the engine is started again after a loss: {words}")
            sys.stderr.write(f"yalis: {words}; starting the engine again ({left - 1} restarts left after this)\n")
            await asyncio.sleep(_RESTART_PAUSE_S)

    async def _run_engine(self, frontend: Frontend, client: AsyncEngineClient) -> str | None:
        """One engine from start to end; why it was lost, None after an orderly end.

        Raises:
            EngineDeadError, ConfigError: it did not come up the first time.
        """
        stopping = asyncio.create_task(self._stopping.wait())
        start = asyncio.create_task(self._start(frontend, client))
        watch: asyncio.Task[str] | None = None
        try:
            await asyncio.wait({stopping, start}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                return None
            try:
                start.result()
            except EngineDeadError as error:
                if frontend.restarts == 0:
                    raise
                return str(error)
            sys.stderr.write(f"yalis: serving {frontend.model_names[0]} on {url(self._listener)}\n")
            watch = asyncio.create_task(client.failed())
            await asyncio.wait({stopping, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not watch.done():
                await self._drain(frontend, watch)
            if not watch.done():
                return None
            await asyncio.sleep(0)
            return await client.obituary()
        finally:
            for task in (stopping, start, watch):
                if task is not None and not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, EngineDeadError):
                        await task

    async def _start(self, frontend: Frontend, client: AsyncEngineClient) -> None:
        frontend.attach(client)
        await client.start()
        await _warm_up(client)
        frontend.enter("ready")

    async def _drain(self, frontend: Frontend, lost: asyncio.Task[str]) -> None:
        """Let requests finish: until the last one, the time limit, a second signal, or the engine's end."""
        count, limit = frontend.num_admitted, self._options.drain_timeout_s
        frontend.enter("draining", "the server is shutting down")
        if count:
            sys.stderr.write(f"yalis: shutting down; {count} requests have {limit:g} s to finish\n")
        waits: set[asyncio.Task[Any]] = {
            asyncio.create_task(frontend.drained()),
            asyncio.create_task(self._hurry.wait()),
        }
        await asyncio.wait({lost, *waits}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        if not lost.done() and frontend.num_admitted:
            sys.stderr.write(
                f"yalis: {frontend.num_admitted} requests did not finish in time; they end with an error\n"
            )
            assert frontend.client is not None
            frontend.client.abort_all("the server is shutting down")
            await asyncio.sleep(0.1)


async def _warm_up(client: AsyncEngineClient) -> None:
    """Generate one token, so that *ready* means what it says.

    Raises:
        EngineDeadError: no token came.
    """
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def sink(item: RequestOutput | EngineDeadError) -> None:
        if done.done():
            return
        if isinstance(item, EngineDeadError):
            done.set_exception(item)
        elif item.error is not None:
            done.set_exception(EngineDeadError(f"the engine is up, but refuses its first request: {item.error}"))
        elif item.finished:
            done.set_result(None)

    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=client.tokenizer is not None)
    client.submit("warm-up", [0], params, sink, stream=False)
    await done


def _warn_if_open(options: ServerOptions) -> None:
    if not options.is_loopback and not options.api_keys:
        sys.stderr.write(
            f"yalis: warning: listening on {options.host} without an API key: whoever can connect can use the model; "
            "set --api-key-file, or bind to 127.0.0.1\n"
        )


def _raise_descriptor_limit() -> None:
    """Each connection takes a descriptor; common soft limits are low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

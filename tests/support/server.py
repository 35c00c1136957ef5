"""Starts `yalis serve` as its users do, in a process of its own, and talks to it over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.support.checkpoints import DEMO
from tests.support.forked import Forked, start_module
from tests.support.ranks import ROOT

START_S = 60.0


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of ``condition``; AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape, checked for it."""
        body = self.json()
        assert set(body) == {"error"}, body
        assert set(body["error"]) == {"message", "type", "param", "code"}, body
        assert isinstance(body["error"]["message"], str) and body["error"]["message"]
        return dict(body["error"])


class Server:
    """A running server; a context manager that leaves no process behind.

    Args:
        arguments: of ``yalis serve``, after the model.
        model: folder.
        env: environment on top of this process's.
        prefix: command in place of this Python and ``-m yalis``, such as torchrun's. Without it the process is forked
            with torch loaded, where that is possible (`tests.support.forked`); its ranks start from nothing.
    """

    def __init__(
        self,
        *arguments: str,
        model: Path | str = DEMO,
        env: Mapping[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ):
        self.temporary = Path(tempfile.mkdtemp(prefix="y-", dir="/tmp"))  # short: a socket's path has 107 characters
        self.stderr = ""
        words = ["serve", str(model), "--port", "0", "--cpu-threads", "1", *arguments]
        how: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": ROOT}
        how["env"] = os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"} | dict(env or {})
        self.process: subprocess.Popen[str] | Forked
        if prefix:
            self.process = subprocess.Popen([*prefix, *words], text=True, **how)
        else:
            self.process = start_module(["yalis", *words], **how)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0
        self._pids: set[int] = set()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._remember()
        for pid in {*self._pids, self.process.pid}:
            if alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)
        if value is not None:
            sys.stderr.write(f"--- stderr of the server:\n{self.stderr}\n")

    def _remember(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._pids.update(p.pid for p in psutil.Process(self.process.pid).children(recursive=True))

    # ---- life -------------------------------------------------------------------------------------------------

    def listening(self) -> Server:
        """Wait until the port is known, which comes before the model."""

        def found() -> int:
            assert self.process.poll() is None, self.stderr
            for line in self.stderr.splitlines():
                if "listening on http://" in line:
                    return int(line.split("listening on http://")[1].split(",")[0].rpartition(":")[2])
            return 0

        self.port = wait_for(found, START_S, "the server's port")
        return self

    def ready(self) -> Server:
        """Wait until requests are served."""
        if not self.port:
            self.listening()

        def is_ready() -> bool:
            assert self.process.poll() is None, self.stderr
            return self.get("/ready").status == 200

        wait_for(is_ready, START_S, "a ready server")
        self._remember()
        return self

    def rank_pids(self) -> dict[int, int]:
        """Process id by rank, as `GET /state` says; on a busy machine the first status comes after the first token."""
        ranks = wait_for(lambda: self.state()["ranks"], 5.0, "a status of the ranks")
        return {rank["rank"]: rank["pid"] for rank in ranks}

    def wait_exit(self, timeout_s: float) -> int:
        """The exit code; every process of the server must be gone, too."""
        code = self.process.wait(timeout_s)
        wait_for(lambda: not any(alive(pid) for pid in self._pids), 5.0, f"end of {self._pids}")
        return code

    # ---- requests ---------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Answer:
        """One request; ``body`` is sent as JSON, unless it is bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json"} if body is not None else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data, {**given, **dict(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Answer:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> Answer:
        return self.request("POST", path, body, **options)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        answer = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert answer.status == 200, answer.body
        return dict(answer.json())

    def state(self) -> dict[str, Any]:
        return dict(self.get("/state").json())

    def metric(self, name: str) -> float:
        """Sum of a metric's samples over its labels."""
        total, found = 0.0, False
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith((f"{name}{{", f"{name} ")):
                total, found = total + float(line.rpartition(" ")[2]), True
        assert found, name
        return total

    @contextlib.contextmanager
    def stream(self, body: Mapping[str, Any], path: str = "/v1/completions") -> Iterator[http.client.HTTPResponse]:
        """An open stream; leaving the block closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            "POST", path, json.dumps({**body, "stream": True}).encode(), {"content-type": "application/json"}
        )
        try:
            yield connection.getresponse()
        finally:
            connection.close()


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a stream as they come; ``"[DONE]"`` as that text."""
    for line in response:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield "[DONE]" if data == b"[DONE]" else json.loads(data)

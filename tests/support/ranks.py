"""Runs a function of a test module in several real processes, with a hard time limit.

    results = run_ranks(work, 3, "argument", timeout_s=20)   # each rank runs work("argument")
    assert [r.value for r in results] == [0, 1, 2]

The function must be at module level; its module is loaded anew in each rank, by file. Arguments and results are
pickled. Ranks see torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT):
with ``torch_store=True`` a TCPStore of the test process listens there, so that ``init_process_group("gloo")`` works and
outlives a killed rank 0; such ranks are forked from a process with torch loaded, where that is possible
(`tests.support.forked`). Without it nothing imports torch, and `rank_store` gives a store of files.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.forked import Forked

ROOT = Path(__file__).resolve().parents[2]


class FileStore:
    """The few store operations that ranks use to find each other, in a folder. No server, no torch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "%")

    def set(self, key: str, value: str) -> None:
        draft = self._path(f"{key}.{os.getpid()}.draft")
        draft.write_bytes(value.encode())
        draft.replace(self._path(key))

    def get(self, key: str) -> bytes:
        self.wait([key], timedelta(seconds=30))
        return self._path(key).read_bytes()

    def add(self, key: str, amount: int) -> int:
        """Not atomic between ranks: fine for counters that one rank owns."""
        path = self._path(key)
        value = (int(path.read_text()) if path.exists() else 0) + amount
        path.write_text(str(value))
        return value

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        while not all(self._path(key).exists() for key in keys):
            if time.monotonic() > deadline:
                raise RuntimeError(f"timeout waiting for {keys}")
            time.sleep(0.005)


def rank_store() -> Any:
    """In a rank: the store of this group (torch's TCPStore if the group was started with one)."""
    if "YALIS_TEST_STORE" in os.environ:
        return FileStore(Path(os.environ["YALIS_TEST_STORE"]))
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


@dataclass(frozen=True)
class RankResult:
    """How one rank ended: ``returncode`` as in subprocess (negative: killed by that signal), ``value`` as returned."""

    rank: int
    pid: int
    returncode: int
    stdout: str
    stderr: str
    value: Any


class RankProcesses:
    """N running ranks. A context manager: on the way out every rank is killed and reaped, whatever happened."""

    def __init__(
        self,
        function: Callable[..., Any],
        nproc: int,
        *args: Any,
        env: Mapping[str, str] | None = None,
        torch_store: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="yalis-ranks-")
        folder = Path(self._folder.name)
        self._store: Any = None
        common = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        if torch_store:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common |= {"MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        else:
            (folder / "store").mkdir()
            common["YALIS_TEST_STORE"] = str(folder / "store")
        common |= dict(env or {})
        source = sys.modules[function.__module__].__file__
        (folder / "call").write_bytes(pickle.dumps((str(source), function.__qualname__, args)))
        # Imports of the process that forks have read some of its variables.
        fork = torch_store and not (env and "PYTHONPATH" in env)
        self.processes = [
            _start(folder, rank, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, fork=fork)
            for rank in range(nproc)
        ]

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self.processes]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    def stderr(self, rank: int) -> str:
        """What a rank printed so far."""
        return (Path(self._folder.name) / f"{rank}.err").read_text(errors="replace")

    def stdout(self, rank: int) -> str:
        """What a rank printed so far."""
        return (Path(self._folder.name) / f"{rank}.out").read_text(errors="replace")

    def wait_for_line(self, text: str, *, timeout_s: float = 30.0) -> None:
        """Wait until every rank has printed ``text`` on stdout (it must flush)."""
        deadline = time.monotonic() + timeout_s
        waiting = set(range(len(self.processes)))
        while waiting:
            waiting = {r for r in waiting if text not in self.stdout(r)}
            dead = [r for r in waiting if self.processes[r].poll() is not None]
            if dead or time.monotonic() > deadline:
                told = "\n".join(
                    f"--- rank {r} ({self.processes[r].poll()}):\n{self.stderr(r)}" for r in sorted(waiting)
                )
                raise AssertionError(f"ranks {sorted(waiting)} did not print {text!r} within {timeout_s} s\n{told}")
            time.sleep(0.01)

    def wait(self, timeout_s: float) -> list[RankResult]:
        """Wait for all ranks; AssertionError, with what they printed, if one is still there after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        late = []
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
        if late:
            told = "\n".join(f"--- rank {r}:\n{self.stderr(r)}" for r in range(len(self.processes)))
            raise AssertionError(f"ranks {late} still ran after {timeout_s:.1f} s\n{told}")
        results = []
        for rank, process in enumerate(self.processes):
            saved = Path(self._folder.name) / f"{rank}.value"
            value = pickle.loads(saved.read_bytes()) if saved.exists() else None
            results.append(
                RankResult(rank, process.pid, process.returncode, self.stdout(rank), self.stderr(rank), value)
            )
        return results


def _start(folder: Path, rank: int, env: Mapping[str, str], *, fork: bool) -> subprocess.Popen[bytes] | Forked:
    """A rank: a program of its own, or with ``fork``, where that is possible, forked with torch loaded."""
    with (folder / f"{rank}.out").open("wb") as out, (folder / f"{rank}.err").open("wb") as err:
        if fork:
            from tests.support.forked import Forked, may_fork  # not in ranks that are programs of their own

            if may_fork({**env, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}):
                return Forked(_main, folder, rank, env=env, cwd=ROOT, stdout=out, stderr=err)
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(folder), str(rank)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
        )


def run_ranks(
    function: Callable[..., Any],
    nproc: int,
    *args: Any,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    torch_store: bool = False,
    check: bool = True,
) -> list[RankResult]:
    """Run ``function(*args)`` in ``nproc`` ranks and wait; with ``check`` any non-zero exit is an AssertionError."""
    with RankProcesses(function, nproc, *args, env=env, torch_store=torch_store) as group:
        results = group.wait(timeout_s)
    if check:
        failed = [f"--- rank {r.rank} exited with {r.returncode}:\n{r.stderr}" for r in results if r.returncode]
        assert not failed, "\n".join(failed)
    return results


def _main(folder: Path, rank: int) -> None:
    from yalis.utils.garbage import spare_imports

    spare_imports()
    source, qualname, args = pickle.loads((folder / "call").read_bytes())
    # By file, not by name: test folders are no packages, and their module names may repeat.
    spec = importlib.util.spec_from_file_location("rank_under_test", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_under_test"] = module
    spec.loader.exec_module(module)
    target: Any = module
    for name in qualname.split("."):
        target = getattr(target, name)
    try:
        value = target(*args)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(1) from None
    (folder / f"{rank}.value").write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    # The script's own folder is not the place to import from.
    sys.path[0] = str(ROOT)
    _main(Path(sys.argv[1]), int(sys.argv[2]))

"""Starts ranks on this machine through torch's elastic agent, and sees to it that none is left behind.

With `Nodes` they are one node's share of a launch that other nodes join. `adopt_rank` starts just one rank of a launch
that somebody else (torchrun, srun, mpirun) made.

`launch_ranks` runs the agent in a daemon thread of the caller. The ranks are started as ``python -m yalis.launch
MODULE ARGS``: this module's `main` ties each rank's life to the agent's thread before it runs MODULE, so that even a
kill -9 of the caller ends them.

How a group ends when one rank fails: a stopped rank (SIGSTOP) is killed at once, since it can do nothing else; the
others get `_PATIENCE_S` to end by themselves with a verdict (see `yalis.comm.liveness`), then SIGTERM, then after
`_GRACE_S` SIGKILL.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from yalis.comm.liveness import ERROR_FILE_VARIABLE, EXIT_PEER_LOST, die_with_parent, last_words
from yalis.comm.topology import from_environment, launcher
from yalis.errors import ConfigError, PeerLostError, YalisError
from yalis.utils.garbage import spare_imports
from yalis.utils.logging import get_logger

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import LogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousHandler

logger = get_logger(__name__)

_PARENT_VARIABLE = "YALIS_LAUNCHER_PID"
_PATIENCE_S = 3.0
_GRACE_S = 3.0
_POLL_S = 0.05
_CONNECT_S = 1.0
_MEET_S = 0.25
_RENDEZVOUS_S = 60


def is_launched(env: Mapping[str, str]) -> bool:
    """Whether a launcher (torchrun, srun, mpirun) started this process as one of several ranks.

    Raises:
        TopologyError: the launcher's variables contradict each other.
    """
    # The node size does not matter here, and not every launcher tells it: any value that fits will do.
    return launcher(env) is not None and from_environment(env, ranks_per_node=1).world_size > 1


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended badly.

    Attributes:
        rank: the rank.
        pid: its process id.
        exitcode: exit code, or minus the number of the signal that killed it.
        message: its last words (a verdict, or the exception that nobody caught); empty if it left none.
        stopped: it was stopped (SIGSTOP) when another rank failed, so it is the likely cause.
    """

    rank: int
    pid: int
    exitcode: int
    message: str = ""
    stopped: bool = False

    def __str__(self) -> str:
        if self.exitcode < 0:
            try:
                how = f"was killed by {signal.Signals(-self.exitcode).name}"
            except ValueError:
                how = f"was killed by signal {-self.exitcode}"
        else:
            how = f"exited with code {self.exitcode}"
        if self.stopped:
            how = "was stopped (SIGSTOP), and " + how
        return f"rank {self.rank} (pid {self.pid}) {how}" + (f": {self.message}" if self.message else "")


@dataclass(frozen=True)
class Nodes:
    """This node in a launch over several; every node starts as many ranks.

    Args:
        count: number of nodes.
        index: this node, from 0; rank 0 runs on node 0.
        address: host name or address of node 0, as the others reach it.
        port: free port there.
        timeout_s: longest wait for the other nodes.
    """

    count: int
    index: int
    address: str
    port: int
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ConfigError(f"node {self.index} of {self.count}: must be 0 to {max(self.count, 1) - 1}")
        if not 0 < self.port < 65536:
            raise ConfigError(f"master port {self.port}: a port is 1 to 65535")
        if not self.address:
            raise ConfigError(f"{self.count} nodes need the address of node 0; name it with --master-addr")


class Ranks(Protocol):
    """Processes of ranks that this process started."""

    @property
    def pids(self) -> dict[int, int]:
        """Process id by rank."""

    @property
    def failures(self) -> dict[int, RankFailure]:
        """How ranks ended badly, by rank."""

    def poll(self) -> bool | None:
        """None while ranks run; then whether all ended well."""

    def wait(self, timeout: float | None = None) -> bool | None:
        """Wait up to ``timeout`` seconds for the end; returns as `poll`."""

    def terminate(self) -> None:
        """End all; returns when they are gone. Idempotent."""


class RankGroup:
    """Running ranks. Ends with the last of them, with `terminate`, or with the calling process."""

    def __init__(
        self,
        nproc: int,
        args: Sequence[str],
        env: Mapping[str, str],
        *,
        quiet: bool,
        report: bool,
        nodes: Nodes | None = None,
    ) -> None:
        self._nproc = nproc  # of this node
        self._nodes = nodes
        self._quiet = quiet
        self._report = report
        self._folder = tempfile.TemporaryDirectory(prefix="yalis-launch-")
        self._stop = threading.Event()
        self._started = threading.Event()
        self._done = threading.Event()
        self._pids: dict[int, int] = {}
        self._failures: dict[int, RankFailure] = {}
        self._failed_first: list[int] = []
        self._stopped: set[int] = set()
        self._error: BaseException | None = None
        # Ranks die with the thread that created them (PR_SET_PDEATHSIG counts threads, not processes), so this one
        # must live as long as they do: it runs the agent from beginning to end.
        self._thread = threading.Thread(
            target=self._run, args=(list(args), dict(env)), name="yalis-launch", daemon=True
        )
        atexit.register(self.terminate)
        self._thread.start()

    @property
    def pids(self) -> dict[int, int]:
        """Process id by rank; waits (at most `_RENDEZVOUS_S`) until they are started."""
        self._started.wait(_RENDEZVOUS_S)
        return dict(self._pids)

    @property
    def started(self) -> bool:
        """Whether this node's ranks were started: not before the nodes have met."""
        return self._started.is_set()

    @property
    def failures(self) -> dict[int, RankFailure]:
        """How ranks ended badly, by rank; complete once the group has ended, empty after a good end.

        Those that failed by themselves come first, then those that were ended because of them.
        """
        return dict(self._failures)

    def poll(self) -> bool | None:
        """None while ranks run; then whether all ended well."""
        if not self._done.is_set():
            return None
        return self._error is None and not self._failures

    def wait(self, timeout: float | None = None) -> bool | None:
        """Wait up to ``timeout`` seconds for the end; returns as `poll`.

        Raises:
            YalisError: the ranks could not be started at all.
        """
        self._done.wait(timeout)
        if self._done.is_set() and self._error is not None:
            raise YalisError(f"could not run {self._nproc} ranks: {self._error}") from self._error
        return self.poll()

    def terminate(self) -> None:
        """End all ranks: SIGTERM, then SIGKILL after `_GRACE_S`. Returns when they are gone. Idempotent."""
        self._stop.set()
        atexit.unregister(self.terminate)
        self._done.wait(_RENDEZVOUS_S)

    def _run(self, args: list[str], env: dict[str, str]) -> None:
        try:
            agent = _make_agent(self, args, env)
            result = agent.run()
            for rank in sorted(result.failures, key=lambda r: (r not in self._failed_first, r)):
                failure = result.failures[rank]
                words = self._error_file(rank)
                message = words.read_text(errors="replace").strip().removeprefix("yalis: ") if words.exists() else ""
                self._failures[rank] = RankFailure(
                    rank, failure.pid, failure.exitcode, message, stopped=rank in self._stopped
                )
            if self._report and not self._stop.is_set():
                for lost in self._failures.values():
                    sys.stderr.write(f"yalis: {lost}\n")
                sys.stderr.flush()
        except BaseException as error:
            self._error = error
            logger.debug("the launch failed", exc_info=True)
        finally:
            with contextlib.suppress(OSError):
                self._folder.cleanup()
            atexit.unregister(self.terminate)
            self._started.set()
            self._done.set()

    def _error_file(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.last-words"


def launch_ranks(
    nproc: int,
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    report: bool = True,
    nodes: Nodes | None = None,
) -> RankGroup:
    """Start ``python -m args[0] args[1:]`` as ``nproc`` ranks on this machine, with torchrun's environment.

    The rendezvous listens on a free port of loopback; with ``nodes``, on their address and port. Ranks inherit stdout
    and stderr. OMP_NUM_THREADS becomes the usable cores / ranks here (at least 1) unless it is set. A rank that fails
    ends the group; nothing is restarted.

    Args:
        nproc: number of ranks, of all nodes together.
        args: module name, then its arguments.
        env: environment variables for the ranks, on top of this process's.
        report: print `RankGroup.failures` on stderr; off for a caller that reports them itself.
        nodes: this node's place; default it is the only one.

    Raises:
        ConfigError: no ranks or no module asked for.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc}: at least one rank is needed")
    if not args:
        raise ConfigError("launch_ranks needs the name of a module to run")
    if nodes is not None:
        if nproc % nodes.count:
            raise ConfigError(f"{nproc} ranks cannot be spread evenly over {nodes.count} nodes; change one of them")
        nproc //= nodes.count
    extra = dict(env or {})
    if "OMP_NUM_THREADS" not in extra and "OMP_NUM_THREADS" not in os.environ:
        extra["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    quiet = os.environ.get("YALIS_LOG_LEVEL", "").upper() != "DEBUG"
    return RankGroup(nproc, args, extra, quiet=quiet, report=report, nodes=nodes)


class AdoptedRank:
    """One rank as a child of this process, in the place that a launcher gave to this process."""

    def __init__(self, args: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="yalis-launch-")
        self._words = Path(self._folder.name) / "last-words"
        self._rank = from_environment(os.environ, ranks_per_node=1).rank
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "yalis.launch", *args],
            env={**os.environ, _PARENT_VARIABLE: str(os.getpid()), ERROR_FILE_VARIABLE: str(self._words)},
            start_new_session=True,  # the terminal's Ctrl-C is for this process, which then ends the rank
        )
        atexit.register(self.terminate)

    @property
    def pids(self) -> dict[int, int]:
        """See `Ranks.pids`."""
        return {self._rank: self._process.pid}

    @property
    def failures(self) -> dict[int, RankFailure]:
        """See `Ranks.failures`."""
        code = self._process.poll()
        if not code:
            return {}
        message = self._words.read_text(errors="replace").strip() if self._words.exists() else ""
        return {self._rank: RankFailure(self._rank, self._process.pid, code, message.removeprefix("yalis: "))}

    def poll(self) -> bool | None:
        """See `Ranks.poll`."""
        code = self._process.poll()
        return None if code is None else code == 0

    def wait(self, timeout: float | None = None) -> bool | None:
        """See `Ranks.wait`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self.poll()

    def terminate(self) -> None:
        """See `Ranks.terminate`."""
        with self._lock:
            if is_stopped(self._process.pid):
                _signal_group(self._process.pid, signal.SIGKILL)
            _end([self._process], patience_s=0.0)
            atexit.unregister(self.terminate)


def adopt_rank(args: Sequence[str]) -> AdoptedRank:
    """Start ``python -m args[0] args[1:]`` with this process's own launch environment; it dies with this thread."""
    return AdoptedRank(args)


def _make_agent(group: RankGroup, args: list[str], env: dict[str, str]) -> LocalElasticAgent:
    # Torch takes a second to import, and the ranks themselves come through this module.
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import SubprocessContext

    if group._quiet:
        # Its loggers have levels of their own; stop their records where they leave the package.
        noise = logging.getLogger("torch.distributed.elastic")
        noise.propagate = False
        noise.addHandler(logging.NullHandler())

    class Agent(LocalElasticAgent):
        """Elastic's agent with our way of ending a group; it would wait 30 s for a stopped rank."""

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            pids: dict[int, Any] = super()._start_workers(worker_group)
            group._pids.update(pids)
            group._started.set()
            return pids

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            context = self._pcontext
            assert isinstance(context, SubprocessContext)
            processes = [handler.proc for handler in context.subprocess_handlers.values()]
            if group._stop.is_set():
                for process in processes:
                    if is_stopped(process.pid):
                        _signal_group(process.pid, signal.SIGKILL)  # it would not hear the SIGTERM
                _end(processes, patience_s=0.0)
            elif failed := [rank for rank, p in enumerate(processes) if p.poll()]:  # an exit code other than 0
                group._failed_first += failed
                for rank, process in enumerate(processes):
                    if is_stopped(process.pid):
                        group._stopped.add(rank)
                        _signal_group(process.pid, signal.SIGKILL)
                _end(processes, patience_s=_PATIENCE_S)
            result: RunResult = super()._monitor_workers(worker_group)
            return result

    nodes = group._nodes
    spec = WorkerSpec(
        role="yalis",
        local_world_size=group._nproc,
        rdzv_handler=_meeting(nodes, group._stop),
        entrypoint=sys.executable,
        # Elastic substitutes ${local_rank} in arguments, and would turn $$ into $.
        args=tuple(a.replace("$", "$$") for a in ("-m", "yalis.launch", *args)),
        max_restarts=0,
        monitor_interval=_POLL_S,
        local_addr="127.0.0.1" if nodes is None else None,
    )
    env = {**env, _PARENT_VARIABLE: str(os.getpid())}
    # The barrier after a good end waits for the other nodes' agents, which may have gone with their hosts.
    return Agent(spec=spec, logs_specs=_inherited_streams(group, env), exit_barrier_timeout=_RENDEZVOUS_S / 4)


def _meeting(nodes: Nodes | None, stop: threading.Event) -> RendezvousHandler:
    """Where the nodes' agents and then the ranks meet.

    Elastic's own rendezvous listen on every interface, and one of them lets the nodes' numbers be decided by a race.

    Args:
        nodes: this node's place; None for the only one.
        stop: ends the wait for the other nodes.
    """
    import torch.distributed
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    c10d: Any = torch.distributed  # its type information does not name the stores
    address, port = ("127.0.0.1", 0) if nodes is None else (nodes.address, nodes.port)
    count, index = (1, 0) if nodes is None else (nodes.count, nodes.index)
    timeout_s = _RENDEZVOUS_S if nodes is None else nodes.timeout_s
    run_id = uuid.uuid4().hex if nodes is None else f"yalis-{port}"

    def wait_for(condition: Callable[[], bool], what: str, deadline: float) -> None:
        while not condition():
            if stop.wait(_MEET_S):
                raise YalisError(f"told to end while it waited for {what}")
            if time.monotonic() > deadline:
                raise YalisError(
                    f"waited {timeout_s:g} s for {what}; start every node with the same addresses and sizes, and look "
                    "for the first error in the output of the one that is missing"
                )

    class Meeting(RendezvousHandler):
        """The store of node 0, on one interface, port 0 for a free one; the ranks use it, too."""

        use_agent_store = True
        _store: Any = None

        def get_backend(self) -> str:
            return "yalis"

        def next_rendezvous(self) -> RendezvousInfo:
            # Torch's own waits hear no stop and print a traceback at every attempt; so nothing is asked of it before it
            # can be answered at once.
            deadline = time.monotonic() + timeout_s
            where = port
            wait: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s), "wait_for_workers": False}
            if index == 0:
                listener = _listener(address, port)
                where = listener.getsockname()[1]
                self._store = c10d.TCPStore(address, where, count, True, master_listen_fd=listener.detach(), **wait)
            else:
                wait_for(partial(_is_listening, address, port), f"node 0 to listen at {address} port {port}", deadline)
                self._store = c10d.TCPStore(address, where, count, False, **wait)
            store = c10d.PrefixStore(run_id, self._store)
            store.set(f"node/{index}", "here")
            for other in range(count):
                wait_for(partial(store.check, [f"node/{other}"]), f"node {other} of {count}", deadline)
            return RendezvousInfo(store, index, count, RendezvousStoreInfo(address, where))

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return run_id

        def shutdown(self) -> bool:
            return True

    return Meeting()


def _is_listening(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
    except OSError:  # not yet, or a name that is not known yet
        return False
    return True


def _listener(address: str, port: int) -> socket.socket:
    """A listening socket on one interface.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"the ranks cannot meet at {address} port {port}: {error}; name an address of this host and a free port"
        ) from error
    return listener


def _inherited_streams(group: RankGroup, env: dict[str, str]) -> LogsSpecs:
    """Elastic's seam for a rank's streams and environment: inherit the streams, add ``env`` and the last-words file."""
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class Inherited(LogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            for rank, rank_env in envs.items():
                rank_env.update(env)
                rank_env[ERROR_FILE_VARIABLE] = str(group._error_file(rank))
            none = dict.fromkeys(envs, "")
            return LogsDest(stdouts=none, stderrs=dict(none), error_files=dict.fromkeys(envs, os.devnull))

        @property
        def root_log_dir(self) -> str:
            return os.devnull

    return Inherited()


def _end(processes: Sequence[Any], *, patience_s: float) -> None:
    """End processes in three steps: let them, ask them, kill them."""
    for number, seconds in ((None, patience_s), (signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        running = [p for p in processes if p.poll() is None]
        for process in running:
            if number is not None:
                _signal_group(process.pid, number)
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            time.sleep(0.01)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)  # each rank leads a group of its own


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped (SIGSTOP) and so will do nothing more by itself."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def leave_words(text: str) -> None:
    """In a rank: leave ``text`` as `RankFailure.message` for the launcher, without printing it."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path:
        Path(path).write_text(text)


def main() -> None:
    """A rank's first steps: die with the launcher, then run the module; an uncaught exception becomes last words.

    A lost peer is no fault of this program: one line instead of a traceback, and exit code 70.
    """
    parent = os.environ.get(_PARENT_VARIABLE)
    if parent is not None:
        die_with_parent(int(parent))
    sys.argv = sys.argv[1:]
    spare_imports()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except PeerLostError as error:
        last_words(f"yalis: {error}")
        raise SystemExit(EXIT_PEER_LOST) from None
    except (Exception, SystemExit) as error:
        if not isinstance(error, SystemExit):
            leave_words("".join(traceback.format_exception_only(error)).strip())
        elif isinstance(error.code, str):  # sys.exit("what was wrong")
            leave_words(error.code)
        raise


if __name__ == "__main__":
    main()

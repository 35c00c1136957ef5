"""Nodes as network namespaces of one host: a real TCP path between them whose rate the kernel's token bucket limits.

Each node is a namespace with one interface; a namespace more holds the bridge between them, so the host's own network
is not touched. ``yalis calibrate --emulate netns,bytes_per_s=...`` and a study's ``emulate`` start their ranks inside;
latency, loss and late ranks stay in the transport (`yalis.comm.emulation`), since not every kernel has netem.

``python -m yalis.study.netns RANKS RANKS_PER_NODE MODULE ARGS`` runs any module so, with ``YALIS_EMULATED_FABRIC`` set.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from yalis.comm.emulation import EmulatedFabric
from yalis.comm.liveness import die_with_parent
from yalis.errors import ConfigError
from yalis.launch import Nodes, launch_ranks

MODULE = "yalis.study.netns"
_PREFIX = "yalis-ns"
_INTERFACE = "eth0"
_PORT = 29500  # every namespace is new: nobody else listens there
_COMMAND_S = 20.0
_GRACE_S = 10.0
# Bytes on the wire for each segment of a TCP stream over Ethernet with timestamps, and what it carries.
_FRAME_BYTES, _PAYLOAD_BYTES = 1514, 1448
# What may pass at once: little, so that short messages see the rate as well, but no less than two frames.
_BURST_S = 200e-6
# Longest wait of a frame in the bucket; TCP's own window keeps the queue far below.
_QUEUE_MS = 400


@dataclass(frozen=True)
class Node:
    """A namespace and its address on the bridge."""

    namespace: str
    address: str


class Running(Protocol):
    """Ranks that were started; `yalis.launch.RankGroup` is one."""

    def wait(self, timeout: float | None = None) -> bool | None:
        """Wait up to ``timeout`` seconds; None while ranks run, then whether all ended well."""

    def terminate(self) -> None:
        """End all."""


def why_not() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (package iproute2)"
    name = f"{_PREFIX}-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
    except ConfigError as error:
        return str(error)
    try:
        _run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        _limit(name, "br0", 1e6)
    except ConfigError as error:
        return str(error)
    finally:
        _delete(name)
    return ""


@contextmanager
def namespaces(count: int, bytes_per_s: float) -> Iterator[list[Node]]:
    """``count`` nodes on a bridge, each sending and receiving at most ``bytes_per_s`` of TCP payload; gone afterwards.

    Args:
        bytes_per_s: 0 for no limit.

    Raises:
        ConfigError: they cannot be made here; says why and what to do instead.
    """
    reason = why_not()
    if reason:
        raise ConfigError(
            f"network namespaces cannot be made here: {reason}; they need root (CAP_NET_ADMIN, CAP_SYS_ADMIN). Leave "
            "netns out of the emulated network: latency and rate are then both in the transport"
        )
    _delete_leftovers()
    switch = f"{_PREFIX}-{os.getpid()}-switch"
    nodes = [Node(f"{_PREFIX}-{os.getpid()}-{i}", f"10.0.0.{i + 1}") for i in range(count)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for i, node in enumerate(nodes):
            space, port = node.namespace, f"port{i}"
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", _INTERFACE, "netns", space)
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", space, "address", "add", f"{node.address}/24", "dev", _INTERFACE)
            _run("ip", "-n", space, "link", "set", _INTERFACE, "up")
            if bytes_per_s:  # both ways, as a NIC is: what leaves, and what arrives from several at once
                _limit(space, _INTERFACE, bytes_per_s)
                _limit(switch, port, bytes_per_s)
        yield nodes
    finally:
        for name in (*(node.namespace for node in nodes), switch):
            _delete(name)


def _limit(space: str, interface: str, bytes_per_s: float) -> None:
    rate = round(8 * bytes_per_s * _FRAME_BYTES / _PAYLOAD_BYTES)
    burst = round(max(2 * _FRAME_BYTES, bytes_per_s * _BURST_S))
    bucket = ("rate", f"{rate}bit", "burst", f"{burst}b", "latency", f"{_QUEUE_MS}ms")
    _run("tc", "-n", space, "qdisc", "add", "dev", interface, "root", "tbf", *bucket)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _delete(name: str) -> None:
    with suppress(ConfigError):  # it may never have been made
        _run("ip", "netns", "delete", name)


def _delete_leftovers() -> None:
    """Namespaces of processes that were killed before they could clean up."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.removeprefix(f"{_PREFIX}-").split("-")[0]
        if name.startswith(f"{_PREFIX}-") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _delete(name)


@contextmanager
def started_ranks(ranks: int, per_node: int, args: Sequence[str], env: Mapping[str, str]) -> Iterator[Running]:
    """``python -m args[0] args[1:]`` as ``ranks`` ranks: in namespaces where ``env`` declares such an emulated network.

    Nothing is left running afterwards.

    Raises:
        ConfigError: namespaces cannot be made, or the emulated network is declared wrongly.
    """
    fabric = EmulatedFabric.from_environment(env)
    if fabric is None or not fabric.namespaces or ranks == per_node:
        group = launch_ranks(ranks, args, env=env)
        try:
            yield group
        finally:
            group.terminate()
        return
    rate = 1 / fabric.s_per_byte if fabric.s_per_byte else 0.0
    with namespaces(ranks // per_node, rate) as nodes:
        launchers = _Launchers(nodes, ranks, args, env)
        try:
            yield launchers
        finally:
            launchers.terminate()


class _Launchers:
    """One launcher in each namespace."""

    def __init__(self, nodes: Sequence[Node], ranks: int, args: Sequence[str], env: Mapping[str, str]):
        place = f"{len(nodes)},{nodes[0].address},{ranks},{os.getpid()}"
        # torch complains of addresses without a name.
        inside = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, **env, "GLOO_SOCKET_IFNAME": _INTERFACE}
        self._processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", node.namespace, sys.executable, "-m", MODULE, "--node", f"{i},{place}", *args],
                env=inside,
            )
            for i, node in enumerate(nodes)
        ]

    def wait(self, timeout: float | None = None) -> bool | None:
        """See `Running.wait`; when one node's ranks have failed, so have all."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            codes = [process.poll() for process in self._processes]
            if any(codes):
                return False
            if None not in codes:
                return True
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)

    def terminate(self) -> None:
        """See `Running.terminate`."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # its ranks die with it
                process.wait()


def end_in_order_at_sigterm() -> None:
    """Let SIGTERM unwind this program, so that namespaces are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main() -> None:
    """``RANKS PER_NODE MODULE ARGS``: run them in namespaces; ``--node PLACE MODULE ARGS``: one of these nodes."""
    if sys.argv[1] == "--node":
        index, count, address, ranks, parent = sys.argv[2].split(",")
        die_with_parent(int(parent))
        nodes = Nodes(int(count), int(index), address, _PORT, timeout_s=60.0)
        raise SystemExit(0 if launch_ranks(int(ranks), sys.argv[3:], nodes=nodes).wait() else 1)
    end_in_order_at_sigterm()
    with started_ranks(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:], os.environ) as running:
        raise SystemExit(0 if running.wait() else 1)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"yalis: {error}") from None

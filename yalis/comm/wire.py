"""Star-shaped TCP links between ranks: rank 0 is the hub. Used by the control channel and by the liveness monitor.

Rank 0 publishes its address and a random token in the launch's store; a follower presents the token in its first
bytes. Whoever else connects (port scanners, another job) is dropped without harm: a stranger can hold one pending slot
for a few seconds and nothing more. The token keeps jobs apart; it is sent in the clear, so it is no protection against
someone who can read the cluster's traffic.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import struct
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from yalis.errors import CommError, TopologyError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

_MAGIC = b"yalis-1\0"
_TOKEN_BYTES = 32
_HELLO = struct.Struct("!8s32sI")
_ACCEPTED = b"\x01"
_MAX_PENDING = 64
_PENDING_S = 5.0
LENGTH = struct.Struct("!I")


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used here."""

    def set(self, key: str, value: str) -> Any:
        """Store ``value``."""

    def get(self, key: str) -> bytes:
        """The value, waiting for it."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; returns the new value."""

    def wait(self, keys: list[str], timeout: timedelta) -> Any:
        """Wait until the keys exist; RuntimeError after ``timeout``."""


def network_identity() -> str:
    """Equal on two processes exactly when they share a loopback interface (same kernel, same network namespace)."""
    return f"{_boot_id()}/{_namespace('net')}"


def process_identity() -> str:
    """Equal on two processes exactly when a pid means the same to both (same kernel, same pid namespace)."""
    return f"{_boot_id()}/{_namespace('pid')}"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0


def connect_star(
    name: str, rank: int, world_size: int, store: Store, *, timeout_s: float, bind_host: str | None = None
) -> dict[int, socket.socket]:
    """Connect every rank to rank 0. Collective: every rank calls it, in the same order for each ``name``.

    Args:
        name: names the star in the store, such as ``"control"``; may be used again for a later star.
        rank: this rank.
        world_size: number of ranks.
        store: the launch's store.
        timeout_s: longest wait for all others, in seconds.
        bind_host: address or name of rank 0's interface that the others can reach; default loopback when all ranks
            share it, else the interface on the route to MASTER_ADDR.

    Returns:
        Non-blocking sockets with TCP_NODELAY. On rank 0 one per follower, by its rank; on a follower one, under key 0.

    Raises:
        CommError: somebody did not come in time, or rank 0 cannot be reached.
        TopologyError: no address of this host can be told.
    """
    deadline = time.monotonic() + timeout_s
    # The counter gives each use of a name keys of its own, so that nobody reads the address of an earlier star.
    key = f"yalis/{name}/{store.add(f'yalis/{name}/uses/{rank}', 1)}"
    if world_size == 1:
        return {}
    if rank == 0:
        return _host(key, world_size, store, deadline, timeout_s, bind_host)
    store.set(f"{key}/network/{rank}", network_identity())
    _wait(store, f"{key}/address", deadline, timeout_s, "rank 0 to publish its address")
    where = json.loads(store.get(f"{key}/address"))
    return {0: _join(rank, where["host"], int(where["port"]), bytes.fromhex(where["token"]), deadline)}


def _wait(store: Store, key: str, deadline: float, timeout_s: float, what: str) -> None:
    try:
        store.wait([key], timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError as error:
        raise CommError(
            f"waited {timeout_s:g} s for {what}; look for the first error in that rank's output, or raise "
            f"distributed_timeout_s if it is only slow ({error})"
        ) from error


def _host(
    key: str, world_size: int, store: Store, deadline: float, timeout_s: float, bind_host: str | None
) -> dict[int, socket.socket]:
    mine = network_identity()
    one_host = True
    for rank in range(1, world_size):
        _wait(store, f"{key}/network/{rank}", deadline, timeout_s, f"rank {rank} to come up")
        one_host &= store.get(f"{key}/network/{rank}").decode() == mine
    host = bind_host or ("127.0.0.1" if one_host else reachable_address(os.environ.get("MASTER_ADDR", "")))
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    token = secrets.token_bytes(_TOKEN_BYTES)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            raise TopologyError(f"cannot listen on {host}: {error}; name an address of this host") from error
        listener.listen(world_size + _MAX_PENDING)
        store.set(f"{key}/address", json.dumps({"host": host, "port": listener.getsockname()[1], "token": token.hex()}))
        return _accept_all(listener, token, world_size, deadline, timeout_s)


def reachable_address(master: str) -> str:
    """Address of this host's interface on the route to ``master``, or on the default route.

    Distributions commonly map a host's own name to 127.0.1.1, which no other host can reach; hence the second try.

    Raises:
        TopologyError: there is only loopback.
    """
    for target in (master, "192.0.2.1", "2001:db8::1"):  # documentation addresses; connecting UDP sends nothing
        try:
            family, _, _, _, address = socket.getaddrinfo(target or "127.0.0.1", 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                found = str(probe.getsockname()[0])
        except OSError:
            continue
        if not found.startswith("127.") and found != "::1":
            return found
    raise TopologyError(
        f"ranks run on several hosts, but this host has no address that others can reach "
        f"(MASTER_ADDR={master or 'unset'}); set MASTER_ADDR to the address of rank 0's host"
    )


def _accept_all(
    listener: socket.socket, token: bytes, world_size: int, deadline: float, timeout_s: float
) -> dict[int, socket.socket]:
    links: dict[int, socket.socket] = {}
    pending: dict[socket.socket, tuple[bytearray, float]] = {}
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)

        def drop(sock: socket.socket, why: str) -> None:
            logger.warning("dropped a connection to the rendezvous of ranks: %s", why)
            selector.unregister(sock)
            del pending[sock]
            sock.close()

        try:
            while len(links) < world_size - 1:
                now = time.monotonic()
                if now >= deadline:
                    missing = [r for r in range(1, world_size) if r not in links]
                    raise CommError(
                        f"waited {timeout_s:g} s for rank(s) {', '.join(map(str, missing))} to connect to "
                        f"{listener.getsockname()[0]}; check that they run and can reach this address"
                    )
                for stale in [s for s, (_, until) in pending.items() if now >= until]:
                    drop(stale, "no greeting")
                for selected, _ in selector.select(min(0.5, deadline - now)):
                    if selected.fileobj is listener:
                        try:
                            sock, _ = listener.accept()
                        except OSError:
                            continue  # gone again before it was accepted
                        if len(pending) >= _MAX_PENDING:
                            drop(next(iter(pending)), "too many at once")
                        sock.setblocking(False)
                        pending[sock] = (bytearray(), now + _PENDING_S)
                        selector.register(sock, selectors.EVENT_READ)
                        continue
                    sock = selected.fileobj  # type: ignore[assignment]
                    if sock not in pending:
                        continue
                    greeting, _ = pending[sock]
                    try:
                        data = sock.recv(_HELLO.size - len(greeting))
                    except OSError as error:
                        drop(sock, str(error))
                        continue
                    greeting += data
                    # Strangers are told apart by their first bytes, so that none is waited for longer than needed.
                    if not data or greeting[: len(_MAGIC)] != _MAGIC[: len(greeting)]:
                        drop(sock, "not one of ours")
                    elif len(greeting) == _HELLO.size:
                        _, given, rank = _HELLO.unpack(greeting)
                        if not hmac.compare_digest(given, token):
                            drop(sock, "wrong token")
                        elif not 0 < rank < world_size or rank in links:
                            drop(sock, f"rank {rank} is taken or outside a world of {world_size}")
                        else:
                            selector.unregister(sock)
                            del pending[sock]
                            sock.send(_ACCEPTED)
                            links[rank] = _tuned(sock)
        except BaseException:
            for sock in links.values():
                sock.close()
            raise
        finally:
            for sock in pending:
                sock.close()
    return links


def _join(rank: int, host: str, port: int, token: bytes, deadline: float) -> socket.socket:
    remedy = "check that this host can reach it (firewall, interface of MASTER_ADDR)"
    try:
        sock = socket.create_connection((host, port), timeout=max(0.001, deadline - time.monotonic()))
    except OSError as error:
        raise CommError(f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}; {remedy}") from error
    try:
        sock.sendall(_HELLO.pack(_MAGIC, token, rank))
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        if sock.recv(1) != _ACCEPTED:
            raise ConnectionError("refused")
    except OSError as error:
        sock.close()
        raise CommError(
            f"rank 0 at {host}:{port} did not let rank {rank} join: {error}; two processes may have the same rank"
        ) from error
    return _tuned(sock)


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock

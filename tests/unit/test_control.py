"""The control channel and its rendezvous, with ranks as threads of one process."""

from __future__ import annotations

import ctypes
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import FileStore
from yalis.comm import control, wire
from yalis.comm.control import ChannelClosedError, ControlChannel
from yalis.comm.guard import NullGuard
from yalis.comm.topology import Topology
from yalis.errors import CommError, PeerLostError, TopologyError


class FlagGuard(NullGuard):
    """A guard with an abort flag and a record of the waits."""

    def __init__(self) -> None:
        super().__init__()
        self.flag = ctypes.c_int32(0)
        self.waits: list[str] = []

    def entered(self, what: str) -> None:
        self.waits.append(what)

    def left(self) -> None:
        self.waits.append("left")

    def abort_flag_address(self) -> int:
        return ctypes.addressof(self.flag)


def connect_all(store: FileStore, world: int, guards: list[Any] | None = None, **options: Any) -> list[ControlChannel]:
    def one(rank: int) -> ControlChannel:
        topology = Topology(rank, world, world)
        guard = guards[rank] if guards else None
        return ControlChannel.connect(topology, store, guard=guard, **{"timeout_s": 10.0, **options})

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


@pytest.fixture
def trio(store: FileStore) -> Iterator[list[ControlChannel]]:
    channels = connect_all(store, 3)
    yield channels
    for channel in channels:
        channel.close()


def test_frames_arrive_in_order_and_whole(trio: list[ControlChannel]) -> None:
    payloads = [b"", b"x", b"y" * 70_000, json.dumps({"step": 3}).encode()]
    for payload in payloads:
        trio[0].broadcast(payload)
    for follower in trio[1:]:
        assert [follower.recv() for _ in payloads] == payloads


def test_followers_answer(trio: list[ControlChannel]) -> None:
    trio[2].send_to_root(b"two")
    trio[1].send_to_root(b"one")
    assert trio[0].recv_from(1) == b"one"
    assert trio[0].recv_from(2) == b"two"


def test_frame_larger_than_the_socket_buffers(trio: list[ControlChannel]) -> None:
    payload = bytes(range(256)) * (1 << 16)  # 16 MiB
    with ThreadPoolExecutor(2) as pool:
        received = [pool.submit(follower.recv) for follower in trio[1:]]
        trio[0].broadcast(payload)
        assert all(r.result(10) == payload for r in received)


@pytest.mark.parametrize("size", [0, 999, 1000, 1001, 2000, 5432])
def test_payload_of_any_size_travels_in_frames(
    trio: list[ControlChannel], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(control, "MAX_FRAME_BYTES", 1000)
    payload = bytes(i % 251 for i in range(size))
    trio[0].broadcast(payload)
    trio[0].broadcast(b"next")
    trio[2].send_to_root(payload)
    assert [follower.recv() for follower in trio[1:]] == [payload] * 2
    assert [follower.recv() for follower in trio[1:]] == [b"next"] * 2
    assert trio[0].recv_from(2) == payload


def test_frame_over_the_limit_is_refused(trio: list[ControlChannel], monkeypatch: pytest.MonkeyPatch) -> None:
    trio[0].broadcast(b"z" * 2000)
    monkeypatch.setattr(control, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(CommError, match="rank 0 announced a control frame of 2000 bytes; the limit is 1000"):
        trio[1].recv()


def test_all_wait_for_the_slowest_and_the_verdict_ends_it(store: FileStore) -> None:
    guards = [FlagGuard(), FlagGuard(), FlagGuard()]
    channels = connect_all(store, 3, guards, timeout_s=5.0)
    for channel in channels:
        channel._timeout_s = 0.1  # shorter than the wait below: must not matter
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(channels[rank].assemble, "load") for rank in (0, 2)]
        time.sleep(0.4)
        assert not any(one.done() for one in early)
        # What the guard hears begins so that it does not judge the wait.
        assert {guards[rank].waits[-1] for rank in (0, 2)} == {f"{control.PATIENT}waiting for all ranks (load)"}
        channels[1].assemble("load")
        for one in early:
            one.result(5)
        early = [pool.submit(channels[rank].assemble, "capture") for rank in (0, 1)]
        time.sleep(0.1)
        for guard in guards:
            guard.flag.value = 1
        for one in early:
            with pytest.raises(PeerLostError):
                one.result(5)
    for channel in channels:
        channel.close()


def test_farewell_comes_after_what_was_sent(trio: list[ControlChannel]) -> None:
    trio[0].broadcast(b"last")
    trio[0].close()
    trio[0].close()
    assert trio[1].recv() == b"last"
    with pytest.raises(ChannelClosedError, match="rank 0 closed"):
        trio[1].recv()
    with pytest.raises(CommError, match="the channel is closed"):
        trio[0].recv_from(1)


def test_connection_lost_without_farewell(trio: list[ControlChannel]) -> None:
    trio[1]._links[0].close()
    with pytest.raises(PeerLostError, match="connection was closed") as lost:
        trio[0].recv_from(1)
    assert lost.value.rank == 1


def test_silence_ends_a_wait(trio: list[ControlChannel]) -> None:
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="control/recv from rank 1"):
        trio[0].recv_from(1, timeout_s=0.2)
    assert 0.2 <= time.monotonic() - begin < 1.0


def test_a_follower_that_does_not_read_ends_a_send(store: FileStore) -> None:
    channels = connect_all(store, 2, timeout_s=0.5)
    with pytest.raises(PeerLostError, match="control/send to rank 1"):
        channels[0].broadcast(bytes(32 << 20))
    for channel in channels:
        channel.close()


def test_idle_wait_has_no_limit_but_the_verdict(store: FileStore) -> None:
    guards = [FlagGuard(), FlagGuard()]
    channels = connect_all(store, 2, guards, timeout_s=5.0)
    channels[1]._timeout_s = 0.1  # shorter than the wait below: must not matter
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(channels[1].recv)
        time.sleep(0.4)
        assert not waiting.done()
        assert guards[1].waits == [control.IDLE]
        channels[0].broadcast(b"go")
        assert waiting.result(2) == b"go"
        assert guards[1].waits == [control.IDLE, "left"]
        waiting = pool.submit(channels[1].recv)
        time.sleep(0.1)
        guards[1].flag.value = 1
        begin = time.monotonic()
        with pytest.raises(PeerLostError):
            waiting.result(2)
        assert time.monotonic() - begin < 0.5
    for channel in channels:
        channel.close()


def test_without_a_watch_even_the_idle_wait_ends(store: FileStore) -> None:
    channels = connect_all(store, 2)
    channels[1]._timeout_s = 0.2
    with pytest.raises(PeerLostError):
        channels[1].recv()
    for channel in channels:
        channel.close()


def test_world_of_one(store: FileStore) -> None:
    channel = ControlChannel.connect(Topology(), store, timeout_s=1.0)
    channel.broadcast(b"nobody")
    channel.close()


def test_a_name_can_be_used_again(store: FileStore) -> None:
    for word in (b"first", b"second"):
        channels = connect_all(store, 2)
        channels[0].broadcast(word)
        assert channels[1].recv() == word
        for channel in channels:
            channel.close()


def test_missing_rank_is_named(store: FileStore) -> None:
    with pytest.raises(CommError, match="rank 1 to come up"):
        ControlChannel.connect(Topology(0, 2, 2), store, timeout_s=0.3)


def test_rank_that_does_not_connect_is_named(store: FileStore) -> None:
    store.set("yalis/control/1/network/1", wire.network_identity())
    with pytest.raises(CommError, match=r"waited 0\.3 s for rank\(s\) 1 to connect"):
        ControlChannel.connect(Topology(0, 2, 2), store, timeout_s=0.3)


def test_missing_hub_is_named(store: FileStore) -> None:
    with pytest.raises(CommError, match="rank 0 to publish its address"):
        ControlChannel.connect(Topology(1, 2, 2), store, timeout_s=0.3)


def hello(token: bytes, rank: int) -> bytes:
    return wire._HELLO.pack(wire._MAGIC, token, rank)


@pytest.mark.parametrize(
    "greeting",
    [
        lambda token: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        lambda token: hello(bytes(32), 1),
        lambda token: hello(token, 0),
        lambda token: hello(token, 7),
        lambda token: hello(token, 1)[:-1],
        lambda token: b"",
    ],
    ids=["http", "wrong token", "rank 0", "rank 7", "half a greeting", "silent"],
)
def test_strangers_are_ignored(store: FileStore, greeting: Callable[[bytes], bytes]) -> None:
    """A stranger connects before the followers do, says something wrong or nothing, and stays."""
    channels: dict[int, ControlChannel] = {}

    def one(rank: int) -> None:
        channels[rank] = ControlChannel.connect(Topology(rank, 3, 3), store, timeout_s=8.0)

    hub = threading.Thread(target=one, args=(0,))
    first = threading.Thread(target=one, args=(2,))
    store.set("yalis/control/1/network/1", wire.network_identity())
    hub.start()
    first.start()
    store.wait(["yalis/control/1/address"], timedelta(seconds=5))
    where = json.loads(store.get("yalis/control/1/address"))
    with socket.create_connection((where["host"], where["port"])) as stranger:
        stranger.settimeout(0.2)
        stranger.sendall(greeting(bytes.fromhex(where["token"])))
        try:
            answer = stranger.recv(1)
        except OSError:
            answer = b""
        assert answer != wire._ACCEPTED
        begin = time.monotonic()
        one(1)
        hub.join(5)
        first.join(5)
        assert time.monotonic() - begin < 2.0
    channels[0].broadcast(b"ours")
    assert channels[1].recv() == channels[2].recv() == b"ours"
    for channel in channels.values():
        channel.close()


def test_second_process_with_the_same_rank_is_refused(store: FileStore) -> None:
    store.set("yalis/control/1/network/2", wire.network_identity())
    outcome: list[Exception] = []

    def hub() -> None:
        try:
            ControlChannel.connect(Topology(0, 3, 3), store, timeout_s=1.5)
        except CommError as error:
            outcome.append(error)

    thread = threading.Thread(target=hub)
    thread.start()
    channel = ControlChannel.connect(Topology(1, 3, 3), store, timeout_s=1.5)
    where = json.loads(store.get("yalis/control/1/address"))
    with pytest.raises(CommError, match="two processes may have the same rank"):
        wire._join(1, where["host"], where["port"], bytes.fromhex(where["token"]), time.monotonic() + 1.0)
    thread.join(5)
    channel.close()
    assert "rank(s) 2 to connect" in str(outcome[0])


def test_bind_host(store: FileStore) -> None:
    channels = connect_all(store, 2, bind_host="127.0.0.2")
    assert channels[1]._links[0].getpeername()[0] == "127.0.0.2"
    for channel in channels:
        channel.close()


def test_bind_host_of_another_machine_is_refused(store: FileStore) -> None:
    store.set("yalis/control/1/network/1", wire.network_identity())
    with pytest.raises(TopologyError, match=r"cannot listen on 192\.0\.2\.7"):
        ControlChannel.connect(Topology(0, 2, 2), store, timeout_s=1.0, bind_host="192.0.2.7")


def test_ranks_without_a_common_loopback_use_a_reachable_address(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "reachable_address", lambda master: "127.0.0.3")
    identities = iter(range(10))
    monkeypatch.setattr(wire, "network_identity", lambda: f"host {next(identities)}")
    channels = connect_all(store, 2)
    assert channels[1]._links[0].getpeername()[0] == "127.0.0.3"
    for channel in channels:
        channel.close()


def test_only_loopback_is_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **named: real("127.0.0.1", *rest, **named))
    with pytest.raises(TopologyError, match="MASTER_ADDR=node7"):
        wire.reachable_address("node7")

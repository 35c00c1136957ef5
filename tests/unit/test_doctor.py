from __future__ import annotations

import argparse
import errno
import json
import resource
from pathlib import Path

import pytest

from yalis.cli import doctor
from yalis.cli.doctor import Finding
from yalis.errors import CommError

H100 = {"index": 0, "name": "NVIDIA H100", "memory_bytes": 80 << 30, "driver": "580.1", "bus": "0"}
ETH = [{"name": "eth3", "state": "up", "speed_mbit": 25000, "mtu": 9000}]
TWO_NODES = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
ROWS = [{"bytes": 8192, "algorithm": "shm", "time_us": 4.25, "wrong": 0}]


def run(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    return doctor.run(parser.parse_args(["doctor", *flags]))


@pytest.fixture
def findings(monkeypatch) -> list[Finding]:
    """What the machine checks find; the test fills it."""
    found: list[Finding] = []
    monkeypatch.setattr(doctor, "machine_findings", lambda: list(found))
    monkeypatch.setattr("yalis.cli.allreduce_check.run_check", lambda: ROWS)
    return found


@pytest.mark.parametrize(("status", "code"), [("OK", 0), ("WARN", 0), ("FAIL", 1)])
def test_exit_code_and_plain_report(findings, capsys, status, code) -> None:
    findings.append(Finding("thing", status, "is so", "" if status == "OK" else "do this"))
    assert run() == code
    out = capsys.readouterr().out
    assert out.splitlines()[0].split(maxsplit=2) == [status, "thing", "is so"]
    assert ("fix: do this" in out) == (status != "OK")
    assert "4.2 us by shm" in out
    assert "\x1b" not in out


def test_json_report(findings, capsys) -> None:
    findings.append(Finding("thing", "WARN", "is so", "do this"))
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0] == {"name": "thing", "status": "WARN", "detail": "is so", "fix": "do this"}
    assert report["all_reduce"] == ROWS
    assert report["machine"]["versions"]["yalis"]
    assert isinstance(report["launch_environment"], dict)


def test_no_allreduce_runs_none(findings, capsys, monkeypatch) -> None:
    monkeypatch.setattr("yalis.cli.allreduce_check.run_check", lambda: pytest.fail("must not run"))
    findings.append(Finding("thing", "OK", "is so"))
    assert run("--no-allreduce") == 0
    assert "all-reduce" not in capsys.readouterr().out


def test_terminal_report_keeps_brackets(findings, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    findings.append(Finding("thing", "FAIL", "bad [red]list[/red]", "mend [it]"))
    assert run("--no-allreduce") == 1
    out = capsys.readouterr().out
    assert "bad [red]list[/red]" in out
    assert "fix: mend [it]" in out
    assert "1 failures" in out


def test_every_check_runs_here_and_every_problem_has_a_fix() -> None:
    found = doctor.machine_findings()
    assert {"python", "torch", "cpu", "gpus", "rdma", "c compiler", "/dev/shm", "network", "launch"} <= {
        f.name for f in found
    }
    assert all(f.detail for f in found)
    assert all(bool(f.fix) == (f.status != "OK") for f in found)


@pytest.mark.parametrize(
    ("version", "cuda", "works", "gpu", "status"),
    [
        ("2.13.0+cpu", None, False, False, "OK"),
        ("2.11.0+cu130", "13.0", True, True, "OK"),
        ("2.13.0+cpu", None, False, True, "WARN"),
        ("2.11.0+cu130", "13.0", False, True, "FAIL"),
        ("2.9.1", None, False, False, "FAIL"),
    ],
)
def test_torch(version, cuda, works, gpu, status) -> None:
    finding = doctor.judge_torch(version, cuda, works, gpu)
    assert finding.status == status
    assert version in finding.detail


def test_cpu_without_bf16_warns() -> None:
    assert doctor.check_cpu("Zen 5", 2, "x86_64", frozenset({"avx2", "avx512_bf16"})).status == "OK"
    slow = doctor.check_cpu("Old", 1, "x86_64", frozenset({"avx2"}))
    assert slow.status == "WARN"
    assert "float32" in slow.fix
    assert doctor.check_cpu("Grace", 72, "aarch64", frozenset({"bf16"})).status == "OK"


def test_gpus_and_links() -> None:
    both = [H100, {**H100, "index": 1}]
    gpu, link = doctor.check_gpus(both, {"GPU0-GPU1": "NV18"})
    assert "2 x NVIDIA H100 (80 GiB), driver 580.1" in gpu.detail
    assert (link.status, link.detail) == ("OK", "NV18 (1 pairs)")
    assert doctor.check_gpus(both, {"GPU0-GPU1": "SYS"})[1].status == "WARN"
    assert doctor.check_gpus(both, {})[1].status == "WARN"
    assert len(doctor.check_gpus([H100], {})) == 1


def test_driver_that_does_not_answer_warns(monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.check_gpus([], {})[0].status == "WARN"


def test_rdma(tmp_path: Path) -> None:
    port = {"name": "mlx5_0", "port": "1", "state": "ACTIVE", "rate": "400 Gb/sec", "link_layer": "InfiniBand"}
    unlimited = resource.RLIM_INFINITY
    assert [f.status for f in doctor.check_rdma([], True, tmp_path, 0)] == ["OK"]
    assert [f.status for f in doctor.check_rdma([port], False, tmp_path, unlimited)] == ["OK"]
    down = doctor.check_rdma([{**port, "state": "DOWN"}], False, tmp_path, unlimited)
    assert [f.status for f in down] == ["WARN"]
    locked = doctor.check_rdma([port], False, tmp_path, 8 << 20)
    assert [f.name for f in locked if f.status == "WARN"] == ["locked memory"]
    direct = doctor.check_rdma([port], True, tmp_path, unlimited)
    assert [f.name for f in direct if f.status == "WARN"] == ["gpu-direct"]
    (tmp_path / "nvidia_peermem").mkdir()
    assert [f.status for f in doctor.check_rdma([port], True, tmp_path, unlimited)] == ["OK"]


def test_compiler_missing_or_broken(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YALIS_CACHE_DIR", str(tmp_path / "cache"))
    assert doctor.check_compiler().status == "OK"
    assert list((tmp_path / "cache").rglob("doctor-probe-*.so"))
    monkeypatch.setattr("yalis.utils.native.compiler", lambda: None)
    assert doctor.check_compiler().status == "FAIL"
    broken = tmp_path / "broken-cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "stdint.h: No such file" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setattr("yalis.utils.native.compiler", lambda: str(broken))
    finding = doctor.check_compiler()
    assert finding.status == "FAIL"
    assert "stdint.h: No such file" in finding.detail


def test_compiler_with_unusable_cache(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YALIS_CACHE_DIR", str(tmp_path / "file"))
    finding = doctor.check_compiler()
    assert finding.status == "FAIL"
    assert "YALIS_CACHE_DIR" in finding.fix


def test_shared_memory(monkeypatch, tmp_path: Path) -> None:
    usage = {"free": 8 << 30}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: argparse.Namespace(total=16 << 30, **usage))
    assert doctor.check_shared_memory(tmp_path).status == "OK"
    usage["free"] = 63 << 20
    small = doctor.check_shared_memory(tmp_path)
    assert small.status == "WARN"
    assert "--shm-size" in small.fix

    def refuse(**kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    finding = doctor.check_shared_memory(tmp_path)
    assert finding.status == "FAIL"
    assert "Read-only" in finding.detail


@pytest.mark.parametrize(
    ("env", "address", "status"),
    [
        ({}, "10.0.0.7", "OK"),
        ({}, "127.0.1.1", "OK"),
        ({}, None, "WARN"),
        (TWO_NODES, "10.0.0.7", "OK"),
        (TWO_NODES, "127.0.1.1", "FAIL"),
        (TWO_NODES, "::1", "FAIL"),
        (TWO_NODES, None, "FAIL"),
        (TWO_NODES | {"GLOO_SOCKET_IFNAME": "eth3"}, None, "OK"),
        ({"GLOO_SOCKET_IFNAME": "ib9"}, "10.0.0.7", "FAIL"),
    ],
)
def test_network(env, address, status) -> None:
    finding = doctor.check_network(env, ETH, hostname="node1", resolve=lambda name: address)
    assert finding.status == status
    if status != "OK":
        assert "eth3" in finding.fix


def test_name_server_that_does_not_answer_is_not_waited_for(monkeypatch) -> None:
    import threading
    import time

    release = threading.Event()
    monkeypatch.setattr(doctor, "_RESOLVE_TIMEOUT_S", 0.1)

    def hang(*args: object, **kwargs: object) -> None:
        release.wait(20)
        raise OSError("no answer")

    monkeypatch.setattr(doctor.socket, "getaddrinfo", hang)
    start = time.monotonic()
    try:
        assert doctor._resolve("node1") is None
        assert time.monotonic() - start < 5
    finally:
        release.set()


def test_launch() -> None:
    assert "no launcher" in doctor.check_launch({}).detail
    two = doctor.check_launch(TWO_NODES)
    assert two.status == "OK"
    assert "torchrun: rank 1 of 2 nodes x 1 ranks, meeting at node0:29500" in two.detail
    assert doctor.check_launch({"RANK": "0"}).status == "FAIL"
    assert doctor.check_launch(TWO_NODES | {"RANK": "5"}).status == "FAIL"
    assert doctor.check_launch({k: v for k, v in TWO_NODES.items() if k != "MASTER_ADDR"}).status == "FAIL"


def test_limits() -> None:
    assert doctor.check_open_files(65536, 65536).status == "OK"
    assert doctor.check_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY).status == "OK"
    assert doctor.check_open_files(256, 4096).fix == "ulimit -n 4096"
    assert doctor.check_memory(8 << 30, 16 << 30).status == "OK"
    assert doctor.check_memory(1 << 30, 16 << 30).status == "WARN"


def test_cgroup_limit(tmp_path: Path) -> None:
    path = tmp_path / "memory.max"
    assert doctor._cgroup_limit(path) is None
    path.write_text("max\n")
    assert doctor._cgroup_limit(path) is None
    path.write_text("1073741824\n")
    assert doctor._cgroup_limit(path) == 1 << 30


def test_allreduce_findings() -> None:
    def fail() -> list[dict[str, object]]:
        raise CommError("rank 1 exited with 1: no route to host")

    findings, rows = doctor.check_allreduce(fail)
    assert (findings[0].status, rows) == ("FAIL", [])
    assert "no route to host" in findings[0].detail
    wrong, slow, good = doctor.check_allreduce(
        lambda: [
            {"bytes": 8192, "algorithm": "shm", "time_us": 4.0, "wrong": 3},
            {"bytes": 8192, "algorithm": "torch", "time_us": 90.0, "wrong": 0},
            {"bytes": 8192, "algorithm": "shm", "time_us": 4.0, "wrong": 0},
        ]
    )[0]
    assert [f.status for f in (wrong, slow, good)] == ["FAIL", "WARN", "OK"]

"""``yalis doctor``: what is on this machine, what is wrong with it for many ranks, and how to mend it.

Each check is a function that returns findings and never raises for what it finds; the facts that it judges are passed
in where a test must be able to change them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import ipaddress
import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from yalis.errors import BuildError, CommError, TopologyError

Status = Literal["OK", "WARN", "FAIL"]

_EXAMPLES = """examples:
  yalis doctor                        look at this machine
  yalis doctor --json > report.json   the same for programs, with the full machine record
  srun -N2 --ntasks-per-node=1 yalis doctor --no-allreduce
                                      look at every node of an allocation

The exit code is 1 if anything FAILs; a WARN costs speed or fails only in some launches."""

_MIB, _GIB = 1 << 20, 1 << 30
_RESOLVE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        status: ``OK``; ``WARN``: slower, or wrong in some launches; ``FAIL``: ranks will not run.
        detail: what was found.
        fix: how to mend it; empty for ``OK``.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register the options of ``yalis doctor``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="look at this machine, say what is wrong and how to mend it",
        description="Look at this machine, say what is wrong for running many ranks, and how to mend it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: findings, all-reduce rows, machine")
    parser.add_argument("--no-allreduce", action="store_true", help="leave out the all-reduce between two local ranks")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a finding is ``FAIL``, else 0."""
    findings = machine_findings()
    rows: list[dict[str, Any]] = []
    if not args.no_allreduce:
        from yalis.cli.allreduce_check import run_check

        allreduce, rows = check_allreduce(run_check)
        findings += allreduce
    if args.json:
        from yalis.utils.machine import launch_environment, machine_record

        record = {
            "findings": [dataclasses.asdict(f) for f in findings],
            "all_reduce": rows,
            "machine": machine_record(),
            "launch_environment": launch_environment(),
        }
        print(json.dumps(record, indent=2))
    elif sys.stdout.isatty():
        _print_rich(findings)
    else:
        print(render_plain(findings))
    return int(any(f.status == "FAIL" for f in findings))


def machine_findings() -> list[Finding]:
    """Every check but the all-reduce, in the order of the report."""
    from yalis.utils import machine
    from yalis.utils.native import cpu_flags

    gpus, links, nics = machine.gpus(), machine.gpu_links(), machine.network_devices()
    return [
        check_python(),
        check_torch(gpus),
        check_cpu(machine.cpu_model(), machine.usable_cores(), platform.machine(), cpu_flags()),
        *check_gpus(gpus, links),
        *check_rdma(nics["rdma"], bool(gpus), Path("/sys/module"), resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        check_compiler(),
        check_shared_memory(Path("/dev/shm")),
        check_network(os.environ, nics["net"]),
        check_launch(os.environ),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_memory(),
    ]


# ---- the checks ---------------------------------------------------------------------------------------------------


def check_python() -> Finding:
    """The interpreter (one that is too old cannot get here)."""
    return Finding("python", "OK", f"{platform.python_version()}, {sys.executable}")


def check_torch(gpus: Sequence[Mapping[str, Any]]) -> Finding:
    """torch, and whether its build fits the machine."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that it needs is missing
        return Finding("torch", "FAIL", f"cannot be imported: {error}", "make setup, or pip install 'torch>=2.11'")
    return judge_torch(torch.__version__, torch.version.cuda, torch.cuda.is_available(), bool(gpus))


def judge_torch(version: str, cuda: str | None, cuda_works: bool, has_gpu: bool) -> Finding:
    """The finding for a torch of this version and build on a machine with or without a GPU."""
    build = f"CUDA {cuda} build" if cuda else "CPU build"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11):
        return Finding("torch", "FAIL", f"{version} ({build})", "pip install 'torch>=2.11'")
    if has_gpu and not cuda:
        return Finding(
            "torch", "WARN", f"{version} ({build}), but there is a GPU", "install a CUDA build of torch to use the GPU"
        )
    if has_gpu and not cuda_works:
        return Finding(
            "torch",
            "FAIL",
            f"{version} ({build}) cannot use the GPU",
            f"use a driver that supports CUDA {cuda}, or a torch built for an older CUDA; look at CUDA_VISIBLE_DEVICES",
        )
    return Finding("torch", "OK", f"{version} ({build})")


def check_cpu(model: str, cores: int, machine: str, flags: frozenset[str]) -> Finding:
    """The CPU and the features that decide how fast bf16 is."""
    from yalis.utils.machine import NOTABLE_CPU_FLAGS

    notable = [flag for flag in NOTABLE_CPU_FLAGS if flag in flags]
    detail = (
        f"{model}, {cores} usable core{'s' if cores > 1 else ''}, {' '.join(notable) or 'no vector extensions known'}"
    )
    if machine == "x86_64" and not flags & {"avx512_bf16", "amx_bf16"}:
        return Finding(
            "cpu",
            "WARN",
            f"{detail}: no avx512_bf16",
            "bf16 is emulated and slow on this CPU: run with --dtype float32",
        )
    return Finding("cpu", "OK", detail)


def check_gpus(gpus: Sequence[Mapping[str, Any]], links: Mapping[str, str]) -> list[Finding]:
    """GPUs, their driver, and what connects them."""
    if not gpus:
        if shutil.which("nvidia-smi"):
            fix = "the driver does not answer: run nvidia-smi and follow what it says"
            return [Finding("gpus", "WARN", "nvidia-smi is installed but lists no GPU", fix)]
        return [Finding("gpus", "OK", "none; ranks run on the CPU")]
    sizes = [f"{gpu['memory_bytes'] / _GIB:.0f} GiB" if gpu["memory_bytes"] else "memory unknown" for gpu in gpus]
    kinds = sorted({f"{gpu['name']} ({size})" for gpu, size in zip(gpus, sizes, strict=True)})
    drivers = sorted({str(gpu["driver"]) for gpu in gpus})
    findings = [Finding("gpus", "OK", f"{len(gpus)} x {', '.join(kinds)}, driver {', '.join(drivers)}")]
    if len(gpus) > 1:
        kinds_of_link = sorted(set(links.values()))
        detail = ", ".join(f"{kind} ({sum(v == kind for v in links.values())} pairs)" for kind in kinds_of_link)
        if not links:
            fix = "run nvidia-smi topo -m and see why it fails"
            findings.append(Finding("gpu links", "WARN", "nvidia-smi topo -m tells nothing", fix))
        elif not all(kind.startswith("NV") for kind in kinds_of_link):
            fix = "keep a tensor-parallel group within GPUs joined by NVLink; use pipeline stages across the others"
            findings.append(Finding("gpu links", "WARN", f"{detail}: not all by NVLink", fix))
        else:
            findings.append(Finding("gpu links", "OK", detail))
    return findings


def check_rdma(rdma: Sequence[Mapping[str, Any]], has_gpu: bool, modules: Path, memlock: int) -> list[Finding]:
    """RDMA devices, and whether GPUs can use them directly."""
    if not rdma:
        return [Finding("rdma", "OK", "no device; nodes talk over TCP")]
    named = [f"{d['name']}:{d['port']} {d['link_layer']} {d['rate']} {d['state']}" for d in rdma]
    findings = []
    if not any(device["state"] == "ACTIVE" for device in rdma):
        fix = "bring a port up: check the cable, the switch and (InfiniBand) the subnet manager; ibstat shows the state"
        findings.append(Finding("rdma", "WARN", "; ".join(named) + ": no port is ACTIVE", fix))
    else:
        findings.append(Finding("rdma", "OK", "; ".join(named)))
    if memlock != resource.RLIM_INFINITY and memlock < _GIB:
        fix = "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service that starts the ranks (slurmd, docker)"
        findings.append(
            Finding("locked memory", "WARN", f"limit {memlock // 1024} KiB; RDMA must lock its buffers", fix)
        )
    if has_gpu and not any((modules / name).exists() for name in ("nvidia_peermem", "nv_peer_mem")):
        fix = "modprobe nvidia-peermem, unless kernel and driver support DMA-BUF (NCCL_DEBUG=INFO prints GDRDMA then)"
        findings.append(Finding("gpu-direct", "WARN", "nvidia_peermem is not loaded", fix))
    return findings


def check_compiler() -> Finding:
    """A C compiler that really builds a shared object, in a cache folder that can be written."""
    from yalis.utils.native import build_shared_object, cache_dir, compiler

    cc = compiler()
    if cc is None:
        return Finding("c compiler", "FAIL", "none found", "apt-get install gcc libc6-dev, or set CC")
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.c"
            source.write_text("#include <stdint.h>\n#include <math.h>\nint32_t probe(void) { return 7; }\n")
            build_shared_object("doctor-probe", [source])
    except BuildError as error:
        return Finding("c compiler", "FAIL", f"{cc}: {error}", "apt-get install gcc libc6-dev, or set CC")
    except OSError as error:
        return Finding("c compiler", "FAIL", f"{cc}: {error}", f"make {cache_dir()} writable, or set YALIS_CACHE_DIR")
    return Finding("c compiler", "OK", f"{cc}, objects in {cache_dir()}")


def check_shared_memory(folder: Path) -> Finding:
    """Room in /dev/shm, through which NCCL exchanges data inside a host. (CPU ranks use a memfd, which needs none.)"""
    fix = "start the container with --shm-size=1g or --ipc=host, or: mount -o remount,size=1g /dev/shm"
    name = str(folder)
    try:
        usage = shutil.disk_usage(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="yalis-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return Finding(name, "FAIL", f"cannot be written: {error.strerror}", fix)
    detail = f"{usage.free / _MIB:.0f} of {usage.total / _MIB:.0f} MiB free"
    if usage.free < 64 * _MIB:
        return Finding(name, "WARN", detail, fix)
    return Finding(name, "OK", detail)


def check_network(
    env: Mapping[str, str],
    net: Sequence[Mapping[str, Any]],
    *,
    hostname: str | None = None,
    resolve: Callable[[str], str | None] | None = None,
) -> Finding:
    """The interface that gloo will use: ``$GLOO_SOCKET_IFNAME``, else the one that the host's name leads to.

    Args:
        env: the environment.
        net: network devices as `yalis.utils.machine.network_devices` gives them.
        hostname: default this host's name.
        resolve: IPv4 or IPv6 address of a name, or None; default the system's resolver.
    """
    hostname = hostname or socket.gethostname()
    names = [str(device["name"]) for device in net]
    up = next((str(d["name"]) for d in net if d["state"] == "up"), "eth0")
    chosen = env.get("GLOO_SOCKET_IFNAME")
    if chosen:
        missing = [name for name in chosen.split(",") if name not in [*names, "lo"]]
        if missing:
            fix = f"set GLOO_SOCKET_IFNAME to one of {', '.join(names) or 'lo'}"
            return Finding("network", "FAIL", f"GLOO_SOCKET_IFNAME={chosen}: no interface {missing[0]}", fix)
        return Finding("network", "OK", f"gloo uses {chosen} (GLOO_SOCKET_IFNAME)")
    fix = f"export GLOO_SOCKET_IFNAME={up}, or give {hostname} the address of {up} in /etc/hosts"
    several = spans_nodes(env)
    address = (resolve or _resolve)(hostname)
    if address is None:
        # gloo falls back to loopback then, which is enough on one host.
        detail = f"host name {hostname} resolves to nothing, so gloo uses loopback"
        return Finding("network", "FAIL" if several else "WARN", detail, fix)
    if ipaddress.ip_address(address.split("%")[0]).is_loopback:
        detail = f"host name {hostname} resolves to loopback ({address})"
        if several:
            return Finding("network", "FAIL", f"{detail}: other nodes cannot reach this rank", fix)
        return Finding("network", "OK", f"{detail}; fine on one host, several need GLOO_SOCKET_IFNAME={up}")
    return Finding("network", "OK", f"gloo uses the interface of {hostname}, {address}")


def spans_nodes(env: Mapping[str, str]) -> bool:
    """Whether the launch environment has more than one node."""
    from yalis.comm.topology import from_environment

    try:
        return from_environment(env).num_nodes > 1
    except TopologyError:
        return False  # `check_launch` reports it


def _resolve(hostname: str) -> str | None:
    found: list[str] = []

    def look_up() -> None:
        with contextlib.suppress(OSError):
            found.append(str(socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)[0][4][0]))

    # A name server that does not answer can hold getaddrinfo for half a minute, and nothing can interrupt it: a daemon
    # thread, unlike an executor's, is not waited for at exit.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_RESOLVE_TIMEOUT_S)
    return found[0] if found else None


def check_launch(env: Mapping[str, str]) -> Finding:
    """Which launcher started this process, and whether its variables fit together."""
    from yalis.comm.topology import from_environment, launcher, rendezvous

    try:
        found = launcher(env)
        half = [name for name in ("RANK", "WORLD_SIZE") if name in env]
        if found is None and half:
            fix = "start with torchrun, or unset both RANK and WORLD_SIZE"
            return Finding("launch", "FAIL", f"{half[0]} is set without its partner", fix)
        if found is None:
            return Finding("launch", "OK", "no launcher; yalis starts the ranks of this host itself")
        topology = from_environment(env)
        address, port = rendezvous(env)
    except TopologyError as error:
        return Finding("launch", "FAIL", str(error), "correct what the launcher sets, or declare --ranks-per-node")
    shape = f"{topology.num_nodes} nodes x {topology.ranks_per_node} ranks"
    return Finding("launch", "OK", f"{found}: rank {topology.rank} of {shape}, meeting at {address}:{port}")


def check_open_files(soft: int, hard: int) -> Finding:
    """The limit on open files: every peer costs connections and mapped files."""
    if soft != resource.RLIM_INFINITY and soft < 1024:
        allowed = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return Finding("open files", "WARN", f"limit {soft}", f"ulimit -n {allowed}")
    return Finding("open files", "OK", f"limit {'unlimited' if soft == resource.RLIM_INFINITY else soft}")


def check_memory(available: int | None = None, total: int | None = None) -> Finding:
    """Free memory in bytes, default what the system and this process's control group say."""
    if available is None or total is None:
        import psutil

        memory = psutil.virtual_memory()
        available, total = int(memory.available), int(memory.total)
        limit = _cgroup_limit()
        if limit is not None:
            available, total = min(available, limit), min(total, limit)
    detail = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if available < 2 * _GIB:
        return Finding(
            "memory", "WARN", detail, "end other programs, or set kv_cache_memory_bytes and take a small model"
        )
    return Finding("memory", "OK", detail)


def _cgroup_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def check_allreduce(
    run_check: Callable[[], list[dict[str, Any]]],
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """One finding per size of the all-reduce that ``run_check`` runs, and its rows."""
    try:
        rows = run_check()
    except CommError as error:
        fix = "mend the findings above first; for more: YALIS_LOG_LEVEL=DEBUG yalis doctor"
        return [Finding("all-reduce", "FAIL", str(error), fix)], []
    findings = []
    for row in rows:
        name = f"all-reduce {row['bytes'] >> 10} KiB"
        if row["wrong"]:
            detail = f"{row['wrong']} wrong values by {row['algorithm']}"
            findings.append(Finding(name, "FAIL", detail, "run with --all-reduce torch and report this machine"))
            continue
        detail = f"{row['time_us']:.1f} us by {row['algorithm']} between 2 local ranks"
        if row["algorithm"] == "torch":
            fix = "shared memory is not used (no C compiler, or ranks in different containers); mend the findings above"
            findings.append(Finding(name, "WARN", detail, fix))
        else:
            findings.append(Finding(name, "OK", detail))
    return findings, rows


# ---- printing -----------------------------------------------------------------------------------------------------


def render_plain(findings: Sequence[Finding]) -> str:
    """The report as text without any markup: one line per finding, its fix below it."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.status:<4}  {f.name:<{width}}  {f.detail}")
        if f.fix:
            lines.append(f"{'':<4}  {'':<{width}}  fix: {f.fix}")
    return "\n".join([*lines, _summary(findings)])


def _summary(findings: Sequence[Finding]) -> str:
    counts = {status: sum(f.status == status for f in findings) for status in ("OK", "WARN", "FAIL")}
    return f"{counts['OK']} ok, {counts['WARN']} warnings, {counts['FAIL']} failures"


def _print_rich(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for f in findings:
        # Text, not markup: names of hosts and errors may hold brackets.
        detail = Text(f.detail)
        if f.fix:
            detail.append(f"\nfix: {f.fix}", style="cyan")
        table.add_row(Text(f.status, style=colors[f.status]), Text(f.name), detail)
    console = Console()
    console.print(table)
    console.print(Text(_summary(findings), style="bold"))

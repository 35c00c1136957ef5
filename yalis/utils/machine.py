"""What this process runs on: hardware, versions and launch environment, for benchmark records and `yalis doctor`.

Records are published with results, so hosts appear as a hash, and only allow-listed environment variables are kept.
Every external program has a time limit; what cannot be found out is None or empty, never guessed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yalis
from yalis.utils.logging import get_logger
from yalis.utils.native import cpu_flags

logger = get_logger(__name__)

# CPU features that decide which kernels run and how fast.
NOTABLE_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "i8mm")

_PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "msgspec",
    "pyzmq",
    "flashinfer-python",
    "nvidia-nvshmem-cu13",
)

_LAUNCH_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
)
_LAUNCH_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "NCCL_", "GLOO_", "NVSHMEM_", "OMP_", "YALIS_")
# Launchers also pass credentials (SLURM_JWT, ...), and those never belong in a record.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|JWT|(?:^|_)KEY(?:_|$)")

_SMI_FIELDS = ("index", "name", "memory.total", "driver_version", "pci.bus_id")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def machine_record() -> dict[str, Any]:
    """Everything a reader needs to judge a number measured here; JSON-ready.

    Keys: ``host`` (hash of the host name, equal for equal hosts), ``cpu`` (model, usable cores, notable flags),
    ``memory_bytes``, ``kernel``, ``gpus``, ``gpu_links``, ``nics``, ``versions``, ``commit``.
    """
    flags = cpu_flags()
    return {
        "host": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8],
        "cpu": {
            "model": cpu_model(),
            "cores_usable": usable_cores(),
            "flags": [flag for flag in NOTABLE_CPU_FLAGS if flag in flags],
        },
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "gpus": gpus(),
        "gpu_links": gpu_links(),
        "nics": network_devices(),
        "versions": versions(),
        "commit": git_commit(),
    }


def versions() -> dict[str, str | None]:
    """Versions of yalis, Python and the packages that decide speed or results; None for what is not installed."""
    found: dict[str, str | None] = {"yalis": yalis.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = found["nccl"] = None
    if found["torch"] is not None:
        import torch  # late: takes a second, and the rest of this module does not need it

        nccl_version: Any = torch.cuda.nccl.version  # untyped upstream
        found["torch"] = torch.__version__  # tells the build (+cpu, +cu130), the package's version need not
        found["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            found["nccl"] = ".".join(map(str, nccl_version()))
    return found


def launch_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of launchers and communication libraries, by allow list; names that look like secrets are left out."""
    source = os.environ if env is None else env
    return {
        name: value
        for name, value in sorted(source.items())
        if (name in _LAUNCH_NAMES or name.startswith(_LAUNCH_PREFIXES)) and not _SECRET.search(name)
    }


def usable_cores() -> int:
    """Cores that this process may run on (its affinity mask, not the machine's count)."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """The CPU's name as the kernel tells it, else the machine type (``x86_64``)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError as error:
        logger.debug("no /proc/cpuinfo: %s", error)
    return platform.machine()


def gpus() -> list[dict[str, Any]]:
    """One dict per NVIDIA GPU: index, name, memory_bytes, driver, bus; empty where nvidia-smi finds none."""
    text = run_tool(["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"])
    return parse_gpus(text or "")


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Read ``nvidia-smi --query-gpu`` rows (memory in MiB); rows of another shape (messages) are no GPUs."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_SMI_FIELDS) or not cells[0].isdigit():
            continue
        index, name, memory, driver, bus = cells
        # Some GPUs that share the host's memory report "[N/A]".
        size = int(memory) << 20 if memory.isdigit() else None
        found.append({"index": int(index), "name": name, "memory_bytes": size, "driver": driver, "bus": bus})
    return found


def gpu_links() -> dict[str, str]:
    """Link of every GPU pair as nvidia-smi names it, such as ``{"GPU0-GPU1": "NV18"}``; empty with fewer than two."""
    return parse_gpu_links(run_tool(["nvidia-smi", "topo", "-m"]) or "")


def parse_gpu_links(text: str) -> dict[str, str]:
    """Read the matrix of ``nvidia-smi topo -m``; NIC columns and the legend are left out."""
    rows = [_ANSI.sub("", line).split() for line in text.splitlines()]
    header = next((row for row in rows if row and row[0] == "GPU0" and "X" not in row), [])
    columns = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    links = {}
    for row in rows:
        if row and row[0] in columns and row is not header:
            for column, link in zip(columns, row[1:], strict=False):
                if columns.index(column) > columns.index(row[0]):
                    links[f"{row[0]}-{column}"] = link
    return links


def network_devices(sys_class: Path = Path("/sys/class")) -> dict[str, list[dict[str, Any]]]:
    """NICs: ``{"rdma": [...], "net": [...]}``.

    RDMA entries have name, port, state (``ACTIVE``), rate (``400 Gb/sec (4X NDR)``), link_layer; network entries have
    name, state, speed_mbit (None where the driver does not say) and mtu. The loopback interface is left out.
    """
    rdma = []
    for port in sorted(sys_class.glob("infiniband/*/ports/*")):
        state = _read(port / "state") or ""
        rdma.append(
            {
                "name": port.parent.parent.name,
                "port": port.name,
                "state": state.split(":")[-1].strip(),
                "rate": _read(port / "rate"),
                "link_layer": _read(port / "link_layer"),
            }
        )
    net = []
    for device in sorted(sys_class.glob("net/*")):
        if device.name == "lo" or not device.is_dir():
            continue
        speed, mtu = _read(device / "speed") or "", _read(device / "mtu") or ""
        net.append(
            {
                "name": device.name,
                "state": _read(device / "operstate"),
                "speed_mbit": int(speed) if speed.isdigit() else None,  # "-1" while down
                "mtu": int(mtu) if mtu.isdigit() else None,
            }
        )
    return {"rdma": rdma, "net": net}


def git_commit() -> str | None:
    """Commit of the checkout that yalis is imported from, with ``-dirty`` if tracked files differ; None outside one."""
    root = Path(yalis.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = run_tool(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return None
    changed = run_tool(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return commit.strip() + ("-dirty" if changed else "")


def run_tool(command: Sequence[str], timeout_s: float = 20.0) -> str | None:
    """Standard output of ``command``; None where it is not installed, fails, or takes longer than ``timeout_s``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("%s: %s", command[0], error)
        return None
    return done.stdout


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # sysfs answers EINVAL for attributes that a device does not have
        return None

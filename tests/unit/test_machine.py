from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import yalis
from yalis.utils import machine

TOPO = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tNODE\t0-47\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tNODE\t48-95\t1\t\tN/A
NIC0\tPIX\tNODE\tNODE\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def test_record_is_json_and_names_no_host() -> None:
    record = machine.machine_record()
    text = json.dumps(record)
    assert re.fullmatch(r"[0-9a-f]{8}", record["host"])
    assert record["host"] == machine.machine_record()["host"]
    assert f'"{socket.gethostname()}"' not in text
    assert record["cpu"]["cores_usable"] == len(os.sched_getaffinity(0)) >= 1
    assert record["memory_bytes"] > 1 << 28
    assert record["versions"]["yalis"] == yalis.__version__


def test_versions_follow_what_is_installed() -> None:
    import torch

    found = machine.versions()
    assert found["torch"] == torch.__version__
    assert found["cuda"] == torch.version.cuda
    assert found["msgspec"] is not None


def test_missing_package_is_none(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "a-package-that-does-not-exist"))
    assert machine.versions()["a-package-that-does-not-exist"] is None


def test_launch_environment_is_an_allow_list_without_secrets() -> None:
    env = {
        "RANK": "1",
        "SLURM_NTASKS": "4",
        "NCCL_DEBUG": "INFO",
        "YALIS_LOG_LEVEL": "INFO",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": "/root",
        "SLURM_JWT": "secret",
        "OMPI_ACCESS_TOKEN": "secret",
        "PMI_SECURITY_KEY": "secret",
        "NVSHMEM_PASSWORD": "secret",
    }
    kept = machine.launch_environment(env)
    assert kept == {k: env[k] for k in sorted(("RANK", "SLURM_NTASKS", "NCCL_DEBUG", "YALIS_LOG_LEVEL"))} | {
        "CUDA_VISIBLE_DEVICES": "0"
    }


def test_launch_environment_defaults_to_the_process(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert machine.launch_environment()["GLOO_SOCKET_IFNAME"] == "eth7"


def test_parse_gpus() -> None:
    text = (
        "0, NVIDIA H100 80GB HBM3, 81559, 580.95.05, 00000000:1B:00.0\n"
        "1, NVIDIA GB10, [N/A], 580.95.05, 0000000F:01:00.0\n"
    )
    first, second = machine.parse_gpus(text)
    assert first == {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 81559 << 20,
        "driver": "580.95.05",
        "bus": "00000000:1B:00.0",
    }
    assert second["memory_bytes"] is None
    assert machine.parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []


def test_parse_gpu_links_takes_each_pair_once_and_no_nic() -> None:
    assert machine.parse_gpu_links(TOPO) == {"GPU0-GPU1": "NV18", "GPU0-GPU2": "SYS", "GPU1-GPU2": "SYS"}
    assert machine.parse_gpu_links("") == {}
    single = "\t\x1b[4mGPU0\tNIC0\x1b[0m\nGPU0\t X \tPIX\nNIC0\tPIX\t X\n"
    assert machine.parse_gpu_links(single) == {}


def test_network_devices(tmp_path: Path) -> None:
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "link_layer").write_text("InfiniBand\n")
    for name, speed in (("eth0", "25000"), ("eth1", "-1"), ("lo", "0")):
        device = tmp_path / "net" / name
        device.mkdir(parents=True)
        (device / "operstate").write_text("up\n")
        (device / "speed").write_text(f"{speed}\n")
        (device / "mtu").write_text("9000\n")
    found = machine.network_devices(tmp_path)
    assert found["rdma"] == [
        {
            "name": "mlx5_0",
            "port": "1",
            "state": "ACTIVE",
            "rate": "400 Gb/sec (4X NDR)",
            "link_layer": "InfiniBand",
        }
    ]
    assert [(d["name"], d["speed_mbit"], d["mtu"]) for d in found["net"]] == [
        ("eth0", 25000, 9000),
        ("eth1", None, 9000),
    ]


def test_run_tool_is_bounded_and_never_raises() -> None:
    assert machine.run_tool(["a-program-that-does-not-exist"]) is None
    assert machine.run_tool(["sh", "-c", "exit 3"]) is None
    assert machine.run_tool(["sleep", "30"], timeout_s=0.1) is None
    assert machine.run_tool(["echo", "word"]) == "word\n"


def test_git_commit_marks_changes(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "yalis"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(machine.yalis, "__file__", str(package / "__init__.py"))
    assert machine.git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "yalis"], ["commit", "-q", "-m", "one"]):
        assert machine.run_tool([*git, *command]) is not None
    clean = machine.git_commit()
    assert clean is not None
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    (package / "__init__.py").write_text("changed")
    assert machine.git_commit() == f"{clean}-dirty"

"""What NCCL's own tuner says of an all-reduce: latencies and bandwidths of ring and tree over LL, LL128 and Simple.

The numbers are those of NCCL 2.28.3, ``src/graph/tuning.cc``: ``ncclTunerConstantsDefaults``, ``getNetOverhead``,
``ncclTopoTuneModel``, ``treeCorrectionFactor`` and ``ncclTopoGetAlgoTime``, read in full. A cluster brings what NCCL
finds out at start: bandwidths, channels, latency of the network path, GPU generation and CPU.

Left out: CollNet, NVLS and NVLSTree (switch reductions), PCI links inside a node, and the tree pattern's factor of
0.85, which holds where a GPU takes both halves of a tree. NCCL's search gives two nodes the bandwidth inside a node;
here the slower of the two tiers counts, since a NIC carries what crosses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

PROTOCOLS = ("ll", "ll128", "simple")
SHAPES = ("ring", "tree")
GENERATIONS = ("ampere", "hopper", "blackwell")
CPUS = ("intel", "amd", "arm")
# Microseconds, by protocol.
_BASE_US = {"ring": (6.6, 14.0, 8.4), "tree": (6.8, 14.0, 8.4)}
_NVLINK_US = {"ring": (0.6, 1.9, 3.4), "tree": (0.6, 1.25, 4.0)}
_NET_US = {"ring": (2.7, 4.0, 14.0), "tree": (5.0, 8.5, 14.0)}
# Host work of one post to the network; three posts in Simple.
_NET_OVERHEAD_US = {"intel": 1.0, "amd": 2.0, "arm": 1.0}
# GB/s, for one, two and more nodes.
_LL_MAX_INSIDE = {"ampere": 87.7, "hopper": 141.0, "blackwell": 282.0}
_LL_MAX_ACROSS = {"intel": (39.0, 20.4), "amd": (22.5, 19.0), "arm": (39.0, 20.4)}
_RING_LL128_PER_CHANNEL = {"ampere": (20.0,) * 3, "hopper": (36.7,) * 3, "blackwell": (73.4,) * 3}
_TREE_LL128_PER_CHANNEL = {"ampere": (20.0,) * 3, "hopper": (36.7, 36.7, 29.0), "blackwell": (55.6, 31.67, 20.0)}
_TREE_PER_CHANNEL = {"ampere": (24.0, 23.6, 17.8), "hopper": (38.7, 41.4, 36.0), "blackwell": (70.0, 42.8, 24.0)}
# Share of a tree's bandwidth by protocol and log2(bytes / 64), from 64 B to 256 MiB.
_TREE_CORRECTION = (
    (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 1, 1),
    (0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9, 0.9),
)
# Latency of a ring with Simple between nodes once every channel and rank has this many bytes ("plateau effect").
_PLATEAU_BYTES, _PLATEAU = 64, 1.4


@dataclass(frozen=True)
class Setting:
    """What NCCL finds out about a machine.

    Attributes:
        bus_intra_bytes_per_s, bus_inter_bytes_per_s: over all channels, of a rank inside a node and of a node's NICs.
        channels: of the communicator.
        latency_inter_s: of the path to the network (``latencyInter`` of its graph), per hop between nodes.
        generation, cpu: of the GPUs, of the hosts.
    """

    bus_intra_bytes_per_s: float
    bus_inter_bytes_per_s: float
    channels: float
    latency_inter_s: float
    generation: str
    cpu: str


def bandwidth_bytes_per_s(setting: Setting, shape: str, protocol: str, ranks: int, nodes: int) -> float:
    """Bytes of an all-reduce per second, before a tree's correction by size."""
    size_class, p = min(nodes, 3) - 1, PROTOCOLS.index(protocol)
    bus = setting.bus_intra_bytes_per_s if ranks > nodes else math.inf
    bus = min(bus, setting.bus_inter_bytes_per_s) if nodes > 1 else bus
    generation, per_channel = setting.generation, 1e9 * setting.channels
    ll_most = 1e9 * (_LL_MAX_INSIDE[generation] if nodes == 1 else _LL_MAX_ACROSS[setting.cpu][size_class - 1])
    if shape == "ring":
        if p == 0:
            bus = min(ll_most, 0.5 * bus)
        elif p == 1:
            bus = min(0.92 * bus, per_channel * _RING_LL128_PER_CHANNEL[generation][size_class])
        return bus * ranks / (2 * (ranks - 1))
    bus = min(0.92 * bus, per_channel * _TREE_PER_CHANNEL[generation][size_class])
    if p == 0:
        bus = min(bus / 3.8, ll_most)
    elif p == 1:
        share = 7 / 9 if nodes == 1 else 120 / 128
        bus = min(share * bus, per_channel * _TREE_LL128_PER_CHANNEL[generation][size_class])
    return bus / 2


def latency_s(setting: Setting, shape: str, protocol: str, ranks: int, nodes: int) -> float:
    """Seconds of an empty all-reduce."""
    p = PROTOCOLS.index(protocol)
    inside_us = _NVLINK_US[shape][p]
    # With a GPU a node nothing hides the network's latency: the tree's counts for the ring, too.
    across_us = _NET_US["tree" if ranks == nodes else shape][p]
    across_us += 1e6 * setting.latency_inter_s * (2 if protocol == "simple" else 1)  # Simple also flushes
    if shape == "ring":
        crossing = 2 * (nodes - 1)
        if nodes > 1:
            inside_us = max(inside_us, _NET_OVERHEAD_US[setting.cpu] * (3 if protocol == "simple" else 1))
        hops_us = (2 * (ranks - 1) - crossing) * inside_us + crossing * across_us
    else:
        hops_us = 2 * ((ranks // nodes - 1) * inside_us + math.floor(math.log2(nodes)) * across_us)
    return 1e-6 * (_BASE_US[shape][p] + hops_us)


def time_s(setting: Setting, shape: str, protocol: str, m: float, ranks: int, nodes: int) -> float:
    """Seconds of an all-reduce of ``m`` bytes, as the tuner compares them."""
    p = PROTOCOLS.index(protocol)
    bandwidth = bandwidth_bytes_per_s(setting, shape, protocol, ranks, nodes)
    latency = latency_s(setting, shape, protocol, ranks, nodes)
    if shape == "tree":
        step = int(math.log2(m / 64)) if m >= 64 else 0
        if step < len(_TREE_CORRECTION[p]):
            bandwidth *= _TREE_CORRECTION[p][step]
    elif protocol == "simple" and nodes > 1 and m / (setting.channels * ranks) >= _PLATEAU_BYTES:
        latency *= _PLATEAU
    return latency + m / bandwidth


def ways(setting: Setting, m: float, ranks: int, nodes: int) -> Iterator[tuple[str, str, float]]:
    """(shape, protocol, seconds) of everything that the tuner compares."""
    for shape in SHAPES:
        for protocol in PROTOCOLS:
            yield shape, protocol, time_s(setting, shape, protocol, m, ranks, nodes)

"""Which algorithm reduces a message: a pure function of what every rank of the group knows alike.

Two ranks that chose differently would wait for each other for ever, so nothing here may depend on a rank, on time or on
the environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yalis.errors import CommError, ConfigError

ALGORITHMS = ("torch", "rd", "shm", "nvrar", "two_shot", "symm_mem", "null")
# Other names: what torch's own all-reduce is on a device.
ALIASES = {"nccl": ("torch", "cuda"), "gloo": ("torch", "cpu")}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GroupShape:
    """Shape of a group, the same on all of its ranks.

    Args:
        ranks: number of ranks.
        nodes: number of (declared) nodes they stand on.
        ranks_per_node: ranks on each node, 0 when nodes hold different numbers.
        device: ``"cpu"`` or ``"cuda"``.
        shared_memory: the ranks of each node can map the same memory, and the native code for it is there.
        contiguous: ranks of one node are neighbours in the group.
        one_host: all ranks run under one kernel, whatever nodes are declared.
        nvrar_bytes: largest message of NVRAR where it is open for this group, else 0.
        mapped: the ranks' GPUs stand on one node and have memory mapped to each other.
    """

    ranks: int
    nodes: int
    ranks_per_node: int
    device: str
    shared_memory: bool
    contiguous: bool
    one_host: bool = False
    nvrar_bytes: int = 0
    mapped: bool = False


# Rows (largest message in bytes, algorithm), ascending; the last row holds for everything above.
Table = Sequence[tuple[int, str]]

_ANY = 1 << 62
# Where two_shot serves, forced NVRAR leaves it what is longer. Two H100, with residual and norm, us: 12.6 and 19.3 at
# 2 MiB, 34.8 and 26.1 at 4 MiB (NVRAR takes two rounds there). More GPUs have not been measured.
_NVRAR_BESIDE_TWO_SHOT = 2 << 20
# Measured in docs/communicator.md: on one host shared memory wins at every size from 2 KiB to 2 MiB.
_ONE_NODE_CPU: Table = ((_ANY, "shm"), (_ANY, "torch"))
_NODES_CPU: Table = ((_ANY, "rd"), (_ANY, "torch"))
_CUDA: Table = ((_ANY, "torch"),)


def why_not(name: str, shape: GroupShape, dtype: torch.dtype | None = None) -> str | None:
    """Why algorithm ``name`` cannot serve this group (and dtype, if given); None when it can."""
    if name in ("torch", "null"):
        return None
    if name == "symm_mem":
        if shape.device != "cuda":
            return f"it works on CUDA tensors, not on {shape.device}"
        if not shape.one_host:
            return "it works inside one host"
        if dtype not in (None, torch.float32, torch.bfloat16):
            return f"it reduces float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        return None
    if dtype is not None and dtype not in _FLOATS:
        return f"it reduces float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if name == "shm":
        if shape.device != "cpu":
            return f"it works on CPU tensors, not on {shape.device}"
        if shape.nodes > 1:
            return f"it works inside one node, and the group spans {shape.nodes}; use rd or torch"
        if not shape.shared_memory:
            return "the ranks cannot share memory (other containers), or there is no C compiler"
    if name == "two_shot":
        if shape.device != "cuda":
            return f"it works on CUDA tensors, not on {shape.device}"
        if shape.nodes > 1:
            return f"it works inside one node, and the group spans {shape.nodes}"
        if not shape.one_host:
            return "it works inside one host"
        if not shape.mapped:
            return "the GPUs' memory is not mapped to each other (see the log for the reason)"
    if name == "nvrar" and not shape.nvrar_bytes:
        return "its library is not open for this group (see the log for the reason)"
    return None


def check_name(name: str) -> None:
    """Refuse a name that is neither ``auto`` nor an algorithm.

    Raises:
        ConfigError: names what is known.
    """
    if name != "auto" and name not in ALGORITHMS and name not in ALIASES:
        known = ", ".join((*ALGORITHMS, *ALIASES))
        raise ConfigError(f"all-reduce algorithm {name!r}: unknown; known: auto, {known}")


def plain_name(name: str, device: str) -> str:
    """The algorithm that ``name`` means on ``device`` (``"cpu"`` or ``"cuda"``): itself, unless it is an alias.

    Raises:
        ConfigError: unknown, or an alias of another device.
    """
    check_name(name)
    if name not in ALIASES:
        return name
    meant, wanted = ALIASES[name]
    if device != wanted:
        other = next(alias for alias, (_, kind) in ALIASES.items() if kind == device)
        raise ConfigError(
            f"all-reduce algorithm {name!r}: it serves {wanted} tensors, not {device}; use {other} or auto"
        )
    return meant


def check_forced(forced: str, shape: GroupShape) -> None:
    """Refuse an algorithm that can never serve this group.

    Raises:
        ConfigError: names the algorithm and the reason.
    """
    forced = plain_name(forced, shape.device)
    reason = None if forced == "auto" else why_not(forced, shape)
    if reason is not None:
        raise ConfigError(f"all-reduce algorithm {forced!r}: {reason}")


def default_table(shape: GroupShape) -> Table:
    """The measured default for a group of this shape."""
    if shape.device != "cpu":
        return _CUDA
    return _ONE_NODE_CPU if shape.nodes == 1 else _NODES_CPU


def choose(shape: GroupShape, dtype: torch.dtype, nbytes: int, forced: str = "auto", table: Table | None = None) -> str:
    """Name of the algorithm for one message.

    Args:
        shape: the group.
        dtype: of the message.
        nbytes: size of the message in bytes.
        forced: ``"auto"``, or an algorithm to use for everything (``"nvrar"``: up to 2 MiB where ``"two_shot"`` serves
            and takes the rest, else up to ``shape.nvrar_bytes``, and the rest goes to torch).
        table: rows in place of the default ones. A row whose algorithm cannot serve is skipped; when none can, torch's
            own collective is used.

    Raises:
        CommError: the forced algorithm cannot reduce this dtype.
    """
    if forced != "auto":
        reason = why_not(forced, shape, dtype)
        if reason is not None:
            raise CommError(f"all-reduce algorithm {forced!r} was forced, but {reason}; use auto or torch")
        if forced == "nvrar" and why_not("two_shot", shape, dtype) is None:
            return forced if nbytes <= min(_NVRAR_BESIDE_TWO_SHOT, shape.nvrar_bytes) else "two_shot"
        return forced if _fits(forced, shape, nbytes) else "torch"
    for limit, name in table if table is not None else default_table(shape):
        if nbytes <= limit and why_not(name, shape, dtype) is None and _fits(name, shape, nbytes):
            return name
    return "torch"


def _fits(name: str, shape: GroupShape, nbytes: int) -> bool:
    """Whether the message is within what the algorithm reserved memory for. Beyond, bandwidth counts: torch's turn."""
    return name != "nvrar" or nbytes <= shape.nvrar_bytes


def explain(
    shape: GroupShape, dtype: torch.dtype, forced: str = "auto", table: Table | None = None
) -> list[tuple[int, str]]:
    """The policy in effect for ``dtype``: rows (largest bytes, algorithm), ascending; the last holds for all above.

    Raises:
        CommError: the forced algorithm cannot reduce this dtype.
    """
    rows = table if table is not None else default_table(shape)
    edges = sorted({limit for limit, _ in rows} | {shape.nvrar_bytes, _NVRAR_BESIDE_TWO_SHOT, _ANY} - {0})
    told: list[tuple[int, str]] = []
    for edge in edges:
        name = choose(shape, dtype, edge, forced, table)
        if told and told[-1][1] == name:
            told.pop()
        told.append((edge, name))
    return told


def candidates(shape: GroupShape, forced: str = "auto", table: Table | None = None) -> tuple[str, ...]:
    """Every algorithm that `choose` may return for this group; torch is always one of them."""
    rows = table if table is not None else default_table(shape)
    names = [forced] if forced != "auto" else [name for _, name in rows]
    if forced == "nvrar":
        names.append("two_shot")
    usable = [name for name in dict.fromkeys(names) if why_not(name, shape) is None]
    return tuple(dict.fromkeys([*usable, "torch"]))

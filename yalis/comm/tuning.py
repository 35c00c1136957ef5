"""Tuned tables: which algorithm and plan serve a message of some size, as measured on this kind of machine.

`yalis tune` writes them (`yalis.bench.tune` measures); rank 0 reads the one that fits when a communicator is made and
hands it to the others. A table counts only for the version, sources, device and topology that it was measured with;
any other is refused with a log line, never used half.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from yalis import __version__
from yalis.comm import policy
from yalis.comm.nvrar.build import source_digest
from yalis.comm.nvrar.library import ALGORITHMS, FORMATS, Plan
from yalis.errors import ConfigError
from yalis.utils.logging import get_logger
from yalis.utils.native import cache_dir

logger = get_logger(__name__)

DIRECTORY_VARIABLE = "YALIS_TUNING_DIR"


@dataclass(frozen=True)
class TableKey:
    """What a table was measured on. All of it must match before it is used.

    Args:
        version: of yalis.
        sources: digest of the native sources.
        device: ``"cpu"`` or the GPU's name.
        nodes: number of nodes; local: ranks of each.
    """

    version: str
    sources: str
    device: str
    nodes: int
    local: int

    def file_name(self) -> str:
        """Where such a table is looked for, in `tuning_dir`."""
        device = re.sub(r"[^A-Za-z0-9]+", "-", self.device).strip("-").lower()
        return f"all-reduce-{device}-{self.nodes}x{self.local}.json"


@dataclass(frozen=True)
class Row:
    """Messages up to ``max_bytes`` (above the row before): ``algorithm`` serves them.

    Args:
        max_bytes: largest message of the row.
        algorithm: a name in `yalis.comm.policy.ALGORITHMS`.
        plan: for ``nvrar``, how; None for the others.
        us: measured median at ``max_bytes``, microseconds.
        others: the same of the algorithms that lost, by name.
    """

    max_bytes: int
    algorithm: str
    plan: Plan | None
    us: float
    others: Mapping[str, float]


@dataclass(frozen=True)
class TunedTable:
    """Rows by dtype name (``"bfloat16"``), ascending in size; above the last row the default policy holds.

    Args:
        key: what it was measured on.
        rows: of the all-reduce alone.
        norms: of the one that is fused with residual and norm, which wants other plans. Not consulted for which
            algorithm serves: that is decided by ``rows``.
    """

    key: TableKey
    rows: Mapping[str, Sequence[Row]]
    norms: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Every algorithm that some row names."""
        return list(dict.fromkeys(row.algorithm for rows in self.rows.values() for row in rows))

    def policy_rows(self, dtype: torch.dtype) -> list[tuple[int, str]] | None:
        """The rows of ``dtype`` as `yalis.comm.policy.choose` takes them; None where it was not measured."""
        rows = self.rows.get(str(dtype).removeprefix("torch."))
        return [(row.max_bytes, row.algorithm) for row in rows] if rows else None

    def plan(self, dtype: torch.dtype, nbytes: int, norm: bool = False) -> Plan | None:
        """The plan of the row that holds ``nbytes`` (``norm``: of a fused call); None where the table has none."""
        for row in (self.norms if norm else self.rows).get(str(dtype).removeprefix("torch."), ()):
            if nbytes <= row.max_bytes:
                return row.plan
        return None

    def to_json(self) -> str:
        """As text; equal tables give equal text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TunedTable:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: it is no table: names the place and the reason.
        """
        try:
            data = json.loads(text)
            key = TableKey(**data["key"])
            rows, norms = (
                {dtype: [_row(words) for words in lines] for dtype, lines in data[part].items()}
                for part in ("rows", "norms")
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"tuned table: not readable ({type(error).__name__}: {error}); run `yalis tune` again"
            ) from error
        for dtype, lines in (*rows.items(), *norms.items()):
            sizes = [row.max_bytes for row in lines]
            if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
                raise ConfigError(f"tuned table: sizes of {dtype} must ascend, got {sizes}; run `yalis tune` again")
        return cls(key, rows, norms)

    def digest(self) -> str:
        """Short digest, for the agreement check."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def _row(words: Mapping[str, Any]) -> Row:
    plan = None if words["plan"] is None else Plan(**words["plan"])
    if words["algorithm"] not in policy.ALGORITHMS:
        raise ValueError(f"algorithm {words['algorithm']!r} is none of {', '.join(policy.ALGORITHMS)}")
    if (plan is None) != (words["algorithm"] != "nvrar"):
        raise ValueError("nvrar rows have a plan, others have none")
    if plan is not None and (plan.algorithm not in ALGORITHMS or plan.format not in FORMATS):
        raise ValueError(f"plan {plan} is unknown")
    return Row(int(words["max_bytes"]), words["algorithm"], plan, float(words["us"]), dict(words["others"]))


def shape_of(shape: policy.GroupShape) -> tuple[int, int]:
    """(nodes, ranks of each) as NVRAR sees a group: every rank a node where nodes are unequal or interleave."""
    if shape.ranks_per_node and shape.contiguous:
        return shape.nodes, shape.ranks_per_node
    return shape.ranks, 1


def tuning_dir() -> Path:
    """Folder of tables: ``$YALIS_TUNING_DIR`` or ``tuning`` in the cache."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or cache_dir() / "tuning")


def key_for(device: torch.device, nodes: int, local: int) -> TableKey:
    """The key of a table that this process may use."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return TableKey(__version__, source_digest(), name, nodes, local)


def save(table: TunedTable, path: Path | None = None) -> Path:
    """Write a table, whole or not at all; default place: where `find` looks.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = path or tuning_dir() / table.key.file_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as draft:
            draft.write(table.to_json())
        os.replace(draft.name, path)
    except OSError as error:
        raise ConfigError(f"cannot write the tuned table {path}: {error}; choose another with --output") from error
    return path


def find(key: TableKey, path: Path | None = None) -> TunedTable | None:
    """The table at ``path`` (default: the usual place) if there is one for exactly this key; else None, with the reason
    in the log."""
    path = path or tuning_dir() / key.file_name()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("tuned table %s is left out: %s", path, error)
        return None
    try:
        table = TunedTable.from_json(text)
    except ConfigError as error:
        logger.warning("tuned table %s is left out: %s", path, error)
        return None
    differing = [
        f"{name} {getattr(table.key, name)!r} instead of {getattr(key, name)!r}"
        for name in asdict(key)
        if getattr(table.key, name) != getattr(key, name)
    ]
    if differing:
        logger.warning(
            "tuned table %s is left out, it was measured with %s; run `yalis tune` again", path, ", ".join(differing)
        )
        return None
    return table


# ---- without a table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a plan may use, the same on all ranks of a group.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        nodes: number of nodes; local: ranks of each.
        blocks: most blocks of a call; threads: most per block.
        formats: usable wire formats.
        relay: puts between nodes, not stores: few and large ones.
        parts: most blocks that may share a row of a norm.
    """

    device: str
    nodes: int
    local: int
    blocks: int
    threads: int
    formats: tuple[str, ...]
    relay: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Costs:
    """What `model_us` charges: for a message to arrive, and for each byte that a rank sends."""

    latency_us: float
    bytes_per_us: float


_STORES = Costs(1.44, 400e3)  # one-way latency and rate that were measured between two H200 over NVLink
_PUTS = Costs(5.0, 40e3)  # assumed, of a 400 Gbit/s NIC behind a proxy; not measured
_DENSE_BYTES = 64 * 1024  # emulated, one H200: from here on half the bytes outweigh the wiping
_RELAY_BLOCKS = 4  # each block is a put per phase and rank


def model_us(algorithm: str, nodes: int, local: int, nbytes: int, inside: Costs, between: Costs) -> float:
    """Microseconds that a message takes by count of steps and bytes; only to compare algorithms.

    Within a step a rank sends to its receivers one after another. ``inside``: between ranks of a node.
    """
    if algorithm == "one_shot":
        # All ranks at once: what crosses nodes and what does not go side by side.
        crossing = between.latency_us + (nodes - 1) * local * nbytes / between.bytes_per_us if nodes > 1 else 0.0
        staying = inside.latency_us + (local - 1) * nbytes / inside.bytes_per_us if local > 1 else 0.0
        return max(crossing, staying)
    shard = nbytes / local
    layers = 2 * (inside.latency_us + (local - 1) * shard / inside.bytes_per_us) if local > 1 else 0.0
    if nodes == 1:
        return layers
    if algorithm == "direct":
        return layers + between.latency_us + (nodes - 1) * shard / between.bytes_per_us
    steps = nodes.bit_length() - 1 + (2 if nodes & (nodes - 1) else 0)  # fold and unfold
    return layers + steps * (between.latency_us + shard / between.bytes_per_us)


def default_plan(limits: Limits, nbytes: int) -> Plan:
    """The plan for a message where no table says one. A pure function: the same on every rank."""
    nodes, local = limits.nodes, limits.local
    ranks = nodes * local
    if limits.device == "cpu":
        # Measured: one thread per rank pays for every byte that it handles, so one-shot wins where that costs less
        # than a second trip. Declared nodes want their hierarchy.
        one_shot = nodes == 1 and nbytes * (ranks - 1) <= 64 * 1024
        return Plan("one_shot" if one_shot else "doubling", "cells", 1, 1)
    format_name = "dense" if "dense" in limits.formats and nbytes >= _DENSE_BYTES else "cells"
    wire = nbytes if format_name == "dense" else 2 * nbytes
    between = _PUTS if limits.relay else _STORES
    # Two ranks have one exchange, whatever it is called; as one-shot it has a kernel of its own.
    names = ("one_shot",) if ranks == 2 else ALGORITHMS
    algorithm = min(names, key=lambda name: model_us(name, nodes, local, wire, _STORES, between))
    # From virtual ranks of one H200 (emulated), where 32 blocks were best up to 512 KiB and all of them above; threads
    # without a pack cost less than a second pass. `yalis tune` replaces this by what the fabric likes.
    threads = min(512, limits.threads)
    most = min(32, limits.blocks) if nbytes <= 512 * 1024 else limits.blocks
    if limits.relay:
        most = min(_RELAY_BLOCKS, limits.blocks)
    return Plan(algorithm, format_name, max(1, min(most, -(-nbytes // (16 * 128)))), threads)


def default_norm_plan(limits: Limits, nbytes: int) -> Plan:
    """The same for a call that is fused with residual and norm: as many blocks per row as there are, so that the row
    stays in registers."""
    plan = default_plan(limits, nbytes)
    return plan if limits.device == "cpu" or limits.relay else replace(plan, blocks=limits.blocks)


def _algorithms(limits: Limits) -> list[str]:
    if limits.nodes * limits.local == 2:
        # On CUDA all are the same exchange, or a second trip for nothing. On CPU a second trip halves the additions.
        return ["one_shot"] if limits.device == "cuda" or limits.nodes == 2 else ["one_shot", "doubling"]
    return ["one_shot", "doubling"] + (["direct"] if limits.nodes > 2 else [])


def candidate_plans(limits: Limits, nbytes: int) -> list[Plan]:
    """Plans worth measuring at this size."""
    names = _algorithms(limits)
    if limits.device == "cpu" or limits.relay:
        threads = (1,) if limits.device == "cpu" else tuple(n for n in (256, 512) if n <= limits.threads) or (32,)
        counts = [n for n in (1, 2, 4) if n <= limits.blocks]
        return [Plan(name, wire, n, t) for name in names for wire in limits.formats for n in counts for t in threads]
    plans = []
    for name in names:
        for format_name in limits.formats:
            for threads_each in (128, 256, 512):
                if threads_each > limits.threads:
                    continue
                # From four threads for each pack to sixteen packs for each thread.
                most = -(-nbytes // (4 * threads_each))
                found = {max(1, min(limits.blocks, -(-most // share))) for share in (1, 4, 8, 16, 64)}
                plans += [Plan(name, format_name, count, threads_each) for count in sorted(found)]
    return plans


def candidate_norm_plans(limits: Limits, nbytes: int, rows: int) -> list[Plan]:
    """Plans worth measuring for ``rows`` rows of ``nbytes`` altogether, fused with residual and norm."""
    if limits.device == "cpu" or limits.relay:
        return candidate_plans(limits, nbytes)
    parts = [n for n in (1, 2, 4, 8) if n == 1 or (n <= limits.parts and n * rows <= limits.blocks)]
    threads = [n for n in (128, 256, 512) if n <= limits.threads]
    return [
        Plan(name, wire, limits.blocks, t, n)
        for name in _algorithms(limits) for wire in limits.formats for t in threads for n in parts
    ]  # fmt: skip

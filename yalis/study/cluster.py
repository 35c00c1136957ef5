"""Descriptions of clusters: every constant of the cost model, each with where it comes from.

A description is a TOML file. A constant is a table ``{ value, kind, source }`` with the optional bounds ``low`` and
``high``; ``kind`` says how much to believe it: ``spec`` (a data sheet), ``measured``, ``fitted`` (to measurements, with
the bounds as confidence interval) or ``assumed``. Units are part of the key: ``_s`` seconds, ``_bytes``, ``_per_s``.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError
from yalis.study.nccl import CPUS, GENERATIONS

KINDS = ("spec", "measured", "fitted", "assumed")
# All-reduces as the engine names them; what each may do is in `yalis.study.collectives.VARIANTS`.
ALGORITHMS = ("nccl", "nvrar", "two_shot", "symm_mem", "torch", "rd", "shm")
FOLDER = Path(__file__).parent / "clusters"


@dataclass(frozen=True)
class Constant:
    """A number with its origin; ``low`` and ``high`` bound it where that is known (else both are ``value``)."""

    value: float
    kind: str
    source: str
    low: float
    high: float


@dataclass(frozen=True)
class Wire:
    """How a payload travels on one tier.

    Attributes:
        name: such as ``ll`` (data and flag side by side) or ``simple`` (data, then a signal).
        alpha_s: seconds from a send to the arrival of an empty message.
        bytes_per_s: payload and flags together, one direction, one rank.
        factor: bytes on the wire per byte of payload.
    """

    name: str
    alpha_s: Constant
    bytes_per_s: Constant
    factor: Constant

    def seconds(self, nbytes: float) -> float:
        """Time of one message of ``nbytes`` payload bytes."""
        return self.alpha_s.value + self.factor.value * nbytes / self.bytes_per_s.value

    @property
    def s_per_byte(self) -> float:
        """Beta per byte of payload."""
        return self.factor.value / self.bytes_per_s.value


@dataclass(frozen=True)
class Ring:
    """The baseline library as one flat ring at its bus bandwidth (gloo, or NCCL where it was measured).

    Attributes:
        base_s: per call. intra_s, inter_s: per hop inside a node and between nodes.
    """

    base_s: Constant
    intra_s: Constant
    inter_s: Constant


@dataclass(frozen=True)
class Nccl:
    """What NCCL's tuner needs to know of the machine, see `yalis.study.nccl`.

    Attributes:
        channels: of a communicator over nodes. latency_inter_s: of the path to the network.
        generation, cpu: as `yalis.study.nccl` names them.
    """

    channels: Constant
    latency_inter_s: Constant
    generation: str
    cpu: str


@dataclass(frozen=True)
class Fit:
    """Latency measured here for one algorithm and shape: ``alpha + bytes * beta`` by range of sizes.

    Attributes:
        algorithm: as the engine names it, such as ``shm``, ``rd``, ``torch``; ``p2p`` for a transfer between two ranks.
        ranks, nodes: shape of the group.
        segments: rows (largest message in bytes, alpha in s, beta in s per byte), ascending; the last holds above.
        kind, source: as of `Constant`.
        norm: of all-reduces with the residual and the norm that follow them in the engine.
    """

    algorithm: str
    ranks: int
    nodes: int
    segments: tuple[tuple[float, float, float], ...]
    kind: str
    source: str
    norm: bool = False

    def seconds(self, nbytes: float) -> float:
        """Time of one call with ``nbytes`` bytes."""
        for limit, alpha_s, beta_s in self.segments:
            if nbytes <= limit:
                return alpha_s + nbytes * beta_s
        _, alpha_s, beta_s = self.segments[-1]
        return alpha_s + nbytes * beta_s


@dataclass(frozen=True)
class Rates:
    """What the engine's own steps cost in one layout on ranks that share a host, by measurement.

    Attributes:
        tp, pp: the layout. flying: steps in flight, so ``tp * flying`` of ``tp * pp`` ranks compute at the same time.
        step_s: of a step of one stage besides its layers. sequence_s: per sequence of a step.
        layer_s: of a layer besides its products, attention and all-reduces; holds the wait for a core.
        logit_s: per logit on a rank, sampling and gathering. arrival_s: of a batch until its first step.
        rows: ascending. s_per_weight_byte: seconds per byte of a weight matrix multiplied by so many rows, with bounds
            ``low`` and ``high``.
        kv_byte_s, kv_query_s: of decode attention, per byte of keys and values, and per byte and query head that shares
            it. pair_s: seconds per (query, key, head and dimension) of a prefill.
    """

    tp: int
    pp: int
    flying: int
    step_s: Constant
    sequence_s: Constant
    layer_s: Constant
    logit_s: Constant
    arrival_s: Constant
    kv_byte_s: Constant
    kv_query_s: Constant
    pair_s: Constant
    rows: tuple[float, ...]
    s_per_weight_byte: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def ranks(self) -> int:
        """That share the host."""
        return self.tp * self.pp

    @property
    def active(self) -> int:
        """Of these, how many compute at the same time."""
        return self.tp * self.flying

    def weight_s(self, rows: float, weight_bytes: float) -> float:
        """Time of products of ``rows`` rows with ``weight_bytes`` of weights; linear between measured rows."""
        xs, ys = self.rows, self.s_per_weight_byte
        if rows <= xs[0]:
            return ys[0] * weight_bytes
        for i in range(1, len(xs)):
            if rows <= xs[i]:
                share = (rows - xs[i - 1]) / (xs[i] - xs[i - 1])
                return (ys[i - 1] + share * (ys[i] - ys[i - 1])) * weight_bytes
        return ys[-1] * rows / xs[-1] * weight_bytes

    @property
    def bytes_per_s(self) -> float:
        """What a rank reads of its weights with one row."""
        return 1 / max(self.s_per_weight_byte[0], 1e-15)


@dataclass(frozen=True)
class Products:
    """Matrix products of one shape by rows, measured apart from the engine: ``n`` outputs, ``k`` inputs, bf16.

    Attributes:
        ranks: computing at the same time. rows, s_per_weight_byte, low, high: as of `Rates`.
    """

    ranks: int
    n: int
    k: int
    rows: tuple[float, ...]
    s_per_weight_byte: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Device:
    """One GPU, or the host of CPU ranks.

    Attributes:
        memory_bytes: of one device. memory_bytes_per_s: reads, as a kernel reaches them.
        flops_per_s: dense bf16 products as large ones reach them.
        attention_flops_share: of ``flops_per_s``, that prefill attention reaches.
        kernel_s: cost of one more operation (in a graph: until the next kernel runs).
        kernels_per_layer: operations of one decoder layer, all-reduce not counted.
        step_s: scheduling and batch preparation per step; sequence_s: per sequence of a step besides.
        pass_s: what a forward pass costs besides its layers (embedding, logits, sampling).
        shared: all ranks of a node share one device (CPU ranks) of so many ``cores``.
    """

    name: str
    memory_bytes: Constant
    memory_bytes_per_s: Constant
    flops_per_s: Constant
    attention_flops_share: Constant
    kernel_s: Constant
    kernels_per_layer: Constant
    step_s: Constant
    sequence_s: Constant
    pass_s: Constant
    shared: bool
    cores: int = 1


@dataclass(frozen=True)
class Cluster:
    """A whole description.

    Attributes:
        name: short, no blanks. title: for people.
        gpus_per_node, nics_per_node, max_nodes: shape. On a host of CPU ranks gpus_per_node counts ranks.
        intra, inter: ways to send inside a node and between nodes, between yalis's own algorithms.
        library: how the baseline reduces. library_name: ``nccl`` or ``gloo``.
        bus_intra_bytes_per_s, bus_inter_bytes_per_s: bandwidth per rank inside a node, per node between nodes.
        library_p2p_s: of one transfer between stages by the library, besides its bytes.
        fits, rates, products: measured here. Fits also hold transfers between two ranks, under the name ``p2p``.
        notes: machine, versions, date, what is emulated.
    """

    name: str
    title: str
    gpus_per_node: int
    nics_per_node: int
    max_nodes: int
    device: Device
    intra: tuple[Wire, ...]
    inter: tuple[Wire, ...]
    library_name: str
    library: Ring | Nccl
    bus_intra_bytes_per_s: Constant
    bus_inter_bytes_per_s: Constant
    library_p2p_s: Constant
    algorithms: tuple[str, ...]
    emulated: bool = False
    fits: tuple[Fit, ...] = ()
    rates: tuple[Rates, ...] = ()
    products: tuple[Products, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def nodes(self, ranks: int) -> int:
        """Nodes that ``ranks`` ranks occupy when nodes are filled one after the other."""
        return -(-ranks // self.gpus_per_node)

    def fit(self, algorithm: str, ranks: int, nodes: int, *, norm: bool = False) -> Fit | None:
        """What was measured for exactly this algorithm and shape, with or without the norm behind it."""
        wanted = (algorithm, ranks, nodes, norm)
        return next((f for f in self.fits if (f.algorithm, f.ranks, f.nodes, f.norm) == wanted), None)

    def transfer(self, *, across: bool) -> Fit | None:
        """What was measured of a transfer between two ranks, of one node or of two."""
        return next((f for f in self.fits if f.algorithm == "p2p" and (f.nodes > 1) == across), None)

    def rates_for(self, tp: int, pp: int, flying: int) -> Rates | None:
        """What was measured of this layout, or of the one most like it; None where none is.

        Alike is a layout with as many ranks at work and as many threads in each. Where all that work have a core of
        their own, others with fewer ranks at work serve as well: nobody waits for a core in either. Ranks with a device
        of their own never compete: there the nearest TP counts, TP 1 only for itself unless there is nothing else.
        """
        if not self.device.shared:

            def distance(r: Rates) -> tuple[bool, float, bool]:
                return (r.tp > 1) != (tp > 1), abs(math.log2(r.tp / tp)), r.pp != pp

            return min(self.rates, key=distance, default=None)
        ranks, active, cores = tp * pp, tp * flying, self.device.cores

        def threads(count: int) -> int:
            return max(1, cores // count)

        alike = [r for r in self.rates if threads(r.ranks) == threads(ranks)]
        same = [r for r in alike if r.active == active]
        if not same and active <= cores:
            same = [r for r in alike if r.active <= cores]
        wanted = (tp, pp, flying)
        return min(
            same,
            key=lambda r: ((r.tp, r.pp, r.flying) != wanted, abs(r.active - active), abs(r.ranks - ranks), r.tp != tp),
            default=None,
        )

    def constants(self) -> dict[str, Constant]:
        """Every constant by its key in the file, such as ``device.flops_per_s`` or ``inter.ll.alpha_s``."""
        found = {f"device.{k}": v for k, v in vars(self.device).items() if isinstance(v, Constant)}
        for tier, wires in (("intra", self.intra), ("inter", self.inter)):
            for wire in wires:
                found |= {f"{tier}.{wire.name}.{k}": v for k, v in vars(wire).items() if isinstance(v, Constant)}
        kind = type(self.library).__name__.lower()
        found |= {f"library.{kind}.{k}": v for k, v in vars(self.library).items() if isinstance(v, Constant)}
        for r in self.rates:
            key = f"rates.tp{r.tp}pp{r.pp}x{r.flying}"
            found |= {f"{key}.{k}": v for k, v in vars(r).items() if isinstance(v, Constant)}
        found |= {f"library.{k}": v for k, v in vars(self).items() if isinstance(v, Constant)}
        return found


def shipped() -> list[str]:
    """Names of the descriptions that come with yalis."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_cluster(name: str | Path) -> Cluster:
    """A shipped description by name, or a file.

    Raises:
        ConfigError: there is none, or a value is wrong; names file, key and value.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
        if not path.exists():
            raise ConfigError(f"cluster {str(name)!r}: not shipped ({', '.join(shipped())}), and not a .toml file")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cluster {path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"cluster {path}: not TOML: {error}") from None
    return parse_cluster(raw, str(path))


def parse_cluster(raw: Mapping[str, Any], where: str) -> Cluster:
    """Check and build. ``where``: the file, for messages.

    Raises:
        ConfigError: names file, key and value.
    """
    top = _Table(raw, where, "")
    node, device = top.table("node"), top.table("device")
    library = top.table("library")
    shared = device.flag("shared")
    cluster = Cluster(
        name=top.text("name"),
        title=top.text("title"),
        emulated=top.flag("emulated"),
        gpus_per_node=node.count("gpus"),
        nics_per_node=node.count("nics"),
        max_nodes=node.count("max_nodes"),
        device=Device(
            name=device.text("name"),
            shared=shared,
            cores=device.count("cores") if shared else 1,
            memory_bytes=device.constant("memory_bytes"),
            memory_bytes_per_s=device.constant("memory_bytes_per_s"),
            flops_per_s=device.constant("flops_per_s"),
            attention_flops_share=device.constant("attention_flops_share"),
            kernel_s=device.constant("kernel_s", zero=True),
            kernels_per_layer=device.constant("kernels_per_layer", zero=True),
            step_s=device.constant("step_s", zero=True),
            sequence_s=device.constant("sequence_s", zero=True),
            pass_s=device.constant("pass_s", zero=True),
        ),
        intra=_wires(top.table("intra")),
        inter=_wires(top.table("inter")),
        library_name=library.text("name"),
        library=_library(library),
        bus_intra_bytes_per_s=library.constant("bus_intra_bytes_per_s"),
        bus_inter_bytes_per_s=library.constant("bus_inter_bytes_per_s"),
        library_p2p_s=library.constant("library_p2p_s"),
        algorithms=top.texts("algorithms", ALGORITHMS),
        fits=tuple(_fit(row) for row in top.rows("fit")),
        rates=tuple(_rates(row) for row in top.rows("rates")),
        products=tuple(_products(row) for row in top.rows("products")),
        notes={key: str(value) for key, value in top.optional("notes").items()},
    )
    for each in (top, node, device, library):
        each.finish()
    return cluster


def _wires(tier: _Table) -> tuple[Wire, ...]:
    names = tier.subtables()
    if not names:
        raise ConfigError(
            f"{tier.where}: {tier.name}: no wire format; give at least one table such as [{tier.name}.ll]"
        )
    wires = []
    for name in names:
        table = tier.table(name)
        factor = table.constant("factor")
        if factor.value < 1:
            raise ConfigError(f"{tier.where}: {tier.name}.{name}.factor={factor.value:g}: must be at least 1")
        wires.append(Wire(name, table.constant("alpha_s", zero=True), table.constant("bytes_per_s"), factor))
        table.finish()
    tier.finish()
    return tuple(wires)


def _library(library: _Table) -> Ring | Nccl:
    kinds = [kind for kind in library.subtables() if kind in ("ring", "nccl")]
    if len(kinds) != 1:
        raise ConfigError(f"{library.where}: library: needs one table, [library.ring] or [library.nccl], got {kinds}")
    table = library.table(kinds[0])
    found: Ring | Nccl
    if kinds == ["ring"]:
        found = Ring(*(table.constant(key, zero=True) for key in ("base_s", "intra_s", "inter_s")))
    else:
        found = Nccl(
            table.constant("channels"),
            table.constant("latency_inter_s", zero=True),
            table.one_of("generation", GENERATIONS),
            table.one_of("cpu", CPUS),
        )
    table.finish()
    return found


def _fit(table: _Table) -> Fit:
    rows = table.raw.get("segments")
    table.used.add("segments")
    if not isinstance(rows, list) or not rows or any(not isinstance(r, list) or len(r) != 3 for r in rows):
        raise ConfigError(f"{table.where}: {table.name}.segments={rows!r}: must be rows [bytes, alpha_s, s_per_byte]")
    segments = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    if any(a >= b for (a, _, _), (b, _, _) in pairwise(segments)):
        raise ConfigError(f"{table.where}: {table.name}.segments: sizes must ascend, got {[s[0] for s in segments]}")
    found = Fit(
        table.text("algorithm"),
        table.count("ranks"),
        table.count("nodes"),
        segments,
        table.text("kind"),
        table.text("source"),
        table.flag("norm"),
    )
    table.finish()
    return found


_Row = tuple[float, ...]


def _by_rows(table: _Table) -> tuple[_Row, _Row, _Row, _Row]:
    """rows, s_per_weight_byte, low, high."""
    rows, middle, low, high = (table.numbers(key) for key in ("rows", "s_per_weight_byte", "low", "high"))
    if any(len(column) != len(rows) for column in (middle, low, high)) or list(rows) != sorted(set(rows)):
        raise ConfigError(
            f"{table.where}: {table.name}.rows={list(rows)}: must ascend, one entry of s_per_weight_byte, low and high "
            "each"
        )
    return rows, middle, low, high


def _rates(table: _Table) -> Rates:
    tp, pp, flying = (table.count(key) for key in ("tp", "pp", "flying"))
    names = ("step_s", "sequence_s", "layer_s", "logit_s", "arrival_s", "kv_byte_s", "kv_query_s", "pair_s")
    constants = {key: table.constant(key, zero=True) for key in names}
    rows, s_per_weight_byte, low, high = _by_rows(table)
    found = Rates(tp, pp, flying, rows=rows, s_per_weight_byte=s_per_weight_byte, low=low, high=high, **constants)
    table.finish()
    return found


def _products(table: _Table) -> Products:
    ranks, n, k = (table.count(key) for key in ("ranks", "n", "k"))
    found = Products(ranks, n, k, *_by_rows(table))
    table.finish()
    return found


class _Table:
    """A TOML table that knows its place, so that every complaint names file, key and value."""

    def __init__(self, raw: Mapping[str, Any], where: str, name: str):
        self.raw = raw
        self.where = where
        self.name = name
        self.used: set[str] = set()

    def _key(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def _get(self, key: str) -> Any:
        self.used.add(key)
        if key not in self.raw:
            raise ConfigError(f"{self.where}: {self._key(key)} is missing")
        return self.raw[key]

    def _refuse(self, key: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(f"{self.where}: {self._key(key)}={value!r}: must be {wanted}")

    def table(self, key: str) -> _Table:
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._refuse(key, value, "a table")
        return _Table(value, self.where, self._key(key))

    def subtables(self) -> list[str]:
        return [k for k, v in self.raw.items() if isinstance(v, dict) and "value" not in v]

    def rows(self, key: str) -> list[_Table]:
        self.used.add(key)
        value = self.raw.get(key, [])
        if not isinstance(value, list) or any(not isinstance(row, dict) for row in value):
            raise self._refuse(key, value, f"tables [[{key}]]")
        return [_Table(row, self.where, f"{key}[{i}]") for i, row in enumerate(value)]

    def optional(self, key: str) -> Mapping[str, Any]:
        return self.table(key).raw if key in self.raw else {}

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str) or not value:
            raise self._refuse(key, value, "text")
        return value

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in known:
            raise self._refuse(key, value, f"one of {', '.join(known)}")
        return value

    def texts(self, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
        value = self._get(key)
        if not isinstance(value, list) or not value or any(word not in known for word in value):
            raise self._refuse(key, value, f"a list of {', '.join(known)}")
        return tuple(value)

    def flag(self, key: str) -> bool:
        self.used.add(key)
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self._refuse(key, value, "true or false")
        return value

    def count(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._refuse(key, value, "an integer of at least 1")
        return value

    def number(self, key: str) -> float:
        value = self._get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise self._refuse(key, value, "a finite number of at least 0")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._get(key)
        good = isinstance(value, list) and bool(value)
        if not good or any(not isinstance(v, int | float) or not math.isfinite(v) or v <= 0 for v in value):
            raise self._refuse(key, value, "a list of positive numbers")
        return tuple(float(v) for v in value)

    def constant(self, key: str, *, zero: bool = False) -> Constant:
        table = self.table(key)
        value = table.number("value")
        if not value and not zero:
            raise table._refuse("value", 0, "above 0")
        kind = table.text("kind")
        if kind not in KINDS:
            raise table._refuse("kind", kind, f"one of {', '.join(KINDS)}")
        low = table.number("low") if "low" in table.raw else value
        high = table.number("high") if "high" in table.raw else value
        if not low <= value <= high:
            raise table._refuse("value", value, f"between low={low:g} and high={high:g}")
        found = Constant(value, kind, table.text("source"), low, high)
        table.finish()
        return found

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self.raw:
            if key not in self.used:
                raise ConfigError(
                    f"{self.where}: {self._key(key)} is unknown; known here: {', '.join(sorted(self.used))}"
                )

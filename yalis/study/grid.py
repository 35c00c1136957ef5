"""A study: a grid of measurements described in TOML (docs/study.md), as cells of one measurement each."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from yalis.comm.emulation import EmulatedFabric
from yalis.comm.policy import ALGORITHMS, ALIASES
from yalis.config import LOAD_FORMATS
from yalis.errors import ConfigError
from yalis.study.workload import parse_workload

# `ring` is the study's own (`yalis.study.ring`), there to be compared with; the engine has none over CPU ranks.
SWEPT = (*ALGORITHMS, *ALIASES, "ring")
ENGINES = ("yalis", "transformers", "vllm", "openai")

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file; a key that it does not know is refused."""


class Scheme(_Table, frozen=True):
    """How ranks share a model. ``ranks_per_node`` declares nodes; None: all ranks on one."""

    tp: Count = 1
    pp: Count = 1
    ranks_per_node: Count | None = None


class Engine(_Table, frozen=True):
    """What is measured.

    Attributes:
        name: label; default the kind. python: interpreter of another environment (transformers, vllm).
        url: of a running server (openai). served_name: as the server knows the model; default the model's.
        vocab: draw random token ids below this where the model's folder is not here (openai).
        tp, pp, ranks_per_node: what the server at ``url`` was started with, for labels.
    """

    kind: str
    name: str = ""
    python: str = ""
    url: str = ""
    served_name: str = ""
    vocab: Count | None = None
    tp: Count | None = None
    pp: Count | None = None
    ranks_per_node: Count | None = None


class Load(_Table, frozen=True):
    """Requests that arrive over time, sent to a server by `yalis bench serve`.

    Attributes:
        requests: how many.
        rate: requests per second; burstiness: 1 is a Poisson process, below 1 burstier.
        input_len, output_len: tokens of every request (with ``rate``).
        trace: BurstGPT's CSV, with its own times and lengths; in place of ``rate``.
        time_scale: play the trace so many times faster. max_len: leave out rows of more tokens in all.
    """

    requests: Count
    rate: Positive | None = None
    burstiness: Positive = 1.0
    input_len: Count | None = None
    output_len: Count | None = None
    trace: str = ""
    time_scale: Positive = 1.0
    max_len: Count | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.trace:
            faster = f", {self.time_scale:g}x faster" if self.time_scale != 1 else ""
            return f"{self.requests} of {Path(self.trace).name}{faster}"
        burst = f", burstiness {self.burstiness:g}" if self.burstiness != 1 else ""
        return f"{self.requests} of {self.input_len}+{self.output_len} at {self.rate:g}/s{burst}"


class Sweep(_Table, frozen=True):
    """All-reduces by message size, beside the engines.

    Attributes:
        baseline: what ratios are to; default `yalis.study.allreduce_plots.baseline_of`.
        device: where the messages lie: auto (a GPU where there is one), cpu or cuda.
    """

    nodes: tuple[Count, ...] = ()
    ranks_per_node: tuple[Count, ...] = (1,)
    algorithms: tuple[str, ...] = ("rd",)
    baseline: str = ""
    device: str = "auto"


class File(_Table, frozen=True):
    """The whole file."""

    name: str = ""
    models: tuple[str, ...] = ()
    workloads: tuple[str | Load, ...] = ()
    schemes: tuple[Scheme, ...] = (Scheme(),)
    all_reduce: tuple[str, ...] = ("auto",)
    engine: tuple[Engine, ...] = (Engine("yalis"),)
    iters: Count = 5
    warmup: Count = 1
    timeout_s: Positive = 600.0
    load_format: str = "auto"
    emulate: str = ""
    cluster: str = ""
    allreduce: Sweep = Sweep()
    slurm: dict[str, str | int] = {}


@dataclass(frozen=True)
class Cell:
    """One measurement. ``kind`` is an engine, or ``allreduce``.

    Attributes:
        workload: `yalis.study.workload`'s text, or the name of ``load``.
        load: fields of `Load`, empty for a batch that arrives at once.
        options: of the engine: those of `Engine` that are set.
    """

    kind: str
    model: str
    workload: str
    tp: int
    pp: int
    ranks_per_node: int
    all_reduce: str
    iters: int
    warmup: int
    emulate: str
    load_format: str
    load: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Ranks that share the model."""
        return self.tp * self.pp

    @property
    def nodes(self) -> int:
        """Declared or real."""
        return self.ranks // self.ranks_per_node

    @property
    def key(self) -> str:
        """The same for the same measurement, in every run of the study."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def engine(self) -> str:
        """For people."""
        return str(self.options.get("name") or self.kind)

    @property
    def scheme(self) -> str:
        """As ``TP2 PP2, 2 nodes``."""
        parts = f"TP{self.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")
        return parts + (f", {self.nodes} nodes" if self.nodes > 1 else "")

    @property
    def label(self) -> str:
        """One line."""
        if self.kind == "allreduce":
            return f"all-reduce {self.all_reduce}, {self.ranks} ranks on {self.nodes} node(s)"
        reduce = f", {self.all_reduce}" if self.kind == "yalis" and self.tp > 1 else ""
        return f"{self.engine} {Path(self.model).name} {self.scheme}{reduce}, {self.workload}"


@dataclass(frozen=True)
class Study:
    """A parsed file.

    Attributes:
        cells: the grid, in order. skipped: combinations left out, with the reason.
        cluster: description to predict with; empty for none.
        baseline: all-reduce that ratios are to; empty for the report's choice.
        slurm: options of the job scripts.
    """

    name: str
    cells: tuple[Cell, ...]
    skipped: tuple[str, ...]
    timeout_s: float
    cluster: str
    baseline: str
    slurm: Mapping[str, str]


def load_study(path: Path) -> Study:
    """Read and check.

    Raises:
        ConfigError: names file, key and value.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"study {path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"study {path}: not TOML: {error}") from None
    try:
        file = msgspec.convert(raw, File)
    except msgspec.ValidationError as error:
        raise ConfigError(f"study {path}: {_complaint(str(error), raw)}") from None
    try:
        return _build(file, path.stem)
    except ConfigError as error:
        raise ConfigError(f"study {path}: {error}") from None


def _complaint(words: str, raw: Any) -> str:
    """msgspec's complaint with place and value in front: ``schemes[0].tp=0: expected `int` >= 1``."""
    text, _, where = words.partition(" - at `$")
    place = where.rstrip("`").lstrip(".")
    text = text[0].lower() + text[1:]
    if "unknown field" in text:
        tables = {"": File, "schemes": Scheme, "engine": Engine, "workloads": Load, "allreduce": Sweep}
        text += f"; known: {', '.join(tables[re.sub(r'[.[].*', '', place)].__struct_fields__)}"
        return f"{place}: {text}" if place else text
    value = raw
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return f"{place}: {text}"
    return f"{place}: {text}" if isinstance(value, dict) else f"{place}={value!r}: {text}"


def _build(file: File, stem: str) -> Study:
    EmulatedFabric.parse(file.emulate)
    _check_name("load_format", file.load_format, LOAD_FORMATS)
    _check_name("allreduce.device", file.allreduce.device, ("auto", "cpu", "cuda"))
    for engine in file.engine:
        _check_name("engine.kind", engine.kind, ENGINES)
        _check_engine(engine)
    for name in file.all_reduce:
        _check_name("all_reduce", name, ("auto", *ALGORITHMS, *ALIASES))
    for name in file.allreduce.algorithms:
        _check_name("allreduce.algorithms", name, SWEPT)
    if file.allreduce.baseline:
        _check_name("allreduce.baseline", file.allreduce.baseline, file.allreduce.algorithms)
    for load in file.workloads:
        if isinstance(load, Load):
            _check_load(load)
    cells: list[Cell] = []
    skipped: list[str] = []
    for cell in [*_engine_cells(file), *_sweep_cells(file)]:
        reason = _unsuitable(cell)
        if cell in cells:
            continue
        if reason:
            skipped.append(f"{cell.label}: {reason}")
        else:
            cells.append(cell)
    if not cells:
        raise ConfigError("no cell; give models, workloads and schemes, or [allreduce] with nodes")
    return Study(
        name=file.name or stem,
        cells=tuple(cells),
        skipped=tuple(dict.fromkeys(skipped)),
        timeout_s=file.timeout_s,
        cluster=file.cluster,
        baseline=file.allreduce.baseline,
        slurm={key: str(value) for key, value in file.slurm.items()},
    )


def _check_name(key: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(f"{key}={name!r}: must be one of {', '.join(known)}")


def _check_engine(engine: Engine) -> None:
    if engine.kind == "openai" and not engine.url:
        raise ConfigError("engine.url is missing: where the server of kind openai listens, such as http://host:8000")
    for kind, keys in (
        ("openai", ("url", "served_name", "vocab", "tp", "pp", "ranks_per_node")),
        ("transformers, vllm", ("python",)),
    ):
        for key in keys:
            if getattr(engine, key) and engine.kind not in kind:
                raise ConfigError(f"engine.{key}={getattr(engine, key)!r}: is for kind {kind}, not {engine.kind}")


def _check_load(load: Load) -> None:
    if bool(load.trace) == (load.rate is not None):
        raise ConfigError(f"workload {load.name if load.trace else 'table'}: give either rate or trace")
    if load.trace and not Path(load.trace).is_file():
        raise ConfigError(f"workloads.trace={load.trace!r}: no such file; name BurstGPT's CSV, relative to this folder")
    lengths = (load.input_len, load.output_len)
    if load.trace and any(lengths):
        raise ConfigError("workloads: a trace has lengths of its own; leave out input_len and output_len")
    if load.rate is not None and not all(lengths):
        raise ConfigError(f"workloads.rate={load.rate:g}: needs input_len and output_len as well")


def _engine_cells(file: File) -> Iterator[Cell]:
    for model in file.models:
        for work in file.workloads:
            for engine in file.engine:
                own = Scheme(engine.tp or 1, engine.pp or 1, engine.ranks_per_node)
                for scheme in (own,) if engine.kind == "openai" else file.schemes:
                    # Only yalis's own all-reduce is switched.
                    for reduce in file.all_reduce if engine.kind == "yalis" and scheme.tp > 1 else ("auto",):
                        yield _cell(file, engine, model, work, scheme, reduce)


def _cell(file: File, engine: Engine, model: str, work: str | Load, scheme: Scheme, reduce: str) -> Cell:
    ranks = scheme.tp * scheme.pp
    per_node = scheme.ranks_per_node or ranks
    if ranks % per_node:
        raise ConfigError(f"schemes.ranks_per_node={per_node}: does not divide {ranks} ranks")
    options = {k: v for k, v in msgspec.to_builtins(engine).items() if v and k not in ("kind", "tp", "pp")}
    options.pop("ranks_per_node", None)
    return Cell(
        kind=engine.kind,
        model=model,
        workload=work.name if isinstance(work, Load) else parse_workload(work).name,
        tp=scheme.tp,
        pp=scheme.pp,
        ranks_per_node=per_node,
        all_reduce=reduce,
        iters=file.iters,
        warmup=file.warmup,
        # What lies between the nodes of another engine is real.
        emulate=file.emulate if engine.kind == "yalis" and ranks > per_node else "",
        load_format=file.load_format,
        load=msgspec.to_builtins(work) if isinstance(work, Load) else {},
        options=options,
    )


def _sweep_cells(file: File) -> Iterator[Cell]:
    for nodes in file.allreduce.nodes:
        for per_node in file.allreduce.ranks_per_node:
            for name in file.allreduce.algorithms:
                yield Cell(
                    kind="allreduce",
                    model="",
                    workload="",
                    tp=nodes * per_node,
                    pp=1,
                    ranks_per_node=per_node,
                    all_reduce=name,
                    iters=file.iters,
                    warmup=file.warmup,
                    emulate=file.emulate if nodes > 1 else "",
                    load_format="",
                    options={"device": file.allreduce.device},
                )


def _unsuitable(cell: Cell) -> str:
    if cell.kind == "transformers" and cell.ranks > 1:
        return "transformers runs on one rank here"
    if cell.kind == "vllm" and cell.nodes > 1:
        return "vllm runs offline on one node here; serve it and use kind openai"
    if cell.load and cell.kind in ("transformers", "vllm"):
        return "requests over time need a server; serve it and use kind openai"
    if cell.load and cell.emulate and EmulatedFabric.parse(cell.emulate).namespaces:
        return "a server and its client do not share a network namespace; leave netns out for requests over time"
    if cell.kind in ("yalis", "allreduce"):
        if cell.all_reduce == "shm" and cell.tp > cell.ranks_per_node:
            return "shm works inside one node"
        if cell.kind == "allreduce" and cell.ranks < 2:
            return "one rank has nothing to reduce with"
        if cell.emulate and cell.all_reduce in ("torch", "gloo"):
            return "gloo's own all-reduce does not pass through the emulated network"
    return ""

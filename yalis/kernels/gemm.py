"""Matrix products on CUDA devices: cuBLAS, or for few rows a Triton kernel where that measured faster.

`tune` measures, for the weights of a model and a few numbers of rows, cuBLAS against a handful of ways to cut the
kernels of `triton_gemm`, and keeps what it found in a file per device and versions, so that the next process only
reads it. What was not measured goes to cuBLAS.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from yalis.kernels.gpu import gpu_kernels
from yalis.utils.logging import get_logger, log_once
from yalis.utils.native import cache_dir

if TYPE_CHECKING:
    from yalis.kernels.triton_gemm import GemmScratch, GemmShape

logger = get_logger(__name__)

MOST_ROWS = 64
"""Products of more rows are cuBLAS's alone: from there on the matrix units are the limit, not memory."""

# Numbers of rows that are measured; others take the choice of the next larger one.
_ROWS = (1, 8, 32, 64)
# Weights that a timing rotates over, so that none is found in the cache: several times the largest cache there is.
_ROTATED_BYTES = 256 << 20
_CALLS = 24
_MOST_SHARED_BYTES = 220 << 10
_REPLAYS = 5
_CUBLAS = "cublas"
# Dependent reads that take as long as NVRAR with its norm between two H100, alone and while weights come in
# (docs/kernels.md, "Weights before the wait").
_DEPENDENT_READS = 12


@dataclass(frozen=True)
class Product:
    """What distinguishes one product from another.

    Attributes:
        rows: rows of activations, one of the measured numbers.
        n, k: output and input features; with ``gated`` the weight has 2 n rows.
        dtype: of weight and activations.
        gated: ``silu(gate) * up`` of the two halves follows.
        bias: whether there is one.
    """

    rows: int
    n: int
    k: int
    dtype: torch.dtype
    gated: bool
    bias: bool

    def __str__(self) -> str:
        marks = (" gated" if self.gated else "") + (" bias" if self.bias else "")
        return f"{self.rows} x {self.n} x {self.k} {str(self.dtype).removeprefix('torch.')}{marks}"


@dataclass(frozen=True)
class ProductUse:
    """A weight [N, K] and bias [N] or None, and how decode steps use them (`yalis.kernels.ops.LinearUse`)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    gated: bool
    waits: bool


@dataclass(frozen=True)
class TuneReceipt:
    """What `tune` did.

    Attributes:
        products: choices in force.
        measured: how many of them were measured now; the rest was read from the file.
        seconds: that this took.
        triton: how many went to Triton kernels.
    """

    products: int
    measured: int
    seconds: float
    triton: int


@dataclass
class _State:
    """Choices of this process, and scratch memory of split products, which captured graphs point to.

    Attributes:
        chosen: how each measured product is computed; None is cuBLAS.
        rows: measured numbers of rows, ascending; ``most_rows`` is the last or 0.
    """

    rows: tuple[int, ...] = ()
    most_rows: int = 0
    chosen: dict[Product, GemmShape | None] = field(default_factory=dict)
    scratch: list[GemmScratch] = field(default_factory=list)


@cache
def _state() -> _State:
    return _State()


def candidates(rows: int, dtype: torch.dtype, *, gated: bool, pdl: bool = True) -> list[GemmShape]:
    """Ways to cut a product of ``rows`` rows that are worth measuring and fit on chip.

    Args:
        pdl: kernels start before their predecessors end; without it nothing is held or asked for ahead.
    """
    from yalis.kernels.triton_gemm import GemmShape

    if dtype == torch.float32:
        found = [GemmShape(8, 256, 4, 2)] * (rows == 1)
        return [*found, GemmShape(16, 64, 4, 2, splits=1), GemmShape(16, 64, 4, 2, splits=2)]
    if rows == 1:
        found = [
            GemmShape(4, 1024, 4, 2),
            GemmShape(4, 1024, 4, 2, ahead=4),
            GemmShape(4, 1024, 4, 3, ahead=6),
            GemmShape(4, 1024, 4, 3, held=1024, ahead=4),
            GemmShape(4, 1024, 4, 3, held=2048, ahead=4),
            GemmShape(2, 2048, 4, 2, ahead=6),
            GemmShape(2, 2048, 4, 2, held=2048),
            GemmShape(8, 512, 4, 4, ahead=4),
            GemmShape(16, 512, 8, 3),
            GemmShape(16, 512, 8, 3, held=1024),
        ]
    else:
        found = [
            GemmShape(16, 512, 1, 3, splits=1),
            GemmShape(16, 512, 1, 3, splits=1, ahead=2),
            GemmShape(16, 128, 1, 6, splits=1),
            GemmShape(16, 128, 1, 6, splits=1, held=256, ahead=8),
            GemmShape(16, 128, 1, 6, splits=1, held=512, ahead=8),
            GemmShape(32, 256, 2, 4, splits=1),
            GemmShape(32, 256, 2, 4, splits=1, held=512),
            GemmShape(32, 256, 2, 4, splits=1, held=512, ahead=8),
            GemmShape(64, 128, 4, 4, splits=1, tokens=16),
            GemmShape(64, 128, 4, 4, splits=1, tokens=16, ahead=8),
            GemmShape(64, 128, 4, 4, splits=1, tokens=16, ahead=24),
            GemmShape(64, 128, 4, 4, splits=1, tokens=16, held=512, ahead=8),
            GemmShape(64, 128, 4, 5, splits=2, ahead=2),
            GemmShape(64, 128, 4, 5, splits=2, held=512, ahead=8),
            GemmShape(64, 128, 4, 3, splits=4, tokens=16, held=256, ahead=8),
        ]
    if not pdl:
        found = list(dict.fromkeys(replace(shape, held=0, ahead=0) for shape in found))
    return [shape for shape in found if rows == 1 or _fits(shape, rows, gated)]


def _fits(shape: GemmShape, rows: int, gated: bool) -> bool:
    """Whether a cut of `triton_gemm._few_rows` in 16 bits has room for its tiles.

    Those in flight lie in shared memory, and beside them held ones of 64 rows on their way to the matrix units. Held
    ones of fewer rows pass through the place of those in flight; beside the sums of many rows registers have no room.
    """
    parts = 2 if gated else 1
    if shape.held and shape.rows < 64 and shape.padded(rows) * parts > 32:
        return False
    columns = shape.stages * shape.columns + (shape.held if shape.rows >= 64 else 0)
    return 2 * columns * (shape.rows * parts + shape.padded(rows)) <= _MOST_SHARED_BYTES


def _distinct(product: Product, weight: torch.Tensor) -> list[GemmShape]:
    """The candidates, without those that are the same kernel with the same arguments for this weight."""
    found: dict[tuple[GemmShape, int], GemmShape] = {}
    for shape in candidates(product.rows, product.dtype, gated=product.gated, pdl=gpu_kernels().pdl):
        launched = replace(shape, held=shape.held_of(product.k), ahead=0)
        found.setdefault((launched, shape.ahead_of(weight)), shape)
    return list(found.values())


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: GemmShape,
    *,
    gated: bool,
    compile_only: bool = False,
) -> torch.Tensor:
    """The product by the Triton kernel cut as ``shape``; arguments as in `triton_gemm.product`."""
    from yalis.kernels.triton_gemm import GemmScratch, product

    rows, n = len(x), weight.shape[0] // (2 if gated else 1)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    elements, tiles = GemmScratch.needed(shape, rows, n, gated)
    scratch = None
    if tiles:
        held = _state().scratch
        scratch = next(
            (s for s in held if s.device == x.device and len(s.partial) >= elements and len(s.counters) >= tiles), None
        )
        if scratch is None:
            scratch = GemmScratch(elements, tiles, x.device)
            held.append(scratch)
    product(x, weight, bias, out, shape, scratch, gated=gated, pdl=gpu_kernels().pdl, compile_only=compile_only)
    return out


def _run_shape(
    x: torch.Tensor, shape: GemmShape, gated: bool, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return run(x, weight, bias, shape, gated=gated)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``: [T, K] -> [T, N]."""
    shape = _choice(x, weight, bias, gated=False)
    return F.linear(x, weight, bias) if shape is None else run(x, weight, bias, shape, gated=False)


def linear_silu_and_mul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """``silu(gate) * up`` of the product's halves, or None where two kernels are faster."""
    shape = _choice(x, weight, bias, gated=True)
    return None if shape is None else run(x, weight, bias, shape, gated=True)


def _choice(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool) -> GemmShape | None:
    state, count = _state(), len(x)
    if not 0 < count <= state.most_rows:
        return None
    n, k = weight.shape
    rows = next(r for r in state.rows if r >= count)
    return state.chosen.get(Product(rows, n // 2 if gated else n, k, weight.dtype, gated, bias is not None))


def tune(
    uses: Iterable[ProductUse],
    batch_sizes: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> TuneReceipt:
    """Choose for each product of a model and each number of rows; takes effect in this process at once.

    Of products of one shape, in another model too, the latest choice counts; captured graphs keep theirs.

    Args:
        uses: every product of the model. Several of one shape are timed in turn; a single small one is copied until it
            cannot stay in the cache.
        batch_sizes: numbers of rows that decode steps will have.
        on_progress: called with (products done, products to measure).
    """
    started = time.perf_counter()
    groups: dict[tuple[int, int, torch.dtype, bool, bool], list[ProductUse]] = {}
    for use in uses:
        weight = use.weight
        if gpu_kernels().serves(weight) and weight.stride(1) == 1:
            n, k = weight.shape
            key = (n // 2 if use.gated else n, k, weight.dtype, use.gated, use.bias is not None)
            groups.setdefault(key, []).append(use)
    rows = [r for i, r in enumerate(_ROWS) if any((0, *_ROWS)[i] < size <= r for size in batch_sizes)]
    state = _state()
    chosen = state.chosen
    if not groups or not rows:
        return TuneReceipt(0, 0, time.perf_counter() - started, 0)
    path = _file(next(iter(groups.values()))[0].weight.device)
    known = _read(path)
    wanted = {Product(r, *key): members for key, members in groups.items() for r in rows}
    missing = [product for product, members in wanted.items() if _name(product, members) not in known]
    _compile({product: wanted[product] for product in missing})
    for done, product in enumerate(missing):
        if on_progress is not None:
            on_progress(done, len(missing))
        known[_name(product, wanted[product])] = _measure(product, wanted[product])
    if missing:
        _write(path, known)
    for product, members in wanted.items():
        found = known[_name(product, members)]["choice"]
        chosen[product] = None if found is None else _shape(found)
    state.rows = tuple(sorted({product.rows for product in chosen}))
    state.most_rows = state.rows[-1]
    triton = sum(chosen[product] is not None for product in wanted)
    receipt = TuneReceipt(len(wanted), len(missing), time.perf_counter() - started, triton)
    log_once(
        logger,
        logging.INFO,
        f"products of few rows: {triton} of {len(wanted)} by Triton, the rest by cuBLAS "
        f"({len(missing)} measured in {receipt.seconds:.1f} s, kept in {path})",
    )
    return receipt


def _waits(members: Sequence[ProductUse]) -> bool:
    """Whether a product is measured behind a kernel that leaves memory alone."""
    return gpu_kernels().pdl and any(use.waits for use in members)


def _name(product: Product, members: Sequence[ProductUse]) -> str:
    """By which a choice is kept."""
    return f"{product} waits" if _waits(members) else str(product)


def _compile(wanted: Mapping[Product, Sequence[ProductUse]]) -> None:
    """Compile every candidate, many at a time: one after the other they would take longer than all the rest."""
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for product, members in wanted.items():
            weight, bias = members[0].weight, members[0].bias
            x = torch.empty((product.rows, product.k), dtype=product.dtype, device=weight.device)
            for shape in _distinct(product, weight):
                run(x, weight, bias, shape, gated=product.gated, compile_only=True)


def _measure(product: Product, members: Sequence[ProductUse]) -> dict[str, Any]:
    """Times of every way to compute ``product`` and what goes before it, in microseconds, and the fastest."""
    from yalis.kernels.triton_elementwise import rms_norm, silu_and_mul
    from yalis.kernels.triton_gemm import LatencyBound

    weights = _rotation(members)
    device = weights[0][0].device
    x = torch.randn(product.rows, product.k, dtype=torch.float32, device=device).to(product.dtype)
    before: Callable[[], object]
    if _waits(members):
        before = LatencyBound(product.rows, _DEPENDENT_READS, device)
    else:
        gain, residual = torch.ones(product.k, dtype=product.dtype, device=device), torch.zeros_like(x)
        before = partial(rms_norm, x, residual, gain, 1e-5, x, pdl=gpu_kernels().pdl)

    def time(compute: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> float:
        def call(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            before()  # as in the model: what a product does while it waits counts, too
            compute(weight, bias)

        return _time([partial(call, weight, bias) for weight, bias in weights], device)

    def cublas(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found = F.linear(x, weight, bias)
        if not product.gated:
            return found
        out = torch.empty((product.rows, product.n), dtype=x.dtype, device=device)
        silu_and_mul(found, out, pdl=gpu_kernels().pdl)
        return out

    times = {_CUBLAS: time(cublas)}
    best: tuple[float, GemmShape | None] = (times[_CUBLAS], None)
    for shape in _distinct(product, weights[0][0]):
        try:
            times[str(shape)] = time(partial(_run_shape, x, shape, product.gated))
        except Exception as error:  # a cut that this device has no room for is no reason to stop
            log_once(logger, logging.INFO, f"product {product} cut {shape} does not run here: {error}")
            continue
        best = min(best, (times[str(shape)], shape), key=lambda pair: pair[0])
    logger.debug("product %s: %s", product, {name: round(t, 2) for name, t in times.items()})
    return {"choice": None if best[1] is None else asdict(best[1]), "us": {n: round(t, 2) for n, t in times.items()}}


def _rotation(members: Sequence[ProductUse]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Enough different weights of one shape that none is still in the cache when its turn comes."""
    count = min(_CALLS, max(2, math.ceil(_ROTATED_BYTES / members[0].weight.nbytes)))
    weights = [(use.weight, use.bias) for use in members[:count]]
    while len(weights) < count:
        weights.append((weights[0][0].clone(), weights[0][1]))
    return weights


def _time(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Microseconds per call within a CUDA graph, median of a few replays."""
    rounds = max(1, _CALLS // len(calls))
    torch.cuda.synchronize(device)  # what the calls read was made on another stream
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, and makes the scratch memory
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(rounds):
                for call in calls:
                    call()
        finally:
            graph.capture_end()
        graph.replay()
        times = []
        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return 1e3 * float(sorted(times)[_REPLAYS // 2]) / (rounds * len(calls))


# ---- the file ---------------------------------------------------------------------------------------------------


def _file(device: torch.device) -> Path:
    """Where choices for this device and these versions are kept."""
    import triton

    from yalis.kernels import triton_elementwise, triton_gemm

    sources = hashlib.sha256()
    for source in (__file__, triton_gemm.__file__, triton_elementwise.__file__):
        sources.update(Path(source).read_bytes())
    what = (
        torch.cuda.get_device_name(device), torch.__version__, str(torch.version.cuda), triton.__version__,
        str(gpu_kernels()), sources.hexdigest(),
    )  # fmt: skip
    return cache_dir() / "gemm" / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    """Publish by rename, with what another process may have added meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(_read(path) | known, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("cannot keep the measured products in %s (%s): they are measured at every start", path, error)


def _shape(found: dict[str, int]) -> GemmShape:
    from yalis.kernels.triton_gemm import GemmShape

    return GemmShape(**found)

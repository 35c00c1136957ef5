"""What weights before the wait bring: decode layers whose products hold and ask for more or less of them.

    python bench/gpu_ahead.py --tp 2 --between idle:4.3 --out idle.json      one GPU, a rank's share of TP 2
    python bench/gpu_ahead.py --tp 2 --between reads:12 --out reads.json     the same as `tune` measures
    torchrun --nproc-per-node 2 bench/gpu_ahead.py --tp 2 --between nvrar --out nvrar.json

A chain of four layers of --shape (8b, 70b) in a CUDA graph, 640 keys a sequence, batch 1, 8 and 32. In place of
all-reduce and norm: NVRAR, a kernel that idles so many microseconds, or one of so many dependent reads; with --tp 1 the
norm alone. First the best cuts without asking, then one product after the other all its cuts with columns held and MiB
asked for; what is best stays. Microseconds a layer, median of nine replays, the slower rank.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from gpu_kernels import timed  # beside this file
from triton import AsyncCompileMode

from yalis.attention.base import AttentionBatch, AttentionSpec, LayerKV, Rotation
from yalis.attention.triton import TritonBackend
from yalis.comm.communicator import Communicator, init_distributed
from yalis.comm.topology import from_environment
from yalis.kernels import gemm, ops
from yalis.kernels.triton_gemm import GemmShape, LatencyBound

BF16 = torch.bfloat16
# hidden, heads, KV heads, MLP
SHAPES = {"8b": (4096, 32, 8, 14336), "70b": (8192, 64, 8, 28672)}
DIM, KEYS, PAGE, LAYERS, CALLS, REPLAYS = 128, 640, 16, 4, 3, 9
ONE_ROW = [GemmShape(4, 1024, 4, 2), GemmShape(4, 1024, 4, 3), GemmShape(8, 512, 4, 4), GemmShape(2, 2048, 4, 2),
           GemmShape(16, 512, 8, 3)]  # fmt: skip
FEW_ROWS = [
    GemmShape(16, 512, 1, 3, splits=1), GemmShape(16, 128, 1, 6, splits=1), GemmShape(32, 256, 2, 4, splits=1),
    GemmShape(64, 128, 4, 4, splits=1, tokens=16), GemmShape(64, 128, 4, 5, splits=2),
    GemmShape(64, 128, 4, 3, splits=4, tokens=16),
]  # fmt: skip
HELD = {1: (0, 512, 1024, 2048), 8: (0, 256, 512), 32: (0, 256, 512)}
AHEAD = {1: (0, 1, 2, 4, 6, 8, 12), 8: (0, 2, 8, 24), 32: (0, 2, 8, 24)}

Weights = dict[str, torch.Tensor]


@triton.jit
def _idle(x, residual, gain, nanoseconds, SIZE: tl.constexpr):
    """Residual and norm of a row, and then nothing until so much time has passed."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    begin = tl.extra.cuda.globaltimer()
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.load(x + at).to(tl.float32) + tl.load(residual + at).to(tl.float32)
    tl.store(residual + at, total.to(tl.bfloat16))
    value = total * tl.rsqrt(tl.sum(total * total) / SIZE + 1e-5) * tl.load(gain + tl.arange(0, SIZE)).to(tl.float32)
    now = begin
    while now - begin < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    tl.store(x + at, value.to(tl.bfloat16))


class Chain:
    """Decode layers one after the other, as a rank runs them.

    Attributes:
        cuts: how each product is computed; None is cuBLAS.
    """

    def __init__(self, shape: str, tp: int, rows: int, weights: Sequence[Weights], between: Between):
        hidden, heads, kv_heads, _ = SHAPES[shape]
        self.rows, self.weights, self.between = rows, weights, between
        self.split = [heads // tp, kv_heads // tp, kv_heads // tp]
        pages = KEYS // PAGE
        table = torch.randperm(rows * pages, device="cuda").view(rows, pages).to(torch.int32)
        shape_ = (2, rows * pages, kv_heads // tp, PAGE, DIM)
        self.kv = [LayerKV(*torch.randn(shape_, device="cuda", dtype=BF16).unbind()) for _ in range(LAYERS)]
        batch = AttentionBatch(
            torch.arange(rows + 1, dtype=torch.int32, device="cuda"),
            torch.full((rows,), KEYS, dtype=torch.int32, device="cuda"),
            table, table[:, -1].long() * PAGE + PAGE - 1, [1] * rows, [4096] * rows,
        )  # fmt: skip
        device = torch.device("cuda", torch.cuda.current_device())
        self.attention = TritonBackend(AttentionSpec(heads // tp, kv_heads // tp, DIM, DIM**-0.5, PAGE, BF16, device))
        self.plan = self.attention.plan(batch)
        self.rotation = Rotation(
            torch.full((rows,), KEYS - 1, device="cuda"), torch.rand(4096, DIM, device="cuda"), None
        )
        self.start = torch.randn(rows, hidden, device="cuda", dtype=BF16)
        self.cuts: dict[str, GemmShape | None] = {}

    def multiply(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gated, cut = name == "gate_up", self.cuts.get(name)
        if cut is not None:
            return gemm.run(x, weight, None, cut, gated=gated)
        y = F.linear(x, weight)
        return ops.silu_and_mul(y) if gated else y

    def __call__(self) -> torch.Tensor:
        residual, x = self.start.clone(), self.start.clone()
        for w, kv in zip(self.weights, self.kv, strict=True):
            x = self.between(x, residual)
            q, k, v = self.multiply("qkv", x, w["qkv"]).view(self.rows, -1, DIM).split(self.split, 1)
            y = self.attention.rotate_and_forward(q, k, v, self.rotation, kv, self.plan, None)
            x = self.between(self.multiply("o", y.view(self.rows, -1), w["o"]), residual)
            x = self.multiply("down", self.multiply("gate_up", x, w["gate_up"]), w["down"])
        return x

    def time(self) -> float:
        """Microseconds a layer, of the slowest rank."""
        found = timed([self], CALLS, REPLAYS) / LAYERS
        if dist.is_initialized():
            box = torch.tensor([found])
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
            found = float(box)
        return found


class Between:
    """All-reduce, residual and norm, or what stands for them: ``nvrar``, ``idle:US``, ``reads:N`` or ``norm``."""

    def __init__(self, kind: str, hidden: int, comm: Communicator | None):
        self.kind, _, amount = kind.partition(":")
        self.amount = float(amount or 0)
        self.comm, self.gain = comm, torch.ones(hidden, device="cuda", dtype=BF16)
        self._reads: dict[int, LatencyBound] = {}

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        rows, hidden = x.shape
        if self.kind == "nvrar":
            assert self.comm is not None
            return self.comm.all_reduce_rmsnorm(x, residual, self.gain, 1e-5)[0]
        if self.kind == "idle":
            _idle[(rows,)](x, residual, self.gain, int(1e3 * self.amount), SIZE=hidden, num_warps=16, launch_pdl=True)
            return x
        if self.kind == "reads":
            if rows not in self._reads:
                self._reads[rows] = LatencyBound(rows, int(self.amount), x.device)
            self._reads[rows]()
            return x
        return ops.add_rms_norm(x, residual, self.gain, 1e-5, out=x)[0]


def variants(rows: int, k: int, gated: bool) -> Iterator[GemmShape]:
    """Cuts of a product with columns held and MiB asked for that fit on chip."""
    for cut in ONE_ROW if rows == 1 else FEW_ROWS:
        for held in HELD[rows]:
            shared = 2 * (cut.stages * cut.columns + held) * (cut.rows * (2 if gated else 1) + cut.padded(rows))
            whole = held % cut.columns == 0 and replace(cut, held=held).held_of(k) == held
            if whole and (rows == 1 or shared <= 220 << 10):
                for ahead in AHEAD[rows]:
                    yield replace(cut, held=held, ahead=ahead)


def search(chain: Chain, products: Sequence[tuple[str, int]], say: Callable[[str], None]) -> dict[str, Any]:
    """Times of every variant, one product after the other."""
    tried: dict[str, float] = {}

    def best_of(name: str, cuts: Sequence[GemmShape], best: float) -> float:
        kept = chain.cuts.get(name)
        for cut in cuts:
            chain.cuts[name] = cut
            tried[f"{name} {cut}"] = found = round(chain.time(), 2)
            if found < best:
                best, kept = found, cut
        chain.cuts[name] = kept
        return best

    best = chain.time()
    for name, k in products:
        plain = [v for v in variants(chain.rows, k, name == "gate_up") if not v.held and not v.ahead]
        best = best_of(name, plain, best)
    without = best
    say(f"batch {chain.rows}: {without:.1f} us a layer without")
    for name, k in products:
        best = best_of(name, list(variants(chain.rows, k, name == "gate_up")), best)
        say(f"batch {chain.rows}: {best:.1f} with {name} {chain.cuts[name]}")
    cuts = {name: str(cut) for name, cut in chain.cuts.items()}
    return {"without": without, "with": best, "cuts": cuts, "tried": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--between", default="norm", metavar="KIND", help="nvrar, idle:US, reads:N, norm (norm)")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    started, comm, rank = time.perf_counter(), None, 0
    if arguments.between == "nvrar":
        topology = from_environment(os.environ)
        rank = topology.rank
        torch.cuda.set_device(topology.local_rank)
        init_distributed(topology)
        everyone = range(topology.world_size)
        device = f"cuda:{topology.local_rank}"
        comm = Communicator.create(topology, everyone, device=device, algorithm="nvrar")
    hidden, heads, kv_heads, mlp = SHAPES[arguments.shape]
    tp = arguments.tp
    features = {
        "gate_up": (2 * mlp // tp, hidden), "qkv": ((heads + 2 * kv_heads) * DIM // tp, hidden),
        "o": (hidden, heads * DIM // tp), "down": (hidden, mlp // tp),
    }  # fmt: skip
    weights = [
        {name: torch.randn(n, k, device="cuda", dtype=BF16) * k**-0.5 for name, (n, k) in features.items()}
        for _ in range(LAYERS)
    ]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for rows in HELD:
            for name, (_, k) in features.items():
                x = torch.empty(rows, k, device="cuda", dtype=BF16)
                for cut in variants(rows, k, name == "gate_up"):
                    gemm.run(x, weights[0][name], None, cut, gated=name == "gate_up", compile_only=True)

    def say(line: str) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - started:6.1f} s  {line}", flush=True)

    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), **vars(arguments)}
    between = Between(arguments.between, hidden, comm)
    for rows in HELD:
        chain = Chain(arguments.shape, tp, rows, weights, between)
        found[f"batch {rows}"] = search(chain, [(name, k) for name, (_, k) in features.items()], say)
        if rank == 0:
            with open(arguments.out, "w") as file:
                json.dump(found, file, indent=1)
    if comm is not None:
        dist.barrier()
        comm.close()


if __name__ == "__main__":
    main()

"""Times the kernels of a decode step on one GPU at the shapes of Llama-3.1-8B: python bench/gpu_kernels.py OUT.json

Every time is that of one call within a CUDA graph of many, over weights that rotate so that none stays in the cache;
median of several replays. "floor" is the bytes that must be read over the read bandwidth measured first.
"""

# ruff: noqa: B023  # every closure is called before its loop goes on

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from yalis.attention.base import AttentionBatch, AttentionSpec, LayerKV, Rotation
from yalis.attention.triton import TritonBackend
from yalis.kernels import gemm, ops, torch_reference, triton_attention
from yalis.kernels.gpu import gpu_kernels
from yalis.kernels.triton_gemm import GemmShape

BF16 = torch.bfloat16
HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB = 4096, 32, 8, 128, 14336, 128256
PRODUCTS = {"qkv": (6144, 4096, 0), "o": (4096, 4096, 0), "gate_up": (14336, 4096, 1), "down": (4096, 14336, 0),
            "head": (128256, 4096, 0)}  # fmt: skip
RESULTS: dict[str, Any] = {}


def timed(calls: list[Callable[[], Any]], repeat: int = 1, replays: int = 7) -> float:
    """Microseconds per call."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")  # NCCL's watchdog may call CUDA meanwhile
        for _ in range(repeat):
            for call in calls:
                call()
        graph.capture_end()
        graph.replay()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times)[len(times) // 2] / (repeat * len(calls))


ONE_ROW = [*gemm.candidates(1, BF16, gated=False), GemmShape(2, 2048, 4, 1), GemmShape(8, 512, 4, 5)]
FEW_ROWS = [
    *gemm.candidates(8, BF16, gated=False),
    GemmShape(16, 256, 1, 4, 1),
    GemmShape(32, 128, 2, 6, 1),
    GemmShape(64, 128, 4, 4, 2),
    GemmShape(32, 512, 2, 3, 1),
]


DECODES = [
    triton_attention.DecodeShape(*cut)
    for cut in [(64, 1, 2), (64, 1, 4), (64, 2, 4), (64, 3, 4), (64, 4, 4), (32, 3, 2), (32, 4, 4), (128, 1, 4),
                (128, 2, 4), (128, 3, 4), (128, 1, 8), (128, 3, 8)]
]  # fmt: skip


PREFILLS = [
    (128, 64, 3, 8), (128, 64, 4, 8), (128, 64, 3, 4), (128, 32, 3, 4), (128, 32, 4, 4), (128, 32, 5, 4),
    (64, 64, 3, 4),
    (64, 64, 4, 4), (64, 32, 5, 4), (256, 32, 4, 8), (128, 128, 2, 8), (64, 128, 3, 4),
]  # fmt: skip


def operands(rows: int, n: int, k: int, gated: int, copies: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = torch.randn(rows, k, device="cuda", dtype=BF16)
    return x, [torch.randn(n * (1 + gated), k, device="cuda", dtype=BF16) * k**-0.5 for _ in range(copies)]


def warm(part: int, parts: int) -> None:
    """Compile this part of the kernels into Triton's cache."""
    jobs = [(1, s) for s in ONE_ROW] + [(m, s) for m in (8, 32) for s in FEW_ROWS]
    x, weights = operands(32, 256, 4096, 1, 1)
    for i, (m, shape) in enumerate(jobs):
        if i % parts == part:
            for gated in (False, True):
                try:
                    gemm.run(x[:m], weights[0], None, shape, gated=gated)
                except Exception as error:
                    print("warm", shape, gated, str(error)[:100])
    info, kv = pages(1, 64)
    for i, shape in enumerate(DECODES):
        if (i + len(jobs)) % parts == part:
            one = backend()
            fused = torch.randn(1, HEADS + 2 * KV_HEADS, DIM, device="cuda", dtype=BF16)
            q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], 1)
            rotation = Rotation(info.slot_mapping, torch.rand(64, DIM, device="cuda"), None)
            for splits in (1, 2, 4, 8):
                plan = replace(one.plan(info), shape=shape, splits=splits, scratch=one._scratch_for(1, splits))
                for fuse in (False, True):
                    one.rotate_and_forward(q, k, v, rotation, kv[0], replace(plan, fuse=fuse), None)
    q = torch.randn(64, HEADS, DIM, device="cuda", dtype=BF16)
    info = replace(info, query_start=info.query_start * 64, query_lens_host=[64], seq_lens_host=[64])
    for i, cut in enumerate(PREFILLS):
        if (i + len(jobs) + len(DECODES)) % parts == part:
            one = backend()
            one._prefill = triton_attention.PrefillShape(*cut)
            one.forward(q, kv[0], one.plan(info), None)
    torch.cuda.synchronize()


def ceilings() -> float:
    a = torch.randn(2**30, device="cuda", dtype=BF16)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / timed([lambda: b.copy_(a)]) / 1e6
    read = a.nbytes / timed([lambda: torch.sum(a, dtype=torch.float32)]) / 1e6
    RESULTS["copy_tb_s"], RESULTS["sum_tb_s"] = copy, read
    print(f"copy {copy:.2f} TB/s, torch.sum {read:.2f} TB/s  {gpu_kernels()}")
    return max(copy, read)


def products(bandwidth: float, deadline: float) -> None:
    for rows in (1, 8, 32):
        for name, (n, k, gated) in PRODUCTS.items():
            nbytes = n * (1 + gated) * k * 2
            copies = max(2, math.ceil(2.5e8 / nbytes))
            x, weights = operands(rows, n, k, gated, copies)
            repeat = max(1, 12 // copies)

            def cublas(w: torch.Tensor, x: torch.Tensor = x, gated: int = gated) -> torch.Tensor:
                y = F.linear(x, w)
                return ops.silu_and_mul(y) if gated else y

            found = {"cublas": timed([lambda w=w: cublas(w) for w in weights], repeat)}
            want = cublas(weights[0]).float()
            for shape in ONE_ROW if rows == 1 else FEW_ROWS:
                if time.perf_counter() > deadline:
                    print("out of time")
                    return
                if shape.splits > 1 and n > 30000:
                    continue
                try:
                    got = gemm.run(x, weights[0], None, shape, gated=bool(gated)).float()
                    bad = float((got - want).norm() / want.norm())
                    if not bad < 1.5e-2:
                        print("WRONG", name, rows, shape, bad)
                    found[str(shape)] = timed(
                        [lambda w=w, s=shape: gemm.run(x, w, None, s, gated=bool(gated)) for w in weights], repeat
                    )
                except Exception as error:
                    print("failed", name, rows, shape, str(error)[:100])
            floor = nbytes / bandwidth / 1e6
            RESULTS[f"{name} m{rows}"] = found | {"floor": floor}
            best = sorted((t, s) for s, t in found.items() if s != "cublas")[:2]
            print(f"{name:8}m{rows:<3} floor {floor:6.1f} cublas {found['cublas']:6.1f} " +
                  "; ".join(f"{t:.1f} {s}" for t, s in best), flush=True)  # fmt: skip


def pages(batch: int, context: int, block_size: int = 16, layers: int = 1) -> tuple[AttentionBatch, list[LayerKV]]:
    per = -(-context // block_size)
    table = torch.randperm(batch * per, device="cuda").view(batch, per).to(torch.int32)
    shape = (batch * per, KV_HEADS, block_size, DIM)
    kv = [LayerKV(*torch.randn(2, *shape, device="cuda", dtype=BF16).unbind()) for _ in range(layers)]
    slots = table[:, -1].long() * block_size + (context - 1) % block_size
    info = AttentionBatch(
        torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        torch.full((batch,), context, dtype=torch.int32, device="cuda"), table, slots, [1] * batch, [4096] * batch,
    )  # fmt: skip
    return info, kv


def backend() -> TritonBackend:
    return TritonBackend(AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5, 16, BF16, torch.device("cuda", 0)))


def small(bandwidth: float) -> None:
    for rows in (1, 8, 32, 2048):
        x, r = torch.randn(2, rows, HIDDEN, device="cuda", dtype=BF16).unbind()
        g = torch.randn(HIDDEN, device="cuda", dtype=BF16)
        gate_up = torch.randn(rows, 2 * FFN, device="cuda", dtype=BF16)
        fused = torch.randn(rows, HEADS + 2 * KV_HEADS, DIM, device="cuda", dtype=BF16)
        q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], 1)
        table = torch.randn(4096, DIM, device="cuda")
        at = torch.arange(rows, device="cuda")
        cache = torch.zeros(2, 256, KV_HEADS, 16, DIM, device="cuda", dtype=BF16)
        calls = {
            "add_rms_norm": lambda: ops.add_rms_norm(x, r, g, 1e-5, out=x),
            "silu_and_mul": lambda: ops.silu_and_mul(gate_up),
            "rope_and_write_kv": lambda: ops.rope_and_write_kv(q, k, v, at, table, cache[0], cache[1], at),
        }
        found = {name: timed([call], 40) for name, call in calls.items()}
        RESULTS[f"small m{rows}"] = found
        print(f"m{rows:<5}" + "  ".join(f"{name} {t:.2f}" for name, t in found.items()), flush=True)


def attention(bandwidth: float) -> None:
    for batch in (1, 8, 32):
        info, kv = pages(batch, 640, layers=max(2, 64 // batch))
        q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=BF16)
        floor = 2 * kv[0].k.nbytes / bandwidth / 1e6
        found = {}
        for shape, per_sm in [(shape, per_sm) for shape in DECODES for per_sm in (2, 4)]:
            one = backend()
            splits = max(1, min(32, 132 * per_sm // (batch * KV_HEADS)))
            plan = replace(one.plan(info), splits=splits, scratch=one._scratch_for(batch, splits), shape=shape)
            found[f"k{shape.keys} s{shape.stages} w{shape.warps} x{splits}"] = timed(
                [lambda one=one, plan=plan, pages=pages_: one.forward(q, pages_, plan, None) for pages_ in kv], 2
            )
        k, v = torch.randn(2, batch, KV_HEADS, 640, DIM, device="cuda", dtype=BF16).unbind()
        sdpa = timed([lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)], 10)
        RESULTS[f"decode b{batch}"] = found | {"floor": floor, "sdpa_contiguous": sdpa}
        best = sorted((t, s) for s, t in found.items())
        print(f"decode b{batch:<3} floor {floor:5.1f} sdpa {sdpa:5.1f} " +
              "; ".join(f"{t:.1f} {s}" for t, s in best[:3] + best[-1:]), flush=True)  # fmt: skip
    for batch, length in ((1, 2048), (8, 2048)):
        info, kv = pages(batch, length)
        info = replace(
            info, query_start=torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length,
            query_lens_host=[length] * batch, seq_lens_host=[length] * batch,
        )  # fmt: skip
        q = torch.randn(batch * length, HEADS, DIM, device="cuda", dtype=BF16)
        k, v = torch.randn(2, batch, KV_HEADS, length, DIM, device="cuda", dtype=BF16).unbind()
        flop = 4 * batch * HEADS * DIM * length * length / 2
        dense = q.view(batch, length, HEADS, DIM).transpose(1, 2)
        sdpa = timed([lambda: F.scaled_dot_product_attention(dense, k, v, is_causal=True, enable_gqa=True)], 3)
        found = {}
        for rows, keys, stages, warps in PREFILLS:
            one = backend()
            one._prefill = triton_attention.PrefillShape(rows, keys, stages, warps)
            plan = one.plan(info)
            found[f"r{rows} k{keys} s{stages} w{warps}"] = timed([lambda: one.forward(q, kv[0], plan, None)], 3)
        RESULTS[f"prefill {batch}x{length}"] = found | {"sdpa": sdpa}
        best = sorted((t, s) for s, t in found.items())
        print(f"prefill {batch}x{length}: sdpa {sdpa:.0f} us; " + "; ".join(f"{t:.0f} {s}" for t, s in best[:3]) +
              f"  {flop / best[0][0] / 1e6:.0f} TFLOP/s", flush=True)  # fmt: skip


class Chain:
    """Decode layers one after the other, as the model runs them.

    Attributes:
        shapes: how each product is computed; None is cuBLAS.
        skip: operations that are left out, to see what they cost where they are.
    """

    count = 4

    def __init__(self, rows: int, weights: list[dict[str, torch.Tensor]]):
        self.rows, self.weights = rows, weights
        self.info, self.kv = pages(rows, 640, layers=self.count)
        self.attention = backend()
        self.plan = self.attention.plan(self.info)
        self.gain = torch.randn(HIDDEN, device="cuda", dtype=BF16)
        self.table = torch.rand(4096, DIM, device="cuda") - 0.5
        self.at = torch.full((rows,), 639, device="cuda")
        self.start = torch.randn(rows, HIDDEN, device="cuda", dtype=BF16)
        self.shapes: dict[str, GemmShape | None] = {}
        self.skip: frozenset[str] = frozenset()

    def multiply(self, name: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        gated, shape = bool(PRODUCTS[name][2]), self.shapes.get(name)
        if name in self.skip:
            return torch.empty((self.rows, PRODUCTS[name][0]), device="cuda", dtype=BF16)
        if shape is None:
            y = F.linear(x, w)
            return ops.silu_and_mul(y) if gated else y
        return gemm.run(x, w, None, shape, gated=gated)

    def norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return x if "norm" in self.skip else ops.add_rms_norm(x, residual, self.gain, 1e-5, out=x)[0]

    def __call__(self) -> torch.Tensor:
        residual, x = self.start.clone(), self.start.clone()
        for w, kv in zip(self.weights, self.kv, strict=True):
            x = self.norm(x, residual)
            fused = self.multiply("qkv", x, w["qkv"]).view(self.rows, -1, DIM)
            q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], 1)
            if "attention" in self.skip:
                y = torch.empty((self.rows, HEADS, DIM), device="cuda", dtype=BF16)
            elif "rope" in self.skip:
                y = self.attention.forward(q, kv, self.plan, None)
            else:
                rotation = Rotation(self.at, self.table, None)
                y = self.attention.rotate_and_forward(q, k, v, rotation, kv, self.plan, None)
            x = self.norm(self.multiply("o", y.view(self.rows, -1), w["o"]), residual)
            x = self.multiply("down", self.multiply("gate_up", x, w["gate_up"]), w["down"])
        return x

    def reference(self) -> torch.Tensor:
        """The same by torch alone, fp32 between the roundings that the kernels make."""
        residual, x = self.start.clone(), self.start.clone()
        for w, kv in zip(self.weights, self.kv, strict=True):
            residual = residual + x
            fused = F.linear(torch_reference.rms_norm(residual, self.gain, 1e-5), w["qkv"]).view(self.rows, -1, DIM)
            q, k, v = (t.contiguous() for t in fused.split([HEADS, KV_HEADS, KV_HEADS], 1))
            torch_reference.rope_(q, self.at, self.table)
            torch_reference.rope_(k, self.at, self.table)
            torch_reference.write_kv(k, v, kv.k, kv.v, self.info.slot_mapping)
            y = torch.empty_like(q)
            torch_reference.paged_attention(
                q, kv.k, kv.v, self.info.query_start, self.info.seq_lens, self.info.block_table, DIM**-0.5, None, y
            )  # fmt: skip
            residual = residual + F.linear(y.view(self.rows, -1), w["o"])
            x = F.linear(torch_reference.rms_norm(residual, self.gain, 1e-5), w["gate_up"])
            x = F.linear(torch_reference.silu_and_mul(x), w["down"])
        return x

    def replayed(self) -> torch.Tensor:
        """What a graph of it gives when it is replayed twice."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self()
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        return out

    def time(self) -> float:
        """Microseconds per layer."""
        return timed([self], 3) / self.count


def layers(bandwidth: float, deadline: float) -> None:
    """What a layer costs next to its floor, in place; then what its parts cost there."""
    weights = [{name: operands(1, n, k, gated, 1)[1][0] for name, (n, k, gated) in PRODUCTS.items() if name != "head"}
               for _ in range(Chain.count)]  # fmt: skip
    for rows in (1, 8, 32):
        chain = Chain(rows, weights)
        shapes = {str(s): s for s in (ONE_ROW if rows == 1 else FEW_ROWS)}
        found = {"cublas": chain.time()}
        names = [name for name in PRODUCTS if name != "head"]
        ranked = {}
        for name in names:
            alone = RESULTS.get(f"{name} m{rows}", {})
            ranked[name] = sorted((s for s in alone if s in shapes), key=alone.__getitem__)
            chain.shapes[name] = shapes[ranked[name][0]] if ranked[name] else None
        found["best alone"] = best = chain.time()
        tried: dict[str, float] = {}
        for name in names:
            kept = chain.shapes[name]
            options = [None] + [shapes[s] for s in ranked[name][:5]]
            for option in options:
                if time.perf_counter() > deadline:
                    break
                chain.shapes[name] = option
                tried[f"{name} {option}"] = t = chain.time()
                if t < best:
                    best, kept = t, option
            chain.shapes[name] = kept
        found["best in place"] = best
        keep, plan = chain.plan, chain.plan
        for shape in DECODES:
            for splits in sorted({max(1, min(32, 132 * per_sm // (rows * KV_HEADS))) for per_sm in (1, 2, 4)}):
                for fuse in (False, True):
                    if time.perf_counter() > deadline:
                        break
                    scratch = chain.attention._scratch_for(rows, splits)
                    chain.plan = replace(plan, splits=splits, scratch=scratch, shape=shape, fuse=fuse)
                    tried[f"attention {shape} x{splits} {fuse}"] = t = chain.time()
                    if t < best:
                        best, keep = t, chain.plan
        chain.plan = keep
        found["best"] = best
        want = chain.reference().float()
        wrong = max(float((got.float() - want).norm() / want.norm()) for got in (chain(), chain.replayed()))
        for skip in ("norm", "rope", "attention", *names):
            chain.skip = frozenset([skip])
            found[f"cost of {skip}"] = best - chain.time()
        floor = sum(w.nbytes for w in weights[0].values()) / bandwidth / 1e6
        floor += 2 * chain.kv[0].k.nbytes / bandwidth / 1e6
        RESULTS[f"layer m{rows}"] = found | {"floor": floor, "tried": tried, "error": wrong}
        RESULTS[f"layer m{rows} choice"] = {n: str(s) for n, s in chain.shapes.items()} | {
            "attention": f"{keep.shape} x{keep.splits} fused {keep.fuse}"
        }
        print(f"layer m{rows} floor {floor:.1f} " + " ".join(f"{how} {t:.1f};" for how, t in found.items()) +
              f" x32 {best * 32 / 1e3:.2f} ms, error {wrong:.4f}", flush=True)  # fmt: skip
        print("   ", RESULTS[f"layer m{rows} choice"], flush=True)


def main() -> None:
    started = time.perf_counter()
    if len(sys.argv) > 2:
        warm(int(sys.argv[2]), int(sys.argv[3]))
        return
    count = min(14, os.cpu_count() or 1)
    compiling = [subprocess.Popen([sys.executable, __file__, "-", str(i), str(count)]) for i in range(count)]
    for process in compiling:
        process.wait(90)
    print(f"compiled in {time.perf_counter() - started:.0f} s", torch.cuda.get_device_name())
    if sys.argv[1] == "compile":
        return
    bandwidth = ceilings()
    limit = float(os.environ.get("LIMIT_S", "110"))
    parts = (
        small,
        lambda b: products(b, started + 0.55 * limit),
        lambda b: layers(b, started + 0.9 * limit),
        attention,
    )
    for part in parts:
        try:
            part(bandwidth)
        except Exception as error:
            print("failed", repr(error)[:300], flush=True)
        with open(sys.argv[1], "w") as file:
            json.dump(RESULTS, file, indent=1)


if __name__ == "__main__":
    main()

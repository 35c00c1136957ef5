"""Time the CPU kernels against torch, interleaved in one run so that a busy machine burdens both alike.

    python bench/bench_cpu_kernels.py [--threads 1 2] [--shapes small qwen3-0.6b] [--seconds 0.3]

Prints, per layer shape: GB/s of weights for 1 to 8 rows, GFLOP/s from 32 rows on, each as median [10th .. 90th
percentile], and the ratio of medians to torch's ``F.linear``. Weights rotate among copies that together exceed the last
level cache several times over. Then attention, the row-wise operations, and the cost of a call.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from yalis.kernels import ops
from yalis.utils.native import load_shared_object

SHAPES = {  # layer: (N, K)
    "small": {
        "qkv": (2048, 1024),
        "o": (1024, 1024),
        "gate_up": (5632, 1024),
        "down": (1024, 2816),
        "head": (32000, 1024),
    },
    "qwen3-0.6b": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
        "head": (151936, 1024),
    },
}
ROTATE_BYTES = 192 << 20
STREAM_READ = """
#include <immintrin.h>
long yalis_stream_read(const char *p, long bytes, long threads) {
    long total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (long block = 0; block < bytes / 65536; block++) {
        __m512i s = _mm512_setzero_si512();
        for (const char *q = p + block * 65536, *e = q + 65536; q < e; q += 256) {
            for (int i = 0; i < 256; i += 64) {
                _mm_prefetch(q + 8192 + i, _MM_HINT_T0);
                s = _mm512_add_epi64(s, _mm512_loadu_si512(q + i));
            }
        }
        total += _mm512_reduce_add_epi64(s);
    }
    return total;
}
"""


def measure(seconds: float, *calls: Callable[[int], object]) -> list[list[float]]:
    """Seconds per call of each function, called in turn with a running number until ``seconds`` each are spent."""
    times: list[list[float]] = [[] for _ in calls]
    for index, call in enumerate(calls):  # warm up; where the calls are long, once is enough
        call(index)
    turn, end = 0, time.perf_counter() + seconds * len(calls)
    while turn < 5 or time.perf_counter() < end:
        for call, spent in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call(turn)
            spent.append(time.perf_counter() - begin)
        turn += 1
    return times


def rate(work: float, times: list[float]) -> str:
    """``work`` per median time, in units of 1e9 a second, and its 10th to 90th percentile."""
    low, high = (statistics.quantiles(times, n=10)[i] for i in (8, 0))
    return f"{work / statistics.median(times) / 1e9:6.1f} [{work / low / 1e9:6.1f} ..{work / high / 1e9:6.1f}]"


def bench_stream(threads: list[int], seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stream_read.c"
        source.write_text(STREAM_READ)
        library = load_shared_object("yalis_stream_read", [source], ["-march=native", "-fopenmp"])
    data = ops.alloc_weight((256 << 20,), torch.uint8).fill_(1)
    function = library.yalis_stream_read
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long], ctypes.c_long
    for count in threads:
        (times,) = measure(seconds, lambda _, n=count: function(data.data_ptr(), data.nbytes, n))  # type: ignore[misc]
        print(f"streaming read, {count} thread(s): {rate(data.nbytes, times)} GB/s")


def bench_linear(model: str, threads: list[int], rows: list[int], seconds: float) -> None:
    for layer, (n, k) in SHAPES[model].items():
        copies = max(2, math.ceil(ROTATE_BYTES / (2 * n * k)))
        plain = [torch.randn(n, k).bfloat16() for _ in range(copies)]
        packed = [ops.pack_linear(w) for w in plain]
        for count in threads:
            torch.set_num_threads(count)
            for m in rows:
                x, out = torch.randn(m, k).bfloat16(), torch.empty(m, n, dtype=torch.bfloat16)
                ours, theirs = measure(
                    seconds,
                    lambda i: ops.linear(x, packed[i % copies], out=out),  # noqa: B023
                    lambda i: F.linear(x, plain[i % copies]),  # noqa: B023
                )
                work, unit = (2 * n * k, "GB/s") if m <= 8 else (2 * m * n * k, "GFLOP/s")
                ratio = statistics.median(theirs) / statistics.median(ours)
                print(
                    f"{model} {layer:8}{n:7} x{k:5}  threads {count}  rows {m:4}: {rate(work, ours)} {unit:8}"
                    f" torch {rate(work, theirs)}  x{ratio:.2f}",
                    flush=True,
                )


def bench_attention(threads: list[int], seconds: float) -> None:
    for batch, new, length, heads, kv_heads, dim in (
        (1, 1, 4096, 16, 8, 64), (16, 1, 1024, 16, 8, 128), (1, 128, 128, 16, 8, 64), (1, 512, 512, 16, 8, 128),
    ):  # fmt: skip
        block = 16
        pages = length // block
        copies = math.ceil(ROTATE_BYTES / (batch * length * kv_heads * dim * 4)) if new == 1 else 1
        shape = (batch * pages, kv_heads, block, dim)
        keys = [ops.alloc_weight(shape, torch.bfloat16).normal_() for _ in range(copies)]
        values = [ops.alloc_weight(shape, torch.bfloat16).normal_() for _ in range(copies)]
        table = torch.randperm(batch * pages).int().view(batch, pages)
        q = torch.randn(batch * new, heads, dim).bfloat16()
        start, lengths = torch.arange(0, batch * new + 1, new).int(), torch.full((batch,), length).int()
        dense_q = torch.randn(batch, heads, new, dim).bfloat16()
        dense_k, dense_v = (torch.randn(batch, kv_heads, length, dim).bfloat16() for _ in range(2))
        out = torch.empty_like(q)
        for count in threads:
            torch.set_num_threads(count)

            def paged(i: int) -> object:
                k, v = keys[i % copies], values[i % copies]  # noqa: B023
                return ops.paged_attention(q, k, v, start, lengths, table, 0.1, out=out)  # noqa: B023

            def dense(_: int) -> object:
                return F.scaled_dot_product_attention(
                    dense_q,  # noqa: B023
                    dense_k,  # noqa: B023
                    dense_v,  # noqa: B023
                    is_causal=new > 1,  # noqa: B023
                    enable_gqa=True,
                )

            ours, theirs = measure(seconds, paged, dense)
            flops = 4 * batch * heads * dim * (new * length - new * (new - 1) / 2)
            work, unit = (batch * length * kv_heads * dim * 4.0, "GB/s of KV") if new == 1 else (flops, "GFLOP/s")
            ratio = statistics.median(theirs) / statistics.median(ours)
            print(
                f"attention {batch} x {new} new of {length}, {heads}/{kv_heads} heads of {dim}, threads {count}: "
                f"{rate(work, ours)} {unit}  {statistics.median(ours) * 1e6:.0f} us, x{ratio:.1f} of torch on dense KV",
                flush=True,
            )


def bench_calls(seconds: float) -> None:
    """Microseconds per call on data so small that only the call counts, with ``out=`` where there is one."""
    torch.set_num_threads(1)
    x, w = torch.randn(1, 64).bfloat16(), torch.ones(64).bfloat16()
    packed, out, residual = ops.pack_linear(torch.randn(64, 64).bfloat16()), torch.empty_like(x), torch.zeros_like(x)
    gate_up = torch.randn(1, 128).bfloat16()
    q, k = torch.randn(1, 2, 64).bfloat16(), torch.randn(1, 1, 64).bfloat16()
    table, zero = torch.ones(8, 64), torch.zeros(1, dtype=torch.int64)
    k_cache, v_cache = torch.zeros(4, 1, 16, 64).bfloat16(), torch.zeros(4, 1, 16, 64).bfloat16()
    start, one = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    pages, heads_out = torch.zeros(1, 1, dtype=torch.int32), torch.empty_like(q)
    calls: dict[str, Callable[[int], object]] = {
        "linear": lambda _: ops.linear(x, packed, out=out),
        "linear, no out": lambda _: ops.linear(x, packed),
        "torch F.linear": lambda _: F.linear(x, x),
        "rms_norm": lambda _: ops.rms_norm(x, w, 1e-5, out=out),
        "add_rms_norm": lambda _: ops.add_rms_norm(x, residual, w, 1e-5, out=out),
        "silu_and_mul": lambda _: ops.silu_and_mul(gate_up, out=out),
        "rope_": lambda _: ops.rope_(q, k, zero, table),
        "write_kv": lambda _: ops.write_kv(k, k, k_cache, v_cache, zero),
        "paged_attention": lambda _: ops.paged_attention(q, k_cache, v_cache, start, one, pages, 0.1, out=heads_out),
    }
    for name, times in zip(calls, measure(seconds, *calls.values()), strict=True):
        print(f"call {name:16} {statistics.median(times) * 1e6:5.1f} us (least {min(times) * 1e6:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 32, 128, 512])
    parser.add_argument("--seconds", type=float, default=0.2, help="per kernel and case")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, CPU kernels: {ops.cpu_kernels()}")
    bench_stream(options.threads, options.seconds)
    bench_calls(options.seconds)
    bench_attention(options.threads, options.seconds)
    for model in options.shapes:
        bench_linear(model, options.threads, options.rows, options.seconds)


if __name__ == "__main__":
    main()

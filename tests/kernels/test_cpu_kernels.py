"""The CPU kernels against float64 references and against torch, and the promise of invariant rows.

Where this CPU has no compiled kernels the same tests run on the torch path; the invariance tests are then skipped.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from yalis.errors import ConfigError
from yalis.kernels import native_cpu, ops, torch_reference

DTYPES = [torch.bfloat16, torch.float32]
needs_native = pytest.mark.skipif(
    native_cpu.cpu_kernels().library is None, reason=f"no compiled kernels: {native_cpu.cpu_kernels()}"
)


@pytest.fixture(autouse=True)
def _one_seed_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(_one_seed_one_thread: None) -> None:
    torch.set_num_threads(2)


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest value: one rounding of bf16 (2^-9), or an fp32 sum of some thousand terms."""
    return 2**-8 if dtype == torch.bfloat16 else 1e-5


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    bound = factor * tolerance(dtype) * max(1e-6, float(want.double().abs().max()))
    worst = float((got.double() - want.double()).abs().max())
    assert worst <= bound, f"off by {worst}, allowed {bound}"


# ---------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 32), (1, 1), (17, 33), (100, 31), (130, 257), (320, 96)])
def test_linear_matches_float64(dtype: torch.dtype, bias: bool, n: int, k: int) -> None:
    weight = torch.randn(n, k).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    packed = ops.pack_linear(weight, b)
    assert (packed.shape, packed.dtype) == ((n, k), dtype)
    assert torch.equal(packed.unpack(), weight)
    assert (packed.bias is None) is (b is None)
    if b is not None and packed.bias is not None:
        assert torch.equal(packed.bias, b)
    for rows in (1, 2, 5, 6, 7, 8, 13, 70):
        x = torch.randn(rows, k).to(dtype)
        want = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert_close(ops.linear(x, packed), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_strided_and_misaligned_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(90, 45).to(dtype)
    packed = ops.pack_linear(torch.cat((weight, weight), 1)[:, 45:])  # a strided weight
    x = torch.randn(9, 101).to(dtype)[:, 3:48]
    canvas = torch.full((9, 200), 7.0, dtype=dtype)
    out = canvas[:, 5:95]
    assert ops.linear(x, packed, out=out).data_ptr() == out.data_ptr()
    assert_close(out, F.linear(x.double(), weight.double()), dtype)
    canvas[:, 5:95] = 7
    assert (canvas == 7).all(), "wrote outside out"


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_passes_nan_and_infinity_on(dtype: torch.dtype) -> None:
    packed = ops.pack_linear(torch.rand(70, 33).to(dtype) + 0.5)
    x = torch.rand(8, 33).to(dtype) + 0.5
    x[2, 32], x[5, 0] = math.nan, math.inf
    y = ops.linear(x, packed)
    assert y[2].isnan().all()
    assert (y[5] == math.inf).all()
    assert y[[0, 1, 3, 4, 6, 7]].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_do_not_depend_on_batch_or_threads(dtype: torch.dtype, two_threads: None) -> None:
    packed = ops.pack_linear(torch.randn(200, 333).to(dtype), torch.randn(200).to(dtype))
    x = torch.randn(600, 333).to(dtype)
    whole = ops.linear(x, packed)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 64, 241):
        first = 37 if rows < 500 else 0
        assert torch.equal(ops.linear(x[first : first + rows], packed), whole[first : first + rows])
    torch.set_num_threads(1)
    assert torch.equal(ops.linear(x, packed), whole)


def test_linear_refuses_what_does_not_fit() -> None:
    packed = ops.pack_linear(torch.randn(8, 16))
    if native_cpu.cpu_kernels().library is not None:
        with pytest.raises(ValueError, match=r"\[T, 16\]"):
            ops.linear(torch.randn(2, 15), packed)
        with pytest.raises(ValueError, match="bfloat16"):
            ops.linear(torch.randn(2, 16).bfloat16(), packed)
        with pytest.raises(ValueError, match="out must be"):
            ops.linear(torch.randn(2, 16), packed, out=torch.empty(2, 9))
    with pytest.raises(ValueError, match="bias"):
        ops.pack_linear(torch.randn(8, 16), torch.randn(9))


def test_half_precision_is_served_by_torch() -> None:
    packed = ops.pack_linear(torch.randn(8, 16).half())
    x = torch.randn(3, 16).half()
    assert torch.equal(ops.linear(x, packed), F.linear(x, packed.unpack()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 33])
def test_embedding_reads_packed_and_plain_tables(dtype: torch.dtype, k: int) -> None:
    table = torch.randn(100, k).to(dtype)
    ids = torch.tensor([0, 99, 63, 64, 5, 5, -1, 100])
    want = torch.cat((table[ids[:6]], torch.zeros(2, k, dtype=dtype)))
    for source in (table, ops.pack_linear(table)):
        assert torch.equal(ops.embedding(ids, source), want)
        out = torch.empty(8, k, dtype=dtype)
        assert ops.embedding(ids, source, out=out) is out
        assert torch.equal(out, want)


def test_alloc_weight_is_aligned_zeroed_and_outlives_its_views() -> None:
    weight = ops.alloc_weight((1025, 1024), torch.float32)
    assert weight.shape == (1025, 1024)
    assert not weight.any()
    assert weight.data_ptr() % (2 << 20) == 0
    tail = weight[1000:]
    tail.fill_(3)
    del weight
    assert (tail == 3).all()
    assert ops.alloc_weight((3, 5), torch.bfloat16).shape == (3, 5)


# ---------------------------------------------------------------------------------------------- row-wise operations


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random values in a view whose rows are further apart than they are long, at an odd element offset."""
    return torch.randn(*shape[:-2], shape[-2] + 2, shape[-1] + 3).to(dtype)[..., 1:-1, 1:-2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 1024), (70, 37), (3, 4, 64), (40, 8, 128)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = strided(shape, dtype), torch.randn(shape[-1]).to(dtype)
    want = torch_reference.rms_norm(x, weight, 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), want, dtype)
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_close(ops.rms_norm(x, weight, 1e-5), exact, dtype, 2)
    same = ops.rms_norm(x, weight, 1e-5)
    assert ops.rms_norm(x, weight, 1e-5, out=x) is x
    assert torch.equal(x, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (7, 100), (64, 1024)])
def test_add_rms_norm_updates_the_residual(dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual, weight = (
        strided((rows, width), dtype),
        torch.randn(rows, width).to(dtype),
        torch.randn(width).to(dtype),
    )
    total = residual + x
    want = torch_reference.rms_norm(total, weight, 1e-6)
    normed, new = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert new is residual
    assert torch.equal(new, total)
    assert_close(normed, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 2816), (9, 33), (70, 512)])
def test_silu_and_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = strided((rows, 2 * width), dtype) * 4
    got = ops.silu_and_mul(gate_up)
    assert_close(got, torch_reference.silu_and_mul(gate_up), dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert_close(got, F.silu(gate) * up, dtype)


def test_silu_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, math.inf, math.nan]])
    got = ops.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), 1))
    torch.testing.assert_close(got, F.silu(gate), rtol=1e-6, atol=1e-30, equal_nan=True)


def rope_table(positions: int, dim: int) -> torch.Tensor:
    angle = torch.arange(positions).float()[:, None] * 10000 ** (-torch.arange(0, dim, 2).float() / dim)
    return torch.cat((angle.cos(), angle.sin()), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 80, 6])
@pytest.mark.parametrize("rows", [1, 70])
def test_rope_rounds_like_torch(dtype: torch.dtype, dim: int, rows: int) -> None:
    qkv = torch.randn(rows, 8 * dim + 3).to(dtype)
    q, k = (qkv[:, 3:].view(rows, 8, dim)[:, part] for part in (slice(0, 4), slice(4, 6)))
    positions, table = torch.randint(0, 100, (rows,)), rope_table(100, dim)
    want = q.clone(), k.clone()
    for t in want:
        torch_reference.rope_(t, positions, table)
    rest = qkv[:, 3:].view(rows, 8, dim)[:, 6:].clone()
    ops.rope_(q, k, positions, table)
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])
    assert torch.equal(qkv[:, 3:].view(rows, 8, dim)[:, 6:], rest), "touched v"


@needs_native
def test_rope_refuses_a_position_past_the_table() -> None:
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    before = q.clone()
    with pytest.raises(ValueError, match=r"position 50 of row 1 is outside \[0, 50\)"):
        ops.rope_(q, k, torch.tensor([1, 50, 2]), rope_table(50, 8))
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_write_kv_scatters_and_skips(dtype: torch.dtype) -> None:
    qkv = torch.randn(5, 6, 16).to(dtype)
    k, v = qkv[:, 2:4], qkv[:, 4:6]
    caches = [torch.full((4, 2, 8, 16), 9.0, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([31, 0, -1, 9, 16])
    ops.write_kv(k, v, caches[0], caches[1], slots)
    written = torch.zeros(4, 8, dtype=torch.bool)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            written[slot // 8, slot % 8] = True
            for cache, source in zip(caches, (k, v), strict=True):
                assert torch.equal(cache[slot // 8, :, slot % 8], source[row])
    for cache in caches:
        assert (cache.transpose(1, 2)[~written] == 9).all()


@needs_native
def test_write_kv_refuses_a_slot_past_the_cache() -> None:
    cache = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match="slot 8 of row 0"):
        ops.write_kv(torch.ones(1, 1, 8), torch.ones(1, 1, 8), cache, cache.clone(), torch.tensor([8]))
    assert not cache.any()


# ---------------------------------------------------------------------------------------------------- attention


class Paged:
    """Sequences in pages of random order; every slot that belongs to nobody holds NaN."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, block: int = 16):
        self.lengths, self.dim, self.dtype, self.block = lengths, dim, dtype, block
        counts = [-(-n // block) for n in lengths]
        order = torch.randperm(sum(counts) + 3).tolist()
        self.k_cache = torch.full((len(order), kv_heads, block, dim), math.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        self.table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
        self.q, self.kv = [], []
        for b, n in enumerate(lengths):
            pages = [order.pop() for _ in range(counts[b])]
            self.table[b, : counts[b]] = torch.tensor(pages, dtype=torch.int32)
            self.q.append(torch.randn(n, heads, dim).to(dtype))
            self.kv.append([torch.randn(n, kv_heads, dim).to(dtype) for _ in range(2)])
            slots = torch.tensor([pages[i // block] * block + i % block for i in range(n)])
            ops.write_kv(self.kv[b][0], self.kv[b][1], self.k_cache, self.v_cache, slots)

    def run(self, parts: list[tuple[int, int, int]], window: int | None = None) -> list[torch.Tensor]:
        """Attention for parts (sequence, first position, end position) in one batch; one result per part."""
        q = torch.cat([self.q[b][i:j] for b, i, j in parts])
        sizes = [j - i for _, i, j in parts]
        start = torch.tensor([0, *sizes]).cumsum(0).int()
        lengths = torch.tensor([j for _, _, j in parts], dtype=torch.int32)
        table = self.table[[b for b, _, _ in parts]].contiguous()
        out = ops.paged_attention(q, self.k_cache, self.v_cache, start, lengths, table, self.dim**-0.5, window=window)
        return list(torch.split(out, sizes))

    def want(self, b: int, i: int, j: int, window: int | None = None) -> torch.Tensor:
        q, (k, v) = self.q[b][i:j].double(), [t.double() for t in self.kv[b]]
        group = q.shape[1] // k.shape[1]
        k, v = (t[:j].repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * self.dim**-0.5
        at, key = torch.arange(i, j)[:, None], torch.arange(j)
        hidden = (key > at) | (key <= at - window if window else False)
        return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"),
    [(4, 2, 64, 16), (4, 4, 128, 32), (8, 1, 80, 7), (3, 3, 256, 16), (14, 2, 6, 64)],
)
@pytest.mark.parametrize("window", [None, 1, 20, 100])
def test_attention_matches_float64(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, block: int, window: int | None
) -> None:
    paged = Paged([1, 64, 65, 200, 31], heads, kv_heads, dim, dtype, block)
    parts = [(0, 0, 1), (1, 0, 64), (2, 64, 65), (3, 60, 200), (4, 30, 31)]
    for part, got in zip(parts, paged.run(parts, window), strict=True):
        assert_close(got, paged.want(*part, window), dtype if dtype != torch.float16 else torch.bfloat16, 2)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
def test_attention_rows_do_not_depend_on_batch_chunking_or_threads(
    dtype: torch.dtype, window: int | None, two_threads: None
) -> None:
    paged = Paged([150, 90, 1], 6, 2, 64, dtype)
    whole = paged.run([(0, 0, 150)], window)[0]
    batched = paged.run([(1, 3, 90), (0, 0, 150), (2, 0, 1)], window)[1]
    assert torch.equal(batched, whole)
    for size in (1, 17, 64, 100):
        chunks = [(0, i, min(i + size, 150)) for i in range(0, 150, size)]
        assert torch.equal(torch.cat([paged.run([c], window)[0] for c in chunks]), whole)
    torch.set_num_threads(1)
    assert torch.equal(paged.run([(0, 0, 150)], window)[0], whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reads_nothing_before_the_window(dtype: torch.dtype) -> None:
    paged = Paged([200], 2, 1, 64, dtype)
    want = paged.run([(0, 190, 200)], 32)[0]
    for page in paged.table[0, : (190 - 31) // 16].tolist():
        for cache in (paged.k_cache, paged.v_cache):
            cache[page] = math.nan
    paged.table[0, : (190 - 31) // 16] = -1
    assert torch.equal(paged.run([(0, 190, 200)], 32)[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_survives_large_scores_and_passes_nan_on(dtype: torch.dtype) -> None:
    paged = Paged([130], 2, 2, 64, dtype)
    paged.q[0].mul_(60)
    got = paged.run([(0, 0, 130)])[0]
    assert_close(got, paged.want(0, 0, 130), dtype, 4)
    paged.q[0][40, 0, 3] = math.nan
    got = paged.run([(0, 0, 130)])[0]
    assert got[40, 0].isnan().all()
    assert got.isnan().sum() == 64


def test_attention_takes_strided_rows() -> None:
    paged = Paged([70], 4, 2, 64, torch.bfloat16)
    want = paged.run([(0, 0, 70)])[0]
    wide = torch.zeros(70, 8, 64, dtype=torch.bfloat16)
    wide[:, 2:6] = paged.q[0]
    start, length = torch.tensor([0, 70], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    out = torch.zeros(70, 6, 64, dtype=torch.bfloat16)
    ops.paged_attention(wide[:, 2:6], paged.k_cache, paged.v_cache, start, length, paged.table, 0.125, out=out[:, 1:5])
    assert torch.equal(out[:, 1:5], want)
    assert not out[:, 0].any()
    assert not out[:, 5].any()


@needs_native
def test_attention_refuses_bad_metadata() -> None:
    paged = Paged([40], 2, 1, 64, torch.float32)
    paged.table[0, 1] = 99
    with pytest.raises(ValueError, match="sequence 0"):
        paged.run([(0, 30, 40)])
    paged = Paged([40], 2, 1, 64, torch.float32)
    q = torch.randn(5, 2, 64)
    for start, length in (([0, 4], 40), ([0, 5], 4), ([0, 5], 500), ([1, 5], 40)):
        starts, lengths = torch.tensor(start, dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
        with pytest.raises(ValueError, match="sequence 0"):
            ops.paged_attention(q, paged.k_cache, paged.v_cache, starts, lengths, paged.table, 1.0)


# ---------------------------------------------------------------------------------------------------- the choice


def choose(mode: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"import torch\nfrom yalis.kernels import ops, native_cpu\n{code}"
    variables = {**os.environ, "YALIS_CPU_KERNELS": mode, **environment}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=variables)


def test_torch_can_be_forced_and_agrees() -> None:
    code = (
        "torch.manual_seed(3); p = ops.pack_linear(torch.randn(70, 40)); x = torch.randn(5, 40)\n"
        "print(ops.cpu_kernels()); print(ops.linear(x, p).double().sum().item())"
    )
    forced, auto = choose("torch", code), choose("auto", code)
    assert forced.stdout.splitlines()[0] == "torch: YALIS_CPU_KERNELS=torch", forced.stderr
    assert math.isclose(float(forced.stdout.splitlines()[1]), float(auto.stdout.splitlines()[1]), abs_tol=1e-3)


def test_an_unknown_mode_is_refused() -> None:
    done = choose("fast", "ops.cpu_kernels()")
    assert done.returncode != 0
    assert "YALIS_CPU_KERNELS='fast': must be auto, native or torch" in done.stderr


def test_a_failed_build_falls_back_and_says_so(tmp_path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken-cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no such luck >&2; exit 1\n')
    broken.chmod(0o755)
    environment = {"CC": str(broken), "YALIS_CACHE_DIR": str(tmp_path)}
    done = choose("auto", "print(ops.cpu_kernels())", **environment)
    assert done.stdout.startswith("torch: "), done.stderr
    if "build failed" in done.stdout:
        assert "no such luck" in done.stderr
        forced = choose("native", "ops.cpu_kernels()", **environment)
        assert forced.returncode != 0
        assert "BuildError" in forced.stderr
        assert "no such luck" in forced.stderr


def test_native_on_a_cpu_without_avx512_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cpu, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setenv("YALIS_CPU_KERNELS", "native")
    with pytest.raises(ConfigError, match="avx512_bf16"):
        native_cpu.cpu_kernels.__wrapped__()
    monkeypatch.setenv("YALIS_CPU_KERNELS", "auto")
    assert str(native_cpu.cpu_kernels.__wrapped__()).startswith("torch: CPU lacks avx512f")


@needs_native
def test_one_openmp_runtime_is_mapped() -> None:
    code = (
        "torch.set_num_threads(2); torch.mm(torch.randn(300, 300), torch.randn(300, 300))\n"
        "ops.linear(torch.randn(9, 64), ops.pack_linear(torch.randn(640, 64)))\n"
        "maps = {l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l}\n"
        "print(len(maps))"
    )
    done = choose("native", code)
    assert done.stdout.strip() == "1", done.stdout + done.stderr


def test_rounding_to_bf16_is_torchs_for_denormals_and_ties() -> None:
    """The CPU's conversion flushes denormals; ours must not."""
    torch.manual_seed(0)
    x = torch.randn(4, 64).to(torch.bfloat16)
    residual = torch.randn(4, 64).to(torch.bfloat16)
    x[1], residual[1] = 1e-39, 2e-39  # a whole row of denormals
    x[2, 5], residual[2, 5] = math.nan, 1.0
    x[3, 7], residual[3, 7] = 1.0, 2.0**-8  # half way between two neighbours
    x[3, 8], residual[3, 8] = 1.0 + 2.0**-7, 2.0**-8
    want = x + residual
    _, got = ops.add_rms_norm(x, residual.clone(), torch.ones(64, dtype=torch.bfloat16), 1e-6)
    assert got[2, 5].isnan()
    got[2, 5] = want[2, 5] = 0.0
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert (want[1] != 0).all()

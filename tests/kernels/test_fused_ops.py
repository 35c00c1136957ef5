"""Fused operations where they are not one kernel; the choice of kernels on a machine without a CUDA device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from yalis.errors import ConfigError
from yalis.kernels import gemm, gpu, ops, torch_reference
from yalis.kernels.triton_gemm import LatencyBound


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    gpu.gpu_kernels.cache_clear()
    yield
    gpu.gpu_kernels.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_and_write_kv_is_its_parts(dtype: torch.dtype, norm: bool) -> None:
    torch.manual_seed(0)
    fused = torch.randn(5, 8, 16).to(dtype)
    q, k, v = fused.split([4, 2, 2], 1)
    table, positions = torch.randn(9, 16), torch.tensor([0, 8, 3, 3, 1])
    slots = torch.tensor([7, 0, -1, 11, 2])
    norms = (torch.randn(16).to(dtype), torch.randn(16).to(dtype), 1e-6) if norm else None
    want_q, want_k = q.clone(), k.clone()
    if norms is not None:
        want_q = torch_reference.rms_norm(want_q, norms[0], norms[2])
        want_k = torch_reference.rms_norm(want_k, norms[1], norms[2])
    torch_reference.rope_(want_q, positions, table)
    torch_reference.rope_(want_k, positions, table)
    want = [torch.zeros(3, 2, 4, 16, dtype=dtype) for _ in range(2)]
    torch_reference.write_kv(want_k, v, want[0], want[1], slots)
    caches = [torch.zeros(3, 2, 4, 16, dtype=dtype) for _ in range(2)]
    got = ops.rope_and_write_kv(q, k, v, positions, table, caches[0], caches[1], slots, norms=norms)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, want_q, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(caches[0], want[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(caches[1], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(64, 32), (256, 65), (384, 128)])  # no whole panels, an odd row, several panels
def test_linear_silu_and_mul_is_its_parts(dtype: torch.dtype, bias: bool, n: int, k: int) -> None:
    torch.manual_seed(0)
    packed = ops.pack_linear(torch.randn(n, k).to(dtype), torch.randn(n).to(dtype) if bias else None)
    for rows in (0, 1, 15, 16, 17, 241, 500):  # around where the kernels join, and where a panel's rows are cut
        x = torch.randn(rows, k).to(dtype)
        assert torch.equal(ops.linear_silu_and_mul(x, packed), ops.silu_and_mul(ops.linear(x, packed)))


@pytest.mark.usefixtures("fresh_choice")
def test_choice_of_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CUDA device is visible to these tests."""
    monkeypatch.delenv("YALIS_GPU_KERNELS", raising=False)
    assert str(gpu.gpu_kernels()).startswith("torch: ")
    assert not gpu.gpu_kernels().serves(torch.zeros(1))
    for mode, message in (("torch", None), ("triton", "cannot serve: .*use auto"), ("cuda", "must be auto, triton")):
        monkeypatch.setenv("YALIS_GPU_KERNELS", mode)
        gpu.gpu_kernels.cache_clear()
        if message is None:
            assert str(gpu.gpu_kernels()) == "torch: YALIS_GPU_KERNELS=torch"
        else:
            with pytest.raises(ConfigError, match=message):
                gpu.gpu_kernels()


@pytest.mark.usefixtures("fresh_choice")
def test_tune_leaves_the_cpu_alone() -> None:
    packed = ops.pack_linear(torch.randn(8, 8))
    assert ops.tune_products([ops.LinearUse(packed)], [1, 8]).products == 0


@pytest.mark.parametrize("pdl", [True, False])
def test_what_is_measured(pdl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel twice, nothing ahead without dependent launches, and choices by what goes before a product."""
    monkeypatch.setattr(gemm, "gpu_kernels", lambda: SimpleNamespace(pdl=pdl))
    for rows in (1, 8, 32, 64):
        for gated in (False, True):
            shapes = gemm.candidates(rows, torch.bfloat16, gated=gated, pdl=pdl)
            assert len(set(shapes)) == len(shapes) and any(not shape.held and not shape.ahead for shape in shapes)
            assert any(shape.held or shape.ahead for shape in shapes) == pdl
            for shape in shapes:
                assert shape.held == shape.held_of(4096) and shape.held & (shape.held - 1) == 0, shape
    small, large = torch.empty(1024, 4096, dtype=torch.bfloat16), torch.empty(65536, 4096, dtype=torch.bfloat16)
    products = [gemm.Product(1, len(weight), 4096, weight.dtype, False, False) for weight in (small, large)]
    found = [gemm._distinct(product, weight) for product, weight in zip(products, (small, large), strict=True)]
    assert len(found[0]) > len(found[1]) or not pdl  # few MiB are no column of many rows
    product = gemm.Product(8, 1024, 4096, torch.bfloat16, False, False)
    use = gemm.ProductUse(small, None, gated=False, waits=True)
    assert gemm._name(product, [use]) == ("8 x 1024 x 4096 bfloat16 waits" if pdl else "8 x 1024 x 4096 bfloat16")
    assert gemm._name(product, [replace(use, waits=False)]) == "8 x 1024 x 4096 bfloat16"


def test_latency_bound_has_a_line_for_each_program() -> None:
    with pytest.raises(ValueError, match="257 programs: there are lines for 1 to 256"):
        LatencyBound(257, 12, torch.device("cpu"))


def test_file_of_choices_keeps_what_others_added(tmp_path: Path) -> None:
    path = tmp_path / "gemm" / "device.json"
    assert gemm._read(path) == {}
    gemm._write(path, {"a": {"choice": None}})
    gemm._write(path, {"b": {"choice": {"rows": 8}}})
    assert set(gemm._read(path)) == {"a", "b"}
    assert set(json.loads(path.read_text())) == {"a", "b"}
    path.write_text("{")
    assert gemm._read(path) == {}
    assert list(path.parent.glob("*.tmp")) == []


def test_unwritable_file_of_choices_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    gemm._write(blocked / "gemm.json", {"a": 1})
    assert not (tmp_path / "gemm.json").exists()

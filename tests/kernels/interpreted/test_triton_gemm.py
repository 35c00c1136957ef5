"""Products of few rows against float64, any shape, split or not, gated or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from yalis.kernels.triton_gemm import GemmScratch, GemmShape, product


@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("m", "n", "k", "shape"),
    [
        (1, 33, 70, GemmShape(8, 32, 1, 1)),
        (1, 64, 128, GemmShape(16, 64, 1, 2)),
        (3, 40, 96, GemmShape(16, 32, 1, 1, splits=1)),
        (17, 50, 70, GemmShape(16, 16, 1, 1, splits=3)),
        (8, 32, 64, GemmShape(32, 32, 1, 1, splits=2)),
        (1, 33, 128, GemmShape(8, 32, 1, 1, held=64, ahead=1)),
        (1, 64, 128, GemmShape(16, 64, 1, 2, held=128)),  # all of it
        (1, 33, 70, GemmShape(8, 32, 1, 1, held=32)),  # tiles that are not whole: nothing is held
        (3, 40, 96, GemmShape(16, 32, 1, 1, splits=1, held=32)),
        (8, 32, 128, GemmShape(32, 16, 1, 1, splits=2, held=32)),
        (17, 50, 160, GemmShape(16, 32, 1, 1, splits=3, held=32)),  # splits that are not whole: nothing is held
    ],
)
def test_product(m: int, n: int, k: int, shape: GemmShape, bias: bool, gated: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.float16 if m == 8 else torch.float32
    out_rows = 2 * n if gated else n
    x, weight = torch.randn(m, k).to(dtype), torch.randn(out_rows, k).to(dtype)
    b = torch.randn(out_rows).to(dtype) if bias else None
    out = torch.full((m, n), torch.nan, dtype=dtype)
    scratch = GemmScratch(*GemmScratch.needed(shape, m, n, gated), torch.device("cpu"))
    for _ in range(2):  # the counters are left at zero
        product(x, weight, b, out, shape, scratch, gated=gated, pdl=False)
    want = F.linear(x.double(), weight.double(), None if b is None else b.double())
    if gated:
        gate, up = want.chunk(2, -1)
        want = F.silu(gate) * up
    scale = want.abs().max().item()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance * scale, rtol=0)


def test_what_is_asked_for_fits() -> None:
    """MiB of the whole weight, shared out over its rows and splits; nothing where 16 bytes are not aligned."""
    weight = torch.empty(1024, 4096, dtype=torch.bfloat16)  # 8 MiB
    assert GemmShape(8, 512, 4, 2, ahead=2).ahead_of(weight) == 1024
    assert GemmShape(64, 128, 4, 2, splits=2, ahead=2).ahead_of(weight) == 512
    assert GemmShape(8, 512, 4, 2, ahead=24).ahead_of(weight) == 4096
    assert GemmShape(8, 512, 4, 2, ahead=2).ahead_of(weight[:, 1:]) == 0
    assert GemmShape(8, 512, 4, 2, ahead=2).ahead_of(torch.empty(1024, 4097, dtype=torch.bfloat16)) == 0

"""Backends against plain softmax attention on ragged batches over scrambled, dirty pages."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from yalis.attention.base import AttentionBatch, AttentionSpec, LayerKV
from yalis.attention.registry import create_backend
from yalis.errors import ConfigError
from yalis.kernels import ops

CPU = torch.device("cpu")


def spec(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> AttentionSpec:
    return AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.3, block_size=4, dtype=dtype, device=device)


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """q [Q, H, D] are the last rows; k, v [L, Hk, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    at = torch.arange(len(k) - len(q), len(k))[:, None]
    keys = torch.arange(len(k))
    visible = (keys <= at) if window is None else (keys <= at) & (keys > at - window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v).float()


@pytest.mark.parametrize("name", ["native", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(
    "lengths",
    [[(7, 7)], [(1, 1)], [(1, 9), (1, 30), (1, 16)], [(3, 12), (1, 5), (9, 9), (3, 3), (1, 21)]],
    ids=["prompt", "first", "decodes", "mixed"],
)
def test_ragged_batches(name: str, window: int | None, lengths: list[tuple[int, int]]) -> None:
    """lengths: (query tokens, all tokens) per sequence."""
    what = spec()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    per_sequence = 8
    order = torch.randperm(len(lengths) * per_sequence, generator=generator)
    table = order.view(len(lengths), per_sequence).to(torch.int32)
    pages = (len(order), what.num_kv_heads, what.block_size, what.head_dim)
    kv = LayerKV(torch.full(pages, torch.nan), torch.full(pages, torch.nan))
    histories, slots = [], []
    for row, (new, total) in zip(table, lengths, strict=True):
        k, v = random(total, 2, 16), random(total, 2, 16)
        histories.append((k, v))
        where = [int(row[p // 4]) * 4 + p % 4 for p in range(total)]
        for p in range(total - new):  # what earlier steps wrote
            kv.k[where[p] // 4, :, where[p] % 4] = k[p]
            kv.v[where[p] // 4, :, where[p] % 4] = v[p]
        slots += where[total - new :]
    news = [new for new, _ in lengths]
    batch = AttentionBatch(
        query_start=torch.tensor([0, *news]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots),
        query_lens_host=news,
        seq_lens_host=[total for _, total in lengths],
    )
    # q, k, v as the model gives them: slices of one fused tensor.
    q = random(sum(news), 6, 16)
    k = torch.cat([h[0][-new:] for h, new in zip(histories, news, strict=True)])
    v = torch.cat([h[1][-new:] for h, new in zip(histories, news, strict=True)])
    fused = torch.cat((q, k, v), 1)
    q_part, k_part, v_part = fused.split([6, 2, 2], 1)
    backend = create_backend(name, what)
    plan = backend.plan(batch)
    ops.write_kv(k_part, v_part, kv.k, kv.v, plan.slot_mapping)
    got = backend.forward(q_part, kv, plan, window)
    assert got.is_contiguous()
    for (hk, hv), rows, found in zip(histories, q.split(news), got.split(news), strict=True):
        torch.testing.assert_close(found, expected(rows, hk, hv, what.scale, window), atol=2e-5, rtol=0)


def test_auto_chooses_by_device_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("yalis")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="yalis"):
            assert create_backend("auto", spec()).name == "native"
            assert create_backend("auto", spec(torch.device("meta"))).name == "sdpa"
    finally:
        logger.removeHandler(caplog.handler)
    assert "attention backend sdpa (auto, device meta: it runs wherever torch does)" in caplog.text


def test_unknown_and_unfit_names() -> None:
    with pytest.raises(ConfigError, match="'flash' is unknown; use one of auto, flashinfer, native, sdpa, triton"):
        create_backend("flash", spec())
    with pytest.raises(ConfigError, match="'native' serves the CPU only, not cuda"):
        create_backend("native", spec(torch.device("cuda")))
    with pytest.raises(ConfigError, match="'triton' serves CUDA devices, not cpu"):
        create_backend("triton", spec())
    with pytest.raises(
        ConfigError, match="'flashinfer' serves bf16 and fp16 on CUDA devices, not torch.float32 on cpu"
    ):
        create_backend("flashinfer", spec())


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is not None, reason="flashinfer is installed")
def test_flashinfer_absent_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match="pip install flashinfer-python"):
        create_backend("flashinfer", spec(torch.device("cuda"), torch.bfloat16))

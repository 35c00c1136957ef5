"""The large kernels compile for a GPU, without one: the interpreter takes programs that the compiler refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from yalis.kernels import gemm, triton_attention, triton_gemm, triton_two_shot

BF16, FP32, INT32, INT64 = "*bf16", "*fp32", "*i32", "*i64"
POINTERS = {
    **dict.fromkeys(("q", "k_new", "v_new", "q_gain", "k_gain", "k_cache", "v_cache", "out"), BF16),
    **dict.fromkeys(("cos_sin", "partial", "masses"), FP32),
    **dict.fromkeys(("counters", "which", "work", "query_start", "seq_lens", "block_table"), INT32),
    "slots": INT64,
    **dict.fromkeys(("scale", "eps"), "fp32"),
}
SHAPE = {"GROUP": 4, "DIM": 128, "DIM_PAD": 128, "BLOCK_SIZE": 16, "PRECISION": "tf32", "PDL": True}
DECODE = {**SHAPE, "GROUP_PAD": 4, "ROWS": 16, "HALF_PAD": 64, "KEYS": 64, "STAGES": 3, "MERGE": 4}
PREFILL = {**SHAPE, "QUERIES": 32, "ROWS": 128, "KEYS": 32, "STAGES": 4}


def compiled(
    function: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, aligned: Sequence[str] = ()
) -> str:
    """Its PTX for Hopper; whatever is no pointer and no constant is an int32. ``aligned``: multiples of 16."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names}
    source = ASTSource(function, signature, values, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return str(made.asm["ptx"])


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("_decode", {**DECODE, "LISTED": True, "ROPE": False, "NORM": False, "WINDOW": True}),
        ("_decode", {**DECODE, "LISTED": False, "ROPE": True, "NORM": True, "WINDOW": False}),
        ("_prefill", {**PREFILL, "WINDOW": False}),
    ],
    ids=["decodes of a list", "decodes that rotate", "prefill"],
)
def test_attention(kernel: str, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(getattr(triton_attention, kernel), POINTERS, constants, 4)
    assert "griddepcontrol.wait" in ptx


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows", [1, 8])
def test_products(rows: int, gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is loaded, and what follows asked for, before the wait for the predecessor."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {**dict.fromkeys(("x", "weight", "bias", "out"), BF16), "parts": FP32, "counters": INT32}
    shapes = [shape for shape in gemm.candidates(rows, torch.bfloat16, gated=gated) if shape.held]
    for shape in (shapes[0], shapes[-1]):
        constants = dict(
            ROWS=shape.rows, COLUMNS=shape.columns, STAGES=shape.stages, GATED=gated, BIAS=False, WHOLE=True, PDL=True,
            HELD=shape.held, WARPS=shape.warps,
        )  # fmt: skip
        function = triton_gemm._one_row
        if shape.splits:
            function = triton_gemm._few_rows
            constants |= dict(TOKENS=shape.padded(rows), SPLITS=shape.splits, PRECISION="tf32")
        before, after = compiled(function, pointers, constants, shape.warps).split("griddepcontrol.wait")
        asked = before.count("cp.async.bulk.prefetch.L2")
        assert asked == (2 if gated else 1) and "prefetch" not in after
        assert before.count("ld.global") >= shape.rows * shape.held * asked // (32 * shape.warps * 8)


def test_latency_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that no compiler may take together, behind the wait."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(triton_gemm._dependent_reads, dict.fromkeys(("ring", "sink"), INT64), {}, 4)
    before, after = ptx.split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in after and "ld.volatile" in after
    assert "ld.global" not in before and "ld.volatile" not in before


@pytest.mark.parametrize("name", ["scatter", "reduce", "finish", "reduce_norm", "finish_norm"])
def test_two_shot(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes over the links or through memory moves 16 bytes at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {**dict.fromkeys(("x", "residual", "out", "weight", "staged"), BF16), "bases": INT64, "eps": "fp32"}
    function = getattr(triton_two_shot, f"_two_shot_{name}")
    constants = {"RANK": 1, "RANKS": 2, "UNIT": 4096, "CLIPPED": False, "BLOCK": 4096}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    ptx = compiled(function, pointers, constants, 8, aligned=(*pointers, "room", "half"))
    moves = [line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line]
    assert any("st.global" in line for line in moves)
    assert all(".v4.b32" in line for line in moves if "b64" not in line), moves

"""The attention kernels compile for a GPU, without one: the interpreter takes programs that the compiler refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from yalis.kernels import triton_attention

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
    function = getattr(triton_attention, kernel)
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "griddepcontrol.wait" in compiled.asm["ptx"]

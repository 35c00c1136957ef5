"""Breaking a step down: traces made by hand, whose parts are known, and one of a real CPU engine."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import DEMO
from yalis import LLM, SamplingParams
from yalis.bench.breakdown import PARTS, break_down, part_of, read_trace
from yalis.errors import ConfigError, RequestError


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_tst_64x8_64x16_1x1_h_bz_splitK_TNT", "GEMM"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "GEMM"),
        ("aten::linear", "GEMM"),
        ("aten::mm", "GEMM"),
        ("_one_row", "GEMM"),
        ("_few_rows", "GEMM"),
        ("_decode", "attention"),
        ("_prefill", "attention"),
        ("void flash_fwd_kernel", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "all-reduce"),
        ("_two_shot_finish_norm", "all-reduce"),
        (
            "c10d::symmetric_memory::barrier_kernel(unsigned int**, unsigned long, int, int, unsigned long)",
            "all-reduce",
        ),
        ("L0.mlp.down/allreduce[shm,32768B]", "all-reduce"),
        ("two_shot_all_reduce_kernel_inplace", "all-reduce"),
        ("_rms_norm", "other"),
        ("Memcpy HtoD (Pinned -> Device)", "other"),
        ("aten::embedding", "other"),
    ],
)
def test_names(name, part):
    assert part_of(name) == part


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 7, "args": args}


def graph_step(at: float, correlation: int, kernels: list[tuple[str, float, float]], host_at: float) -> list[Any]:
    """One replay: range and launch on the host from ``host_at`` on, kernels (name, start, length) after ``at``."""
    return [
        event("user_annotation", "yalis.decode[8 of 8]", host_at, 20.0),
        event("cuda_runtime", "cudaGraphLaunch", host_at + 5.0, 10.0, correlation=correlation),
        *(event("kernel", name, at + start, length, correlation=correlation) for name, start, length in kernels),
    ]


KERNELS = [("nvjet_gemm", 0.0, 50.0), ("_decode", 50.0, 20.0), ("nccl_AllReduce", 60.0, 30.0), ("_rms_norm", 92.0, 5.0)]


def hand_made() -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for number in range(4):
        # The host runs one step ahead of the device.
        events += graph_step(100.0 * (number + 1), number, KERNELS, host_at=100.0 * number)
        # A copy of the next step's inputs, launched outside of the range, while the device works on this one.
        events.append(event("gpu_memcpy", "Memcpy HtoD", 100.0 * (number + 1) + 97.0, 1.0, correlation=900 + number))
    return events


def test_parts_of_overlapping_kernels():
    found = break_down(hand_made())
    assert found.on_device and found.steps == 3 and found.step_us == pytest.approx(100.0)
    # 10 of the all-reduce's 30 are hidden behind attention; the copy counts to the step in which it ran.
    assert found.parts_us == pytest.approx(
        {"GEMM": 50.0, "attention": 20.0, "all-reduce": 20.0, "other": 6.0, "idle": 4.0}
    )
    assert sum(found.parts_us.values()) == pytest.approx(found.step_us)
    assert [(k.name, k.part, k.us, k.launches) for k in found.kernels][:3] == [
        ("nvjet_gemm", "GEMM", pytest.approx(50.0), pytest.approx(1.0)),
        ("_decode", "attention", pytest.approx(20.0), pytest.approx(1.0)),
        ("nccl_AllReduce", "all-reduce", pytest.approx(20.0), pytest.approx(1.0)),
    ]


def test_kernels_that_were_started_ahead_wait_for_those_before_them():
    """Programmatic dependent launch: the next kernel is there early, but at work only when the one before has ended."""
    kernels = [
        ("_rms_norm", 0.0, 10.0),
        ("_one_row", 1.0, 49.0),
        ("_decode", 20.0, 50.0),
        ("nvrar::all_reduce", 55.0, 35.0),
    ]
    events: list[dict[str, Any]] = []
    for number in range(3):
        events += graph_step(100.0 * (number + 1), number, kernels, host_at=100.0 * number)
    assert break_down(events).parts_us == pytest.approx(
        {"GEMM": 40.0, "attention": 20.0, "all-reduce": 20.0, "other": 10.0, "idle": 10.0}
    )


def test_a_call_that_notes_its_times_is_split_into_waiting_and_moving() -> None:
    kernels = [("_one_row", 0.0, 50.0), ("void nvrar::all_reduce<BF16>(nvrar::Launch)", 45.0, 45.0)]
    events: list[dict[str, Any]] = []
    for number in range(3):
        events += graph_step(100.0 * (number + 1), number, kernels, host_at=100.0 * number)
    assert break_down(events).wait_us is None
    # The oldest is of before the trace; the last step is not looked at.
    found = break_down(events, calls_us=[(9.0, 9.0), (30.0, 10.0), (10.0, 30.0), (0.0, 40.0)])
    assert found.parts_us["all-reduce"] == pytest.approx(40.0)
    assert found.wait_us == pytest.approx((30.0 + 10.0) / 2)
    # Where only the latest calls are known, the others count as moving.
    assert break_down(events, calls_us=[(20.0, 20.0), (0.0, 40.0)]).wait_us == pytest.approx(20.0 / 2)


def test_an_all_reduce_beside_computation_is_hidden():
    kernels = [("_one_row", 0.0, 50.0), ("_rms_norm", 60.0, 10.0)]
    events: list[dict[str, Any]] = []
    for number in range(3):
        at = 100.0 * (number + 1)
        events += graph_step(at, number, kernels, host_at=100.0 * number)
        events.append(event("kernel", "nccl_AllReduce", at + 10.0, 50.0, correlation=number, stream=20))
    assert break_down(events).parts_us == pytest.approx(
        {"GEMM": 50.0, "attention": 0.0, "all-reduce": 10.0, "other": 10.0, "idle": 30.0}
    )


def test_prefills_are_left_out_unless_asked_for():
    events = hand_made()
    events += [
        event("user_annotation", "yalis.forward[500 of 512 tokens]", 500.0, 20.0),
        event("cuda_driver", "cuLaunchKernelEx", 505.0, 5.0, correlation=77),
        event("kernel", "nvjet_gemm", 500.0, 300.0, correlation=77),
        *graph_step(800.0, 78, KERNELS, host_at=600.0),
    ]
    assert break_down(events).steps == 4
    assert break_down(events).step_us == pytest.approx(100.0)
    assert break_down(events, "all").steps == 5
    assert break_down(events, "all").step_us == pytest.approx(140.0)


def test_a_file_that_is_no_trace(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ConfigError, match="no trace"):
        read_trace(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="no trace"):
        read_trace(tmp_path / "missing.json")
    packed = tmp_path / "x.json.gz"
    packed.write_bytes(gzip.compress(json.dumps({"traceEvents": [*hand_made(), {"ph": "M", "name": "x"}]}).encode()))
    assert break_down(read_trace(packed).events).steps == 3
    with pytest.raises(ConfigError, match="no step of the engine"):
        break_down(graph_step(0.0, 1, KERNELS, host_at=0.0)[1:])


def test_a_step_alone_ends_with_its_own_work():
    found = break_down(graph_step(0.0, 1, KERNELS, host_at=0.0))
    assert found.steps == 1 and found.step_us == pytest.approx(97.0)
    assert sum(found.parts_us.values()) == pytest.approx(97.0)


def test_a_trace_recorded_on_a_gpu():
    """Three decode steps of 8 sequences of an 8B model on one H200; a step took 4.6 ms by the wall."""
    found = break_down(read_trace(Path(__file__).parent / "data" / "decode_b8_h200.json.gz").events)
    assert found.on_device and found.steps == 2
    assert found.step_us == pytest.approx(4600, rel=0.03)
    assert sum(found.parts_us.values()) == pytest.approx(found.step_us, rel=0.03)
    # 32 layers of four products, one of them by cuBLAS, and the output head.
    launches = {k.name: k.launches for k in found.kernels}
    assert launches["_few_rows"] == 97 and launches["_decode"] == 32 and launches["_rms_norm"] == 65
    assert found.parts_us["GEMM"] > 0.85 * found.step_us
    assert found.parts_us["attention"] == pytest.approx(450, rel=0.05)
    assert found.parts_us["all-reduce"] == 0


def test_a_profiled_engine(tmp_path):
    """On the CPU torch's operators stand in for kernels; the parts sum to the step there too."""
    with LLM(str(DEMO), device="cpu", attention_backend="sdpa", cpu_threads=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        llm.start_profile(tmp_path)
        llm.generate(["one", "two"], params)
        path = Path(llm.stop_profile())
    assert path.parent == tmp_path
    found = break_down(read_trace(path).events, "all")
    assert not found.on_device
    assert found.steps == 5  # the last of six has no successor
    assert set(found.parts_us) == set(PARTS)
    assert sum(found.parts_us.values()) == pytest.approx(found.step_us, rel=0.03)
    assert found.parts_us["attention"] > 0 and found.parts_us["other"] > 0 and found.parts_us["idle"] > 0


def test_a_long_profile_ends_by_itself_and_can_be_ended_once(tmp_path, monkeypatch):
    monkeypatch.setattr("yalis.engine.profiler.MAX_PROFILED_STEPS", 3)
    with LLM(str(DEMO), device="cpu", cpu_threads=1) as llm:
        llm.start_profile(tmp_path)
        llm.generate("one", SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
        path = Path(llm.stop_profile())
        assert path.is_file()
        with pytest.raises(RequestError, match="not on"):
            llm.stop_profile()

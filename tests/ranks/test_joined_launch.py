"""`LLM` in processes that a launcher started: every rank makes the same calls, and one that fails tells the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.checkpoints import DEMO
from tests.support.ranks import ROOT, run_ranks

OPTIONS: dict[str, Any] = {"tensor_parallel_size": 2, "max_model_len": 256, "dtype": "float32", "cpu_threads": 1}
# For two ranks to import torch and load the demo model on a busy machine.
START_S = 90.0


def generate_with_small_frames(limit: int) -> list[list[list[int]]]:
    from yalis import LLM, SamplingParams
    from yalis.comm import control

    control.MAX_FRAME_BYTES = limit
    prompts = [[5 + i] * 100 for i in range(20)]
    with LLM(str(DEMO), **OPTIONS) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=3, ignore_eos=True))
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def test_prompts_and_results_larger_than_a_frame() -> None:
    # The prompts are 20 x 100 tokens of a byte each, the results hold them again.
    results = run_ranks(generate_with_small_frames, 2, 500, timeout_s=START_S, torch_store=True)
    assert results[0].value == results[1].value
    assert [[len(tokens) for tokens in output] for output in results[0].value] == [[3] * 4] * 20


# ---- the end ------------------------------------------------------------------------------------------------------


def note_the_end() -> list[str]:
    """The order in which device and communicators are let go of, from here on."""
    from yalis.comm.communicator import Communicator
    from yalis.engine.runner import Runner

    order: list[str] = []
    release, close = Runner.release, Communicator.close

    def noted_release(self: Runner) -> None:
        order.append("device")
        release(self)

    def noted_close(self: Communicator) -> None:
        order.append("communicator")
        close(self)

    Runner.release = noted_release  # type: ignore[method-assign]
    Communicator.close = noted_close  # type: ignore[method-assign]
    return order


def close_an_llm() -> list[str]:
    from yalis import LLM

    order = note_the_end()
    LLM(str(DEMO), **OPTIONS).close()
    return order


def be_a_worker(endpoint: str) -> list[str]:
    from yalis.config import EngineConfig
    from yalis.engine.worker import run_rank

    order = note_the_end()
    client = threading.Thread(target=start_and_end, args=(endpoint,))
    if os.environ["RANK"] == "0":
        client.start()
    assert run_rank(EngineConfig(str(DEMO), **OPTIONS), endpoint, serving=False) == 0
    if client.ident is not None:
        client.join(10)
    return order


def start_and_end(endpoint: str) -> None:
    """A client that wants nothing of an engine but its end."""
    import msgspec
    import zmq

    from yalis.engine.messages import Ready, ServiceMessage, Shutdown

    with zmq.Context() as context, context.socket(zmq.PAIR) as link:
        link.bind(endpoint)
        assert link.poll(START_S * 1000)
        assert isinstance(msgspec.msgpack.decode(link.recv(), type=ServiceMessage), Ready)
        link.send(msgspec.msgpack.encode(Shutdown()))


def test_every_rank_lets_go_of_its_device_before_the_communicators(tmp_path: Path) -> None:
    # NCCL's destroy waits for the CUDA graphs that hold its operations.
    for results in (
        run_ranks(close_an_llm, 2, timeout_s=START_S, torch_store=True),
        run_ranks(be_a_worker, 2, f"ipc://{tmp_path}/e", timeout_s=START_S, torch_store=True),
    ):
        for result in results:
            assert result.value[0] == "device" and set(result.value[1:]) == {"communicator"}, result.value


# ---- a rank that cannot start ---------------------------------------------------------------------------------------


def start_and_say_why_not(model: str) -> tuple[str, str]:
    from yalis import LLM
    from yalis.errors import YalisError

    try:
        LLM(model, **OPTIONS)
    except YalisError as error:
        if os.environ["RANK"] == "0":
            time.sleep(3.0)  # a script that catches the error lives on: the others must not wait for its end
        return type(error).__name__, str(error)
    raise AssertionError("it started")


def test_a_missing_tokenizer_is_told_to_every_rank(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    for file in model.glob("tokenizer*"):
        file.unlink()
    first, second = run_ranks(start_and_say_why_not, 2, str(model), timeout_s=START_S, torch_store=True)
    kind, words = first.value
    assert kind == "CheckpointError" and "tokenizer" in words
    kind, told = second.value
    assert kind == "PeerLostError"
    assert "rank 0" in told and "was lost: raised CheckpointError: " in told and words.splitlines()[0][:60] in told


# ---- again ----------------------------------------------------------------------------------------------------------

TWICE = """
import os, sys
from yalis import LLM, SamplingParams

found, cores, share = [], os.sched_getaffinity(0), set()
for _ in range(3):
    with LLM(sys.argv[1], tensor_parallel_size=2, max_model_len=64, dtype="float32", cpu_threads=1) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        share.add(frozenset(os.sched_getaffinity(0)))
    found.append(output.outputs[0].token_ids)
    assert os.sched_getaffinity(0) == cores
assert len(share) == 1 and (len(cores) < 2 or len(*share) == len(cores) // 2), share
assert found[0] == found[1] == found[2] and len(found[0]) == 4, found
print("three times")
"""


def test_one_engine_after_the_other_under_torchrun(tmp_path: Path) -> None:
    """The agent's store outlives each of them, and with it what the ranks told each other the time before."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script), str(DEMO)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("three times") == 2

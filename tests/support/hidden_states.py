"""Hashes of a rank's last hidden states and residual stream, for tests that every rank holds the same bits."""

from __future__ import annotations

import hashlib
import random
from functools import partial
from typing import Any

import torch

from tests.support.checkpoints import DEMO
from yalis.config import EngineConfig
from yalis.engine.batch import prepare_batch
from yalis.engine.cuda_graphs import GraphMemory
from yalis.engine.decode_steps import DecodeSteps, StaticOutput, StaticStep
from yalis.engine.request import Sequence
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.scheduler import ScheduledSequence, ScheduledStep
from yalis.engine.start import start_rank
from yalis.kvcache.block_manager import BlockTable
from yalis.utils.packing import send

BATCHES = (1, 8, 32)
_PROMPT = 20
_BLOCK = 16


@torch.inference_mode()
def worker(options: dict[str, Any]) -> dict[str, str]:
    """Run in each of two ranks: one SHA-256 for a prefill of 32 prompts, and one per batch for a decode step after it,
    called kernel by kernel (``eager``) and as the engine runs it (``captured`` on a GPU)."""
    config = EngineConfig(
        str(DEMO), tensor_parallel_size=2, max_model_len=64, max_num_seqs=max(BATCHES), block_size=_BLOCK, **options
    )
    rank = start_rank(config)
    runner = rank.core.runner
    residuals: list[torch.Tensor] = []
    reduce = runner.tp.all_reduce_rmsnorm

    def noting(*args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = reduce(*args, **named)
        residuals[:] = [residual]
        return normed, residual

    runner.tp.all_reduce_rmsnorm = noting  # type: ignore[method-assign]

    def both(token_ids: torch.Tensor, positions: torch.Tensor, attention: Any) -> torch.Tensor:
        hidden = runner.model.forward(token_ids, positions, None, runner.kv, runner.attention.plan(attention))
        return torch.cat((hidden, residuals[0]), -1)

    def body(static: StaticStep) -> StaticOutput:
        return StaticOutput(raw_logits=both(static.token_ids, static.positions, static.attention))

    if runner.fixed.decode is None:
        runner.fixed.prepare_decode(max(BATCHES))
    assert runner.fixed.decode is not None
    steps = DecodeSteps(runner.fixed.decode.inputs, body, before=lambda static, lengths: None)
    if runner.device.type == "cuda":
        steps.capture(GraphMemory(runner.device))
    dice = random.Random(7)
    sequences = [_sequence(index, dice) for index in range(max(BATCHES))]
    prompts = [ScheduledSequence(seq, 0, _PROMPT, True) for seq in sequences]
    step = ScheduledStep(prompts, _PROMPT * len(prompts))
    batch = prepare_batch(step, block_size=_BLOCK, send=partial(send, device=runner.device), last_tokens=None)
    found = {"prefill": _digest(both(batch.token_ids, batch.positions, batch.attention))}
    for count in BATCHES:
        items = [ScheduledSequence(seq, _PROMPT, 1, True) for seq in sequences[:count]]
        static = runner.fixed.decode.inputs.fill(ScheduledStep(items, count))
        for way, run in (("eager", body), ("captured", steps.run)):
            output = run(static).raw_logits
            assert output is not None
            found[f"{way} {count}"] = _digest(output[:count])
    steps.release()
    rank.close()
    return found


def _sequence(index: int, dice: random.Random) -> Sequence:
    tokens = [dice.randrange(1, 2000) for _ in range(_PROMPT + 1)]
    seq = Sequence(index, tokens, _PROMPT, SamplingParams(temperature=0.0), seed=0, max_tokens=9)
    seq.table = BlockTable(blocks=[2 * index, 2 * index + 1])
    seq.slot = index
    return seq


def _digest(x: torch.Tensor) -> str:
    host = x.cpu().contiguous()
    assert host.isfinite().all() and host.any()
    return hashlib.sha256(host.view(torch.uint8).numpy().tobytes()).hexdigest()

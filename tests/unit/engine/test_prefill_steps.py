"""Padded steps with prompts: their sizes and inputs, and that they give the tokens that steps made anew give."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.support.arrivals import Arrival, serve
from tests.support.checkpoints import DEMO
from tests.support.padded_native import pad_native
from yalis.config import EngineConfig
from yalis.engine.batch import prepare_batch
from yalis.engine.handle import LocalEngine
from yalis.engine.prefill_steps import PaddedInputs, PaddedSize, PrefillSteps, padded_sizes, padded_tokens
from yalis.engine.request import Sequence
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.scheduler import ScheduledSequence, ScheduledStep
from yalis.engine.start import start_rank
from yalis.kvcache.block_manager import BlockTable

CPU = torch.device("cpu")


def test_sizes():
    sizes = padded_sizes(300, 20)
    assert [size.tokens for size in sizes if size.decodes == 0] == [16, 32, 64, 128, 256, 300]
    assert [size.decodes for size in sizes if size.tokens == 64] == [0, 16, 20]
    assert [size.decodes for size in sizes if size.tokens == 16] == [0, 14], "beside a prompt of two tokens"
    assert {size.tokens: size.prompts for size in sizes} == {16: 1, 32: 2, 64: 4, 128: 8, 256: 16, 300: 18}
    for most in (2, 16, 300, 1024, 2048):
        for sequences in (1, 2, 16, 64, 300, 1000, 5000):
            assert all(size.sequences <= size.tokens for size in padded_sizes(most, sequences))
            assert all(size.prompts >= 1 for size in padded_sizes(most, sequences))
            assert padded_sizes(most, sequences)[-1].tokens == most
    assert list(sizes) == sorted(sizes)
    assert {size.decodes for size in padded_sizes(1024, 1)} == {0}
    assert {size.decodes for size in padded_sizes(1024, 256) if size.tokens == 512} == {0, 16, 64, 256}
    assert {size.decodes for size in padded_sizes(1024, 256) if size.tokens > 512} == {256}
    assert {size.decodes for size in padded_sizes(1024, 1000) if size.tokens > 512} == {638, 766, 894, 1000}


@pytest.mark.parametrize(
    ("tokens", "padded"), [(1, 16), (16, 16), (17, 32), (129, 256), (400, 512), (513, 600), (601, 601)]
)
def test_what_a_step_is_padded_to(tokens: int, padded: int):
    assert padded_tokens(tokens, 600) == padded


def item(number: int, start: int, count: int, length: int, *, blocks: list[int], **params: Any) -> ScheduledSequence:
    """Tokens ``start .. start + count`` of a sequence of ``length`` known tokens, all of which are the prompt."""
    seq = Sequence(number, [10 * number + i for i in range(length)], length, SamplingParams(**params), 0, 9)
    seq.table, seq.slot = BlockTable(blocks=blocks), number
    return ScheduledSequence(seq, start, count, start + count == length)


def step_of(*items: ScheduledSequence) -> ScheduledStep:
    return ScheduledStep(list(items), sum(i.num_tokens for i in items))


def inputs_of(*sizes: PaddedSize) -> PaddedInputs:
    return PaddedInputs(sizes, max_blocks=3, block_size=4, hidden=None, device=CPU)


def test_inputs_lie_where_they_lay_and_the_rest_is_padding():
    size = PaddedSize(tokens=10, decodes=2, prompts=2)
    inputs = inputs_of(size)
    static = inputs.static(size)
    before = static.token_ids.data_ptr()
    step = step_of(item(1, 4, 1, 5, blocks=[3, 1]), item(2, 0, 4, 9, blocks=[5]), item(3, 2, 2, 4, blocks=[2]))
    batch = prepare_batch(step, block_size=4, send=lambda arrays: inputs.send(size, arrays), last_tokens=None)
    assert static.token_ids.tolist() == [14, 20, 21, 22, 23, 32, 33, 0, 0, 0]
    assert static.positions.tolist() == [4, 0, 1, 2, 3, 2, 3, 0, 0, 0]
    assert static.attention.slot_mapping.tolist() == [4, 20, 21, 22, 23, 10, 11, -1, -1, -1]
    assert static.attention.query_start.tolist() == [0, 1, 5, 7, 7]
    assert static.attention.seq_lens.tolist() == [5, 4, 4, 1]
    assert static.rows.tolist() == [0, 6, 0, 0], "the second samples nothing yet"
    assert static.attention.block_table[:3, :2].tolist() == [[3, 1], [5, 0], [2, 0]]
    assert batch.token_ids.tolist() == [14, 20, 21, 22, 23, 32, 33]
    assert batch.sample_rows.tolist() == [0, 6] and batch.only_samples
    assert batch.token_ids.data_ptr() == static.token_ids.data_ptr() == before
    inputs.clear(size)
    assert static.attention.slot_mapping.tolist() == [-1] * 10
    assert static.attention.query_start.tolist() == [0] * 5
    assert static.attention.seq_lens.tolist() == [1] * 4


def test_tokens_that_only_the_device_knows_are_fed():
    size = PaddedSize(tokens=4, decodes=1, prompts=1)
    inputs = inputs_of(size)
    ahead = item(1, 5, 1, 5, blocks=[0, 1])
    step = step_of(ahead, item(2, 0, 2, 2, blocks=[2]))
    tokens = torch.tensor([0, 77, 0])
    prepare_batch(step, block_size=4, send=lambda arrays: inputs.send(size, arrays), last_tokens=tokens)
    assert inputs.static(size).token_ids.tolist() == [77, 20, 21, 0]


def test_the_least_size_that_fits():
    sizes = [PaddedSize(8, 0, 1), PaddedSize(8, 2, 1), PaddedSize(16, 0, 2), PaddedSize(16, 2, 2)]
    steps = PrefillSteps(inputs_of(*sizes), body=lambda static: static.token_ids, before=lambda *_: None)
    prompt, decode = item(1, 0, 7, 9, blocks=[]), item(2, 4, 1, 5, blocks=[])
    assert steps.fitting(step_of(prompt)) == sizes[0]
    assert steps.fitting(step_of(prompt, decode)) == sizes[1]
    assert steps.fitting(step_of(prompt, prompt)) == sizes[2]
    assert steps.fitting(step_of(prompt, decode, decode)) == sizes[3]
    assert steps.fitting(step_of(prompt, decode, decode, decode)) is None, "too many decodes"
    assert steps.fitting(step_of(item(1, 0, 17, 20, blocks=[]))) is None, "too many tokens"
    assert steps.fitting(step_of(item(1, 0, 7, 9, blocks=[], prompt_logprobs=1))) is None, "all rows are read"


# ---- the same tokens ----------------------------------------------------------------------------------------------


def generate(*, padded: int, **options: Any) -> tuple[list[Any], Any]:
    """Tokens and log-probabilities of requests that come and go, and the counts of steps."""
    config = EngineConfig(str(DEMO), dtype="float32", device="cpu", max_model_len=128, cpu_threads=1, **options)
    rank = start_rank(config)
    runner = rank.core.runner
    if padded:
        pad_native(runner.attention)
        runner.fixed.prepare_prefill(padded)
    engine = LocalEngine(rank)
    rng = random.Random(5)
    kinds: list[dict[str, Any]] = [
        dict(temperature=0.0),
        dict(temperature=0.8, seed=3),
        dict(temperature=1.0, top_p=0.9, seed=4, logprobs=1),
        dict(temperature=0.0, prompt_logprobs=1),
    ]
    arrivals: list[Arrival] = []
    for number in range(12):
        params = SamplingParams(**kinds[number % 4], max_tokens=rng.randrange(2, 12), ignore_eos=True, detokenize=False)
        prompt = [rng.randrange(1, 2000) for _ in range(rng.randrange(1, 60))]
        if number % 3 == 2:  # one token behind whole blocks that an earlier request has left
            prompt = [*arrivals[number - 2].prompt[:32], 7]
        arrivals.append(Arrival(number * 2, prompt, params))
    outputs = serve(engine, arrivals)
    preemptions = engine.stats().num_preemptions
    engine.close()
    assert rank.core.blocks.usage == 0.0
    reused = sum(o.metrics.num_cached_tokens for o in outputs)
    found = [(o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs]
    return found, (runner.counts, preemptions, reused)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("more", [{}, {"max_num_batched_tokens": 24, "num_kv_blocks": 24, "block_size": 4}])
def test_padding_changes_no_token(overlap: bool, more: dict[str, int]):
    """With chunks of prompts, reused prefixes, preemption; whatever does not fit runs as before."""
    options = {"overlap_scheduling": overlap, "max_num_seqs": 5, **more}
    plain, (plain_counts, _, _) = generate(padded=0, **options)
    fixed, (counts, preemptions, reused) = generate(padded=24 if more else 48, **options)
    assert fixed == plain
    assert plain_counts.padded == 0
    assert (preemptions > 0) == bool(more) and reused > 0
    assert counts.padded >= 8 and counts.other > 0

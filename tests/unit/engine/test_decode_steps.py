"""Decode steps of fixed size without a GPU: the code of the CUDA graphs, called instead of captured."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.arrivals import Arrival, serve
from tests.support.checkpoints import DEMO
from yalis import LLM
from yalis.config import EngineConfig
from yalis.engine.cuda_graphs import GraphLimits, graph_nbytes
from yalis.engine.decode_steps import DecodeInputs, batch_sizes, is_decode, size_for
from yalis.engine.fixed_steps import held_nbytes
from yalis.engine.handle import LocalEngine
from yalis.engine.plain_draw import is_plain
from yalis.engine.request import Sequence
from yalis.engine.sampler import PenaltyState, VocabShard
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.scheduler import ScheduledSequence, ScheduledStep
from yalis.engine.start import start_rank
from yalis.engine.trial import imaginary_steps
from yalis.kvcache.block_manager import BlockTable
from yalis.utils.packing import Layout, pinned, send

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
    ],
)
def test_batch_sizes(largest, expected):
    assert batch_sizes(largest) == expected
    for rows in range(1, largest + 1):
        size = size_for(expected, rows)
        assert size is not None and size >= rows
        assert all(other < rows for other in expected if other < size)
    assert size_for(expected, largest + 1) is None


def test_a_layout_keeps_fields_apart_and_aligned():
    layout = Layout({"a": ((3,), "int64"), "b": ((5,), "int32"), "c": ((0,), "int64"), "d": ((2, 3), "float32")})
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    arrays = layout.arrays(buffer)
    for number, array in enumerate(arrays.values()):
        array[...] = number + 1
    assert all(f.offset % 16 == 0 for f in layout.fields.values())
    seen = {name: t.tolist() for name, t in layout.tensors(buffer).items()}
    assert seen == {"a": [1, 1, 1], "b": [2] * 5, "c": [], "d": [[4.0] * 3] * 2}
    with pytest.raises(ValueError, match="uint8"):
        Layout({"x": ((1,), "uint8")})


def test_send_gives_the_same_values():
    import numpy as np

    arrays = {"x": np.arange(5), "y": np.ones((2, 2), np.float32)}
    for found in (send(arrays, CPU), pinned(arrays, CPU)):
        assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in arrays.items()}


def test_the_copies_of_all_kinds_have_a_place():
    import numpy as np

    arrays = {"a": np.asarray([[0.1], [np.inf]]), "b": np.asarray([True, False, True]), "c": np.asarray([7])}
    layout = Layout({name: (array.shape, array.dtype) for name, array in arrays.items()})
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, view in layout.arrays(buffer).items():
        view[...] = arrays[name]
    for name, found in layout.tensors(buffer).items():
        assert (
            torch.equal(found, torch.from_numpy(arrays[name])) and found.dtype == torch.from_numpy(arrays[name]).dtype
        )


# ---- the largest steps, which the memory of a GPU is shared out by ------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "model_len", "seqs", "lengths"),
    [
        (8192, 4096, 64, [4096, 4096]),
        (8192, 5000, 64, [5000, 3192]),
        (100, 5000, 64, [100]),
        (100, 16, 4, [16] * 4),
        (100, 30, 4, [30, 30, 30, 10]),
    ],
)
def test_imaginary_steps_are_the_largest_that_can_be(tokens, model_len, seqs, lengths):
    prefill, padded, decode, apart = imaginary_steps(tokens, 40, model_len, seqs, 16)
    assert padded.num_tokens == 40 and max(item.num_tokens for item in padded.items) == min(39, model_len)
    assert padded.items[-1].num_tokens == 1, "a decode beside the prompts"
    assert [item.num_tokens for item in prefill.items] == lengths
    assert prefill.num_tokens == sum(lengths) == min(tokens, model_len * seqs)
    for step in (decode, apart):
        assert step.num_tokens == len(step.items) == seqs and is_decode(step)
    for step in (prefill, padded, decode, apart):
        blocks = [block for item in step.items for block in item.seq.table.blocks]
        assert len(set(blocks)) == len(blocks), "sequences write to pages of their own"
        assert sorted(item.seq.slot for item in step.items) == list(range(len(step.items)))
        assert all(len(item.seq.table.blocks) * 16 >= item.start + item.num_tokens for item in step.items)
    assert all(is_plain(item, 1000, ()) for item in (*prefill.items, *decode.items))
    assert not any(is_plain(item, 1000, ()) for item in apart.items)


@pytest.mark.parametrize("padded", [7, 70])
def test_imaginary_steps_run_and_leave_nothing_behind(monkeypatch, padded):
    """The trial run, on a CPU that is asked for its memory as a GPU would be."""
    config = EngineConfig(str(DEMO), dtype="float32", device="cpu", max_model_len=48, max_num_batched_tokens=64,
                          max_num_seqs=6, cpu_threads=1)  # fmt: skip
    runner = start_rank(config).core.runner
    allocated = iter([0, 300, 1000, 5000])  # before each step
    peaks = iter([100, 300 + padded, 1020, 5300])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    drawn = []
    monkeypatch.setattr(runner, "_sample_apart", _noting(runner._sample_apart, drawn))
    limits = GraphLimits(decode_batch=4, prefill_tokens=32)
    assert runner._measure_activations(limits) == 300 + 20 + max(20, padded) + runner.penalties.most_bytes(48)
    assert drawn[-1] == 6 and runner.kv == [] and runner.penalties._output_counts is None


def test_products_that_wait(monkeypatch):
    """Behind attention always, behind an all-reduce where there is one; a product behind a product does not."""
    model = start_rank(EngineConfig(str(DEMO), device="cpu", cpu_threads=1)).core.runner.model
    uses = list(model.products())
    layers = model.config.num_layers
    assert [use.waits for use in uses] == [False, True, False, False] * layers + [False]
    assert [use.gated for use in uses] == [False, False, True, False] * layers + [False]
    monkeypatch.setattr(model, "context", replace(model.context, tp=SimpleNamespace(size=2)))
    assert [use.waits for use in model.products()] == [True, True, True, False] * layers + [True]


def test_what_graphs_hold():
    runner = start_rank(
        EngineConfig(str(DEMO), dtype="float32", device="cpu", max_num_seqs=6, cpu_threads=1)
    ).core.runner
    limits = GraphLimits(decode_batch=4, prefill_tokens=32)
    # Decodes of 1, 2, 4; prompts of 16 and 32, each with and without room for decodes.
    graphs = graph_nbytes(3 + 4, runner.resolved.model.num_layers)
    # What they leave: logits of the first, hidden states of one or two prompts with no or six decodes of the others.
    hidden = (1 + 7 + 2 + 8) * runner.resolved.model.hidden_size
    left = 4 * ((1 + 2 + 4) * runner.model.vocab_shard_size + hidden)
    assert held_nbytes(runner.resolved, runner.model, limits, last_stage=True) == graphs + left
    assert held_nbytes(runner.resolved, runner.model, limits, last_stage=False) == graphs
    assert held_nbytes(runner.resolved, runner.model, GraphLimits(), last_stage=True) == 0


def _noting(call, rows: list[int]):
    def noted(items, slots, logits):
        rows.append(len(items))
        return call(items, slots, logits)

    return noted


def test_counts_of_penalties_never_take_more_than_was_set_aside():
    vocab = VocabShard(0, 100, 100)
    for longest in (5, 63, 64, 200, 1000):
        state = PenaltyState(3, vocab, CPU)
        for length in range(1, longest, 7):
            item = make_item(1, tokens=[1] * length, start=length - 1, blocks=[0], slot=0, repetition_penalty=1.1)
            state.counts([item])
        held = sum(t.nbytes for t in (state._in_prompt, state._output_counts, state._held))
        assert held <= state.most_bytes(longest)


# ---- what the device sees -----------------------------------------------------------------------------------------


def make_item(seq_id: int, *, tokens: list[int], start: int, blocks: list[int], slot: int, **params: Any):
    seq = Sequence(seq_id, tokens, 1, SamplingParams(**params), seed=100 + seq_id, max_tokens=50)
    seq.table = BlockTable(blocks=blocks)
    seq.slot = slot
    return ScheduledSequence(seq, start, 1, True)


def step_of(*items: ScheduledSequence) -> ScheduledStep:
    return ScheduledStep(list(items), sum(i.num_tokens for i in items))


def test_inputs_arrive_padded():
    inputs = DecodeInputs((1, 4, 8), num_slots=6, max_blocks=3, block_size=4, device=CPU)
    first = make_item(1, tokens=[7, 8, 9, 10, 11], start=4, blocks=[5, 2], slot=3, temperature=0.5)
    ahead = make_item(2, tokens=[7, 8, 9], start=3, blocks=[4], slot=0, temperature=0.0)
    static = inputs.fill(step_of(first, ahead))
    assert static.size == 4
    assert static.token_ids.tolist() == [11, -1, 0, 0]  # the second one's token is on the device
    assert static.positions.tolist() == [4, 3, 0, 0]
    assert static.slots.tolist() == [3, 0, 6, 6]
    assert static.attention.slot_mapping.tolist() == [2 * 4 + 0, 4 * 4 + 3, -1, -1]
    assert static.attention.seq_lens.tolist() == [5, 4, 1, 1]
    assert static.attention.query_start.tolist() == [0, 1, 2, 3, 4]
    assert static.attention.block_table[:2].tolist() == [[5, 2, 0], [4, 0, 0]]
    assert static.draw.temperature.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert static.draw.seeds.tolist() == [101, 102, 0, 0]
    assert static.draw.positions.tolist() == [5, 4, 0, 0]


def test_sizes_share_memory_and_addresses_stay():
    inputs = DecodeInputs((1, 4), num_slots=6, max_blocks=3, block_size=4, device=CPU)
    small, large = inputs.static(1), inputs.static(4)
    items = [make_item(i, tokens=[i, 50 + i], start=1, blocks=[i], slot=i) for i in range(4)]
    assert inputs.fill(step_of(*items)) is large
    assert large.token_ids.tolist() == [50, 51, 52, 53]
    assert inputs.fill(step_of(items[2])) is small
    assert small.token_ids.tolist() == [52]
    assert small.attention.block_table.tolist() == [[2, 0, 0]]
    assert small.token_ids.data_ptr() == large.token_ids.data_ptr()


def test_only_changed_blocks_travel():
    inputs = DecodeInputs((2,), num_slots=4, max_blocks=4, block_size=4, device=CPU)
    one = make_item(1, tokens=[1] * 5, start=4, blocks=[3, 1], slot=0)
    two = make_item(2, tokens=[1] * 5, start=4, blocks=[2, 0], slot=1)
    table = inputs.fill(step_of(one, two)).attention.block_table
    table[:, :2] = 9  # whoever sent these again would be seen
    one.seq.table.blocks.append(6)
    inputs.fill(step_of(one, two))
    assert table.tolist() == [[9, 9, 6, 0], [9, 9, 0, 0]]
    # A row that changes hands, and one whose sequence comes back from preemption, are written anew.
    two.seq.num_preemptions = 1
    inputs.fill(step_of(two, one))
    assert table.tolist() == [[2, 0, 6, 0], [3, 1, 6, 0]]
    two.seq.num_preemptions = 2
    two.seq.table.blocks[:] = [7, 8]
    inputs.fill(step_of(two, one))
    assert table[0, :2].tolist() == [7, 8]


def test_what_counts_as_a_decode_step():
    decode = make_item(1, tokens=[1, 2], start=1, blocks=[0], slot=0)
    assert is_decode(step_of(decode))
    chunk = ScheduledSequence(decode.seq, 0, 2, True)
    assert not is_decode(step_of(decode, chunk))
    middle = ScheduledSequence(decode.seq, 0, 1, False)
    assert not is_decode(step_of(middle))
    scored = make_item(2, tokens=[1, 2], start=1, blocks=[0], slot=0, prompt_logprobs=1)
    assert is_decode(step_of(scored)), "its prompt was scored before"
    scored.seq.num_prompt_tokens = 3
    assert not is_decode(step_of(scored))


# ---- the same tokens ----------------------------------------------------------------------------------------------


def generate(*, fixed_sizes: int, **options: Any) -> tuple[list[list[int]], Any]:
    """Outputs of a mixed set of requests that come and go, and the counts of steps."""
    config = EngineConfig(str(DEMO), dtype="float32", device="cpu", max_model_len=128, cpu_threads=1, **options)
    rank = start_rank(config)
    runner = rank.core.runner
    if fixed_sizes:
        runner.fixed.prepare_decode(fixed_sizes)
    engine = LocalEngine(rank)
    rng = random.Random(5)
    kinds: list[dict[str, Any]] = [
        dict(temperature=0.0),
        dict(temperature=0.8, seed=3),
        dict(temperature=1.0, top_p=0.9, seed=4),
        dict(temperature=0.0, repetition_penalty=1.3),
        dict(temperature=0.9, min_tokens=5),
        dict(temperature=0.0, logprobs=2),
    ]
    arrivals = []
    for number in range(14):
        params = SamplingParams(
            **kinds[number % len(kinds)], max_tokens=rng.randrange(2, 24), ignore_eos=True, detokenize=False
        )
        prompt = [rng.randrange(1, 2000) for _ in range(rng.randrange(1, 40))]
        arrivals.append(Arrival(number * 2, prompt, params))
    outputs = [output.outputs[0] for output in serve(engine, arrivals)]
    engine.close()
    assert rank.core.blocks.usage == 0.0
    logprobs = [o.logprobs for o in outputs]
    return [o.token_ids for o in outputs], (logprobs, runner.counts)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scarce", [{}, {"num_kv_blocks": 20, "block_size": 4}])
def test_fixed_sizes_change_no_token(overlap, scarce):
    options = {"overlap_scheduling": overlap, "max_num_seqs": 5, **scarce}
    plain, (plain_logprobs, plain_counts) = generate(fixed_sizes=0, **options)
    fixed, (fixed_logprobs, counts) = generate(fixed_sizes=4, **options)
    assert fixed == plain
    assert fixed_logprobs == plain_logprobs
    assert plain_counts.decode == 0
    assert counts.decode > 10 and counts.other > 0  # prefills, and batches of five
    assert 0 < counts.sampled_apart < counts.decode


def test_plain_draws_alone_are_sampled_within_the_step():
    config = EngineConfig(str(DEMO), dtype="float32", device="cpu", max_model_len=64, overlap_scheduling=True)
    rank = start_rank(config)
    rank.core.runner.fixed.prepare_decode(8)
    engine = LocalEngine(rank)
    for number in range(3):
        params = SamplingParams(temperature=number / 2, seed=number, max_tokens=8, ignore_eos=True, detokenize=False)
        engine.submit(str(number), [5, 6, 7], params, stream=False)
    while engine.engine.has_unfinished_requests:
        engine.poll()
    engine.close()
    assert rank.core.runner.counts.sampled_apart == 0
    assert rank.core.runner.counts.decode == 7


def test_backends_learn_the_lengths_before_each_step(monkeypatch):
    """One plan a size, the largest first; before each decode step the keys of its rows, as many as there will be."""
    config = EngineConfig(str(DEMO), dtype="float32", device="cpu", max_model_len=64, max_num_seqs=4)
    rank = start_rank(config)
    runner = rank.core.runner
    seen: list[Any] = []
    plan = runner.attention.plan

    def plan_fixed(batch):
        seen.append(("plan", len(batch.seq_lens)))
        return plan(batch)

    def renew(of, lengths):
        # The inputs are there: those of the rows, then padding.
        assert of.seq_lens.tolist() == lengths + [1] * (len(of.seq_lens) - len(lengths))
        seen.append((len(of.seq_lens), lengths))

    monkeypatch.setattr(runner.attention, "plan_fixed", plan_fixed, raising=False)
    monkeypatch.setattr(runner.attention, "renew", renew, raising=False)
    runner.fixed.prepare_decode(4)
    engine = LocalEngine(rank)
    for number, prompt in enumerate(([5, 6, 7], [8], [5, 6, 7, 8, 9])):
        params = SamplingParams(temperature=0.0, max_tokens=4 + number, ignore_eos=True, detokenize=False)
        engine.submit(str(number), prompt, params, stream=False)
    while engine.engine.has_unfinished_requests:
        engine.poll()
    engine.close()
    assert seen == [
        ("plan", 4),
        ("plan", 2),
        ("plan", 1),
        (4, [4, 2, 6]),
        (4, [5, 3, 7]),
        (4, [6, 4, 8]),
        (2, [5, 9]),
        (1, [10]),
    ]


def test_the_table_of_a_benchmark_on_a_small_model():
    from yalis.bench.latency import Shape, measure_table

    shapes = (Shape(2, 8, 4), Shape(1, 16, 1))
    with LLM(str(DEMO), device="cpu", cpu_threads=1, enable_prefix_caching=False) as llm:
        decode, prefill = measure_table(llm, warmup=1, iters=2, shapes=shapes)
    assert (decode.shape.name, prefill.shape.name) == ("2x8+4", "1x16+1")
    assert len(decode.value) == len(prefill.value) == 2
    assert decode.value == decode.samples.step and prefill.value == prefill.samples.first
    assert all(0 < step * 3 < latency for step, latency in zip(decode.value, decode.samples.latency, strict=True))
    assert prefill.samples.step == [] and prefill.samples.tpot == []
    assert decode.stats.times.other_steps == 8

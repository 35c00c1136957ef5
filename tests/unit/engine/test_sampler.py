"""Sampling against float64 references, over shards and batches, and the random numbers underneath."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from yalis.engine import sampler
from yalis.engine.plain_draw import best_of_shards
from yalis.engine.random import gumbel, gumbel_at, random_bits, request_seed
from yalis.engine.request import Sequence as EngineSequence
from yalis.engine.sampler import PenaltyState, SamplerOutput, VocabShard, _penalties, build_batch, sample
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.scheduler import ScheduledSequence

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
EOS = (2,)


class FakeGroup:
    """Ranks as threads of this process; a gather is two barriers."""

    def __init__(self, size: int):
        self.size = size
        self.parts: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def run(self, work: Callable[[FakeRank], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def main(rank: int) -> None:
            try:
                results[rank] = work(FakeRank(self, rank))
            except BaseException as error:
                self.barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


class FakeRank:
    def __init__(self, group: FakeGroup, rank: int):
        self.group = group
        self.rank = rank
        self.size = group.size

    def all_gather(self, x: torch.Tensor, dim: int = -1, *, tag: str = "") -> torch.Tensor:
        self.group.parts[self.rank] = x
        self.group.barrier.wait()
        joined = torch.cat([part for part in self.group.parts if part is not None], dim=dim)
        self.group.barrier.wait()
        return joined


def make_items(
    params: Sequence[SamplingParams],
    *,
    prompts: Sequence[list[int]] | None = None,
    outputs: Sequence[list[int]] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[ScheduledSequence]:
    items = []
    for row, p in enumerate(params):
        prompt = prompts[row] if prompts else [1, 1, 1]
        output = outputs[row] if outputs else []
        seq = EngineSequence(row, prompt + output, len(prompt), p, seeds[row] if seeds else 100 + row, 1000, slot=row)
        items.append(ScheduledSequence(seq, 0, len(seq.token_ids), True))
    return items


def run_sample(logits: torch.Tensor, items: list[ScheduledSequence], shards: int = 1) -> SamplerOutput:
    """Sample with the vocabulary over ``shards`` ranks (the last ones padded); all ranks must agree."""
    total = logits.shape[1]
    size = -(-total // shards)
    padded = torch.full((len(logits), size * shards), -torch.inf)
    padded[:, :total] = logits

    def work(comm: FakeRank) -> SamplerOutput:
        vocab = VocabShard(comm.rank * size, size, total)
        state = PenaltyState(len(items), vocab, CPU)
        batch = build_batch(items, state, EOS, CPU)
        shard = padded[:, vocab.start : vocab.start + size].clone()
        before = shard.clone()
        output = sample(shard, batch, vocab, comm)
        assert torch.equal(shard, before), "the model's logits must stay as they are"
        return output

    outputs: list[SamplerOutput] = FakeGroup(shards).run(work)
    for output in outputs[1:]:
        assert torch.equal(output.token_ids, outputs[0].token_ids)
        for name in ("logprobs", "ranks", "top_token_ids", "top_logprobs"):
            mine, other = getattr(output, name), getattr(outputs[0], name)
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
    return outputs[0]


# ---- an independent reference: one row, float64, plain loops ----------------------------------------------------


def reference_probabilities(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], eos: tuple[int, ...] = EOS
) -> np.ndarray:
    """Distribution that one token is drawn from."""
    x = logits.astype(np.float64).copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if len(output) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else eos)):
            x[token] = -np.inf
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    result = np.zeros(len(x))
    if params.greedy:
        result[order[0]] = 1.0
        return result
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = np.exp((x[order] - x[order[0]]) / params.temperature)
    weights /= weights.sum()
    kept, before = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if (params.top_p < 1.0 and before >= params.top_p) or weight < params.min_p * weights[0]:
            break
        kept.append(token)
        before += weight
    result[kept] = weights[: len(kept)]
    return result / result.sum()


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Chi-square within six standard deviations of its mean; impossible outcomes never happen."""
    assert counts[expected == 0].sum() == 0
    # Rare outcomes are pooled, as the approximation wants some counts in every cell.
    total = counts.sum()
    common = expected * total >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * total
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = max(1, len(wanted) - 1)
    return bool(statistic < freedom + 6 * np.sqrt(2 * freedom))


RULES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=2.0),
    "top_k": SamplingParams(top_k=5),
    "top_k_1": SamplingParams(top_k=1),
    "top_k_off": SamplingParams(top_k=-1),
    "top_p": SamplingParams(top_p=0.7),
    "top_p_tiny": SamplingParams(top_p=1e-6),
    "min_p": SamplingParams(min_p=0.2),
    "all_filters": SamplingParams(temperature=1.3, top_k=12, top_p=0.8, min_p=0.05),
    "top_k_and_p": SamplingParams(temperature=0.8, top_k=20, top_p=0.95),
    "repetition": SamplingParams(repetition_penalty=1.5),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=0.7),
    "penalties_top_p": SamplingParams(repetition_penalty=0.8, presence_penalty=-0.5, frequency_penalty=0.3, top_p=0.9),
    "bias": SamplingParams(logit_bias={3: 4.0, 7: -100.0, 39: 2.0}),
    "min_tokens": SamplingParams(min_tokens=10, stop_token_ids=[0, 30]),
    "min_tokens_ignore_eos": SamplingParams(min_tokens=10, stop_token_ids=[0], ignore_eos=True),
    "min_tokens_over": SamplingParams(min_tokens=4, stop_token_ids=[0]),
}
PROMPT, OUTPUT = [0, 1, 5, 5, 39], [2, 2, 3, 39, 0]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shards", [1, 2])
def test_draws_follow_the_reference_distribution(name: str, shards: int) -> None:
    params = RULES[name]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, generator=generator) * 1.5
    logits[2] = logits.max() + 1  # the end-of-sequence token is tempting
    draws = 4000
    items = make_items([params] * draws, prompts=[PROMPT] * draws, outputs=[OUTPUT] * draws)
    tokens = run_sample(logits.expand(draws, -1), items, shards).token_ids
    expected = reference_probabilities(logits.numpy(), params, PROMPT, OUTPUT)
    assert chi_square_is_plausible(np.bincount(tokens.numpy(), minlength=40), expected)


def test_a_wrong_distribution_would_be_noticed() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    items = make_items([SamplingParams(temperature=1.25)] * 4000)
    tokens = run_sample(logits.expand(4000, -1), items).token_ids
    wrong = reference_probabilities(logits.numpy(), SamplingParams(), [], [])
    assert not chi_square_is_plausible(np.bincount(tokens.numpy(), minlength=40), wrong)


def mixed_params() -> list[SamplingParams]:
    greedy = [SamplingParams(temperature=0, repetition_penalty=1.2), SamplingParams(temperature=0, logprobs=3)]
    return [*RULES.values(), *greedy, SamplingParams(top_k=300, top_p=0.9), SamplingParams(top_k=700)]


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("total", [1000, 1001])
def test_tokens_are_the_same_over_any_number_of_shards(spread: float, total: int) -> None:
    """A flat distribution (spread 0.5) makes the candidates of top_p insufficient, so both ways are taken."""
    params = mixed_params()
    logits = torch.randn(len(params), total, generator=torch.Generator().manual_seed(5)) * spread
    items = make_items(params, prompts=[PROMPT] * len(params), outputs=[OUTPUT] * len(params))
    alone = run_sample(logits, items)
    for shards in (2, 3, 4):
        split = run_sample(logits, items, shards)
        assert torch.equal(split.token_ids, alone.token_ids)
        assert split.logprobs is not None
        assert alone.logprobs is not None
        torch.testing.assert_close(split.logprobs, alone.logprobs, rtol=0, atol=2e-6)
        assert torch.equal(split.ranks, alone.ranks)  # type: ignore[arg-type]
        assert torch.equal(split.top_token_ids, alone.top_token_ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_tokens_are_the_same_however_many_candidates_are_tried_first(
    shards: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: no candidates but the whole vocabulary, few of them, or rows left over in pieces."""
    total = 600
    logits = torch.randn(12, total, generator=torch.Generator().manual_seed(3)) * spread
    rules = [dict(top_p=0.9), dict(min_p=0.01), dict(top_p=0.3, top_k=400), dict(top_p=0.999999)]
    items = make_items([SamplingParams(**rules[row % 4], seed=row) for row in range(12)])
    monkeypatch.setattr(sampler, "_first_count", lambda rows, total, device: total)
    expected = run_sample(logits, items, shards).token_ids
    looked: list[int] = []
    draw_among = sampler._draw_among

    def noting(scaled: torch.Tensor, count: int, *rest: Any) -> Any:
        looked.append(count)
        return draw_among(scaled, count, *rest)

    monkeypatch.setattr(sampler, "_draw_among", noting)
    monkeypatch.setattr(sampler, "_SORTED_PIECE", 2 * total)
    for count in (1, 5, 100, 599):
        monkeypatch.setattr(sampler, "_first_count", lambda rows, total, device, count=count: count)
        looked.clear()
        assert torch.equal(run_sample(logits, items, shards).token_ids, expected)
        if count <= 5:
            assert looked.count(total) >= 3 * shards, "these rows need all, two at a time"


def test_a_gpu_sorts_what_is_small_and_tries_candidates_for_the_rest() -> None:
    gpu = torch.device("cuda")
    assert sampler._first_count(1, 128256, gpu) == 128256
    assert sampler._first_count(64, 128256, gpu) == 1024
    assert sampler._first_count(10**6, 500, gpu) == 500


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    params = mixed_params()
    logits = torch.randn(len(params), 800, generator=torch.Generator().manual_seed(6)) * 2
    items = make_items(params, prompts=[PROMPT] * len(params), outputs=[OUTPUT] * len(params))
    together = run_sample(logits, items).token_ids
    for row, item in enumerate(items):
        # A batch of one has its counts in whatever slot it got; the slot is no part of the draw.
        item.seq.slot = 0
        assert run_sample(logits[row : row + 1], [item]).token_ids.item() == together[row].item()


def test_same_seed_same_token_other_position_another() -> None:
    logits = torch.zeros(1, 5000)
    item = make_items([SamplingParams()], seeds=[42])
    first = run_sample(logits, item).token_ids
    assert torch.equal(first, run_sample(logits, item).token_ids)
    assert first != run_sample(logits, make_items([SamplingParams()], seeds=[43])).token_ids
    assert first != run_sample(logits, make_items([SamplingParams()], seeds=[42], outputs=[[1]])).token_ids


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_ties_go_to_the_lowest_id(shards: int) -> None:
    logits = torch.zeros(3, 64)
    logits[0, [9, 20, 63]] = 2.0
    logits[1] = -1.0
    logits[2, :] = -0.0
    logits[2, 40] = 0.0
    greedy = make_items([SamplingParams(temperature=0, logprobs=5)] * 3)
    output = run_sample(logits, greedy, shards)
    assert output.token_ids.tolist() == [9, 0, 0]
    assert output.top_token_ids is not None
    assert output.top_token_ids.tolist() == [[9, 20, 63, 0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    # Only ids 0..3 are among the four "most likely" of equal ones.
    draws = make_items([SamplingParams(top_k=4)] * 200)
    assert set(run_sample(torch.zeros(200, 64), draws, shards).token_ids.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("shards", [1, 3])
def test_one_key_of_a_shard_travels(shards: int) -> None:
    """What a GPU's kernel leaves are keys of pieces; the best of a row may be in any piece of any shard."""
    keys = torch.randint(-(2**62), 2**62, (5, shards, 4), generator=torch.Generator().manual_seed(1))

    def work(comm: FakeRank) -> torch.Tensor:
        return best_of_shards(keys[:, comm.rank], comm)

    for found in FakeGroup(shards).run(work):
        assert found.shape == (5, 4 if shards == 1 else shards)
        assert torch.equal(found.amax(-1), keys.amax((1, 2)))


def test_penalties_follow_the_tokens_sampled_on_the_device() -> None:
    """Counts kept by `record` equal counts made anew from the tokens, for a sequence that was preempted too."""
    vocab = VocabShard(10, 20, 60)
    state = PenaltyState(3, vocab, CPU)
    params = [SamplingParams(frequency_penalty=0.5), SamplingParams(), SamplingParams(repetition_penalty=2.0)]
    items = make_items(params, prompts=[[11, 12]] * 3)
    build_batch(items, state, EOS, CPU)
    generator = torch.Generator().manual_seed(1)
    sampled = [torch.randint(0, 60, (3,), generator=generator) for _ in range(50)]
    for tokens in sampled:
        state.record([0, 1, 2], tokens)
    # The host learns late: token_ids do not hold the outputs yet, and must not be looked at again.
    batch = build_batch(items, state, EOS, CPU)
    assert batch.penalties is not None
    assert batch.penalties.rows.tolist() == [0, 2]
    assert batch.penalties.columns.shape == (2, 2)  # as many positions as the host says
    for place, row in enumerate((0, 2)):
        counts = np.bincount([int(t[row]) for t in sampled], minlength=60)[10:30]
        assert state._output_counts is not None
        assert state._output_counts[row].tolist() == counts.tolist()
        assert batch.penalties.columns[place].tolist() == [1, 2]
        assert batch.penalties.in_prompt[place].tolist() == [True, True]
        assert batch.penalties.output_counts[place].tolist() == counts[1:3].tolist()
        late = ScheduledSequence(items[row].seq, 51, 1, True)  # a step that the host schedules ahead
        found = _penalties([late], [0], state, CPU)
        assert found is not None
        assert set(found.columns[0].tolist()) - {0} == {1, 2, *counts.nonzero()[0].tolist()} - {0}
        for column, count, prompt in zip(found.columns[0], found.output_counts[0], found.in_prompt[0], strict=True):
            assert (int(count), bool(prompt)) == (counts[int(column)], int(column) in (1, 2))
    seq = items[0].seq
    seq.token_ids += [10, 10, 29, 59]
    seq.num_preemptions += 1
    again = build_batch([ScheduledSequence(seq, 0, 6, True)], state, EOS, CPU).penalties
    assert again is not None
    held = dict(zip(again.columns[0].tolist(), again.output_counts[0].tolist(), strict=True))
    assert {column: count for column, count in held.items() if count} == {0: 2, 19: 1}
    assert held[1] == held[2] == 0


def test_slots_that_no_sequence_with_penalties_has_any_more_are_not_counted() -> None:
    """Sequences without penalties come and go in a slot; what a former one left there must not grow."""
    state = PenaltyState(2, VocabShard(0, 8, 8), CPU)
    items = make_items([SamplingParams(frequency_penalty=0.5)] * 2)
    build_batch(items, state, EOS, CPU)
    for _ in range(300):
        state.record([0, 1], torch.tensor([3, 4]))
    assert state._held.shape[1] <= 64
    items[0].seq.seq_id = 7  # a new sequence takes over the slot
    again = build_batch(items[:1], state, EOS, CPU).penalties
    assert again is not None
    assert again.output_counts.sum() == 0 and again.in_prompt[0, again.columns[0] == 1].all()


def test_penalty_counts_are_allocated_on_demand() -> None:
    state = PenaltyState(4, VocabShard(0, 8, 8), CPU)
    build_batch(make_items([SamplingParams()]), state, EOS, CPU)
    state.record([0], torch.tensor([3]))
    assert state._output_counts is None


@pytest.mark.parametrize("shards", [1, 3])
def test_logprobs_are_the_models_own(shards: int) -> None:
    """Neither temperature, nor bias, nor penalties, nor filters show in them."""
    params = SamplingParams(temperature=0.3, top_k=3, logit_bias={1: 5.0}, repetition_penalty=2.0, logprobs=4)
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    output = run_sample(logits, make_items([params] * 6), shards)
    exact = logits.double().log_softmax(-1)
    assert output.logprobs is not None
    assert output.top_token_ids is not None
    assert output.ranks is not None
    rows = torch.arange(6)
    torch.testing.assert_close(output.logprobs.double(), exact[rows, output.token_ids], rtol=0, atol=1e-6)
    assert torch.equal(output.top_token_ids, exact.topk(4).indices)
    ranks = (exact >= exact[rows, output.token_ids][:, None]).sum(-1)
    assert torch.equal(output.ranks, ranks)


def test_logprobs_zero_is_the_sampled_token_alone() -> None:
    output = run_sample(torch.randn(2, 30), make_items([SamplingParams(logprobs=0)] * 2))
    assert output.logprobs is not None
    assert output.top_token_ids is not None
    assert output.top_token_ids.shape == (2, 0)


def test_nothing_extra_is_built_for_greedy_rows() -> None:
    state = PenaltyState(2, VocabShard(0, 8, 8), CPU)
    assert build_batch(make_items([SamplingParams(temperature=0)] * 2), state, EOS, CPU) == sampler.SamplingBatch(2)


@pytest.mark.parametrize("shards", [1, 2])
def test_prompt_logprobs_match_the_reference_and_name_equal_floats(shards: int) -> None:
    rows, total = 37, 90
    logits = torch.randn(rows, total, generator=torch.Generator().manual_seed(8)) * 4
    targets = torch.randint(0, total, (rows,), generator=torch.Generator().manual_seed(9))
    targets[::2] = logits[::2].argmax(-1)
    size = total // shards

    def work(comm: FakeRank, rows_at_a_time: int) -> SamplerOutput:
        vocab = VocabShard(comm.rank * size, size, total)
        shard = logits[:, vocab.start : vocab.start + size]
        parts = zip(shard.split(rows_at_a_time), targets.split(rows_at_a_time), strict=True)
        return SamplerOutput.concat([sampler.prompt_logprobs(x, ids, 5, vocab, comm) for x, ids in parts])

    whole = FakeGroup(shards).run(lambda comm: work(comm, rows))[0]
    pieces = FakeGroup(shards).run(lambda comm: work(comm, 8))[0]
    exact = logits.double().log_softmax(-1)
    for output in (whole, pieces):
        assert torch.equal(output.token_ids, targets)
        torch.testing.assert_close(output.logprobs.double(), exact[torch.arange(rows), targets], rtol=0, atol=2e-6)
        assert torch.equal(output.top_token_ids, exact.topk(5).indices)
        hit = output.top_token_ids == targets[:, None]
        assert hit.any(-1)[::2].all()
        assert torch.equal(output.top_logprobs[hit], output.logprobs[hit.any(-1)])
        assert torch.equal(output.ranks[hit.any(-1)], hit.nonzero()[:, 1] + 1)


# ---- random numbers ---------------------------------------------------------------------------------------------


def reference_bits(seed: int, position: int, token: int) -> int:
    """`random_bits` in plain Python integers."""
    wide, word = 2**64 - 1, 2**32 - 1
    x = seed & wide
    for added in (0, position):
        x = (x + added * 0x94D049BB133111EB + 0x9E3779B97F4A7C15) & wide
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wide
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wide
        x ^= x >> 31
    h = (token * 0x9E3779B1 + x) & word
    h ^= h >> 16
    h = (h * 0x21F0AAAD) & word
    h ^= x >> 32
    h ^= h >> 15
    h = (h * 0x735A2D97) & word
    h ^= h >> 15
    return h & 0x7FFFFFFF


def test_random_bits_are_the_documented_hash() -> None:
    """Torch's wrap-around and shifts do what plain integers do; GPUs are held to the same values."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 12345]
    positions = [0, 1, 7, 2**31, 131071, 5]
    tokens = [0, 1, 2, 31999, 151935, 2**31 - 1]
    bits = random_bits(torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens))
    expected = [[reference_bits(s, p, t) for t in tokens] for s, p in zip(seeds, positions, strict=True)]
    assert bits.tolist() == expected


def test_noise_of_a_shard_is_a_slice_of_the_whole() -> None:
    seeds, positions = torch.tensor([3, 9]), torch.tensor([0, 77])
    whole = gumbel(seeds, positions, 0, 70000)
    assert torch.equal(gumbel(seeds, positions, 35001, 20000), whole[:, 35001:55001])
    ids = torch.tensor([[5, 69999], [0, 40000]])
    torch.testing.assert_close(gumbel_at(seeds, positions, ids), whole.gather(1, ids), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("along", ["seed", "position", "token"])
def test_bits_are_uniform_and_uncorrelated_along_each_counter(along: str) -> None:
    n = 1 << 16
    count, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    if along == "token":
        bits = random_bits(torch.tensor([7]), torch.tensor([3]), count)[0]
    else:
        seeds, positions = (count, zero) if along == "seed" else (zero, count)
        bits = random_bits(seeds, positions, torch.tensor([11]))[:, 0]
    values = bits.numpy().astype(np.int64)
    for shift in (0, 8, 15, 23):  # low, middle and high bits
        cells = np.bincount((values >> shift) & 0xFF, minlength=256)
        assert chi_square_is_plausible(cells, np.full(256, 1 / 256))
    u = values / 2**31 - 0.5
    for lag in (1, 2, 3, 16, 64, 1024):
        correlation = float((u[:-lag] * u[lag:]).mean() / (1 / 12))
        assert abs(correlation) < 5 / np.sqrt(n)
    pairs = np.bincount((values[:-1] >> 27) * 16 + (values[1:] >> 27), minlength=256)
    assert chi_square_is_plausible(pairs, np.full(256, 1 / 256))


def test_rows_of_noise_are_uncorrelated() -> None:
    """Neighbouring seeds and positions share no structure, shifted against each other neither."""
    seeds = torch.tensor([0, 1, 2, 0, 0, 1 << 32])
    positions = torch.tensor([0, 0, 0, 1, 2, 0])
    n = 20000
    u = random_bits(seeds, positions, torch.arange(n)).double() / 2**31 - 0.5
    for shift in (0, 1, 2, 5):
        moved = torch.roll(u, shift, dims=1)
        correlation = (u @ moved.T) / n * 12
        if shift == 0:
            correlation.fill_diagonal_(0.0)
        assert correlation.abs().max() < 5 / np.sqrt(n)


def test_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(torch.tensor([1]), torch.tensor([1]), 0, 200_000)[0].double()
    # Mean is Euler's constant, variance pi^2 / 6; P(g < x) = exp(-exp(-x)).
    assert abs(noise.mean() - 0.5772157) < 5 * np.sqrt(np.pi**2 / 6 / 200_000)
    for x in (-1.5, 0.0, 1.0, 3.0, 6.0, 9.0):
        expected = np.exp(-np.exp(-x))
        error = 5 * np.sqrt(expected * (1 - expected) / 200_000)
        assert abs((noise < x).double().mean() - expected) < error


def test_request_seeds_differ_by_request_and_sample_and_repeat_with_a_users_seed() -> None:
    seeds = {request_seed(0, request, index) for request in (0, 1, "0", "a") for index in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 1, 0) != request_seed(1, 1, 0)
    assert request_seed(0, 1, 2, user_seed=9) == request_seed(5, 7, 2, user_seed=9)
    assert request_seed(0, 1, 0, user_seed=9) != request_seed(0, 1, 1, user_seed=9)

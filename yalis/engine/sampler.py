"""From vocabulary-sharded logits to tokens: exact, the same on every rank, the same whatever else is in the batch.

Logits are gathered only where a rule needs them in one place. The most likely token is an arg max per shard and one
tiny gather. So is a plain draw: the arg max of ``logits / temperature + noise``, with noise that depends on (seed,
position, token id) alone. ``top_k``, ``top_p`` and ``min_p`` look at the most likely tokens only, so each shard sends
its best candidates; all logits travel only when those do not suffice.

Tokens are ordered by logit, equal ones by id, lowest first; every rule below cuts a prefix of that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from yalis.engine.guided import GuideMasks, Guides
from yalis.engine.random import gumbel, gumbel_at
from yalis.engine.request import GUIDE_FAILED
from yalis.engine.scheduler import ScheduledSequence
from yalis.utils.packing import send

# Candidates that a shard sends when no top_k says how many are needed. Enough for top_p=0.9 on text almost always. On a
# GPU finding more costs little, and not having enough costs more.
_CANDIDATES = 256
_GPU_CANDIDATES = 1024
# Keys that a GPU sorts rather than asking whether candidates suffice: that answer is read back, and the host loses its
# lead over the device. An estimate, not measured.
_GPU_SORTED = 2**21
# Keys that are sorted at a time for rows whose candidates did not suffice: 64 MiB, and a few times that on the way.
_SORTED_PIECE = 2**23
# Elements of one piece of keys on the CPU, so that they stay in its cache.
_CPU_PIECE = 2**16
_ID_MASK = 0xFFFFFFFF
_Rows = TypeVar("_Rows", "Draw", "Filters")


class Gather(Protocol):
    """What sampling needs of `yalis.comm.communicator.Communicator`."""

    size: int

    def all_gather(self, x: torch.Tensor, dim: int = -1, *, tag: str = "") -> torch.Tensor:
        """Every rank's ``x`` joined along ``dim`` in rank order."""
        ...


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the logits.

    Attributes:
        start: token id of the first column.
        size: columns, the same on every rank; those past the vocabulary hold -inf.
        total: tokens in the vocabulary.
    """

    start: int
    size: int
    total: int


@dataclass(frozen=True)
class SamplerOutput:
    """Tokens, and their log-probabilities where asked for: of the raw logits, before bias, penalties and temperature.

    Attributes:
        token_ids: [B] int64, sampled tokens (or the scored ones, from `prompt_logprobs`).
        logprobs: [B] float32, natural logarithm of their probability.
        ranks: [B] int64, 1 for the most likely token.
        top_token_ids: [B, k] int64, most likely first; k may be 0.
        top_logprobs: [B, k] float32; where a token of ``token_ids`` is among them the two values are equal.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    @staticmethod
    def concat(parts: Sequence[SamplerOutput]) -> SamplerOutput:
        """Rows of ``parts`` one after the other; all have the same fields filled."""
        if len(parts) == 1:
            return parts[0]
        columns = [[getattr(part, f.name) for part in parts] for f in fields(SamplerOutput)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return SamplerOutput(*joined)

    def to(self, device: torch.device | str) -> SamplerOutput:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if value is not None})


@dataclass(frozen=True)
class Entries:
    """Single logits of this shard.

    Attributes:
        rows, columns: [N] int64.
        values: [N] float32.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Penalties:
    """Penalties of the P rows that have any, for the tokens that they hold: few against a whole vocabulary.

    Attributes:
        rows: [P] int64.
        columns: [P, L] int64, columns of the shard. A column may come several times, and columns of tokens that the row
            does not hold may be among them: their counts are right all the same.
        in_prompt: [P, L] bool, whether the prompt holds the token.
        output_counts: [P, L] int32, its occurrences in the output.
        repetition, presence, frequency: [P, 1] float32.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    in_prompt: torch.Tensor
    output_counts: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@dataclass(frozen=True)
class Draw:
    """Rows that are drawn at random.

    Attributes:
        rows: [D] int64.
        temperature: [D, 1] float32, above 0.
        seeds, positions: [D] int64.
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class Filters:
    """Rules of the D rows that may draw from the most likely tokens only; [D, 1] each.

    Attributes:
        top_k: int64, the vocabulary's size where off.
        has_top_k: bool.
        top_p: float64, infinity where off.
        log_min_p: float32, minus infinity where off.
        max_top_k: largest ``top_k`` of the rows, None when some row has none.
    """

    top_k: torch.Tensor
    has_top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    max_top_k: int | None


@dataclass(frozen=True)
class SamplingBatch:
    """How to sample B rows; what no row asks for is None. Rows in neither ``free`` nor ``filtered`` are greedy.

    Attributes:
        num_rows: B.
        free: rows drawn from all tokens.
        filtered: rows drawn from the most likely tokens, with their ``filters``.
        bias: added to the logits.
        banned: stop tokens that may not come yet (``min_tokens``); their values are -inf.
        penalties: rows with penalties.
        guides: rows with a grammar.
        num_logprobs: most log-probabilities that any row wants, None for none.
    """

    num_rows: int
    free: Draw | None = None
    filtered: Draw | None = None
    filters: Filters | None = None
    bias: Entries | None = None
    banned: Entries | None = None
    penalties: Penalties | None = None
    guides: GuideMasks | None = None
    num_logprobs: int | None = None


class PenaltyState:
    """Token counts per running slot, on the device, so that a step may follow before the host knows the last token.

    Allocated when the first request with penalties comes: 5 bytes per slot and token of the shard, and 8 per slot and
    position of the longest such sequence.

    Args:
        num_slots: most sequences that run at once.
        vocab: this rank's shard.
        device: of the counts.
    """

    def __init__(self, num_slots: int, vocab: VocabShard, device: torch.device):
        self.vocab = vocab
        self.device = device
        self._num_slots = num_slots
        self._in_prompt: torch.Tensor | None = None
        self._output_counts: torch.Tensor | None = None
        # [slots, width] column of the token at each position; column 0 where it lies in another shard or there is none.
        self._held = torch.zeros((num_slots, 0), dtype=torch.int64, device=device)
        self._length: dict[int, int] = {}
        # Who the counts of a slot belong to: (sequence, times it was preempted). A sequence that comes back after a
        # preemption may find the slot it once had, with counts that are out of date.
        self._owner: dict[int, tuple[int, int]] = {}

    def counts(self, items: Sequence[ScheduledSequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts of sequences that sample now; a sequence new in its slot is counted from its known tokens.

        Returns:
            columns, counts in the prompt and counts in the output as in `Penalties`.
        """
        if self._in_prompt is None or self._output_counts is None:
            shape = (self._num_slots, self.vocab.size)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        longest = max(item.sample_position for item in items)
        self._widen(longest + 1)  # and the token that `record` adds
        for item in items:
            seq = item.seq
            owner = (seq.seq_id, seq.num_preemptions)
            if self._owner.get(seq.slot) == owner:
                continue
            self._owner[seq.slot] = owner
            self._length[seq.slot] = len(seq.token_ids)
            columns, inside = _columns(torch.tensor(seq.token_ids, dtype=torch.int64), self.vocab)
            prompt, output = seq.token_ids[: seq.num_prompt_tokens], seq.token_ids[seq.num_prompt_tokens :]
            known = send(
                {
                    "in_prompt": self._count(prompt) > 0,
                    "output": self._count(output),
                    "held": columns.where(inside, 0).numpy(),
                },
                self.device,
            )
            self._in_prompt[seq.slot] = known["in_prompt"]
            self._output_counts[seq.slot] = known["output"]
            self._held[seq.slot] = 0
            self._held[seq.slot, : len(columns)] = known["held"]
        slots = send({"slots": np.asarray([[item.seq.slot] for item in items])}, self.device)["slots"]
        columns = self._held[slots[:, 0], :longest]
        return columns, self._in_prompt[slots, columns], self._output_counts[slots, columns]

    def record(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """Count sampled tokens. A no-op where no sequence in these slots has penalties.

        Args:
            slots: distinct; slots without penalties may be among them.
            token_ids: [len(slots)] int64 on the device.
        """
        rows = [row for row, slot in enumerate(slots) if slot in self._length]
        if not rows or self._output_counts is None:
            return
        tracked = [slots[row] for row in rows]
        columns, inside = _columns(token_ids, self.vocab)
        where = send(
            {
                "rows": np.asarray(rows),
                "slots": np.asarray(tracked),
                "places": np.asarray([self._length[slot] for slot in tracked]),
            },
            self.device,
        )
        columns, inside = columns[where["rows"]], inside[where["rows"]]
        self._output_counts[where["slots"], columns] += inside.to(torch.int32)
        self._held[where["slots"], where["places"]] = columns.where(inside, 0)
        for slot in tracked:
            self._length[slot] += 1
            if self._length[slot] == self._held.shape[1]:
                # `counts` makes room for every sequence with penalties at each of its steps: this one is gone, and
                # its slot belongs to one without.
                del self._length[slot], self._owner[slot]

    def most_bytes(self, longest: int) -> int:
        """Bytes on the device once sequences of up to ``longest`` tokens have had penalties in every slot."""
        held = 8 * max(64, 2 * longest)
        return self._num_slots * (5 * self.vocab.size + held + held // 2)  # it grows, and is copied, by doubling

    def _widen(self, width: int) -> None:
        if width >= self._held.shape[1]:
            held = torch.zeros((self._num_slots, max(64, 2 * width)), dtype=torch.int64, device=self.device)
            held[:, : self._held.shape[1]] = self._held
            self._held = held

    def _count(self, token_ids: list[int]) -> np.ndarray:
        """[vocab.size] int32 on the host."""
        columns = np.asarray(token_ids, np.int64) - self.vocab.start
        inside = (columns >= 0) & (columns < self.vocab.size)
        return np.bincount(columns[inside], minlength=self.vocab.size).astype(np.int32)


def build_batch(
    items: Sequence[ScheduledSequence],
    penalties: PenaltyState,
    eos_token_ids: Iterable[int],
    device: torch.device,
    guides: Guides | None = None,
) -> SamplingBatch:
    """Collect what the sampling rows of a step ask for.

    Args:
        items: scheduled ranges that sample, in row order.
        penalties: token counts of this rank.
        eos_token_ids: tokens that end a sequence, masked by ``min_tokens`` like the request's own stop tokens.
        guides: grammars of this rank; needed where rows are guided.
    """
    vocab = penalties.vocab
    free: list[int] = []
    filtered: list[int] = []
    penalised: list[int] = []
    bias: list[tuple[int, int, float]] = []
    banned: list[tuple[int, int, float]] = []
    num_logprobs: int | None = None
    for row, item in enumerate(items):
        params = item.seq.params
        if not params.greedy:
            has_filter = 0 < params.top_k < vocab.total or params.top_p < 1.0 or params.min_p > 0.0
            (filtered if has_filter else free).append(row)
        if params.has_penalties:
            penalised.append(row)
        if params.logit_bias:
            bias += [(row, token, value) for token, value in params.logit_bias.items()]
        if params.min_tokens and item.sample_position - item.seq.num_prompt_tokens < params.min_tokens:
            stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
            banned += [(row, token, -torch.inf) for token in sorted(stops)]
        if params.logprobs is not None:
            num_logprobs = max(num_logprobs or 0, params.logprobs)
    wanted = {
        "free": _draw(items, free),
        "filtered": _draw(items, filtered),
        "filters": _filters(items, filtered, vocab),
        "bias": _entries(bias, vocab),
        "banned": _entries(banned, vocab),
    }
    # In one copy that the host does not wait for: the step before is still running on a GPU.
    sent = send({f"{name}.{f}": array for name, of in wanted.items() for f, array in of.items()}, device)
    found = {name: {f: sent[f"{name}.{f}"] for f in of} for name, of in wanted.items()}
    return SamplingBatch(
        num_rows=len(items),
        free=Draw(**found["free"]) if free else None,
        filtered=Draw(**found["filtered"]) if filtered else None,
        filters=Filters(**found["filters"], max_top_k=_max_top_k(wanted["filters"], vocab)) if filtered else None,
        bias=Entries(**found["bias"]) if found["bias"] else None,
        banned=Entries(**found["banned"]) if found["banned"] else None,
        penalties=_penalties(items, penalised, penalties, device),
        guides=None if guides is None else guides.masks(items, vocab.start, vocab.size, device),
        num_logprobs=num_logprobs,
    )


def sample(logits: torch.Tensor, batch: SamplingBatch, vocab: VocabShard, comm: Gather) -> SamplerOutput:
    """Sample one token per row. Collective over ``comm``; every rank returns the same.

    Args:
        logits: [B, Vs] float32, this rank's shard; not changed.
        batch: what the rows ask for, the same on every rank but for the shard's own columns.
    """
    scores = _change_logits(logits, batch)
    num_drawn = sum(len(draw.rows) for draw in (batch.free, batch.filtered) if draw is not None)
    if num_drawn == 0:
        token_ids = _argmax(scores, vocab, comm)
    elif batch.filtered is not None and len(batch.filtered.rows) == batch.num_rows:
        token_ids = _draw_filtered(scores, batch.filtered, batch.filters, vocab, comm)
    else:
        token_ids = _argmax(_add_noise(scores, batch.free, vocab), vocab, comm)
        if batch.filtered is not None:
            rows = batch.filtered.rows
            token_ids[rows] = _draw_filtered(scores[rows], batch.filtered, batch.filters, vocab, comm)
    if batch.guides is not None and batch.guides.failed is not None:
        token_ids[batch.guides.failed] = GUIDE_FAILED
    if batch.num_logprobs is None:
        return SamplerOutput(token_ids)
    return _score(logits, token_ids, batch.num_logprobs, vocab, comm)


def prompt_logprobs(
    logits: torch.Tensor, target_ids: torch.Tensor, k: int, vocab: VocabShard, comm: Gather
) -> SamplerOutput:
    """Score given tokens. Collective over ``comm``; every rank returns the same.

    Args:
        logits: [R, Vs] float32, this rank's shard; keys of twice their size are made of them.
        target_ids: [R] int64, the token to score in each row.
        k: how many of the most likely tokens to name besides.

    Returns:
        ``token_ids`` are the targets; the other fields are filled.
    """
    return _score(logits, target_ids, k, vocab, comm)


# ---- building ---------------------------------------------------------------------------------------------------


def _draw(items: Sequence[ScheduledSequence], rows: list[int]) -> dict[str, np.ndarray]:
    """Fields of `Draw`; none where there are no rows."""
    if not rows:
        return {}
    chosen = [items[row] for row in rows]
    return {
        "rows": np.asarray(rows),
        "temperature": np.asarray([[i.seq.params.temperature] for i in chosen], np.float32),
        "seeds": np.asarray([i.seq.seed for i in chosen]),
        "positions": np.asarray([i.sample_position for i in chosen]),
    }


def _filters(items: Sequence[ScheduledSequence], rows: list[int], vocab: VocabShard) -> dict[str, np.ndarray]:
    """Fields of `Filters` that are tensors; none where there are no rows."""
    if not rows:
        return {}
    params = [items[row].seq.params for row in rows]
    top_k = np.asarray([[p.top_k if 0 < p.top_k < vocab.total else vocab.total] for p in params])
    return {
        "top_k": top_k,
        "has_top_k": top_k < vocab.total,
        "top_p": np.asarray([[p.top_p if p.top_p < 1.0 else np.inf] for p in params], np.float64),
        "log_min_p": torch.tensor([[p.min_p] for p in params], dtype=torch.float32).log().numpy(),
    }


def _max_top_k(filters: dict[str, np.ndarray], vocab: VocabShard) -> int | None:
    most = int(filters["top_k"].max())
    return most if most < vocab.total else None


def _entries(found: list[tuple[int, int, float]], vocab: VocabShard) -> dict[str, np.ndarray]:
    """Fields of `Entries`, those that fall into this shard; none on a rank without any."""
    mine = [(row, token - vocab.start, value) for row, token, value in found if 0 <= token - vocab.start < vocab.size]
    if not mine:
        return {}
    rows, columns, values = zip(*mine, strict=True)
    return {"rows": np.asarray(rows), "columns": np.asarray(columns), "values": np.asarray(values, np.float32)}


def _penalties(
    items: Sequence[ScheduledSequence], rows: list[int], state: PenaltyState, device: torch.device
) -> Penalties | None:
    if not rows:
        return None
    chosen = [items[row] for row in rows]
    columns, in_prompt, output_counts = state.counts(chosen)
    params = [item.seq.params for item in chosen]
    sent = send(
        {
            "rows": np.asarray(rows),
            "repetition": np.asarray([[p.repetition_penalty] for p in params], np.float32),
            "presence": np.asarray([[p.presence_penalty] for p in params], np.float32),
            "frequency": np.asarray([[p.frequency_penalty] for p in params], np.float32),
        },
        device,
    )
    return Penalties(columns=columns, in_prompt=in_prompt, output_counts=output_counts, **sent)


# ---- steps of sampling ------------------------------------------------------------------------------------------


def _columns(token_ids: torch.Tensor, vocab: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of token ids, clamped into the shard, and whether they really lie in it."""
    columns = token_ids - vocab.start
    return columns.clamp(0, vocab.size - 1), (columns >= 0) & (columns < vocab.size)


def _change_logits(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Bias, penalties, ban, grammar, in this order; ``logits`` themselves when there is nothing to do."""
    if batch.bias is None and batch.penalties is None and batch.banned is None and batch.guides is None:
        return logits
    logits = logits.clone()
    if batch.bias is not None:
        logits[batch.bias.rows, batch.bias.columns] += batch.bias.values
    if batch.penalties is not None:
        p = batch.penalties
        rows = p.rows[:, None]
        x = logits[rows, p.columns]
        in_output = p.output_counts > 0
        repeated = torch.where(x > 0, x / p.repetition, x * p.repetition)
        x = torch.where(p.in_prompt | in_output, repeated, x)
        # Where a column comes twice, the same value is written twice.
        logits[rows, p.columns] = x - p.frequency * p.output_counts - p.presence * in_output
    if batch.banned is not None:
        logits[batch.banned.rows, batch.banned.columns] = batch.banned.values
    if batch.guides is not None:
        logits[batch.guides.rows] = logits[batch.guides.rows].masked_fill_(~batch.guides.allowed, -torch.inf)
    return logits


def _add_noise(scores: torch.Tensor, free: Draw | None, vocab: VocabShard) -> torch.Tensor:
    """Scores whose arg max is a draw in the ``free`` rows; the other rows stay as they are."""
    if free is None:
        return scores
    noise = gumbel(free.seeds, free.positions, vocab.start, vocab.size)
    if len(free.rows) == len(scores):
        return noise.add_(scores / free.temperature)
    scores = scores.clone()
    scores[free.rows] = noise.add_(scores[free.rows] / free.temperature)
    return scores


def _argmax(scores: torch.Tensor, vocab: VocabShard, comm: Gather) -> torch.Tensor:
    """[B] int64 token of the largest score over all shards; of equal ones the lowest id."""
    if comm.size == 1:
        return scores.argmax(-1)
    values, columns = scores.max(-1, keepdim=True)
    keys = comm.all_gather(_to_keys(values, columns + vocab.start), dim=-1, tag="sample.argmax")
    return _token_of(keys.amax(-1))


def _draw_filtered(
    scores: torch.Tensor, draw: Draw, filters: Filters | None, vocab: VocabShard, comm: Gather
) -> torch.Tensor:
    """[D] int64 tokens drawn under top-k, then top-p, then min-p.

    Args:
        scores: [D, Vs], the rows of ``draw``.
    """
    assert filters is not None
    scaled = scores / draw.temperature
    if filters.max_top_k is not None:
        return _draw_among(scaled, filters.max_top_k, draw, filters, None, vocab, comm)[0]
    log_mass = _logsumexp(scaled, comm)
    count = _first_count(len(scaled), vocab.total, scores.device)
    token_ids, enough = _draw_among(scaled, count, draw, filters, log_mass, vocab, comm)
    if count < vocab.total and len(short := (~enough).nonzero()[:, 0]):
        # The same rows on every rank: what decides was gathered.
        for rows in torch.split(short, max(1, _SORTED_PIECE // vocab.total)):
            few, rules = _rows_of(draw, rows), _rows_of(filters, rows)
            token_ids[rows] = _draw_among(scaled[rows], vocab.total, few, rules, log_mass[rows], vocab, comm)[0]
    return token_ids


def _first_count(rows: int, total: int, device: torch.device) -> int:
    """How many of the most likely tokens are looked at before all of them."""
    if device.type == "cpu":
        return min(_CANDIDATES, total)
    return min(_GPU_CANDIDATES, total) if rows * total > _GPU_SORTED else total


def _draw_among(
    scaled: torch.Tensor,
    count: int,
    draw: Draw,
    filters: Filters,
    log_mass: torch.Tensor | None,
    vocab: VocabShard,
    comm: Gather,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[D] int64 tokens drawn from the ``count`` most likely ones, and [D] bool whether no others could be drawn.

    Args:
        scaled: [D, Vs] logits / temperature.
        log_mass: as `_kept` takes it.
    """
    values, token_ids = _most_likely(scaled, count, vocab, comm)
    keep = _kept(values, filters, log_mass)
    noisy = values + gumbel_at(draw.seeds, draw.positions, token_ids)
    best = noisy.masked_fill(~keep, -torch.inf).argmax(-1, keepdim=True)
    enough = ~(keep[:, -1] | (filters.has_top_k & (filters.top_k > count))[:, 0])
    return token_ids.gather(-1, best).squeeze(-1), enough


def _rows_of(of: _Rows, rows: torch.Tensor) -> _Rows:
    """The same for some of its rows."""
    values = {f.name: getattr(of, f.name) for f in fields(of)}
    some: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(of, **some)


def _kept(values: torch.Tensor, filters: Filters, log_mass: torch.Tensor | None) -> torch.Tensor:
    """Which of the most likely tokens may be drawn: a prefix of each row, never empty.

    Args:
        values: [D, K] float32, logits / temperature of the K most likely tokens, largest first.
        log_mass: [D] logarithm of the sum of the exponentials of all tokens; needed where a row has no ``top_k``.
    """
    best = values[:, :1]
    keep = torch.arange(values.shape[1], device=values.device) < filters.top_k
    weights = (values - best).double().exp() * keep
    # Summed one after the other, so that zeros behind change nothing: a row may not depend on its neighbours' K.
    cumulative = weights.cumsum(-1)
    mass = cumulative[:, -1:]
    if log_mass is not None:
        mass = torch.where(filters.has_top_k, mass, (log_mass[:, None] - best).double().exp())
    keep &= cumulative - weights < filters.top_p * mass
    keep &= values >= best + filters.log_min_p
    keep[:, 0] = True
    return keep


def _score(logits: torch.Tensor, token_ids: torch.Tensor, k: int, vocab: VocabShard, comm: Gather) -> SamplerOutput:
    """Log-probability and rank of ``token_ids`` and the ``k`` most likely tokens, per row."""
    columns, inside = _columns(token_ids, vocab)
    own = logits.gather(-1, columns[:, None]).masked_fill(~inside[:, None], -torch.inf)
    target = comm.all_gather(own, dim=-1, tag="sample.target").amax(-1, keepdim=True)
    total = _logsumexp(logits, comm)[:, None]
    mark = _to_keys(target, token_ids[:, None])
    better, best = _better_and_best(logits, mark, min(k, vocab.total), vocab)
    ranks = comm.all_gather(better, dim=-1, tag="sample.rank").sum(-1) + 1
    values, top_ids = _best_of(best, min(k, vocab.total), comm)
    # One expression for both, so that the same token has the same float in both places.
    return SamplerOutput(
        token_ids=token_ids,
        logprobs=(target - total).squeeze(-1),
        ranks=ranks,
        top_token_ids=top_ids,
        top_logprobs=values - total,
    )


def _logsumexp(x: torch.Tensor, comm: Gather) -> torch.Tensor:
    """[B] float32 log of the sum of exponentials over all shards, joined in rank order."""
    parts = torch.logsumexp(x, -1, keepdim=True)
    if comm.size == 1:
        return parts.squeeze(-1)
    return torch.logsumexp(comm.all_gather(parts, dim=-1, tag="sample.logsumexp"), -1)


def _most_likely(
    scores: torch.Tensor, count: int, vocab: VocabShard, comm: Gather
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest scores over all shards, largest first, and their token ids; [B, count] each."""
    _, best = _better_and_best(scores, None, count, vocab)
    return _best_of(best, count, comm)


def _better_and_best(
    scores: torch.Tensor, mark: torch.Tensor | None, count: int, vocab: VocabShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 1] how many keys of this shard lie above ``mark`` [B, 1], and [B, <= count] the ``count`` largest ones."""
    ids = torch.arange(vocab.start, vocab.start + vocab.size, device=scores.device)
    rows = max(1, _CPU_PIECE // vocab.size) if scores.device.type == "cpu" else len(scores)
    better = torch.zeros((len(scores), 1), dtype=torch.int64, device=scores.device)
    best = []
    for start in range(0, len(scores), rows):
        piece = slice(start, start + rows)
        keys = _to_keys(scores[piece], ids)
        if mark is not None:
            better[piece] = (keys > mark[piece]).sum(-1, keepdim=True)
        best.append(keys.topk(min(count, vocab.size), dim=-1).values)
    return better, torch.cat(best)


def _best_of(best: torch.Tensor, count: int, comm: Gather) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and token ids of the ``count`` largest keys over all shards, from each shard's largest."""
    if comm.size > 1 and count > 0:
        best = comm.all_gather(best, dim=-1, tag="sample.candidates").topk(count, dim=-1).values
    return _value_of(best), _token_of(best)


# ---- keys: one int64 that orders tokens by value, then by lowest id ---------------------------------------------


def _to_keys(values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[..., N] float32 and token ids (broadcast) -> int64 keys, all different, larger for the more likely token."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    # Of negative floats the larger has the smaller magnitude: turning their magnitude bits over orders them.
    # The shift spreads the sign; torch.where in its place takes three times as long on the CPU.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(torch.int64).bitwise_left_shift_(32).add_(_ID_MASK - token_ids)


def _token_of(keys: torch.Tensor) -> torch.Tensor:
    return _ID_MASK - (keys & _ID_MASK)


def _value_of(keys: torch.Tensor) -> torch.Tensor:
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)

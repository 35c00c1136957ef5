"""From a scheduled step to the tensors of one forward pass: explicit, built anew each step, passed down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from yalis.attention.base import AttentionBatch
from yalis.engine.plain_draw import PlainDraw, temperature_of
from yalis.engine.scheduler import ScheduledSequence, ScheduledStep

Send = Callable[[Mapping[str, np.ndarray]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class PromptRows:
    """Rows of one sequence whose logits score prompt tokens.

    Attributes:
        item: the scheduled range.
        first_row: its first row in the batch.
        targets: prompt token that each row is to predict; row ``first_row + i`` predicts ``targets[i]``.
    """

    item: ScheduledSequence
    first_row: int
    targets: list[int]


@dataclass(frozen=True)
class ForwardBatch:
    """One step on the device. T tokens, B sequences, S of which sample.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64.
        attention: which rows belong to which sequence and where their K and V go.
        sample_rows: [S] int64, rows whose logits are sampled, in step order.
        only_samples: of the last stage's hidden states only ``sample_rows`` are read, which are not all of them.
        sample_slots: [S] int64, slots of the sequences that sample.
        samplers: the S scheduled ranges that sample.
        prompt_rows: ranges that have prompt tokens to score.
        draw: temperature, seed and position of the S rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    sample_rows: torch.Tensor
    only_samples: bool
    sample_slots: torch.Tensor
    samplers: list[ScheduledSequence]
    prompt_rows: list[PromptRows]
    draw: PlainDraw


def prepare_batch(
    step: ScheduledStep, *, block_size: int, send: Send, last_tokens: torch.Tensor | None
) -> ForwardBatch:
    """Build the tensors of ``step``.

    Args:
        block_size: tokens per KV block.
        send: takes the arrays to the device.
        last_tokens: [slots] int64 on the device, the token last sampled in each slot; needed when the step holds tokens
            that the host does not know yet (one-step-ahead scheduling).
    """
    items = step.items
    total = step.num_tokens
    tokens = np.zeros(total, np.int64)
    positions = np.empty(total, np.int64)
    slots = np.empty(total, np.int64)
    query_start = np.zeros(len(items) + 1, np.int32)
    seq_lens = [item.start + item.num_tokens for item in items]
    max_blocks = max(-(-n // block_size) for n in seq_lens)
    table = np.zeros((len(items), max_blocks), np.int32)
    sample_rows: list[int] = []
    samplers: list[ScheduledSequence] = []
    prompt_rows: list[PromptRows] = []
    pending_rows: list[int] = []
    pending_slots: list[int] = []
    row = 0
    for b, item in enumerate(items):
        seq, start, count = item.seq, item.start, item.num_tokens
        end, stop = start + count, row + count
        known = min(end, len(seq.token_ids))
        tokens[row : row + known - start] = seq.token_ids[start:known]
        if known < end:  # only ever the last token of a decode
            pending_rows.append(stop - 1)
            pending_slots.append(seq.slot)
        num_blocks = -(-end // block_size)
        blocks = np.asarray(seq.table.blocks[:num_blocks], np.int32)
        table[b, :num_blocks] = blocks
        where = np.arange(start, end)
        positions[row:stop] = where
        slots[row:stop] = blocks[where // block_size].astype(np.int64) * block_size + where % block_size
        if item.samples:
            sample_rows.append(stop - 1)
            samplers.append(item)
        if item.scores_prompt:
            last = min(end, seq.num_prompt_tokens - 1)
            prompt_rows.append(PromptRows(item, row, seq.token_ids[start + 1 : last + 1]))
        row = stop
        query_start[b + 1] = row

    on_device = send(
        {
            "token_ids": tokens,
            "positions": positions,
            "slot_mapping": slots,
            "sample_rows": np.asarray(sample_rows, np.int64),
            "sample_slots": np.asarray([item.seq.slot for item in samplers], np.int64),
            "seeds": np.asarray([item.seq.seed for item in samplers], np.int64),
            "sample_positions": np.asarray([item.sample_position for item in samplers], np.int64),
            "pending_rows": np.asarray(pending_rows, np.int64),
            "pending_slots": np.asarray(pending_slots, np.int64),
            "query_start": query_start,
            "seq_lens": np.asarray(seq_lens, np.int32),
            "block_table": table,
            "temperature": np.asarray([temperature_of(item) for item in samplers], np.float32),
        }
    )
    token_ids = on_device["token_ids"]
    if pending_rows:
        if last_tokens is None:
            raise ValueError("the step holds tokens that are only on the device, but no last_tokens were given")
        fed = last_tokens.index_select(0, on_device["pending_slots"])
        token_ids.index_copy_(0, on_device["pending_rows"], fed)
    return ForwardBatch(
        token_ids=token_ids,
        positions=on_device["positions"],
        attention=AttentionBatch(
            query_start=on_device["query_start"],
            seq_lens=on_device["seq_lens"],
            block_table=on_device["block_table"],
            slot_mapping=on_device["slot_mapping"],
            query_lens_host=[item.num_tokens for item in items],
            seq_lens_host=seq_lens,
        ),
        sample_rows=on_device["sample_rows"],
        only_samples=not prompt_rows and len(sample_rows) < total,
        sample_slots=on_device["sample_slots"],
        samplers=samplers,
        prompt_rows=prompt_rows,
        draw=PlainDraw(on_device["temperature"], on_device["seeds"], on_device["sample_positions"]),
    )

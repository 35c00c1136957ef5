"""One sequence being generated, as the scheduler sees it. ``n`` samples of a prompt are ``n`` of these."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from yalis.engine.sampling_params import SamplingParams
from yalis.kvcache.block_manager import BlockTable


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in the words of the OpenAI API plus ``abort`` and ``error``."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


# Stands for the sampled token of a sequence whose grammar hit a limit: no token, the sequence ends. It travels like a
# token, so that ranks without the grammar know too.
GUIDE_FAILED = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one sequence. The same on every rank, because every rank runs the same scheduler.

    Attributes:
        seq_id: number given by rank 0; orders and names the sequence on all ranks.
        token_ids: prompt, then output; only tokens that are known on the host.
        num_prompt_tokens: length of the prompt.
        params: sampling parameters.
        seed: seed of this very sample.
        max_tokens: output limit after the model's context has been taken into account.
        num_computed_tokens: tokens whose K and V are written or on their way in a step that has been scheduled.
        num_pending_tokens: sampled tokens that are scheduled but not yet known on the host.
        num_inflight: steps that are scheduled and hold this sequence.
        table: its KV blocks.
        slot: row in per-sequence device state while running, else -1.
        guide: state of the grammar (`yalis.engine.guided.Guide`), only on ranks that sample.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    max_tokens: int
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_inflight: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    slot: int = -1
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    guide: Any = None

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that are known on the host."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """All tokens, sampled ones that are still on the device included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def finished(self) -> bool:
        """Whether no further token will be accepted."""
        return self.finish_reason is not None

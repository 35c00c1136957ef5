"""Guided decoding: which tokens a grammar allows next, computed with llguidance on every rank that samples.

Nothing about it travels: a mask is a function of the grammar and the tokens before it, so ranks with the same sequence
have the same mask. What makes that true: grammars are compiled where they are needed, when they are needed, without a
thread in between; every sequence has a compiled grammar of its own (copies share their lexer, and with it what is left
of its limits); and limits count work, never time.

llguidance is imported when the first guided request comes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yalis.engine.guided_check import GrammarChecker
from yalis.engine.sampling_params import JSON_WHITE_SPACE, GuidedParams
from yalis.engine.scheduler import ScheduledSequence
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import RequestError
from yalis.utils.logging import get_logger
from yalis.utils.packing import send

logger = get_logger(__name__)

# What one grammar may cost. The comments give the library's own speeds on one core.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 400_000,  # 50k per millisecond; the worst regular expression we found takes 0.15 s
    "step_lexer_fuel": 200_000,  # 14k per millisecond
    "step_max_items": 50_000,  # 20k per millisecond
    "max_lexer_states": 20_000,  # 1 to 2 kB each, for as long as the sequence lives
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # errors reach users and logs; they shall not hold the output
}
_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class GuideMasks:
    """Which tokens the guided rows of a step may have.

    Attributes:
        rows: [G] int64, rows with a grammar.
        allowed: [G, Vs] bool, this rank's shard of the vocabulary.
        failed: [F] int64, rows whose grammar hit a limit: they get no token, see `yalis.engine.request.GUIDE_FAILED`.
            None where there is none.
    """

    rows: torch.Tensor
    allowed: torch.Tensor
    failed: torch.Tensor | None


class Guide:
    """The grammar of one sequence, and how much of its output it has seen."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._num_seen = 0

    @property
    def error(self) -> str:
        """Why no token can follow: a limit was hit, or a token came that the grammar does not allow. Empty if not."""
        return _without_state(str(self._matcher.get_error()))

    def fill(self, output: Sequence[int], bits: np.ndarray) -> None:
        """Write which tokens may follow ``output``, all that the sequence has; look at `error` afterwards.

        Args:
            bits: [ceil(vocabulary / 32)] int32, contiguous; the lowest bit of the first word is token 0.
        """
        if len(output) > self._num_seen:
            self._matcher.consume_tokens(list(output[self._num_seen :]))
            self._num_seen = len(output)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)


class GuideCompiler:
    """Compiles the grammars of requests for one tokenizer.

    The first `compile` takes seconds for 150,000 tokens, in which nothing else runs in this process; `check` does not.

    Args:
        tokenizer: of the model.
        vocab_size: tokens that the model's logits have.
        eos_token_ids: tokens that end a sequence; one of them is allowed when the grammar is complete.

    Raises:
        RequestError: llguidance is missing, or the model has no token that ends a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]):
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                "guided decoding needs the package llguidance, which is not installed; pip install llguidance"
            ) from error
        if not eos_token_ids:
            raise RequestError("guided decoding needs a model with an end-of-sequence token, to end at a grammar's end")
        self._library: Any = llguidance
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self._num_words = -(-vocab_size // 32)
        self._setup = {
            "tokenizer": tokenizer.backend.to_str(),
            "vocab_size": vocab_size,
            "eos_token_ids": sorted(eos_token_ids),
            "added_tokens": tokenizer.added_tokens,
            "limits": _LIMITS,
        }
        self._checker = GrammarChecker(self._setup)

    @cached_property
    def _tokenizer(self) -> Any:
        setup = self._setup
        try:
            return self._library.LLTokenizer(
                setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=setup["eos_token_ids"]
            )
        except Exception as error:  # the library raises several kinds for tokenizers that it does not know
            raise RequestError(f"guided decoding does not work with this model's tokenizer: {error}") from error

    @property
    def num_words(self) -> int:
        """int32 words of one mask."""
        return self._num_words

    def compile(self, guided: GuidedParams) -> Guide:
        """A fresh grammar, for one that `check` has let through: others may take forever, or end the process.

        Raises:
            RequestError: it is malformed, or beyond a limit; says where. Or the library cannot use this tokenizer.
        """
        matcher = self._library.LLMatcher(self._tokenizer, self._grammar(guided), log_level=0, limits=self._limits)
        guide = Guide(matcher)
        if guide.error:
            raise RequestError(f"guided {guided.kind} cannot be used: {_shortened(guide.error)}")
        return guide

    def check(self, guided: GuidedParams) -> None:
        """Compile and compute the first mask in a process of its own, for a few seconds at most.

        Raises:
            RequestError: the grammar is malformed, beyond a limit, or allows no text at all; says where. Or the library
                cannot use this tokenizer.
        """
        error = self._checker.error(self._grammar(guided), guided.choice or ())
        if error:
            raise RequestError(f"guided {guided.kind} cannot be used: {_shortened(_without_state(error))}")

    def close(self) -> None:
        """End the process that checks. Idempotent; also done when the compiler is no more."""
        self._checker.close()

    def _grammar(self, guided: GuidedParams) -> str:
        make = self._library.LLMatcher
        white_space = {"whitespace_pattern": JSON_WHITE_SPACE}
        try:
            if guided.json_object:
                return str(make.grammar_from_json_schema('{"type": "object"}', overrides=white_space))
            if guided.json_schema is not None:
                return str(make.grammar_from_json_schema(guided.json_schema, overrides=white_space))
        except ValueError as error:
            raise RequestError(f"guided json_schema cannot be used: {_shortened(str(error))}") from error
        if guided.regex is not None:
            return str(make.grammar_from_regex(guided.regex))
        if guided.choice is not None:
            # One terminal: alternatives of a rule would each be an item of the parser's row.
            return str(make.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, guided.choice))))
        return str(make.grammar_from_lark(guided.grammar))


class Guides:
    """Grammars of the sequences on this rank; each lives and dies with its sequence.

    Args:
        tokenizer_path: folder of the tokenizer, read when the first guided request comes.
        vocab_size, eos_token_ids: see `GuideCompiler`.
    """

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_ids: Collection[int]):
        self._path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiler: GuideCompiler | None = None

    @property
    def compiler(self) -> GuideCompiler:
        """The compiler, made when first asked for.

        Raises:
            RequestError, CheckpointError: see `GuideCompiler`; no tokenizer in the folder.
        """
        if self._compiler is None:
            tokenizer = Tokenizer.from_pretrained(self._path)
            self._compiler = GuideCompiler(tokenizer, self._vocab_size, self._eos_token_ids)
        return self._compiler

    def close(self) -> None:
        """See `GuideCompiler.close`."""
        if self._compiler is not None:
            self._compiler.close()

    def check(self, guided: GuidedParams) -> None:
        """See `GuideCompiler.check`; for rank 0, before the other ranks hear of a request."""
        self.compiler.check(guided)

    def masks(
        self, items: Sequence[ScheduledSequence], start: int, size: int, device: torch.device
    ) -> GuideMasks | None:
        """Masks of the rows that have a grammar; None if none has.

        All tokens of their sequences must be known to the host, as the scheduler sees to.

        Args:
            items: scheduled ranges that sample, in row order.
            start, size: this rank's columns of the vocabulary.
        """
        rows = [row for row, item in enumerate(items) if item.seq.params.guided is not None]
        if not rows:
            return None
        bits = np.zeros((len(rows), self.compiler.num_words), np.int32)
        failed = []
        for index, row in enumerate(rows):
            seq = items[row].seq
            assert seq.params.guided is not None
            assert items[row].sample_position == len(seq.token_ids), "a guided sequence was scheduled ahead"
            if seq.guide is None:
                seq.guide = self.compiler.compile(seq.params.guided)
            guide: Guide = seq.guide
            guide.fill(seq.token_ids[seq.num_prompt_tokens :], bits[index])
            if guide.error:
                logger.warning("guided decoding of sequence %d ends: %s", seq.seq_id, _shortened(guide.error))
                bits[index] = -1
                failed.append(row)
        sent = send({"rows": np.asarray(rows), "bits": bits, "failed": np.asarray(failed, np.int64)}, device)
        return GuideMasks(
            rows=sent["rows"],
            allowed=_columns(sent["bits"].view(torch.uint8), start, size),
            failed=sent["failed"] if failed else None,
        )


def _columns(packed: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """[G, size] bool: bits ``start .. start + size`` of ``packed`` [G, bytes] uint8; False past its end."""
    first, last = start // 8, min(-(-(start + size) // 8), packed.shape[1])
    part = packed[:, first : max(first, last)]
    bits = (part[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    allowed = bits.flatten(1).bool()[:, start - 8 * first :][:, :size]
    return torch.nn.functional.pad(allowed, (0, size - allowed.shape[1]))


def _without_state(message: str) -> str:
    return message.split("\n<", 1)[0]


def _shortened(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MESSAGE_LENGTH else text[:_MESSAGE_LENGTH] + " ..."

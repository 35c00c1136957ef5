"""Text of one output, token by token: whole characters only, and nothing that may turn out to be a stop text."""

from __future__ import annotations

from yalis.engine.sampling_params import SamplingParams
from yalis.engine.tokenizer import Tokenizer

# What decoders write for bytes that are no character, or not yet.
_REPLACEMENT = "\ufffd"
# A character is at most four bytes, so after this many tokens without a whole one, bytes are broken for good.
_MAX_PENDING = 8
# Tokens kept before the new ones: a decoder treats the start of a text differently (it drops a leading space).
_CONTEXT = 6
_LONGEST_WINDOW = 64


class IncrementalDetokenizer:
    """Turns tokens into text as they come. The deltas joined are the text of all tokens decoded at once.

    One exception: byte-fallback decoders void a whole run of byte tokens when one byte in it is broken. Characters of
    such a run that were complete have been given out by then and stay.

    Args:
        tokenizer: of the model.
        params: ``stop``, ``include_stop_str_in_output``, ``min_tokens`` and ``skip_special_tokens`` are looked at. As
            in vLLM, text of the first ``min_tokens`` tokens is not searched for stop texts.

    Attributes:
        stop_reason: the stop text that was found, None while there is none; later tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._stops = tuple(params.stop)
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        # The last tokens, how many of them are surely whole characters, and how much of their text was handed on.
        self._window: list[int] = []
        self._num_settled = 0
        self._sent = 0
        # Handed on, but perhaps the start of a stop text.
        self._held = ""

    def add(self, token_id: int) -> str:
        """The text that this token makes certain: often empty, sometimes that of several tokens."""
        if self.stop_reason is not None:
            return ""
        self._num_tokens += 1
        return self._search(self._decode_next(token_id))

    def finish(self) -> str:
        """What is left when no token follows: text held back, and replacement characters for half a character."""
        if self.stop_reason is not None:
            return ""
        rest = self._decode(self._window)[self._sent :]
        self._window, self._num_settled, self._sent = [], 0, 0
        text = self._search(rest)
        if self.stop_reason is None:
            text += self._held
            self._held = ""
        return text

    # ---- whole characters -------------------------------------------------------------------------------------

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)

    def _decode_next(self, token_id: int) -> str:
        # Tokens without text would push those with text out of the window, and the next token would lose its space.
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        if self._tokenizer.backend.id_to_token(token_id) is None:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        broken = text.endswith(_REPLACEMENT)
        if broken and len(self._window) - self._num_settled <= _MAX_PENDING:
            return ""
        certain = len(text) - 1 if broken else len(text)
        delta = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if not broken:
            self._num_settled = len(self._window)
        if len(self._window) >= (_LONGEST_WINDOW if broken else 2 * _CONTEXT):
            self._shorten(text)
        return delta

    def _shorten(self, text: str) -> None:
        """Forget the older tokens of the window, where the rest reads the same without them."""
        for start in range(len(self._window) - _CONTEXT, 0, -1):
            kept = self._decode(self._window[start:])
            # Empty: the next token would be decoded as the first of a text.
            if kept and text.endswith(kept):
                self._window = self._window[start:]
                self._num_settled = max(0, self._num_settled - start)
                self._sent -= len(text) - len(kept)
                return

    # ---- stop texts -------------------------------------------------------------------------------------------

    def _search(self, delta: str) -> str:
        if not self._stops:
            return delta
        if self._num_tokens <= self._min_tokens:
            return delta
        text = self._held + delta
        # The match that is complete first, so that it does not matter how text is cut into tokens.
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, start, self.stop_reason = min(matches)
            self._held = ""
            return text[: end if self._include_stop else start]
        keep = max(self._partial_match(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _partial_match(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` begins with."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0

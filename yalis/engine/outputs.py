"""What a request gives back. Plain structures that travel between processes as MessagePack (msgspec)."""

from __future__ import annotations

import operator
from typing import Any, Literal

import msgspec

from yalis.errors import RequestError

Prompt = str | list[int]
"""Text, or token ids as they are."""


def plain_prompt(prompt: Any) -> Prompt:
    """``prompt`` in the types that messages between processes hold; other integers and texts (numpy's) become plain.

    Raises:
        RequestError: it is neither text nor token ids.
    """
    try:
        if isinstance(prompt, str):
            prompt.encode()
            return str(prompt)
        ids = [int(operator.index(token)) for token in prompt]
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is no valid text: {error}") from None
    except TypeError as error:
        raise RequestError(f"the prompt must be text or a list of token ids: {error}") from None
    for token in ids:
        if token.bit_length() > 63:
            raise RequestError(f"prompt token {token} is no token of any model")
    return ids


class Logprob(msgspec.Struct, frozen=True):
    """How likely the model itself held one token at one position (before bias, penalties and temperature).

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 is the most likely token; equal ones are ordered by token id.
        decoded_token: the token's own text, None when detokenization is off.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct):
    """One continuation of a prompt, as far as it has come.

    Attributes:
        index: which of the request's ``n`` samples this is.
        text: the text so far; whole characters only, and nothing that may turn out to be a stop text.
        token_ids: all output tokens so far.
        cumulative_logprob: sum of the sampled tokens' log-probabilities, None unless ``logprobs`` was asked for.
        logprobs: per output token, the sampled token and the likeliest ones; None unless asked for.
        finish_reason: ``stop`` (end of sequence, stop token or stop text), ``length``, ``abort``, ``error``; None while
            it goes on.
        stop_reason: the stop token or the stop text that ended it; None for the end of sequence and otherwise.
        gaps_s: where outputs hold what is new since the one before, seconds from each token's predecessor to it (the
            first token of all has none).
    """

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None
    gaps_s: list[float] = msgspec.field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """When things happened to a request: seconds of one monotonic clock, None while they have not happened.

    Attributes:
        arrival_s: the engine got the request.
        first_scheduled_s: its first tokens entered a step.
        first_token_s: its first output token was known on the host.
        finished_s: its last output token was.
        num_output_tokens: output tokens of the longest of its samples.
        num_preemptions: times it lost its KV blocks and was computed again.
        num_cached_tokens: prompt tokens whose KV blocks were reused.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def queue_s(self) -> float | None:
        """Seconds from arrival until first scheduled."""
        return None if self.first_scheduled_s is None else self.first_scheduled_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token in seconds, from arrival."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.finished_s is None else self.finished_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token in seconds, (latency - TTFT) / (n - 1); None with fewer than two tokens."""
        if self.e2e_s is None or self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)


class RequestOutput(msgspec.Struct):
    """State of one request after a step, complete when ``finished``.

    Attributes:
        request_id: the request's name.
        prompt: its text, None when it came as token ids.
        prompt_token_ids: the prompt as the model saw it.
        prompt_logprobs: per prompt token, itself and the likeliest ones; the first entry is None, because nothing
            precedes it. None unless asked for.
        outputs: its ``n`` continuations, by index.
        finished: whether all of them have ended.
        metrics: its times.
        error: why the request failed; its outputs then have ``finish_reason`` ``error``.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None

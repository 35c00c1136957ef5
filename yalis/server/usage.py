"""How many tokens a request took."""

from __future__ import annotations

from typing import Any

from yalis.engine.outputs import RequestOutput


class Usage:
    """Counts one HTTP request.

    Args:
        prompts: token ids; each counts once, however many continuations it gets.
    """

    def __init__(self, prompts: list[list[int]]):
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._output_tokens = 0
        self._cached = [0] * len(prompts)

    def take(self, index: int, output: RequestOutput) -> None:
        """An output (a delta) of prompt ``index``."""
        self._cached[index] = output.metrics.num_cached_tokens
        self._output_tokens += sum(len(sample.token_ids) for sample in output.outputs)

    def as_dict(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._output_tokens,
            "total_tokens": self._prompt_tokens + self._output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }

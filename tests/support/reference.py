"""transformers as the reference of whole engines: its greedy continuations, its log-probabilities, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import DEMO
from yalis.engine.outputs import Logprob, RequestOutput

# Larger than the demo tokenizer's 2048 and odd: shards need padding, and some ids have no text.
VOCAB = 2051
# What every checkpoint of the engine's tests has in common; its tokenizer is the demo model's.
CHECKPOINT: dict[str, Any] = {"vocab_size": VOCAB}
ENGINE: dict[str, Any] = {"tokenizer": str(DEMO), "device": "cpu", "cpu_threads": 1}


def token_ids(count: int, seed: int) -> list[int]:
    """A random prompt."""
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Reference:
    """transformers' model of a checkpoint.

    Args:
        folder: of the checkpoint.
        dtype: of weights and activations.
        device: where it computes.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        import transformers

        self.dtype = dtype
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self._model.eval().to(device)
        self._device = device
        self._greedy: dict[Any, list[int]] = {}
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> list[int]:
        """The output of transformers' own `generate`; ``options`` are its options."""
        key = (tuple(prompt), max_tokens, repr(sorted(options.items())))
        if key not in self._greedy:
            ids = torch.tensor([list(prompt)], device=self._device)
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=0,
                **options,
            )
            self._greedy[key] = made[0, len(prompt) :].tolist()
        return self._greedy[key]

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[T, VOCAB] float32 logits after each of ``tokens``, computed in one pass."""
        key = tuple(tokens)
        if key not in self._rows:
            self._rows[key] = self._model(torch.tensor([list(tokens)], device=self._device)).logits[0].float().cpu()
        return self._rows[key]

    def greedy_by_rule(
        self, prompt: Sequence[int], max_tokens: int, rule: Callable[[torch.Tensor, list[int]], torch.Tensor]
    ) -> list[int]:
        """Greedy output when ``rule(logits [VOCAB], output so far)`` changes the logits before each choice."""
        output: list[int] = []
        for _ in range(max_tokens):
            output.append(int(rule(self.logits([*prompt, *output])[-1].clone(), output).argmax()))
        return output


def check_scores(entry: Mapping[int, Logprob], token: int, logits: torch.Tensor, k: int, atol: float) -> None:
    """One position's ``logprobs`` entry against the reference's logits [VOCAB]: values, ranks, the top ``k``."""
    row = logits.log_softmax(-1)
    assert len(entry) == (k if entry[token].rank <= k else k + 1)
    top = row.topk(max(k, 1)).values
    for token_id, found in entry.items():
        assert abs(found.logprob - float(row[token_id])) <= atol, (token_id, found, float(row[token_id]))
        # Tokens closer than the tolerance may have changed places.
        at_least = 1 + int((row > row[token_id] + 2 * atol).sum())
        at_most = int((row >= row[token_id] - 2 * atol).sum())
        assert at_least <= found.rank <= at_most
        if found.rank <= k:
            assert abs(found.logprob - float(top[found.rank - 1])) <= atol
    assert sorted(e.rank for e in entry.values() if e.rank <= k) == list(range(1, k + 1))


def check_logprobs(output: RequestOutput, reference: Reference, *, k: int | None, prompt_k: int | None) -> None:
    """All log-probabilities of a finished request against the reference's, given the same tokens.

    Args:
        k, prompt_k: the request's ``logprobs`` and ``prompt_logprobs``.
    """
    atol = 1e-4 if reference.dtype == torch.float32 else 3e-2
    prompt = output.prompt_token_ids
    for sample in output.outputs:
        tokens = prompt + sample.token_ids
        logits = reference.logits(tokens)
        if k is None:
            assert sample.logprobs is None and sample.cumulative_logprob is None
        else:
            assert sample.logprobs is not None and sample.cumulative_logprob is not None
            assert len(sample.logprobs) == len(sample.token_ids)
            for i, (token, entry) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
                check_scores(entry, token, logits[len(prompt) + i - 1], k, atol)
            total = sum(e[t].logprob for e, t in zip(sample.logprobs, sample.token_ids, strict=True))
            assert abs(total - sample.cumulative_logprob) < 1e-4
        if prompt_k is None:
            assert output.prompt_logprobs is None
            continue
        listed = output.prompt_logprobs
        assert listed is not None and len(listed) == len(prompt) and listed[0] is None
        for i, scored in enumerate(listed[1:], start=1):
            assert scored is not None
            check_scores(scored, prompt[i], logits[i - 1], prompt_k, atol)

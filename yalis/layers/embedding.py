"""Vocabulary-parallel embedding and output head. Rank ``r`` holds tokens ``r * shard : (r + 1) * shard``.

The shard is the vocabulary divided by the ranks, rounded up, so any vocabulary works; the last shards may be partly or
wholly padding. The two share one packed matrix where the checkpoint ties them and both are on this stage.
"""

from __future__ import annotations

import torch

from yalis.comm.communicator import Communicator
from yalis.kernels import ops
from yalis.layers.linear import ColumnLinear, OutputPart


class VocabMatrix(ColumnLinear):
    """This rank's rows of a [vocab, hidden] matrix.

    Attributes:
        start: first token of the shard.
        valid: tokens of the shard that exist; the rest is padding.
        shard_size: rows, the same on every rank.
    """

    def __init__(self, stem: str, vocab_size: int, hidden_size: int, tp: Communicator):
        self.shard_size = -(-vocab_size // tp.size)
        self.start = tp.rank * self.shard_size
        self.valid = max(0, min(self.shard_size, vocab_size - self.start))
        part = OutputPart(stem, vocab_size, min(self.start, vocab_size), self.valid)
        super().__init__([part], hidden_size, pad_to=self.shard_size)


class VocabEmbedding:
    """Token ids -> rows of the embedding matrix."""

    def __init__(self, matrix: VocabMatrix, tp: Communicator):
        self.matrix = matrix
        self.tp = tp

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, hidden], the same on every rank."""
        if self.tp.size == 1:
            return ops.embedding(token_ids, self.matrix.packed)
        # Tokens of other shards fall outside this one's rows and give zeros, so the sum has one nonzero term.
        return self.tp.all_reduce(ops.embedding(token_ids - self.matrix.start, self.matrix.packed), tag="embed")


class OutputHead:
    """Hidden states -> logits of this rank's shard of the vocabulary."""

    def __init__(self, matrix: VocabMatrix):
        self.matrix = matrix

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> [R, shard_size] in the model's dtype; columns from `VocabMatrix.valid` on mean nothing."""
        return self.matrix.forward(hidden)

    def widen(self, raw: torch.Tensor) -> torch.Tensor:
        """What `forward` returned as float32, padding -inf: a new tensor."""
        logits = raw.to(torch.float32, copy=True)
        if self.matrix.valid < self.matrix.shard_size:
            logits[:, self.matrix.valid :] = -torch.inf
        return logits

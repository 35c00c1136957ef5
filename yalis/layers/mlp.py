"""The gated MLP: gate_up (column) -> SiLU(gate) * up -> down (row)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from yalis.comm.communicator import Communicator
from yalis.kernels import ops
from yalis.layers.linear import ColumnLinear, OutputPart, RowLinear
from yalis.layers.weight import Slot


@dataclass(frozen=True)
class MLPNames:
    """Checkpoint names of one layer's MLP, without ``.weight`` or ``.bias``."""

    gate: str
    up: str
    down: str


class GatedMLP:
    """One layer's MLP on this rank.

    Args:
        names: checkpoint names.
        hidden_size, intermediate_size: sizes of the whole model; the second is divided over the ranks.
        bias: whether the three linears have biases.
        tp: tensor-parallel group.
    """

    def __init__(self, names: MLPNames, hidden_size: int, intermediate_size: int, *, bias: bool, tp: Communicator):
        shard = intermediate_size // tp.size
        start = tp.rank * shard
        parts = [OutputPart(stem, intermediate_size, start, shard) for stem in (names.gate, names.up)]
        self.gate_up = ColumnLinear(parts, hidden_size, bias=bias)
        self.down = RowLinear(
            names.down, intermediate_size, hidden_size, start, shard, bias=bias, first_rank=tp.rank == 0
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], this rank's part of the sum."""
        return self.down.forward(ops.linear_silu_and_mul(x, self.gate_up.packed))

    def slots(self) -> list[Slot]:
        """Weights in the order of use."""
        return self.gate_up.slots() + self.down.slots()

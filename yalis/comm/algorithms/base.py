"""What an all-reduce algorithm is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from yalis.comm.group import Group
from yalis.comm.resources import Resources
from yalis.comm.stats import CommStats


class Algorithm(ABC):
    """Sums a tensor over a group of at least two ranks; the result has the same bits on every rank.

    Args:
        group: the members.
        resources: what was opened for it.
        stats: where to count time.
    """

    name: ClassVar[str]
    capturable: ClassVar[bool] = False  # True: a CUDA graph may hold its calls
    flat_equivalent: ClassVar[bool] = False  # True: bus bandwidth means "what a flat ring would need", not traffic

    def __init__(self, group: Group, resources: Resources, stats: CommStats) -> None:
        self.group = group
        self.resources = resources
        self.stats = stats

    @abstractmethod
    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the sum of every rank's ``x`` into ``out``.

        Both are contiguous with the same shape, dtype and device, at least one element; ``out`` is ``x`` or does not
        overlap it.

        Raises:
            WaitFailed: a peer is gone or late.
        """

    def fuses(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether `all_reduce_rmsnorm` serves these tensors; by default none."""
        return False

    def all_reduce_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """``residual += sum(x)``, then ``x`` = RMS norm of its rows times ``weight``. Where `fuses` said yes.

        Args:
            x, residual: [..., hidden], contiguous, on the group's device; both are overwritten.
            weight: [hidden].
            eps: added to the mean square.

        Raises:
            WaitFailed: a peer is gone or late.
        """
        raise NotImplementedError(f"{self.name} does not fuse")

    def close(self, *, failed: bool) -> None:  # noqa: B027 - most have nothing of their own
        """Let go of what this algorithm opened itself; ``failed``: a peer was lost. Not collective."""

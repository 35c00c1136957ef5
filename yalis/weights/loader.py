"""Fill a model from a checkpoint, each rank reading only its own slices, or with dummy values; strict accounting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from yalis.errors import CheckpointError
from yalis.kernels.memory import alloc_weight
from yalis.layers.weight import LocalTensor, Piece, Slot
from yalis.utils.logging import get_logger
from yalis.weights.checkpoint import Checkpoint
from yalis.weights.dummy import DummySource

logger = get_logger(__name__)

# Readers overlap page faults with packing; each holds one slot, so more of them only cost memory.
_THREADS = 2
_NAMED = 5


class Loadable(Protocol):
    """What the loader needs to know of a model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights on this rank."""

    @property
    def device(self) -> torch.device:
        """Of the weights on this rank."""

    def slots(self) -> list[Slot]:
        """Every weight of this rank."""

    def known_tensors(self) -> set[str]:
        """Names of all tensors that some rank may need."""

    def is_harmless(self, name: str) -> bool:
        """Whether a checkpoint may hold ``name`` although no rank needs it."""


class Source(Protocol):
    """Where values come from."""

    def read(self, piece: Piece, out: torch.Tensor) -> int:
        """Fill ``out`` with ``piece``; returns the bytes read."""


@dataclass(frozen=True)
class LoadReceipt:
    """What loading did on this rank.

    Attributes:
        bytes_read: bytes of the slices that this rank read from the checkpoint.
        bytes_checkpoint: bytes of all tensors in the checkpoint.
        num_tensors: tensors installed.
        seconds: wall time, packing included.
    """

    bytes_read: int
    bytes_checkpoint: int
    num_tensors: int
    seconds: float


def load_weights(model: Loadable, path: Path, *, on_progress: Callable[[int, int], None] | None = None) -> LoadReceipt:
    """Read this rank's slices of the checkpoint in folder ``path`` and install them in ``model``.

    Nothing is read before all names and shapes are known to fit. Values are converted to the model's dtype.

    Args:
        on_progress: called with (bytes done, bytes in total) of this rank after each installed slot.

    Raises:
        CheckpointError: missing, unknown or misshapen tensors (named), a dtype that is not supported, or files that are
            missing, truncated or corrupt (named).
    """
    begin = time.perf_counter()
    slots = model.slots()
    with Checkpoint(path) as checkpoint:
        _check(model, slots, checkpoint)
        read = _fill(slots, checkpoint, model.dtype, model.device, on_progress)
        receipt = LoadReceipt(
            bytes_read=read,
            bytes_checkpoint=checkpoint.nbytes,
            num_tensors=sum(len(slot.tensors) for slot in slots),
            seconds=time.perf_counter() - begin,
        )
    logger.info("read %d of %d bytes in %.2f s from %s", read, receipt.bytes_checkpoint, receipt.seconds, path)
    return receipt


def init_dummy(model: Loadable, seed: int) -> None:
    """Fill ``model`` with random weights made on its device: for benchmarks of shapes that no disk holds.

    The values depend on ``seed``, name and place in the whole tensor only, so every split of a model over ranks and
    stages is a split of the same model.
    """
    slots = model.slots()
    stds = {(piece.name): tensor.std for slot in slots for tensor in slot.tensors for piece in tensor.pieces}
    _fill(slots, DummySource(seed, stds, model.dtype, model.device), model.dtype, model.device, None)


def _fill(
    slots: Iterable[Slot],
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None,
) -> int:
    slots = list(slots)
    total = sum(math.prod(piece.local_shape) for slot in slots for piece in slot.pieces()) * dtype.itemsize
    read = done = 0

    def install(slot: Slot) -> int:
        nbytes, tensors = 0, []
        for local in slot.tensors:
            tensor, count = _assemble(local, source, dtype, device)
            nbytes += count
            tensors.append(tensor)
        slot.install(*tensors)
        return nbytes

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="yalis-load") as pool:
        try:
            for slot, nbytes in zip(slots, pool.map(install, slots), strict=True):
                read += nbytes
                done += sum(math.prod(piece.local_shape) for piece in slot.pieces()) * dtype.itemsize
                if on_progress is not None:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return read


def _assemble(local: LocalTensor, source: Source, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, int]:
    if device.type == "cpu":
        # Maps of their own: what packing has copied goes back to the system, and what is kept has huge pages.
        tensor = alloc_weight(local.shape, dtype)
    else:
        tensor = torch.zeros(local.shape, dtype=dtype, device=device)
    nbytes = 0
    for piece in local.pieces:
        nbytes += source.read(piece, tensor[piece.offset : piece.offset + piece.local_shape[0]])
    return tensor, nbytes


def _check(model: Loadable, slots: list[Slot], checkpoint: Checkpoint) -> None:
    needed = {piece.name: piece.shape for slot in slots for piece in slot.pieces()}
    names = checkpoint.names
    missing = sorted(needed.keys() - names)
    unknown = sorted(name for name in names - model.known_tensors() if not model.is_harmless(name))
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_first(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} tensors are unknown to the architecture: {_first(unknown)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder}: {'; '.join(problems)}; config.json and the weights do not belong together"
        )
    for name, shape in needed.items():
        found = checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {list(found)}, config.json asks for {list(shape)}"
            )


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")

"""A checkpoint folder as a set of named tensors: one or several safetensors files, mapped, read by slices.

What the disk delivers is what is asked for, in whole pages (4 KiB): the maps have no read-ahead, which would fetch up
to megabytes around every slice, and a slice's pages are asked for all at once before they are copied. A cut along
dimension 1 (the row-parallel matrices) is a segment of every row, so the two pages at a segment's ends come along;
where less than a page lies between two segments, the whole matrix comes. Ranks of one host share the pages.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from yalis.errors import CheckpointError
from yalis.layers.weight import Piece

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Linux fetches no more than its largest request at one piece of advice and drops the rest; few devices take less.
_ADVICE_BYTES = 128 * 1024


class Checkpoint:
    """Tensors of a checkpoint folder. A context manager; reading is safe from several threads.

    Raises:
        CheckpointError: no safetensors files, a file that the index names is missing, or a file is truncated or corrupt
            (named).

    Attributes:
        nbytes: bytes of all tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: list[_File] = []
        self._where: dict[str, _File] = {}
        paths, index = _files(folder)
        try:
            for path in paths:
                file = _File(path)
                self._files.append(file)
                self._where.update(dict.fromkeys(file.tensors, file))
            for name, path in index.items():
                if name not in self._where or self._where[name].path != path:
                    raise CheckpointError(f"{folder / _INDEX} says that {name} is in {path.name}, but it is not")
            self.nbytes = sum(file.nbytes for file in self._files)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name``."""
        return self._where[name].tensors[name][1]

    def read(self, piece: Piece, out: torch.Tensor) -> int:
        """Copy ``piece`` into ``out`` (its shape; any dtype and device) and return the bytes of the slice."""
        return self._where[piece.name].read(piece, out) if piece.length else 0

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()
        self._files.clear()
        self._where.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _File:
    """One safetensors file.

    Attributes:
        tensors: by name, dtype, shape and first byte in the file.
        nbytes: of all tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}; check its permissions") from error
        try:
            self.tensors = _header(path, self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        self.nbytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape, _ in self.tensors.values())
        # Private and writable, because torch warns of buffers that it must not write; nothing does write.
        self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)

    def read(self, piece: Piece, out: torch.Tensor) -> int:
        """See `Checkpoint.read`."""
        dtype, shape, begin = self.tensors[piece.name]
        stride = math.prod(shape[piece.dim :]) * dtype.itemsize
        step = math.prod(shape[piece.dim + 1 :]) * dtype.itemsize
        segments = _segments(math.prod(shape[: piece.dim]), begin + piece.start * step, piece.length * step, stride)
        if hasattr(os, "posix_fadvise"):
            for at, nbytes in segments:
                os.posix_fadvise(self._fd, at, nbytes, os.POSIX_FADV_WILLNEED)
        whole = torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)
        cut = whole.narrow(piece.dim, piece.start, piece.length)
        out.copy_(cut)
        return cut.nbytes

    def close(self) -> None:
        """Unmap and close."""
        with contextlib.suppress(
            BufferError
        ):  # after an error its traceback may still hold a tensor; then it goes last
            self._map.close()
        os.close(self._fd)


def _segments(count: int, begin: int, nbytes: int, stride: int) -> Iterator[tuple[int, int]]:
    """``count`` ranges of ``nbytes``, the first at ``begin``, ``stride`` apart, as pieces of (first byte, bytes)."""
    if stride - nbytes < mmap.PAGESIZE:  # no page lies between two of them
        count, nbytes = 1, (count - 1) * stride + nbytes
    for row in range(count):
        first = begin + row * stride
        for at in range(first, first + nbytes, _ADVICE_BYTES):
            yield at, min(_ADVICE_BYTES, first + nbytes - at)


def _header(path: Path, fd: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Dtype, shape and first byte of every tensor, after a check that the file holds what its header says.

    Read here and not by the safetensors package, which maps the file with the system's read-ahead.
    """
    size = os.fstat(fd).st_size
    try:
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header would be {length} bytes long")
        found: dict[str, dict[str, Any]] = json.loads(os.pread(fd, length, 8))
        found.pop("__metadata__", None)
        end, tensors = 8 + length, {}
        for name, entry in sorted(found.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"{name} in {path} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
            dtype, shape, begin = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), end
            end += math.prod(shape) * dtype.itemsize
            if [8 + length + offset for offset in entry["data_offsets"]] != [begin, end]:
                raise ValueError(f"{name} with shape {list(shape)} is not where it should be")
            tensors[name] = dtype, shape, begin
        if end != size:
            raise ValueError(f"its tensors end at byte {end}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or corrupt ({size} bytes; {error}); fetch the file again"
        ) from error
    return tensors


def _files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """Files to open, and what the index (if any) says about where tensors are."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            where = {str(name): folder / str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
        return sorted(set(where.values())), where
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
    if files:
        return files, {}
    others = sorted(p.name for pattern in ("*.bin", "*.pth", "*.gguf") for p in folder.glob(pattern))
    found = f"it holds {', '.join(others[:3])}, which is not supported; " if others else ""
    raise CheckpointError(f"no safetensors files in {folder}; {found}save the model with safetensors")

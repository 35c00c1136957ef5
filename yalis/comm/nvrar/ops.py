"""torch operators, so that torch.compile keeps an all-reduce in its graph instead of breaking there.

    yalis::nvrar_all_reduce(x, comm) -> Tensor            a new tensor
    yalis::nvrar_all_reduce_(x!, comm)                    in place
    yalis::nvrar_all_reduce_out(x, out!, comm)
    yalis::nvrar_all_reduce_rmsnorm(x, residual, weight, eps, comm) -> (normed, new_residual)
    yalis::nvrar_all_reduce_rmsnorm_(x!, residual!, weight, eps, comm)    x becomes normed

``comm`` is the number that `register` gave a communicator. At run time an operator calls that communicator, so policy,
guard, errors and statistics are the same as without torch.compile; `Communicator.all_reduce` uses them by itself while
a graph is being traced. On CUDA they launch on the current stream and may be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from yalis.errors import CommError

if TYPE_CHECKING:
    from yalis.comm.communicator import Communicator

_known: weakref.WeakValueDictionary[int, Communicator] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(comm: Communicator) -> int:
    """Give ``comm`` a number for the operators; it is forgotten with the communicator."""
    _define()
    number = next(_numbers)
    _known[number] = comm
    return number


def all_reduce(x: torch.Tensor, out: torch.Tensor | None, comm: int) -> torch.Tensor:
    """`Communicator.all_reduce` as one node of a graph."""
    ops: Any = torch.ops.yalis
    if out is None:
        result: torch.Tensor = ops.nvrar_all_reduce(x, comm)
        return result
    if out is x:
        ops.nvrar_all_reduce_(x, comm)
    else:
        ops.nvrar_all_reduce_out(x, out, comm)
    return out


def all_reduce_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, comm: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Communicator.all_reduce_rmsnorm` as one node of a graph; neither input changes."""
    normed, hidden = torch.ops.yalis.nvrar_all_reduce_rmsnorm(x, residual, weight, eps, comm)
    return normed, hidden


def _communicator(number: int) -> Communicator:
    comm = _known.get(number)
    if comm is None:
        raise CommError(f"yalis::nvrar_all_reduce: there is no communicator {number} any more; compile the graph again")
    return comm


@cache
def _define() -> Any:
    torch_library: Any = torch.library  # its functions have no types
    library = torch_library.Library("yalis", "FRAGMENT")
    library.define("nvrar_all_reduce(Tensor x, int comm) -> Tensor")
    library.define("nvrar_all_reduce_(Tensor(a!) x, int comm) -> ()")
    library.define("nvrar_all_reduce_out(Tensor x, Tensor(a!) out, int comm) -> ()")
    library.define(
        "nvrar_all_reduce_rmsnorm(Tensor x, Tensor residual, Tensor weight, float eps, int comm) -> (Tensor, Tensor)"
    )
    library.define(
        "nvrar_all_reduce_rmsnorm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, int comm) -> ()"
    )

    def functional(x: torch.Tensor, comm: int) -> torch.Tensor:
        return _communicator(comm).all_reduce(x, out=torch.empty_like(x), tag="graph")

    def in_place(x: torch.Tensor, comm: int) -> None:
        _communicator(comm).all_reduce(x, out=x, tag="graph")

    def into(x: torch.Tensor, out: torch.Tensor, comm: int) -> None:
        _communicator(comm).all_reduce(x, out=out, tag="graph")

    def norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, comm: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _communicator(comm).all_reduce_rmsnorm(_packed(x), _packed(residual), weight, eps, tag="graph")

    def norm_in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, comm: int) -> None:
        normed, hidden = _communicator(comm).all_reduce_rmsnorm(x, residual, weight, eps, tag="graph")
        for target, value in ((x, normed), (residual, hidden)):
            if value.data_ptr() != target.data_ptr():
                target.copy_(value)

    implementations = {
        "nvrar_all_reduce": functional,
        "nvrar_all_reduce_": in_place,
        "nvrar_all_reduce_out": into,
        "nvrar_all_reduce_rmsnorm": norm,
        "nvrar_all_reduce_rmsnorm_": norm_in_place,
    }
    for name, implementation in implementations.items():
        library.impl(name, implementation, "CompositeExplicitAutograd")

    def fake_functional(x: torch.Tensor, comm: int) -> torch.Tensor:
        return torch.empty_like(x)

    def fake_nothing(*_: Any) -> None:
        return None

    def fake_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, comm: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        contiguous = torch.contiguous_format
        return torch.empty_like(x, memory_format=contiguous), torch.empty_like(residual, memory_format=contiguous)

    fakes = {
        "nvrar_all_reduce": fake_functional,
        "nvrar_all_reduce_": fake_nothing,
        "nvrar_all_reduce_out": fake_nothing,
        "nvrar_all_reduce_rmsnorm": fake_norm,
        "nvrar_all_reduce_rmsnorm_": fake_nothing,
    }
    for name, fake in fakes.items():
        torch_library.register_fake(f"yalis::{name}", fake, lib=library)
    return library


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)

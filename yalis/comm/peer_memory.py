"""Memory of the GPUs of one host, each mapped into all the others: torch's symmetric memory, without multicast."""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from typing import Any

import torch
import torch.distributed as dist

from yalis.comm.group import Group
from yalis.errors import CommError

_NUMBERS = itertools.count()
_REST_S = 0.5


class PeerMemory:
    """One buffer of the same size on every rank of a group, at addresses that all of them can read and write.

    Attributes:
        buffer: this rank's, [nbytes] uint8.
        bases: [ranks] int64 on the device: where this rank sees each rank's buffer.
        name: of the registered process group, for torch's own operators.
    """

    def __init__(self, group: Group, nbytes: int, what: str) -> None:
        """Collective over the group.

        Args:
            what: whom the memory is for, in errors.

        Raises:
            CommError: the memory could not be mapped.
        """
        # Read when the first buffer is made; without it torch binds multicast memory wherever the switch offers it.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symm_mem

        memory: Any = symm_mem
        c10d: Any = dist
        registry: Any = torch._C._distributed_c10d
        # Counted, because a group may be made again after it was closed.
        self.name = f"yalis_{next(_NUMBERS)}_" + "_".join(map(str, group.ranks))
        self._timeout_ms = int(900 * group.timeout_s)
        try:
            # torch finds the ranks and their store by the name of a registered process group.
            named = c10d.ProcessGroup(c10d.PrefixStore(f"symm_mem/{what}", group.store), group.index, group.size)
            named._set_group_name(self.name)
            registry._register_process_group(self.name, named)
            self.buffer: torch.Tensor = memory.empty(nbytes, dtype=torch.uint8, device=group.device)
            self._handle: Any = memory.rendezvous(self.buffer, self.name)
        except RuntimeError as error:
            raise CommError(
                f"{what}: torch could not map the memory of the ranks {list(group.ranks)} to each other: "
                f"{str(error).splitlines()[0]}; use nccl or auto"
            ) from error
        # torch's destructor throws on a device that failed, and that ends the process: only `close` may run it.
        self._kept: ctypes.py_object[Any] | None = ctypes.py_object(self._handle)
        ctypes.pythonapi.Py_IncRef(self._kept)
        self._device = group.device
        seen = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
        self.bases = torch.tensor([x.data_ptr() for x in seen], dtype=torch.int64, device=group.device)

    def meet(self) -> None:
        """Enqueue that all ranks meet: what each did before is seen by all after. A kernel; graphs may hold it.

        Without a peer it fails at 0.9 of the group's time limit, and with it the device's context.
        """
        self._handle.barrier(0, self._timeout_ms)

    def close(self, *, failed: bool) -> None:
        """Let go of the memory; nothing may use it any more. Not collective, may be called twice.

        Args:
            failed: a peer was lost. The device may stand in a meeting then, or be past use, and to free memory there
                ends the process: it stays until the process ends, as it does when the device has not come to rest.
        """
        if self._kept is None:
            return
        kept, self._kept = self._kept, None
        self._handle = None
        self.buffer = self.bases = torch.empty(0)
        if not failed and self._is_idle():
            ctypes.pythonapi.Py_DecRef(kept)

    def _is_idle(self) -> bool:
        """Whether the device has done all it was told; gives it half a second."""
        cuda: Any = torch.cuda  # its type information lacks the arguments
        done = cuda.Event()
        end = time.monotonic() + _REST_S
        try:
            done.record(torch.cuda.current_stream(self._device))
            while not done.query():
                if time.monotonic() > end:
                    return False
                time.sleep(1e-3)
        except RuntimeError:  # the device failed
            return False
        return True

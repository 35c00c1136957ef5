"""Memory of the GPUs of one host, each mapped into all the others: torch's symmetric memory, without multicast."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from contextlib import nullcontext, suppress
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from yalis.comm.group import Group, WaitFailed
from yalis.errors import CommError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

# A meeting without a peer fails so much later than the group's time limit, so that whoever watches over the ranks has
# said before which of them died or fell silent: the meeting itself can name nobody.
_LATER = 1.1
_LATER_S = 2.0
_REST_S = 5.0


class PeerMemory:
    """One buffer of the same size on every rank of a group, at addresses that all of them can read and write.

    Whoever uses it must do so in one order on every rank: on one stream, or on streams that wait for each other.

    Attributes:
        buffer: this rank's, [nbytes] uint8.
        bases: [ranks] int64 on the device: where this rank sees each rank's buffer.
        name: of the registered process group, for torch's own operators.
    """

    # torch counts the rendezvous of a process, whichever group they are of, and ranks that have counted differently
    # would wait for each other in vain.
    _rendezvous: ClassVar[int] = 0

    def __init__(self, group: Group, nbytes: int, what: str) -> None:
        """Collective over the group; succeeds on all ranks or on none.

        Args:
            nbytes: size of each rank's buffer.
            what: whom the memory is for, in errors; once per group.

        Raises:
            CommError: the memory could not be mapped, the same on every rank, with the first reason.
            PeerLostError: a member did not come.
        """
        # Read when the first buffer is made; without it torch binds multicast memory wherever the switch offers it.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symm_mem

        memory: Any = symm_mem
        c10d: Any = dist
        registry: Any = torch._C._distributed_c10d
        self._group = group
        self._kept: list[Any] = []
        self._timeout_ms = int(1e3 * (_LATER * group.timeout_s + _LATER_S))
        problem, count = "", PeerMemory._rendezvous
        current = torch.cuda.device(group.device) if group.device.type == "cuda" else nullcontext()
        try:
            with current:
                self.buffer: torch.Tensor = memory.empty(nbytes, dtype=torch.uint8, device=group.device)
        except Exception as error:  # whatever it is, the others must hear of it
            problem = _first_line(error)
        # Before anybody meets: who has nothing to map does not come, and the others would wait.
        hello = json.dumps({"problem": problem, "count": count})
        words = [json.loads(word) for word in group.exchange(f"memory/{what}", hello)]
        problems = [word["problem"] for word in words]
        if len({word["count"] for word in words}) > 1:
            problems.append("they have mapped memory in different numbers of groups, which torch cannot match")
        self._refuse(what, problems)
        PeerMemory._rendezvous += 1
        self.name = f"yalis_{count}_" + "_".join(map(str, group.ranks))
        try:
            # torch finds the ranks and their store by the name of a registered process group.
            named = c10d.ProcessGroup(c10d.PrefixStore(f"symm_mem/{what}", group.store), group.index, group.size)
            named._set_group_name(self.name)
            registry._register_process_group(self.name, named)
            self._named = named  # torch's registry alone does not keep it
            with current:
                self._handle: Any = memory.rendezvous(self.buffer, self.name)
                # torch's destructor throws on a device that failed, and that ends the process: only `close` may run it.
                self._keep(self._handle)
                seen = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
                self.bases = torch.tensor([x.data_ptr() for x in seen], dtype=torch.int64, device=group.device)
        except Exception as error:
            problem = _first_line(error)
        try:
            # Where one failed, the others learn so when torch's own wait for it has ended.
            self._refuse(what, group.exchange(f"memory/{what}/mapped", problem, 2 * group.timeout_s))
        except CommError:
            # How far torch has counted on each rank is not known any more: nothing is mapped from now on.
            PeerMemory._rendezvous = -os.getpid()
            self.close(failed=False)
            raise

    def _refuse(self, what: str, problems: list[str]) -> None:
        found = next(filter(None, problems), None)
        if found is not None:
            ranks = list(self._group.ranks)
            raise CommError(f"{what}: torch could not map the memory of the ranks {ranks} to each other: {found}")

    def meet(self) -> None:
        """Enqueue that all ranks meet: what each did before is seen by all after. A kernel; graphs may hold it.

        Without a peer it fails some seconds after the group's time limit, and with it the device, for this process.

        Raises:
            WaitFailed: the device has failed already.
        """
        try:
            self._handle.barrier(0, self._timeout_ms)
        except RuntimeError as error:
            raise_if_failed(error)
            raise

    def _keep(self, thing: object) -> None:
        """Keep it until `close` lets it go, or until the process ends."""
        self._kept.append(ctypes.py_object(thing))
        ctypes.pythonapi.Py_IncRef(self._kept[-1])

    def close(self, *, failed: bool) -> None:
        """Let go of the memory; nothing may use it any more. Not collective, may be called twice.

        Args:
            failed: a peer was lost. The device may stand in a meeting then, or be past use, and to free memory there
                ends the process: it stays until the process ends, as it does when the device does not come to rest.
        """
        if not self._kept:
            return
        if failed or not self._comes_to_rest():
            # Not even back to torch's pools: kernels may still read the addresses, and a later buffer might get this
            # memory with signals of old meetings in it.
            self._keep(self.buffer)
            self._keep(self.bases)
        else:
            for thing in self._kept:
                ctypes.pythonapi.Py_DecRef(thing)
        self._kept = []
        self._handle = None
        self.buffer = self.bases = torch.empty(0)

    def _comes_to_rest(self) -> bool:
        """Whether the device does all that it was told, on whatever stream, within `_REST_S`."""
        done = []
        device = self.buffer.device  # with its index: each thread has a current device of its own

        def rest() -> None:
            with suppress(RuntimeError):  # the device failed
                torch.cuda.synchronize(device)
                done.append(True)

        thread = threading.Thread(target=rest, name="yalis-memory-rest", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            return False
        thread.join(_REST_S)
        return bool(done)


def raise_if_failed(error: RuntimeError) -> None:
    """Tell a device that is past use from other errors of a launch.

    Raises:
        WaitFailed: it is; its cause is logged, since who explains lost peers knows nothing of it.
    """
    words = str(error)
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in words or "Triton Error [CUDA]" in words:
        logger.error("the GPU takes no more work, likely after a meeting without a peer: %s", words)
        raise WaitFailed(f"the GPU has failed, likely in a meeting without a peer: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""What test_launch runs as a rank: ``python -m tests.support.launch_target MODE ...``."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.support.ranks import FileStore
from yalis.comm.liveness import LivenessMonitor, install_termination_handler
from yalis.comm.topology import from_environment


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    rank = os.environ["RANK"]
    seen = {"argv": sys.argv, "env": dict(os.environ), "pid": os.getpid()}
    draft = folder / f"{rank}.draft"
    draft.write_text(json.dumps(seen))
    draft.replace(folder / f"{rank}.json")
    if mode == "return":
        return
    if mode == "raise" and rank == "1":
        raise ValueError("no such weights")
    if mode == "sys.exit" and rank == "1":
        sys.exit("error: no such model")
    if mode == "sleep":
        time.sleep(1000)
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"{rank}.deaf").touch()
        time.sleep(1000)
    if mode == "watched":
        monitor = LivenessMonitor.connect(from_environment(os.environ), FileStore(folder), timeout_s=4.0)
        install_termination_handler(monitor)
        monitor.entered("L0.mlp.down/all_reduce")
        (folder / f"{rank}.watched").touch()
        flag = ctypes.c_int32.from_address(monitor.abort_flag_address())
        while not flag.value:
            time.sleep(0.001)
        raise monitor.explain("L0.mlp.down/all_reduce", None, None)


if __name__ == "__main__":
    main()

"""A group without its transport."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch

from yalis.comm import group as module
from yalis.comm.group import Group
from yalis.comm.topology import Topology


class Backend:
    """A process group whose shutdown does not return before ``release`` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def shutdown(self) -> None:
        self.release.wait(60)


def test_a_backend_that_does_not_shut_down_does_not_hold_up_closing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SHUTDOWN_S", 0.2)
    monkeypatch.setattr(logging.getLogger("yalis"), "propagate", True)
    group = Group(Topology(), [0], torch.device("cpu"), 1.0)
    group.backend = backend = Backend()
    begin = time.monotonic()
    try:
        group.close()
        assert 0.2 <= time.monotonic() - begin < 10.0
        assert "[0] did not shut down within 0.2 s" in caplog.text
        group.close()  # nothing is left to close
    finally:
        backend.release.set()

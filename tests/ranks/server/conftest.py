"""Servers and offline engines that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkpoints import DEMO
from tests.support.server import Server
from yalis import LLM

MAX_BODY = 200_000
BODY_TIMEOUT_S = 1.0
NUM_SEQS, NUM_QUEUED = 8, 24


@pytest.fixture(scope="session")
def profile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="session")
def one(profile_dir: Path) -> Iterator[Server]:
    """A server with one rank."""
    arguments = ["--served-model-name", "demo", "licences", "--profile-dir", str(profile_dir)]
    arguments += ["--max-body-bytes", str(MAX_BODY), "--body-timeout", str(BODY_TIMEOUT_S)]
    arguments += ["--seed", "0", "--max-num-seqs", str(NUM_SEQS), "--max-queued-requests", str(NUM_QUEUED)]
    with Server(*arguments) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two ranks, under SGLang's flag names."""
    folder = tmp_path_factory.mktemp("profile-of-two")
    arguments = ["--tp-size", "2", "--context-length", "512", "--served-model-name", "demo"]
    with Server(*arguments, "--profile-dir", str(folder / "traces")) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def offline() -> Iterator[LLM]:
    """The same engine as that of ``one``, without a server."""
    with LLM(str(DEMO), cpu_threads=1, max_num_seqs=NUM_SEQS) as llm:
        yield llm

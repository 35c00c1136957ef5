from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.checkpoints import cached_checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny random checkpoints, each made once: ``checkpoint("qwen3", dtype=torch.bfloat16)``."""
    return cached_checkpoints(tmp_path_factory.mktemp("checkpoints"))

"""What ``resolve`` decides from a checkpoint's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import DEMO
from yalis.comm.topology import Topology
from yalis.config import EngineConfig
from yalis.engine.resolve import resolve


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({}, (7,)), ({"eos_token_id": None}, (7,)), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 6]}, (5, 6))],
)
def test_end_tokens(tmp_path: Path, generation: dict[str, object], expected: tuple[int, ...]) -> None:
    """The generation config's where it names some; a null there does not switch the model's own off."""
    config = json.loads((DEMO / "config.json").read_text()) | {"eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    resolved = resolve(EngineConfig(str(tmp_path)), Topology(0, 1, 1), {})
    assert resolved.eos_token_ids == expected

"""What ``resolve`` decides from a checkpoint's own files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import DEMO
from yalis.comm.topology import Topology
from yalis.config import EngineConfig
from yalis.engine.resolve import num_kv_blocks, resolve
from yalis.errors import ConfigError


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


GIB = 1 << 30


@pytest.mark.parametrize(
    ("utilization", "graph_bytes", "expected"),
    [
        (0.75, 0, 53),  # 100 GiB, of which 90 are free: 90 - 25 - 12
        (0.75, 24 * GIB, 53),  # graphs lie in the quarter that the engine leaves alone
        (0.75, 25 * GIB, 52),  # half a GiB of it is not theirs
        (1.0, 0, 78),
        (0.999, 3 * GIB, 74),  # there is no room outside
    ],
)
def test_pages_of_a_gpu(utilization: float, graph_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90 * GIB, 100 * GIB))
    config = EngineConfig(str(DEMO), gpu_memory_utilization=utilization, max_num_seqs=2048, load_format="dummy")
    resolved = dataclasses.replace(resolve(config, Topology(0, 1, 1), {}), device=torch.device("cuda", 0))
    assert num_kv_blocks(resolved, GIB, 12 * GIB, graph_bytes) == expected


def test_no_room_for_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 100 * GIB))
    resolved = resolve(EngineConfig(str(DEMO), gpu_memory_utilization=0.99), Topology(0, 1, 1), {})
    resolved = dataclasses.replace(resolved, device=torch.device("cuda", 0))
    assert num_kv_blocks(resolved, GIB, 4 * GIB, GIB) == 4
    with pytest.raises(ConfigError, match="give less to CUDA graphs"):
        num_kv_blocks(resolved, GIB, 4 * GIB, 6 * GIB)
    asked = dataclasses.replace(resolved, user=dataclasses.replace(resolved.user, num_kv_blocks=8))
    assert num_kv_blocks(asked, GIB, 4 * GIB, 2 * GIB) == 8
    with pytest.raises(ConfigError, match=f"has {7 * GIB} on this cuda besides {3 * GIB} of CUDA graphs"):
        num_kv_blocks(asked, GIB, 4 * GIB, 3 * GIB)

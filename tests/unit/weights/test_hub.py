"""From a model's name to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from yalis.errors import CheckpointError
from yalis.weights.hub import resolve_model_path


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_path(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model_path("~/model") == tmp_path / "model"


def test_paths_that_lead_nowhere_do_not_reach_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*/nothing, and it is not a hub id"):
        resolve_model_path(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve_model_path(str(tmp_path / "model.safetensors"))


def test_of_a_hub_id_what_the_engine_reads_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def fetch(model: str, **patterns: Any) -> str:
        asked.update(patterns, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve_model_path("owner/some-model") == tmp_path
    assert (asked.pop("model"), asked.pop("revision")) == ("owner/some-model", None)
    needed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors", "tokenizer.model", "vocab.txt"]
    needed += ["model.safetensors.index.json", "chat_template.jinja"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/params.json", "a.gguf"]
    others += ["onnx/model.safetensors", "pytorch_model.bin", "original/tokenizer.model", "a/b/model.safetensors"]
    assert list(filter_repo_objects(needed + others, **asked)) == needed


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("Name or service not known\nlong trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"did not give 'owner/model'.*Name or service not known.*network"
    ) as info:
        resolve_model_path("owner/model")
    assert "\n" not in str(info.value)

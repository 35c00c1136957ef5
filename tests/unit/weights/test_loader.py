"""Accounting of names, shapes, files and bytes; dummy weights."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.ranks import ROOT
from tests.support.stepper import Stepper, make_model
from yalis.errors import CheckpointError
from yalis.layers.linear import RowLinear
from yalis.models.base import CausalLM
from yalis.models.config import ModelConfig
from yalis.weights.checkpoint import Checkpoint, _segments
from yalis.weights.loader import init_dummy, load_weights

Change = Callable[[dict[str, torch.Tensor]], None]
Q1 = "model.layers.1.self_attn.q_proj.weight"


class Place:
    """A rank's place in a group whose collectives are never called."""

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.size = size


def model_at(folder: Path, rank: int = 0, size: int = 1, **options: Any) -> CausalLM:
    return make_model(folder, tp=Place(rank, size), load=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def changed(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint whose tensors went through a function."""

    def make(change: Change, variant: str = "llama") -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(checkpoint(variant), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def refuse(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_weights(model_at(folder, **options), folder)


def test_missing_tensors_are_named(changed: Callable[..., Path]) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[Q1], tensors["model.norm.weight"]

    refuse(changed(drop), rf"2 tensors are missing: {Q1}, model\.norm\.weight")


def test_unknown_tensors_are_named_and_counted(changed: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(7):
            tensors[f"model.layers.{i + 4}.input_layernorm.weight"] = torch.ones(64)

    refuse(changed(add), r"7 tensors are unknown to the architecture: model\.layers\.10\.input.*, \.\.\.")


def test_a_bias_that_the_config_denies_is_unknown(changed: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q1.replace("weight", "bias")] = torch.ones(64)

    refuse(changed(add), r"1 tensors are unknown .*q_proj\.bias")


def test_misshapen_tensors_are_named_with_both_shapes(changed: Callable[..., Path]) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q1] = tensors[Q1][:60].contiguous()

    refuse(changed(shrink), rf"{Q1} has shape \[60, 64\], config.json asks for \[64, 64\]")


def test_a_dtype_that_is_no_weight_is_refused(changed: Callable[..., Path]) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q1] = tensors[Q1].to(torch.int8)

    refuse(changed(quantize), rf"{Q1} in .* has dtype I8; supported: F64, F32, BF16, F16")


def test_what_other_stages_need_is_known(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama-bias")
    for stage in range(2):
        load_weights(model_at(folder, 1, 2, stage=stage, num_stages=2), folder)


def test_harmless_leftovers(changed: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    folder = changed(add, "llama-tied")
    load_weights(model_at(folder), folder)


def test_truncated_and_corrupt_files_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(checkpoint("llama"), folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    shifted = content[: 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[4,') + content[8 + length :]
    short = content.replace(b'"shape":[64]', b'"shape":[63]', 1)
    assert len({content, shifted, short}) == 3
    for bad in (content[:-100], content + b"x", content[:50], b"", b"\xff" * 64, shifted, short):
        file.write_bytes(bad)
        refuse(folder, rf"model\.safetensors is truncated or corrupt \({len(bad)} bytes")


def test_index_and_files_must_agree(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoint("llama", max_shard_size="100KB"), folder)
    index = folder / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    files = sorted(set(original["weight_map"].values()))
    wrong = {**original["weight_map"], Q1: next(f for f in files if f != original["weight_map"][Q1])}
    index.write_text(json.dumps({"weight_map": wrong}))
    refuse(folder, f"says that {Q1} is in")
    index.write_text("{}")
    refuse(folder, "not an index of safetensors files")
    index.write_text(json.dumps(original))
    (folder / files[1]).unlink()
    refuse(folder, f"{files[1]} is missing; the checkpoint is incomplete")


def test_no_safetensors(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    refuse(tmp_path, "no safetensors files in")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refuse(tmp_path, r"it holds pytorch_model\.bin, which is not supported")


def test_progress_ends_at_the_total(checkpoint: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    folder = checkpoint("llama")
    receipt = load_weights(model_at(folder), folder, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (receipt.bytes_read, receipt.bytes_read)


def replicated_bytes(config: ModelConfig, tp: int, num_stages: int = 1) -> int:
    """What several ranks read on purpose, of a float32 checkpoint."""
    norms = (2 * config.num_layers + 1) * config.hidden_size + 2 * config.num_layers * config.head_dim * config.qk_norm
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (config.hidden_size + config.qkv_bias)
    replicated = (tp - 1) * norms + (max(1, tp // config.num_kv_heads) - 1) * kv
    if config.tie_word_embeddings and num_stages > 1:
        replicated += config.vocab_size * config.hidden_size
    return 4 * replicated


@pytest.mark.parametrize(("variant", "tp"), [("llama", 2), ("llama", 4), ("qwen3", 4), ("llama-bias", 2), ("qwen2", 1)])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_slices_of_all_ranks_are_the_checkpoint_once(
    checkpoint: Callable[..., Path], variant: str, tp: int, num_stages: int
) -> None:
    """But for what is replicated on purpose. (What the disk delivers for them: `test_bytes_from_the_disk`.)"""
    folder = checkpoint(variant)
    read, config, total = 0, None, 0
    for stage in range(num_stages):
        for rank in range(tp):
            model = model_at(folder, rank, tp, stage=stage, num_stages=num_stages)
            receipt = load_weights(model, folder)
            read += receipt.bytes_read
            config, total = model.config, receipt.bytes_checkpoint
    assert config is not None
    assert total == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert read == total + replicated_bytes(config, tp, num_stages)


# One rank: loads once to have all code in memory, forgets the file, loads again and prints what came from the disk.
# The mutants are what a loader must not do: ask for whole matrices, or leave it all to the system's read-ahead.
_RANK = """
import mmap, os, sys
from pathlib import Path
from tests.unit.weights.test_loader import model_at
from yalis.weights import checkpoint
from yalis.weights.loader import load_weights

def from_disk():
    return int(dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())["read_bytes"])

folder, rank, mutant = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if mutant == "whole":
    right = checkpoint._segments
    checkpoint._segments = lambda count, begin, nbytes, stride: right(1, begin // stride * stride, count * stride, 0)
elif mutant == "ahead":
    checkpoint._segments = lambda *_: iter(())
    del mmap.MADV_RANDOM
for _ in range(2):
    file = os.open(folder / "model.safetensors", os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    model = model_at(folder, rank, 4)
    before = from_disk()
    receipt = load_weights(model, folder)
print(from_disk() - before, receipt.bytes_read)
"""


@pytest.mark.parametrize(("mutant", "most"), [("", 1.05), ("whole", None), ("ahead", None)])
def test_bytes_from_the_disk(checkpoint: Callable[..., Path], mutant: str, most: float | None) -> None:
    """Four ranks with cold caches: at most 1.05 times the checkpoint and what is replicated come from the disk."""
    # 64 KiB of every row of down_proj for each rank: the pages at a segment's ends, which two ranks need, weigh little.
    folder = checkpoint("llama", num_hidden_layers=1, intermediate_size=4 * 16384)
    file = folder / "model.safetensors"
    with file.open("rb") as written:
        os.fsync(written.fileno())  # only what is on the disk can be forgotten
    ranks = range(4) if most else range(1)
    counts = []
    for rank in ranks:
        done = subprocess.run(
            [sys.executable, "-c", _RANK, str(folder), str(rank), mutant],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        counts.append([int(word) for word in done.stdout.split()])
    delivered, slices = (sum(column) for column in zip(*counts, strict=True))
    if delivered == 0:
        pytest.skip(f"{folder} is on a file system without a disk (tmpfs): /proc/self/io counts nothing")
    if most is None:
        assert delivered > 1.2 * slices
        return
    assert delivered >= 0.9 * slices  # the cache was cold
    config = ModelConfig.from_pretrained(folder)
    assert delivered <= most * file.stat().st_size + replicated_bytes(config, 4)


def test_a_column_slice(checkpoint: Callable[..., Path]) -> None:
    linear = RowLinear("model.layers.0.mlp.down_proj", 112, 64, 28, 28, bias=False, first_rank=True)
    piece = linear.slots()[0].tensors[0].pieces[0]
    folder = checkpoint("llama")
    out = torch.empty(64, 28)
    with Checkpoint(folder) as files:
        assert files.read(piece, out) == 64 * 28 * 4
    assert torch.equal(out, load_file(folder / "model.safetensors")[piece.name][:, 28:56])


@given(st.data())
def test_segments_are_what_the_pieces_hold(data: st.DataObject) -> None:
    """Every byte of every segment is asked for, no piece is longer than advice may be, and nothing beyond the cut."""
    count, nbytes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 300_000))
    begin, stride = data.draw(st.integers(0, 10_000)), nbytes + data.draw(st.integers(0, 20_000))
    pieces = list(_segments(count, begin, nbytes, stride))
    asked = sorted((at, at + size) for at, size in pieces)
    assert all(0 < size <= 128 * 1024 for _, size in pieces)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(asked))
    joined = stride - nbytes < mmap.PAGESIZE
    assert sum(size for _, size in pieces) == ((count - 1) * stride + nbytes if joined else count * nbytes)
    assert (asked[0][0], asked[-1][1]) == (begin, begin + (count - 1) * stride + nbytes)


def test_values_are_converted_to_the_run_dtype(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", dtype=torch.bfloat16)
    model = make_model(folder, dtype=torch.float32)
    packed = next(iter(model._stack.layers)).mlp.down.packed
    expected = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert packed.dtype == torch.float32
    assert torch.equal(packed.unpack(), expected.float())


def test_dummy_logits_are_sane_and_depend_on_the_seed(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3")
    logits = []
    for seed in (0, 0, 1):
        model = model_at(folder)
        init_dummy(model, seed)
        logits.append(Stepper([model]).step({0: list(range(20))})[0])
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=0.1)
    assert logits[0].isfinite().all()
    assert 0.3 < float(logits[0].std()) < 3.0


def test_dummy_shards_are_shards_of_one_model(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yalis.weights.dummy._PERIOD", 5003)  # the noise wraps around inside these small matrices
    folder = checkpoint("llama")
    models = [model_at(folder), *(model_at(folder, rank, 2) for rank in range(2))]
    for model in models:
        init_dummy(model, 3)
    whole, *shards = [list(model._stack.layers)[2] for model in models]
    down = whole.mlp.down.packed.unpack()
    assert torch.equal(torch.cat([s.mlp.down.packed.unpack() for s in shards], 1), down)
    assert len(down.unique(dim=0)) == len(down)
    assert 0.8 < float(down.std()) * 112**0.5 < 1.2
    gate_up = [s.mlp.gate_up.packed.unpack() for s in shards]
    expected = torch.cat([gate_up[0][:56], gate_up[1][:56], gate_up[0][56:], gate_up[1][56:]])
    assert torch.equal(expected, whole.mlp.gate_up.packed.unpack())
    vocabulary = torch.cat([m._head_matrix.packed.unpack() for m in models[1:]])
    assert torch.equal(vocabulary[:515], models[0]._head_matrix.packed.unpack())
    assert not vocabulary[515:].any()
    assert torch.equal(whole.input_norm.weight, torch.ones(64))

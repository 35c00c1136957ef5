"""The small models that a calibration runs in the engine, and with which batches: pure functions of the device."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from yalis.models.config import ModelConfig
from yalis.study.workload import Workload


@dataclass(frozen=True)
class Run:
    """One batch through the engine; gives the time to all first tokens and, with several tokens out, of a step."""

    batch: int
    input_len: int
    output_len: int

    @property
    def name(self) -> str:
        """As ``8x128+33``."""
        return f"{self.batch}x{self.input_len}+{self.output_len}"

    @property
    def workload(self) -> Workload:
        """The same for the cost model."""
        return Workload(self.name, self.batch, self.input_len, self.output_len)


@dataclass(frozen=True)
class Models:
    """What a device runs.

    Attributes:
        sizes: of each model, over those of `_BASE`.
        tiny: two batches of the models that have next to no weights.
        arrival: the one of them whose time to the first token tells what a request costs besides its steps.
        wide: of the model that streams from memory. The first gives the time of one row, the second of many: enough
            for a look; of equal numbers of rows the first run counts.
        contexts: two lengths of cache. prompts: three lengths, for prefill attention.
        max_model_len: tokens of the longest run.
        options: of the engine, besides its layout.
    """

    sizes: Mapping[str, Mapping[str, Any]]
    tiny: tuple[Run, Run]
    arrival: str
    wide: tuple[Run, ...]
    contexts: tuple[Run, Run]
    prompts: tuple[Run, Run, Run]
    max_model_len: int
    options: Mapping[str, Any]

    def runs(self, shape: str) -> tuple[Run, ...]:
        """Of one model."""
        if shape == "wide":
            return self.wide
        return {"alone": (*self.contexts, *self.prompts), "grouped": self.contexts}.get(shape, self.tiny)


_BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _attending(heads: int, head_dim: int, layers: int, groups: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Two models of many heads: with a key for each query head, and with a key for several."""
    both = {"num_attention_heads": heads, "head_dim": head_dim, "num_hidden_layers": layers}
    return {
        name: both | {"num_key_value_heads": heads // group}
        for name, group in zip(("alone", "grouped"), groups, strict=True)
    }


def _wide(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
    }


_TINY_SIZES: dict[str, dict[str, int]] = {
    "shallow": {},
    "deep": {"num_hidden_layers": 18},
    "words": {"vocab_size": 65536},
}
# The wide model streams from memory: 50 MB a layer.
_CPU = Models(
    sizes={**_TINY_SIZES, "wide": _wide(1536, 4096, 6, 24, 64), **_attending(16, 64, 8, (1, 4))},
    tiny=(Run(1, 16, 33), Run(8, 16, 33)),
    arrival="shallow",
    wide=(*(Run(batch, 128, 17) for batch in (1, 2, 4, 8, 16)), Run(1, 8, 1), Run(1, 32, 1), Run(1, 512, 1)),
    contexts=(Run(8, 64, 17), Run(8, 1024, 17)),
    prompts=(Run(1, 512, 1), Run(1, 1024, 1), Run(1, 2048, 1)),
    max_model_len=2304,
    options={},
)
# The host schedules one step ahead and takes 0.2 to 0.5 ms for it (two H100 of a host, TP 1 and 2): a step that is to
# tell what layers or their weights cost has to outlast that, so the shallow, the wide and the attending models have
# many; not too many, because a graph of a thousand kernels takes longer for each of them (64 layers 16 us each, 160
# layers 24). What a sequence costs is told by 32, because kernels for one row are others than those for a few. A
# prompt's arrival is told by a model of few layers, whose own time is little beside it. The wide one has
# 482 MB a layer and 5.8 GB in all: the engine tunes its products on two ranks as well, and a layer's prefill outlasts
# its launch. The sizes are no well-known model's. Prompts of the attending models are long, because a short one takes
# no longer than its launch.
_CUDA = Models(
    sizes={
        "brief": {},
        "shallow": {"num_hidden_layers": 24},
        "deep": {"num_hidden_layers": 64},
        "words": {"num_hidden_layers": 24, "vocab_size": 65536},
        "wide": _wide(5120, 12288, 12, 32, 128),
        **_attending(32, 128, 32, (1, 4)),
    },
    tiny=(Run(1, 16, 129), Run(32, 16, 129)),
    arrival="brief",
    wide=(
        Run(1, 128, 65),
        Run(1, 512, 1),
        Run(1, 1024, 1),
        Run(1, 2048, 1),
        *(Run(batch, 128, 65) for batch in (2, 8, 16, 32, 64)),
    ),
    contexts=(Run(16, 64, 33), Run(16, 1024, 33)),
    prompts=(Run(1, 2048, 1), Run(1, 4096, 1), Run(1, 8192, 1)),
    max_model_len=8448,
    # What auto takes where nothing was tuned; a table left by `yalis tune` must not change what is measured.
    options={"all_reduce": "nccl", "max_num_seqs": 64},
)


def models_of(device: str) -> Models:
    """Of ``cpu`` or ``cuda``."""
    return _CPU if device == "cpu" else _CUDA


@cache
def model_of(device: str, shape: str) -> ModelConfig:
    """A calibration model as the cost model sees it."""
    with model_folder(device, shape) as folder:
        return ModelConfig.from_pretrained(folder)


@contextmanager
def model_folder(device: str, shape: str) -> Iterator[Path]:
    """A folder with its config.json, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="yalis-shape-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**_BASE, **models_of(device).sizes[shape]}))
        yield Path(folder)

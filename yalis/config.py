"""User configuration of the engine: one frozen dataclass, validated when it is built.

``"auto"`` and ``None`` mean *decide from the model and the machine*; the engine resolves them into a
`ResolvedConfig` (see `yalis.engine.resolve`) and never writes into this object.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yalis.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
COMPUTE = ("full", "null")
DEVICES = ("auto", "cpu", "cuda")
MAX_TIMEOUT_S = 1e6
"""Longest deadline in seconds (11 days); much longer ones overflow the clocks that they are handed to."""

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "True or False"),
}
_COUNTS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "ranks_per_node",
    "max_model_len",
    "num_kv_blocks",
    "kv_cache_memory_bytes",
    "max_cudagraph_batch",
    "cpu_threads",
)


def unknown_key_message(kind: str, key: str, known: list[str]) -> str:
    """``unknown <kind> 'x'; did you mean 'y'? known: ...``"""
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {key!r}{hint} Known: {', '.join(sorted(known))}"


@dataclass(frozen=True)
class EngineConfig:
    """Everything a user may decide about an engine.

    Args:
        model: folder in Hugging Face layout, or a hub id.
        tokenizer: folder of the tokenizer; default the model's.
        dtype: ``auto`` (the checkpoint's own; float32 becomes bfloat16 nowhere silently), ``float32``, ``bfloat16``,
            ``float16``.
        load_format: ``auto`` reads safetensors; ``dummy`` builds random weights on the device.
        device: ``auto`` is ``cuda`` where there is a GPU, else ``cpu``.
        tensor_parallel_size: ranks that share every layer (TP).
        pipeline_parallel_size: stages of contiguous layers (PP).
        ranks_per_node: declares the topology instead of reading it from the launch environment; lets one host stand
            for several nodes.
        max_model_len: longest prompt plus output in tokens; default the model's own limit.
        max_num_seqs: most requests that run at once, over all pipeline stages.
        max_num_batched_tokens: most tokens in one forward pass; longer prefills are chunked.
        enable_chunked_prefill: if off, a prompt is prefilled in one pass, so it must fit ``max_num_batched_tokens``.
        enable_prefix_caching: reuse KV blocks of equal prompt prefixes.
        block_size: tokens per KV block.
        num_kv_blocks: number of KV blocks per rank; overrides ``kv_cache_memory_bytes``.
        kv_cache_memory_bytes: memory of the KV cache per rank; default what the running requests can need, at most a
            share of free memory.
        gpu_memory_utilization: share of a GPU's memory that weights, activations and KV cache may use together. CUDA
            graphs lie outside of it as far as there is room; where there is not, the KV cache gets less, and half
            a GiB stays free.
        attention_backend: ``auto`` or a name in `yalis.attention.registry`.
        all_reduce: ``auto`` or a name of an all-reduce algorithm in `yalis.comm.algorithms`.
        compute: ``full``, or ``null``: products and attention take no time and their results mean nothing; collectives,
            shapes and scheduling stay. For measurements.
        overlap_scheduling: schedule one step ahead of the sampled tokens (one pipeline stage only); default on GPUs.
        enforce_eager: launch every step's kernels anew instead of replaying a CUDA graph.
        max_cudagraph_batch: largest decode batch that gets a CUDA graph; default ``max_num_seqs``, at most 256.
        max_cudagraph_prefill: tokens of the largest step with prompts that gets a CUDA graph, 2 or more, or 0 for none;
            default ``max_num_batched_tokens``, at most 2048. Longer ones hide their launches.
        seed: seed of dummy weights and of requests without a seed of their own; fits 64 bits with a sign.
        distributed_timeout_s: a rank that is dead or silent for so long ends the run, in seconds; 1 to 1e6.
        cpu_threads: compute threads per CPU rank; default the cores of its share, at least one.
        bind_cores: bind each CPU rank to its share of the host's cores, where there are several ranks and enough cores.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    device: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    ranks_per_node: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    attention_backend: str = "auto"
    all_reduce: str = "auto"
    compute: str = "full"
    overlap_scheduling: bool | None = None
    enforce_eager: bool = False
    max_cudagraph_batch: int | None = None
    max_cudagraph_prefill: int | None = None
    seed: int = 0
    distributed_timeout_s: float = 30.0
    cpu_threads: int | None = None
    bind_cores: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("device", self.device, DEVICES)
        _one_of("compute", self.compute, COMPUTE)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be an integer of at least 1")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization}: must be above 0 and at most 1")
        if not 1.0 <= self.distributed_timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"distributed_timeout_s={self.distributed_timeout_s}: must be at least 1 second and at most "
                f"{MAX_TIMEOUT_S:g}"
            )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed}: must fit 64 bits, -2**63 to 2**63 - 1; give a smaller number")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "a decode step needs one token per running request; raise the first or lower the second"
            )
        prefill = self.max_cudagraph_prefill
        if prefill and not 2 <= prefill <= self.max_num_batched_tokens:
            raise ConfigError(
                f"max_cudagraph_prefill={prefill}: must be 0 (no graphs of prompts), or at least 2 and at most "
                f"max_num_batched_tokens={self.max_num_batched_tokens}"
            )
        for name in ("max_cudagraph_batch", "max_cudagraph_prefill"):
            if self.enforce_eager and getattr(self, name):
                raise ConfigError(
                    f"enforce_eager with {name}={getattr(self, name)}: the first switches graphs off; leave one of the "
                    "two out"
                )
        if self.overlap_scheduling and self.pipeline_parallel_size > 1:
            raise ConfigError(
                f"overlap_scheduling with pipeline_parallel_size={self.pipeline_parallel_size}: stages in flight "
                "already overlap scheduling; switch one of the two off"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks: TP x PP."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from a mapping of option names; an unknown name raises `ConfigError` with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(unknown_key_message("engine option", key, known))
        return cls(**values)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def _check_type(name: str, value: object, annotation: str) -> None:
    """Refuse a value that is not of its field's type; a whole number may stand for a float."""
    kind, _, optional = annotation.partition(" | ")
    if optional and value is None:
        return
    types, words = _TYPES[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{name}={value!r}: must be {words}{' or None' if optional else ''}")

"""Turns what the user asked for into what this machine and this model give: every ``auto`` decided, once, logged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from yalis.comm.topology import Topology, launcher
from yalis.config import EngineConfig
from yalis.engine.cores import cores_of_rank
from yalis.engine.tokenizer import generation_config
from yalis.errors import ConfigError
from yalis.models.config import ModelConfig, validate_parallel
from yalis.utils.logging import get_logger
from yalis.weights.hub import resolve_model_path

logger = get_logger(__name__)

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Of the memory that is free after the weights are loaded, what a CPU engine takes for KV pages at most.
_CPU_KV_SHARE = 0.4
# GPU memory beside CUDA graphs that nobody plans with: libraries' workspaces, the allocator's fragments.
_GPU_SPARE_BYTES = 512 << 20


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration without any ``auto`` left.

    Attributes:
        user: what was asked for.
        model: the model's own config.
        model_path: local folder of the checkpoint.
        tokenizer_path: local folder of the tokenizer.
        dtype, device: of weights and activations on this rank.
        max_model_len: most tokens in a sequence, before the KV capacity is known.
        eos_token_ids: tokens that end a sequence: the generation config's, else the model config's.
        generation_defaults: sampling defaults that the checkpoint ships.
        cores: cores to bind this rank to; None leaves it where it is.
        cpu_threads: compute threads of this rank.
        ranks_on_host: ranks that share this host's cores and memory.
        overlap_scheduling: whether steps are scheduled one ahead of the sampled tokens.
    """

    user: EngineConfig
    model: ModelConfig
    model_path: Path
    tokenizer_path: Path
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, object]
    cores: tuple[int, ...] | None
    cpu_threads: int
    ranks_on_host: int
    overlap_scheduling: bool


def resolve(config: EngineConfig, topology: Topology, env: Mapping[str, str]) -> ResolvedConfig:
    """Decide every ``auto`` of ``config`` for the rank that ``topology`` describes.

    Raises:
        ConfigError, CheckpointError: the model and the wishes do not fit together.
    """
    path = resolve_model_path(config.model)
    model = ModelConfig.from_pretrained(path)
    validate_parallel(model, config.tensor_parallel_size, config.pipeline_parallel_size)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={max_model_len} exceeds the model's limit of {model.max_position_embeddings} positions; "
            "lower it"
        )
    if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens={config.max_num_batched_tokens} is below max_model_len={max_model_len} while "
            "chunked prefill is off, so the longest prompt could never run; raise the first, lower the second, or "
            "switch chunked prefill on"
        )
    defaults = generation_config(path)
    device = resolve_device(config, topology)
    overlap = config.overlap_scheduling
    if overlap is None:
        # On a CPU the host's work and the model's share the cores: one step ahead gains nothing there.
        overlap = device.type == "cuda" and config.pipeline_parallel_size == 1
    cores, alone = cores_of_rank(list(os.sched_getaffinity(0)), os.cpu_count() or 1, topology, launcher(env))
    # A null there says nothing about the end token; the model config's counts then.
    eos = model.eos_token_id if defaults.get("eos_token_id") is None else defaults["eos_token_id"]
    resolved = ResolvedConfig(
        user=config,
        model=model,
        model_path=path,
        tokenizer_path=resolve_model_path(config.tokenizer) if config.tokenizer else path,
        dtype=_dtype(config, model),
        device=device,
        max_model_len=max_model_len,
        eos_token_ids=_as_ids(eos),
        generation_defaults=defaults,
        cores=tuple(cores) if config.bind_cores and alone else None,
        cpu_threads=config.cpu_threads or (len(cores) if alone else 1),
        ranks_on_host=topology.ranks_on_host or 1,
        overlap_scheduling=overlap,
    )
    logger.info(
        "%s: dtype=%s device=%s max_model_len=%d cpu_threads=%d",
        model.architecture,
        resolved.dtype,
        resolved.device,
        max_model_len,
        resolved.cpu_threads,
    )
    return resolved


def kv_block_bytes(resolved: ResolvedConfig, num_kv_heads: int, num_layers: int) -> int:
    """Bytes that one KV block takes on this rank over all of its layers."""
    per_token = 2 * num_kv_heads * resolved.model.head_dim * num_layers * resolved.dtype.itemsize
    return per_token * resolved.user.block_size


def num_kv_blocks(resolved: ResolvedConfig, block_bytes: int, activation_bytes: int = 0, graph_bytes: int = 0) -> int:
    """KV blocks that this rank can and would hold.

    An explicit ``num_kv_blocks`` or ``kv_cache_memory_bytes`` is taken at its word, if the memory is there. Otherwise:
    enough for ``max_num_seqs`` sequences of ``max_model_len``, at most a share of the memory that is free now.

    Args:
        block_bytes: of one block.
        activation_bytes: GPU memory that steps will take besides weights and pages.
        graph_bytes: GPU memory that CUDA graphs will take: no part of ``gpu_memory_utilization``, but it must be free.

    Raises:
        ConfigError: not even one block fits, or fewer than were asked for.
    """
    user, on_gpu = resolved.user, resolved.device.type == "cuda"
    wanted = user.max_num_seqs * -(-resolved.max_model_len // user.block_size)
    if on_gpu:
        free, total = torch.cuda.mem_get_info(resolved.device)
        outside = graph_bytes + _GPU_SPARE_BYTES if graph_bytes else 0
        share = free - max(int((1.0 - user.gpu_memory_utilization) * total), outside) - activation_bytes
    else:
        free = psutil.virtual_memory().available // resolved.ranks_on_host
        share = int(free * _CPU_KV_SHARE)
    budget = share if user.kv_cache_memory_bytes is None else user.kv_cache_memory_bytes
    blocks = min(wanted, budget // block_bytes) if user.num_kv_blocks is None else user.num_kv_blocks
    if blocks < 1:
        raise ConfigError(
            f"no memory for the KV cache: a block of {user.block_size} tokens takes {block_bytes} bytes, {budget} are "
            "available; raise kv_cache_memory_bytes or gpu_memory_utilization, use more ranks"
            + (", or give less to CUDA graphs (max_cudagraph_prefill, enforce_eager)" if on_gpu else "")
        )
    free -= graph_bytes
    if blocks * block_bytes > free:
        asked = "kv_cache_memory_bytes" if user.num_kv_blocks is None else "num_kv_blocks"
        raise ConfigError(
            f"{asked}={getattr(user, asked)}: {blocks} blocks of {user.block_size} tokens take {blocks * block_bytes} "
            f"bytes, but a rank has {free} on this {resolved.device.type}"
            + (f" besides {graph_bytes} of CUDA graphs" if graph_bytes else "")
            + "; lower it, or leave it out"
        )
    return blocks


def _dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    if config.dtype != "auto":
        return _TORCH_DTYPES[config.dtype]
    return model.dtype


def resolve_device(config: EngineConfig, topology: Topology) -> torch.device:
    """Where the rank that ``topology`` describes computes.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no GPU; use device='cpu', or see `yalis doctor`")
    # Declared nodes may share a host, so the GPU follows the rank's place on the *host*.
    return torch.device("cuda", (topology.device_index or 0) % torch.cuda.device_count())


def _as_ids(eos: object) -> tuple[int, ...]:
    if eos is None:
        return ()
    if isinstance(eos, int):
        return (eos,)
    if isinstance(eos, (list, tuple)):
        return tuple(int(e) for e in eos)
    raise ConfigError(f"eos_token_id={eos!r}: must be an integer or a list of integers")

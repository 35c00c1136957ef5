"""The engine's options as command-line flags, under vLLM's names; SGLang's common ones are accepted too."""

from __future__ import annotations

import argparse
from typing import Any

from yalis.config import COMPUTE, DEVICES, DTYPES, LOAD_FORMATS

# Keeps the engine's seed apart from the request's, and lets `engine_options` find what was given.
_PREFIX = "engine."
_DTYPE_NAMES = {"half": "float16", "float": "float32"}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add every field of `EngineConfig` but ``model``. A flag that is not given leaves the field's default."""
    group = parser.add_argument_group("engine")

    def add(*flags: str, dest: str, **kwargs: Any) -> None:
        group.add_argument(*flags, dest=_PREFIX + dest, default=argparse.SUPPRESS, **kwargs)

    add("--tokenizer", dest="tokenizer", metavar="PATH", help="folder of the tokenizer (default: the model's)")
    add(
        "--dtype",
        dest="dtype",
        type=lambda name: _DTYPE_NAMES.get(name, name),
        choices=DTYPES,
        help="of weights and activations; half and float are understood too (default: the checkpoint's)",
    )
    add("--load-format", dest="load_format", choices=LOAD_FORMATS, help="dummy: random weights, for benchmarks")
    add("--device", dest="device", choices=DEVICES, help="default: cuda where there is a GPU")
    add(
        "--tensor-parallel-size",
        "-tp",
        "--tp",
        "--tp-size",
        dest="tensor_parallel_size",
        type=int,
        metavar="N",
        help="ranks that share every layer",
    )
    add(
        "--pipeline-parallel-size",
        "-pp",
        "--pp",
        "--pp-size",
        dest="pipeline_parallel_size",
        type=int,
        metavar="N",
        help="stages of contiguous layers",
    )
    add(
        "--ranks-per-node",
        dest="ranks_per_node",
        type=int,
        metavar="N",
        help="declare the topology: one host may stand for several nodes",
    )
    add(
        "--max-model-len", "--context-length", dest="max_model_len", type=int, metavar="N", help="most tokens a request"
    )
    add(
        "--max-num-seqs",
        "--max-running-requests",
        dest="max_num_seqs",
        type=int,
        metavar="N",
        help="most requests that run at once",
    )
    add("--max-num-batched-tokens", dest="max_num_batched_tokens", type=int, metavar="N", help="most tokens in a step")
    add(
        "--chunked-prefill-size",
        dest="max_num_batched_tokens",
        type=int,
        action=_ChunkSize,
        metavar="N",
        help="the same, as SGLang spells it; -1 is --no-enable-chunked-prefill",
    )
    add(
        "--enable-chunked-prefill",
        dest="enable_chunked_prefill",
        action=argparse.BooleanOptionalAction,
        help="split long prompts over steps (default: on)",
    )
    add(
        "--enable-prefix-caching",
        dest="enable_prefix_caching",
        action=argparse.BooleanOptionalAction,
        help="reuse KV blocks of equal prompt prefixes (default: on)",
    )
    add("--block-size", "--page-size", dest="block_size", type=int, metavar="N", help="tokens per KV block")
    add("--num-kv-blocks", dest="num_kv_blocks", type=int, metavar="N", help="KV blocks per rank")
    add("--kv-cache-memory-bytes", dest="kv_cache_memory_bytes", type=int, metavar="N", help="KV memory per rank")
    add(
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        dest="gpu_memory_utilization",
        type=float,
        metavar="F",
        help="share of a GPU's memory to use",
    )
    add(
        "--attention-backend",
        dest="attention_backend",
        metavar="NAME",
        help="native, sdpa, triton, flashinfer (default: auto)",
    )
    add(
        "--all-reduce",
        dest="all_reduce",
        metavar="NAME",
        help="torch (nccl, gloo), rd, shm, nvrar, two_shot, symm_mem; null skips it, for benchmarks (default: auto)",
    )
    add(
        "--compute",
        dest="compute",
        choices=COMPUTE,
        help="null skips products and attention, for benchmarks (default: full)",
    )
    add(
        "--overlap-scheduling",
        dest="overlap_scheduling",
        action=argparse.BooleanOptionalAction,
        help="schedule one step ahead of the sampled tokens (default: on GPUs with one stage)",
    )
    add(
        "--enforce-eager",
        "--disable-cuda-graph",
        dest="enforce_eager",
        action="store_true",
        help="no CUDA graphs: launch every kernel anew",
    )
    add(
        "--max-cudagraph-batch",
        "--cuda-graph-max-bs",
        dest="max_cudagraph_batch",
        type=int,
        metavar="N",
        help="largest decode batch with a CUDA graph (default: max-num-seqs, at most 256)",
    )
    add(
        "--max-cudagraph-prefill",
        dest="max_cudagraph_prefill",
        type=int,
        metavar="TOKENS",
        help="largest step with prompts that gets a CUDA graph; 0: none (default: 2048 or max-num-batched-tokens)",
    )
    add("--engine-seed", dest="seed", type=int, metavar="N", help="seed of dummy weights and of requests without one")
    add(
        "--distributed-timeout-seconds",
        "--dist-timeout",
        dest="distributed_timeout_s",
        type=float,
        metavar="S",
        help="a rank that is silent for so long ends the run (default: 30)",
    )
    add("--cpu-threads", dest="cpu_threads", type=int, metavar="N", help="compute threads per CPU rank")
    add(
        "--bind-cores",
        dest="bind_cores",
        action=argparse.BooleanOptionalAction,
        help="bind each CPU rank to its share of the cores (default: on)",
    )


class _ChunkSize(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if values == -1:
            setattr(namespace, f"{_PREFIX}enable_chunked_prefill", False)
        else:
            setattr(namespace, self.dest, values)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that the command line names, for ``LLM(model, **options)``."""
    return {name.removeprefix(_PREFIX): value for name, value in vars(args).items() if name.startswith(_PREFIX)}

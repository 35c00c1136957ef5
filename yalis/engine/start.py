"""Brings one rank up: resolve the configuration, join the others, load weights, make KV pages."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from yalis.comm.liveness import install_termination_handler
from yalis.config import EngineConfig
from yalis.engine.core import EngineCore
from yalis.engine.cuda_graphs import CaptureReceipt, GraphLimits
from yalis.engine.fixed_steps import capture_obstacle
from yalis.engine.ranks import RankContext, rank_topology
from yalis.engine.resolve import ResolvedConfig, resolve, resolve_device
from yalis.engine.runner import Runner
from yalis.engine.sampling_params import log_generation_defaults
from yalis.engine.tokenizer import Tokenizer, load_tokenizer
from yalis.errors import ConfigError
from yalis.utils.logging import get_logger
from yalis.utils.progress import byte_progress, count_progress, done_progress

logger = get_logger(__name__)

# Above them a step is long enough to hide its launches. With two ranks that takes more than 1024 tokens of an 8B model.
_MAX_GRAPH_BATCH = 256
_MAX_GRAPH_TOKENS = 2048


@dataclass(frozen=True)
class StartedRank:
    """A rank that is ready to step.

    Attributes:
        resolved: its configuration.
        ranks: the others.
        core: scheduler and runner.
        tokenizer: of the model, on rank 0; None where dummy weights come without one.
        max_model_len: most tokens in a sequence, KV capacity taken into account.
        load_s: seconds that the weights took.
        allowed: the cores that this thread was on before it was bound to its share; None where it was not bound.
    """

    resolved: ResolvedConfig
    ranks: RankContext
    core: EngineCore
    tokenizer: Tokenizer | None
    max_model_len: int
    load_s: float
    allowed: frozenset[int] | None = None

    def close(self) -> None:
        """Let go of the device, then part from the other ranks in good order, and of the cores. Idempotent.

        In this order because NCCL ends a communicator only when no CUDA graph holds its operations any more. The next
        engine of this process would otherwise get a share of this one's share of the cores.
        """
        self.core.runner.guides.close()
        self.core.runner.release()
        self.ranks.close()
        if self.allowed is not None:
            os.sched_setaffinity(0, self.allowed)


def start_rank(config: EngineConfig, env: Mapping[str, str] | None = None) -> StartedRank:
    """Bring this process up as the rank that its launch environment says; collective.

    Raises:
        ConfigError, CheckpointError: before anything is joined, so every rank says the same.
        CheckpointError: a file is damaged; what was lost on the other ranks is this rank, with these words.
        PeerLostError, CommError: another rank did not come up.
    """
    env = os.environ if env is None else env
    topology = rank_topology(config, env)
    resolved = resolve(config, topology, env)
    allowed = None
    if resolved.device.type == "cpu":
        if resolved.cores is not None and topology.world_size > 1:
            allowed = frozenset(os.sched_getaffinity(0))
            os.sched_setaffinity(0, resolved.cores)  # before any thread pool: threads inherit it
        torch.set_num_threads(resolved.cpu_threads)
    else:
        torch.cuda.set_device(resolved.device)
    ranks = RankContext.join(config, topology, resolve_device(config, topology))
    _end_with_reason(ranks)
    try:
        if config.all_reduce == "null" and ranks.is_root:
            logger.warning("all_reduce=null skips communication: times are of interest, tokens are wrong")
        if config.compute == "null" and ranks.is_root:
            logger.warning("compute=null skips products and attention: times are of interest, tokens are wrong")
        tokenizer = load_tokenizer(resolved.tokenizer_path, config) if ranks.is_root else None
        runner = Runner(resolved, ranks.tp, ranks.pp, ranks.pp_back, ranks.check)
        started = time.perf_counter()
        with byte_progress("loading weights", enabled=ranks.is_root) as on_progress:
            runner.load(on_progress)
        load_s = time.perf_counter() - started
        if resolved.device.type == "cuda":
            with done_progress("measuring matrix products", enabled=ranks.is_root) as on_product:
                runner.tune_products(on_product)
        # Loading and measuring take as long as a node's disk and caches let them. Nobody may wait for that in a
        # collective, where it would be taken for a loss.
        ranks.assemble("weights")
        graphs = _agree_graphs(runner, ranks.agree_min)
        num_blocks = runner.allocate_kv(ranks.agree_min, graphs)
        _capture(runner, graphs, show=ranks.is_root)
        ranks.assemble("start")
        capacity = num_blocks * config.block_size
        max_model_len = min(resolved.max_model_len, capacity)
        if max_model_len < resolved.max_model_len and ranks.is_root:
            logger.warning(
                "max_model_len lowered from %d to %d: the KV cache holds no more tokens; give it more memory "
                "(kv_cache_memory_bytes, num_kv_blocks) for longer sequences",
                resolved.max_model_len,
                max_model_len,
            )
        if ranks.is_root:
            log_generation_defaults(resolved.generation_defaults)
    except BaseException as error:
        if ranks.monitor is not None:
            ranks.monitor.failed(error)
        raise
    core = EngineCore(runner, max_model_len=max_model_len)
    return StartedRank(resolved, ranks, core, tokenizer, max_model_len, load_s, allowed)


def _agree_graphs(runner: Runner, agree_min: Callable[[int], int]) -> GraphLimits:
    """`_choose_graphs`, and no more than every other rank can: stages send each other what a size holds, so all must
    have the same sizes. Collective.

    Raises:
        ConfigError: CUDA graphs were asked for and another rank cannot.
    """
    mine = _choose_graphs(runner)
    if runner.device.type != "cuda":
        return mine
    ours = GraphLimits(agree_min(mine.decode_batch), agree_min(mine.prefill_tokens))
    user = runner.resolved.user
    for name, own, agreed in (
        ("max_cudagraph_batch", mine.decode_batch, ours.decode_batch),
        ("max_cudagraph_prefill", mine.prefill_tokens, ours.prefill_tokens),
    ):
        if agreed == own:
            continue
        if getattr(user, name):
            raise ConfigError(
                f"{name}={own}: another rank takes {agreed}, and all must have the same graphs; give every rank the "
                "same options, and look at its output"
            )
        logger.warning("%s lowered from %d to %d: another rank has no more; look at its output", name, own, agreed)
    return ours


def _choose_graphs(runner: Runner) -> GraphLimits:
    """What the user asked for or, by default, what can be captured.

    Raises:
        ConfigError: CUDA graphs were asked for and something cannot be captured.
    """
    user = runner.resolved.user
    asked = {name: getattr(user, name) for name in ("max_cudagraph_batch", "max_cudagraph_prefill")}
    if runner.device.type != "cuda":
        for name, value in asked.items():
            if value:
                raise ConfigError(f"{name}={value}: there are no CUDA graphs on {runner.device}; leave it out")
        return GraphLimits()
    if user.enforce_eager:
        logger.info("enforce_eager: no CUDA graphs")
        return GraphLimits()
    multiple = user.max_num_batched_tokens > 1
    most = {
        "max_cudagraph_batch": _MAX_GRAPH_BATCH,
        # A step of one token is a decode.
        "max_cudagraph_prefill": min(_MAX_GRAPH_TOKENS, user.max_num_batched_tokens) if multiple else 0,
    }
    chosen = {}
    for name, value in asked.items():
        prompts = name == "max_cudagraph_prefill"
        chosen[name] = most[name] if value is None else value
        obstacle = capture_obstacle(runner.attention, runner.tp, prompts=prompts)
        if obstacle is not None and chosen[name]:
            if value is not None:
                raise ConfigError(f"{name}={value}: {obstacle}; leave it out, or choose another")
            what = "steps with prompts" if prompts else "decode steps"
            logger.warning("no CUDA graphs of %s, so they are slower: %s", what, obstacle)
            chosen[name] = 0
    return GraphLimits(chosen["max_cudagraph_batch"], chosen["max_cudagraph_prefill"])


def _capture(runner: Runner, graphs: GraphLimits, *, show: bool) -> None:
    """Capture the chosen steps; collective."""
    if graphs.prefill_tokens:
        runner.fixed.prepare_prefill(graphs.prefill_tokens)
    if graphs.decode_batch:
        runner.fixed.prepare_decode(graphs.decode_batch)
    if not runner.fixed.num_graphs:
        return
    with count_progress("capturing CUDA graphs", runner.fixed.num_graphs, enabled=show) as on_progress:
        runner.fixed.capture(None if on_progress is None else lambda: on_progress(1))


def _end_with_reason(ranks: RankContext) -> None:
    """Have SIGTERM say why: launchers send it to the survivors of a lost rank, often before they know who was lost.

    A program that handles SIGTERM itself, or that uses the engine outside of its main thread, keeps its own ways.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if ranks.monitor is not None and on_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        install_termination_handler(ranks.monitor)


def engine_info(rank: StartedRank) -> dict[str, str | int | float]:
    """What a client should know about the engine: resolved choices, for people and records."""
    user, model = rank.resolved.user, rank.resolved.model
    captured = rank.core.runner.fixed.captured or CaptureReceipt(0, 0.0, 0)
    return {
        "model": user.model,
        "architecture": model.architecture,
        "vocab_size": model.vocab_size,
        "eos_token_ids": ",".join(map(str, rank.resolved.eos_token_ids)),
        "dtype": str(rank.resolved.dtype).removeprefix("torch."),
        "device": str(rank.resolved.device.type),
        "tensor_parallel_size": user.tensor_parallel_size,
        "pipeline_parallel_size": user.pipeline_parallel_size,
        "num_nodes": rank.ranks.topology.num_nodes,
        "ranks_per_node": rank.ranks.topology.ranks_per_node,
        "attention_backend": rank.core.runner.attention.name,
        "compute": user.compute,
        "cuda_graphs": rank.core.runner.fixed.decode_graphs,
        "prefill_cuda_graphs": rank.core.runner.fixed.prefill_graphs,
        "capture_s": round(captured.seconds, 3),
        "capture_mib": captured.nbytes >> 20,
        "all_reduce": user.all_reduce + (" (none: tokens are wrong)" if user.all_reduce == "null" else ""),
        "max_model_len": rank.max_model_len,
        "num_kv_blocks": rank.core.runner.num_kv_blocks,
        "block_size": user.block_size,
        "cpu_threads": rank.resolved.cpu_threads,
        "load_s": round(rank.load_s, 3),
    }

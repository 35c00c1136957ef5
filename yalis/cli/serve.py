"""``yalis serve``: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os
from typing import Any

from yalis.cli.engine_options import add_engine_options, engine_options
from yalis.cli.foreign_flags import add_flags_without_effect

_EPILOG = """examples:
  yalis serve models/demo
  yalis serve Qwen/Qwen3-0.6B -tp 2 --port 8000 --api-key-file keys.txt
  torchrun --nproc-per-node 4 -m yalis serve MODEL -tp 4
  srun --nodes 2 --ntasks-per-node 4 yalis serve MODEL -tp 8 --host 0.0.0.0 --api-key-file keys.txt
  node 0: yalis serve MODEL -tp 8 --nnodes 2 --node-rank 0 --master-addr HOST0
  node 1: yalis serve MODEL -tp 8 --nnodes 2 --node-rank 1 --master-addr HOST0 --headless

The interface is described in docs/serving.md and, by the server itself, at /openapi.json."""

# After the drain, node 0 aborts what is left and ends the run; other nodes must not be quicker.
_GOODBYE_S = 5.0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP with OpenAI's interface",
        description="Serve a model over HTTP with OpenAI's interface.",
        epilog=_EPILOG,
    )
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="folder in Hugging Face layout, or hub id")
    parser.add_argument("--model", "--model-path", dest="model", metavar="PATH", help="the same, as an option")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id (default: the newest)")
    http = parser.add_argument_group("server")
    http.add_argument("--host", default="127.0.0.1", help="interface to listen on (default: 127.0.0.1)")
    http.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    http.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME", help="names for requests (default: the model)"
    )
    http.add_argument(
        "--api-key",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys, one of which requests must carry",
    )
    http.add_argument("--api-key-file", metavar="FILE", help="file with such keys, one per line")
    http.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="browsers there may call (CORS; default: none)",
    )
    http.add_argument("--chat-template", metavar="FILE", help="template in place of the checkpoint's")
    http.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="hermes, llama3_json, mistral or mistral_args (default: by the template)",
    )
    http.add_argument(
        "--max-queued-requests",
        type=int,
        default=1024,
        metavar="N",
        help="sequences that may wait beyond --max-num-seqs; more get 429 (default: 1024)",
    )
    http.add_argument("--max-body-bytes", type=int, default=16 << 20, metavar="N", help="default: 16 MiB")
    http.add_argument(
        "--body-timeout", type=float, default=30.0, metavar="S", help="for a request to arrive (default: 30)"
    )
    http.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="for open requests to finish after SIGTERM; the same on every node (default: 30)",
    )
    http.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="start the engine again so often (default: 0)"
    )
    http.add_argument("--profile-dir", metavar="DIR", help="where /stop_profile writes the ranks' traces")
    http.add_argument(
        "--log-requests",
        "--enable-log-requests",
        action="store_true",
        help="log requests with their prompts (default: never)",
    )
    http.add_argument(
        "--disable-log-requests", dest="log_requests", action="store_false", help="the default: do not log them"
    )
    nodes = parser.add_argument_group("several nodes without a launcher")
    nodes.add_argument("--nnodes", "-n", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    nodes.add_argument("--node-rank", "-r", type=int, default=0, metavar="I", help="this node (default: 0)")
    nodes.add_argument("--master-addr", metavar="HOST", help="address of node 0")
    nodes.add_argument("--master-port", type=int, default=29501, metavar="PORT", help="port there (default: 29501)")
    nodes.add_argument("--dist-init-addr", metavar="HOST:PORT", help="both in one, as SGLang spells it")
    nodes.add_argument("--headless", action="store_true", help="ranks only, no HTTP: for nodes other than 0")
    add_engine_options(parser)
    # vLLM's name; where requests come from the command line, it is the request's.
    parser.add_argument(
        "--seed",
        "--random-seed",
        dest="engine.seed",
        type=int,
        default=argparse.SUPPRESS,
        help="same as --engine-seed",
    )
    add_flags_without_effect(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve; the exit code."""
    from yalis.config import EngineConfig
    from yalis.errors import ConfigError
    from yalis.launch import is_launched

    if (args.model is None) == (args.model_positional is None):
        raise ConfigError("name one model, and before the options: yalis serve MODEL")
    model = folder = args.model or args.model_positional
    if args.revision is not None:
        from yalis.weights.hub import resolve_model_path

        folder = str(resolve_model_path(model, args.revision))
    config = EngineConfig.from_mapping({"model": folder, **engine_options(args)})
    nodes = _nodes(args)
    launched = is_launched(os.environ)
    if launched and nodes is not None:
        raise ConfigError(
            "the launcher places the ranks: leave out --nnodes, --node-rank, --master-addr and --headless"
        )
    if args.headless:
        return _headless(config, nodes, args.drain_timeout)
    if launched and not _is_first_rank():
        from yalis.engine.worker import run_rank

        return run_rank(config, "", serving=True)
    if nodes is not None and nodes.index != 0:
        raise ConfigError(f"node {nodes.index} has no HTTP interface: add --headless there")
    try:
        from yalis.server.launch import serve
        from yalis.server.options import ServerOptions, read_api_keys, read_template
    except ModuleNotFoundError as error:
        raise ConfigError(f"the server needs {error.name}; install it with: pip install 'yalis[serve]'") from error
    keys = (*args.api_key, *(read_api_keys(args.api_key_file) if args.api_key_file else ()))
    options = ServerOptions(
        host=args.host,
        port=args.port,
        served_model_names=tuple(args.served_model_name) or (model,),
        api_keys=keys,
        allowed_origins=tuple(args.allowed_origins),
        chat_template=read_template(args.chat_template) if args.chat_template else None,
        tool_call_parser=args.tool_call_parser,
        max_queued_requests=args.max_queued_requests,
        max_body_bytes=args.max_body_bytes,
        body_timeout_s=args.body_timeout,
        drain_timeout_s=args.drain_timeout,
        restarts=args.restarts,
        profile_dir=args.profile_dir,
        log_requests=args.log_requests,
    )
    return serve(config, options, nodes=nodes, join=launched)


def _nodes(args: argparse.Namespace) -> Any:
    from yalis.errors import ConfigError
    from yalis.launch import Nodes

    address, port = args.master_addr, args.master_port
    if args.dist_init_addr:
        address, _, text = args.dist_init_addr.rpartition(":")
        if not text.isdecimal():
            raise ConfigError(f"dist_init_addr={args.dist_init_addr}: must look like HOST:PORT")
        port = int(text)
    if args.nnodes == 1 and args.node_rank == 0 and not args.headless:
        return None
    return Nodes(args.nnodes, args.node_rank, address or "", port)


def _is_first_rank() -> bool:
    from yalis.comm.topology import from_environment

    return from_environment(os.environ, ranks_per_node=1).rank == 0


def _headless(config: Any, nodes: Any, drain_timeout_s: float) -> int:
    """This node's ranks and nothing else; ends with them.

    Service managers tell all nodes to stop at once, but only node 0 knows of open requests: after a signal the ranks
    stay until rank 0 ends the run, at most ``drain_timeout_s`` and what node 0 needs to say goodbye. A second signal
    ends them at once.
    """
    import signal
    import sys
    import time

    from yalis.comm.liveness import EXIT_PEER_LOST
    from yalis.engine.process import rank_command
    from yalis.errors import ConfigError
    from yalis.launch import launch_ranks

    if nodes.index == 0:
        raise ConfigError("node 0 serves HTTP: leave out --headless there, or give this node its --node-rank")
    if not 0 <= drain_timeout_s < float("inf"):
        raise ConfigError(f"drain_timeout_s={drain_timeout_s}: must be a number of seconds, 0 or more")
    ranks = launch_ranks(config.world_size, rank_command(config, "", serving=True), report=False, nodes=nodes)
    signals, limit = 0, drain_timeout_s + _GOODBYE_S
    deadline = float("inf")

    def stop(number: int, frame: Any) -> None:
        nonlocal signals
        signals += 1

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while ranks.poll() is None and signals < 2 and time.monotonic() < deadline:
        if signals and not ranks.started:
            break  # node 0 has not come: there is nothing to wait for
        if signals and deadline == float("inf"):
            deadline = time.monotonic() + limit
            sys.stderr.write(f"yalis: asked to stop; node 0 has {limit:g} s to end the run\n")
        ranks.wait(0.2)
    if ranks.poll() is None and time.monotonic() >= deadline:
        sys.stderr.write(f"yalis: node 0 did not end the run within {limit:g} s; ending this node's ranks\n")
    ranks.terminate()
    if ranks.poll() or signals:
        return 0
    for failure in ranks.failures.values():
        sys.stderr.write(f"yalis: error: {failure}\n")
    return EXIT_PEER_LOST

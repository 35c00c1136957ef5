"""``yalis demo``: the main job end to end on ranks of this machine, and a table of where the time went."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.cli.engine_options import add_engine_options, engine_options
from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.engine.messages import StepTimes
    from yalis.engine.outputs import RequestOutput

PROMPTS = (
    "This program is free software",
    "The licenses for most software are designed to",
    "You may copy and distribute",
    "THE SOFTWARE IS PROVIDED",
)

_EPILOG = """examples:
  yalis demo
  yalis demo --tp 2 --pp 2 --max-tokens 100
  yalis demo --model /models/Llama-3.2-1B --tp 2 --ranks-per-node 1"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="run the small demo model on 2 x 2 ranks and show where the time goes",
        description="Generate with 4 CPU ranks declared as 2 nodes x 2, once with each all-reduce algorithm, and show "
        "where the time of a step goes.",
        epilog=_EPILOG,
    )
    parser.add_argument("--model", default=None, metavar="PATH", help="default: the repository's models/demo")
    parser.add_argument(
        "--max-tokens", type=int, default=48, metavar="N", help="output tokens per prompt (default: 48)"
    )
    parser.add_argument(
        "--algorithms", metavar="A,B", help="all-reduce algorithms to compare (default: those that fit)"
    )
    add_engine_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo; 1 if the algorithms' texts differ from each other."""
    from yalis.cli.tables import print_table

    model = args.model or str(_demo_model())
    options = {"tensor_parallel_size": 4, "ranks_per_node": 2, "dtype": "float32"} | engine_options(args)
    algorithms, left_out = _algorithms(args.algorithms, options)
    rows: list[list[str]] = []
    texts: dict[str, list[str]] = {}
    for algorithm in algorithms:
        outputs, times, ready_s, info = _generate(model, options | {"all_reduce": algorithm}, args.max_tokens)
        if not texts:
            _introduce(info, outputs)
        texts[algorithm] = [o.outputs[0].text for o in outputs]
        rows.append([algorithm, *_speed(outputs), *_split(times), f"{ready_s:.1f}"])
    print_table(
        [
            "",
            "TTFT",
            "TPOT",
            "tok/s",
            "step",
            "compute",
            "intra",
            "inter",
            "flat",
            "stages",
            "host",
            "start",
        ],
        rows,
        title=f"\n{len(PROMPTS)} prompts at once, {args.max_tokens} tokens each, by all-reduce algorithm",
    )
    print(
        "TTFT, TPOT in ms; step and its parts in ms on rank 0; start in s.\n"
        "intra, inter: all-reduce inside a node and between nodes; flat: an algorithm\n"
        "that does not tell them apart. All ranks share this machine, so the numbers\n"
        "show the shape of a multi-node run, not the speed of a network."
    )
    if "nvrar" in algorithms:
        print("nvrar takes the host's memory for the network between nodes, too.")
    if left_out:
        print(left_out)
    different = [a for a in algorithms if texts[a] != texts[algorithms[0]]]
    if different:
        sys.stderr.write(f"yalis: error: {', '.join(different)} gave other text than {algorithms[0]}\n")
        return 1
    print(f"Same text with every algorithm: {', '.join(algorithms)}.")
    return 0


def _demo_model() -> Path:
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / "models" / "demo" / "config.json").exists():
            return folder / "models" / "demo"
    raise ConfigError("models/demo was not found: run inside the repository, or name a checkpoint with --model")


def _algorithms(given: str | None, options: dict[str, Any]) -> tuple[list[str], str]:
    """What to compare, and a sentence about what else there would be."""
    if given is not None:
        return given.split(","), ""
    if options.get("all_reduce", "auto") != "auto":
        return [options["all_reduce"]], ""
    tp = options["tensor_parallel_size"]
    if tp == 1:
        return ["auto"], ""
    one_node = tp <= (options.get("ranks_per_node") or tp)
    names = ["torch", "rd", "shm"] if one_node else ["torch", "rd"]
    why_not = _why_no_nvrar(options)
    return (names, f"Without nvrar: {why_not}.") if why_not else ([*names, "nvrar"], "")


def _why_no_nvrar(options: dict[str, Any]) -> str:
    """Why NVRAR's host library cannot serve here; empty where it can. Builds it, so that no rank has to."""
    import torch

    from yalis.comm.nvrar.build import library_path
    from yalis.errors import BuildError
    from yalis.launch import is_launched

    if options.get("device") == "cuda" or (options.get("device", "auto") == "auto" and torch.cuda.is_available()):
        return "on GPUs it needs NVSHMEM; name it with --algorithms"
    if is_launched(os.environ):
        return "on CPUs it is for the ranks of one host"
    try:
        library_path("host")
    except (BuildError, OSError) as error:
        return str(error).splitlines()[0]
    return ""


def _generate(
    model: str, options: dict[str, Any], max_tokens: int
) -> tuple[list[RequestOutput], StepTimes, float, dict[str, Any]]:
    import time

    from yalis.engine.llm import LLM
    from yalis.engine.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    started = time.perf_counter()
    with LLM(model, **options) as llm:
        ready_s = time.perf_counter() - started
        llm.generate(list(PROMPTS), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))  # warm up
        llm.stats(reset=True)
        outputs = llm.generate(list(PROMPTS), params)
        for output in outputs:
            if output.error is not None:
                raise ConfigError(f"prompt {output.prompt!r}: {output.error}")
        return outputs, llm.stats().times, ready_s, dict(llm.info)


def _introduce(info: dict[str, Any], outputs: list[RequestOutput]) -> None:
    print(
        f"{info['architecture']} in {info['dtype']} on {info['device']}: TP {info['tensor_parallel_size']} x PP "
        f"{info['pipeline_parallel_size']}, {info['num_nodes']} node(s) of {info['ranks_per_node']} rank(s),\n"
        f"attention {info['attention_backend']}\n"
    )
    for output in outputs:
        print(f"> {output.prompt}{output.outputs[0].text}\n")


def _speed(outputs: list[RequestOutput]) -> list[str]:
    metrics = [o.metrics for o in outputs]
    ttft = sum(m.ttft_s or 0.0 for m in metrics) / len(metrics)
    tpot = sum(m.tpot_s or 0.0 for m in metrics) / len(metrics)
    span = max(m.finished_s or 0.0 for m in metrics) - min(m.arrival_s for m in metrics)
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    return [f"{1e3 * ttft:.1f}", f"{1e3 * tpot:.2f}", f"{tokens / span:.0f}"]


def _split(times: StepTimes) -> list[str]:
    per = 1e3 / max(1, times.steps)
    parts = (times.total_s, times.compute_s, times.intra_s, times.inter_s, times.flat_s, times.pipeline_s, times.host_s)
    return [f"{part * per:.2f}" for part in parts]

"""Short prompts on GPUs with CUDA graphs of padded steps and without: first tokens, and prompts among decodes.

    python bench/gpu_prompts.py --model bench/shapes/llama-3.1-8b --tp 2 --all-reduce nvrar --out prompts.json

Two engines, one after the other, over the same prompts. A cell BxT+1 is the time from handing in B prompts of T tokens
until all have their first token; "mixed" is a list of requests of 48 to 400 tokens in and 16 to 64 out, of which 16 run
at a time, so that most steps with prompts hold decodes as well. Median of --rounds (7), 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from yalis import LLM, SamplingParams
from yalis.bench.harness import percentile
from yalis.bench.latency import Shape, measure

PROMPTS = (16, 64, 128, 256, 400, 512, 1024, 2048)
BATCHES = ((4, 64), (8, 64), (8, 128))
MIXED_REQUESTS, MIXED_RUNNING = 96, 16


def mixed_s(llm: LLM, rounds: int) -> list[float]:
    """Seconds of the whole list, once a round; the first round is warm-up."""
    found = []
    for number in range(rounds + 1):
        dice = random.Random(number)
        vocab = int(llm.info["vocab_size"])
        prompts: list[Any] = [
            [dice.randrange(vocab) for _ in range(dice.randrange(48, 400))] for _ in range(MIXED_REQUESTS)
        ]
        params = [
            SamplingParams(temperature=0.0, max_tokens=dice.randrange(16, 64), ignore_eos=True, detokenize=False)
            for _ in prompts
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        if number:
            found.append(time.perf_counter() - started)
        assert all(
            o.error is None and len(o.outputs[0].token_ids) == p.max_tokens
            for o, p in zip(outputs, params, strict=True)
        )
    return found


def spread(samples: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{p}": round(1e3 * percentile(samples, p / 100), 3) for p in (10, 50, 90)}


def run(arguments: argparse.Namespace, most_tokens: int) -> dict[str, Any]:
    """Every cell, with graphs of steps with prompts of up to ``most_tokens`` tokens."""
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": 4096, "enable_prefix_caching": False}
    started = time.perf_counter()
    with LLM(
        arguments.model,
        tensor_parallel_size=arguments.tp,
        all_reduce=arguments.all_reduce,
        max_num_seqs=MIXED_RUNNING,
        max_cudagraph_prefill=most_tokens,
        **options,
    ) as llm:
        found: dict[str, Any] = {"ready_s": round(time.perf_counter() - started, 2)}
        found |= {name: llm.info[name] for name in ("prefill_cuda_graphs", "capture_s", "capture_mib")}
        for batch, tokens in (*((1, tokens) for tokens in PROMPTS), *BATCHES):
            shape = Shape(batch, tokens, 1)
            samples, _ = measure(
                llm, batch_size=batch, input_len=tokens, output_len=1, warmup=2, iters=arguments.rounds, seed=tokens
            )
            found[shape.name] = spread(samples.first)
        llm.stats(reset=True)
        found["mixed"] = spread(mixed_s(llm, max(1, arguments.rounds // 2)))
        times = llm.stats().times
        found["mixed_steps"] = {"decode": times.decode_steps, "padded": times.padded_steps, "other": times.other_steps}
    return found


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bench/shapes/llama-3.1-8b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--all-reduce", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048, help="of the largest graph (2048)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = {"without": run(arguments, 0), "with": run(arguments, arguments.tokens)}
    arguments.out.write_text(json.dumps({"results": found, "tp": arguments.tp, "all_reduce": arguments.all_reduce}))
    print(f"{arguments.model}, TP {arguments.tp}, all-reduce {arguments.all_reduce}; {found['with']}", file=sys.stderr)
    print(f"{'ms':>10} {'without':>28} {'with graphs':>28}")
    for cell, after in found["with"].items():
        if isinstance(after, dict) and "p50" in after:
            before = found["without"][cell]
            words = [f"{x['p50']:9.2f} ({x['p10']:.2f} to {x['p90']:.2f})" for x in (before, after)]
            print(f"{cell:>10} {words[0]:>28} {words[1]:>28}   {before['p50'] / after['p50']:.2f}x")


if __name__ == "__main__":
    main()

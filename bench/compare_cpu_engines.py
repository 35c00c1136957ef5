"""Decode and prefill speed of yalis beside other engines on this machine's CPU: interleaved, so that ratios hold.

    python bench/compare_cpu_engines.py [--shapes llama-254m qwen3-0.6b] [--rounds 5] [--output-json FILE]
        [--engines yalis yalis-tp2 transformers] [--vllm-python VENV/bin/python]

Each engine runs in a process of its own with dummy bf16 weights and is asked in turn for one sample, A B C A B C ...:
the machine's memory bandwidth drifts within seconds, and so hits all alike. Two wall-clock times per sample, of the
same prompts: t1 for one output token (TTFT) and tN for N; TPOT = (tN - t1) / (N - 1). Greedy, no early end, no prefix
reuse. ``transformers`` is its ``generate``; ``transformers-forward`` is a bare loop of forward calls with its own cache
and logits of the last position only, the least that it can take. ``vllm`` has its defaults, ``vllm-best`` the variables
of ``--vllm-env``, ``vllm-tp2`` two ranks with a core each and the same variables but the binding. vLLM's processes spin
while they wait for work, so they are stopped while others are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parent / "shapes"
ENGINES = ("yalis", "yalis-tp2", "transformers", "transformers-forward", "vllm", "vllm-best", "vllm-tp2")
_VLLM_BIND = "VLLM_CPU_OMP_THREADS_BIND"


# ---- one engine, in a process of its own ------------------------------------------------------------------------


def yalis_engine(model: str, batches: list[int], *, tp: int) -> Any:
    from yalis import LLM, SamplingParams

    llm = LLM(
        model,
        load_format="dummy",
        tensor_parallel_size=tp,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=max(batches),
    )

    def run(prompts: list[list[int]], tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        elapsed = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == tokens for o in outputs), outputs[0].error
        return elapsed

    return run


def transformers_engine(model: str, batches: list[int], *, bare: bool) -> Any:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.AutoConfig.from_pretrained(model)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        out = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        elapsed = time.perf_counter() - started
        assert out.shape[1] == ids.shape[1] + tokens
        return elapsed

    @torch.inference_mode()
    def forward(prompts: list[list[int]], tokens: int) -> float:
        started = time.perf_counter()
        ids = torch.tensor(prompts)
        cache = transformers.DynamicCache(config=config)
        for _ in range(tokens):
            out = lm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started

    return forward if bare else generate


def vllm_engine(model: str, batches: list[int], *, tp: int) -> Any:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        load_format="dummy",
        dtype="bfloat16",
        tensor_parallel_size=tp,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        disable_log_stats=True,
        gpu_memory_utilization=0.3,  # here: share of host memory; the default counts on an idle host
    )

    def run(prompts: list[list[int]], tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        elapsed = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == tokens for o in outputs)
        return elapsed

    return run


def serve_engine(name: str, model: str, batches: list[int]) -> None:
    """Child: answer each line {"prompts", "tokens"} with the seconds it took. Replies go to the original stdout."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints must not mix with the replies
    started = time.perf_counter()
    if name.startswith("yalis"):
        run = yalis_engine(model, batches, tp=2 if name.endswith("tp2") else 1)
    elif name.startswith("transformers"):
        run = transformers_engine(model, batches, bare=name.endswith("forward"))
    else:
        run = vllm_engine(model, batches, tp=2 if name.endswith("tp2") else 1)
    replies.write(json.dumps({"ready_s": time.perf_counter() - started}) + "\n")
    replies.flush()
    for line in sys.stdin:
        ask = json.loads(line)
        replies.write(json.dumps({"seconds": run(ask["prompts"], ask["tokens"])}) + "\n")
        replies.flush()


# ---- the comparison ---------------------------------------------------------------------------------------------


class Engine:
    """A child process and its samples."""

    def __init__(self, name: str, shape: str, python: str, env: dict[str, str], batches: list[int]):
        self.name = name
        self._spins = name.startswith("vllm")
        command = [python, __file__, "--serve", name, "--model", str(SHAPES / shape), "--batches", *map(str, batches)]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | env,
            start_new_session=self._spins,  # a group of its own, so that all of it can be stopped
        )
        self._read()
        self.ready_s = time.perf_counter() - started
        self._signal(signal.SIGSTOP)
        self.ttft: dict[int, list[float]] = {b: [] for b in batches}
        self.tpot: dict[int, list[float]] = {b: [] for b in batches}

    def _signal(self, which: signal.Signals) -> None:
        if self._spins:
            with contextlib.suppress(ProcessLookupError):  # it ended: reading its answer will say so
                os.killpg(self._process.pid, which)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait(30)}; see its output above")
        return json.loads(line)

    def _ask(self, prompts: list[list[int]], tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def sample(self, prompts: list[list[int]], tokens: int, *, keep: bool) -> None:
        """One t1 and one tN, after an uncounted t1: an engine that sat idle while others ran starts cold."""
        self._signal(signal.SIGCONT)
        self._ask(prompts, 1)
        first = self._ask(prompts, 1)
        whole = self._ask(prompts, tokens)
        self._signal(signal.SIGSTOP)
        if keep:
            self.ttft[len(prompts)].append(first)
            self.tpot[len(prompts)].append((whole - first) / (tokens - 1))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(60)
        finally:
            self._signal(signal.SIGKILL)


def environment(name: str, args: argparse.Namespace) -> dict[str, str]:
    """Variables of an engine's process beside ours."""
    given = dict(pair.split("=", 1) for pair in args.vllm_env)
    if name == "vllm-best":
        return given
    return given | {_VLLM_BIND: "0|1"} if name == "vllm-tp2" else {}


def compare(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    vocab = json.loads((SHAPES / shape / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    engines = []
    for name in args.engines:
        python = args.vllm_python if name.startswith("vllm") else sys.executable
        engines.append(Engine(name, shape, python, environment(name, args), args.batches))
        print(f"{shape}: {name} ready after {engines[-1].ready_s:.1f} s", file=sys.stderr)
    try:
        for number in range(args.warmup + args.rounds):
            for batch in args.batches:
                prompts = [[rng.randrange(vocab) for _ in range(args.input_len)] for _ in range(batch)]
                for engine in engines:
                    engine.sample(prompts, args.output_len, keep=number >= args.warmup)
    finally:
        for engine in engines:
            engine.close()
    return {e.name: {"ready_s": e.ready_s, "ttft_s": e.ttft, "tpot_s": e.tpot} for e in engines}


def report(shape: str, results: dict[str, Any], batches: list[int]) -> None:
    print(f"\n{shape}: ms, median [min .. max]; x = how many times faster yalis is, median of the rounds' ratios")
    base = results.get("yalis")
    header = f"{'engine':<24}{'ready s':>8}"
    for batch in batches:
        header += f"{f'TPOT b{batch}':>24}{'x':>6}{f'TTFT b{batch}':>26}{'x':>6}"
    print(header)
    for name, result in results.items():
        line = f"{name:<24}{result['ready_s']:>8.1f}"
        for batch in batches:
            for key, width in (("tpot_s", 24), ("ttft_s", 26)):
                values = [1e3 * v for v in result[key][batch]]
                text = f"{statistics.median(values):.2f} [{min(values):.1f} .. {max(values):.1f}]"
                ratio = ""
                if base is not None:
                    pairs = zip(result[key][batch], base[key][batch], strict=True)
                    ratio = f"{statistics.median(a / b for a, b in pairs):.2f}"
                line += f"{text:>{width}}{ratio:>6}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-254m", "qwen3-0.6b"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["yalis", "yalis-tp2", "transformers"])
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter of the environment that has vLLM")
    parser.add_argument(
        "--vllm-env", nargs="+", default=[f"{_VLLM_BIND}=0-1"], metavar="NAME=VALUE", help="variables of vllm-best"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_engine(args.serve, args.model, args.batches)
        return
    results = {}
    for shape in args.shapes:
        results[shape] = compare(shape, args)
        report(shape, results[shape], args.batches)
        if args.output_json:  # after each shape: an engine may fail in the next
            from yalis.bench.harness import write_record

            config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
            write_record(args.output_json, "compare_cpu_engines", config=config, results={}, samples=results)


if __name__ == "__main__":
    main()

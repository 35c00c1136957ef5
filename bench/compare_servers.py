"""`yalis serve` beside vLLM's server on this machine's CPU, under the same load of `yalis bench serve`, in turn.

    python bench/compare_servers.py --vllm-python VENV/bin/python [--rounds 3] [--output-json FILE]
        [--servers yalis yalis-1thread vllm vllm-bothcores] [--shapes demo llama-254m] [--concurrency 1 8 32]

All servers run at the same time and are measured one after the other, A B C A B C ..., because a shared machine
drifts. Whoever is not measured is stopped if it would otherwise take cores while it is idle (vLLM's busy loop; yalis
sleeps). Prompts are random tokens, new in each round and the same for all servers; outputs have their full length. The
demo model has its weights, the other shape random ones. Client and servers share the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from serve_process import ROOT, ServerProcess, serving

from yalis.utils.machine import machine_record

SERVERS = ("yalis", "yalis-1thread", "vllm", "vllm-bothcores")
SHAPES = {"demo": ROOT / "models" / "demo", "llama-254m": ROOT / "bench" / "shapes" / "llama-254m"}
MAX_LEN, MAX_SEQS = 1024, 64
VLLM_START_S = 400.0
KEYS = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "mean_itl_ms", "p99_itl_ms", "output_throughput")


class Vllm:
    """vLLM's server in an environment of its own, stopped while it is not measured."""

    def __init__(self, python: str, shape: str, port: int, *, both_cores: bool, log: Path):
        model = str(SHAPES[shape])
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
        command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", str(MAX_LEN)]
        command += ["--max-num-seqs", str(MAX_SEQS), "--disable-log-stats", "--gpu-memory-utilization", "0.3"]
        command += ["--served-model-name", "m", "--tokenizer", str(SHAPES["demo"])]
        if shape != "demo":
            command += ["--load-format", "dummy"]
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if both_cores:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "0-1"
        self.url = f"http://127.0.0.1:{port}"
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        deadline = time.monotonic() + VLLM_START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise SystemExit(f"vLLM did not come up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(1.0)

    def signal(self, number: int) -> None:
        """Send a signal to the server and its children."""
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def close(self) -> None:
        """End it and its children."""
        tree = self._tree()
        self.signal(signal.SIGCONT)
        self._process.terminate()
        _, left = psutil.wait_procs(tree, timeout=20)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(20)


def load(url: str, vocab: int, concurrency: int, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run of `yalis bench serve`; its result."""
    with tempfile.TemporaryDirectory() as folder:
        count = max(args.min_requests, args.waves * concurrency)
        command = [sys.executable, "-m", "yalis", "bench", "serve", "--base-url", url, "--model", "m"]
        command += ["--vocab-size", str(vocab), "--num-prompts", str(count), "--max-concurrency", str(concurrency)]
        command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len), "--seed", str(seed)]
        command += ["--num-warmups", str(min(4, concurrency)), "--disable-tqdm", "--metric-percentiles", "50,99"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "r.json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise SystemExit(f"the load on {url} failed:\n{done.stdout}{done.stderr}")
        result = dict(json.loads((Path(folder) / "r.json").read_text()))
    if result["failed"] or result["total_output_tokens"] != count * args.output_len:
        raise SystemExit(f"{url}: {result['failed']} failed, {result['total_output_tokens']} tokens")
    return {key: result[key] for key in (*KEYS, "median_ttft_ms", "median_itl_ms", "duration", "completed")}


def compare(shape: str, args: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Samples by server and concurrency."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    vocab = min(2000, json.loads((SHAPES[shape] / "config.json").read_text())["vocab_size"])
    servers: dict[str, ServerProcess | Vllm] = {}
    for index, name in enumerate(args.servers):
        started = time.monotonic()
        if name.startswith("vllm"):
            port = args.port + index
            vllm = Vllm(args.vllm_python, shape, port, both_cores=name != "vllm", log=folder / name)
            stack.callback(vllm.close)
            vllm.signal(signal.SIGSTOP)
            servers[name] = vllm
        else:
            options = ["--served-model-name", "m", "--max-model-len", str(MAX_LEN), "--max-num-seqs", str(MAX_SEQS)]
            options += ["--dtype", "bfloat16", "--tokenizer", str(SHAPES["demo"])]
            options += [] if shape == "demo" else ["--load-format", "dummy"]
            options += ["--cpu-threads", "1"] if name == "yalis-1thread" else []
            servers[name] = stack.enter_context(serving(str(SHAPES[shape]), *options))
        print(f"{shape}: {name} ready after {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    samples: dict[str, Any] = {name: {str(c): [] for c in args.concurrency} for name in servers}
    for number in range(args.rounds):
        for concurrency in args.concurrency:
            for name, server in servers.items():
                if isinstance(server, Vllm):
                    server.signal(signal.SIGCONT)
                try:
                    result = load(server.url, vocab, concurrency, args, seed=1000 * number + concurrency)
                finally:
                    if isinstance(server, Vllm):
                        server.signal(signal.SIGSTOP)
                samples[name][str(concurrency)].append(result)
                words = ", ".join(f"{key} {result[key]:.1f}" for key in KEYS)
                print(f"{shape} round {number} c={concurrency} {name}: {words}", file=sys.stderr, flush=True)
    return samples


def report(shape: str, samples: dict[str, Any]) -> None:
    """Markdown: medians over the rounds, and in brackets the extremes."""
    print(f"\n| {shape}: clients | server | TTFT mean ms | ITL mean ms | ITL p99 ms | output tokens/s | x |")
    print("|---|---|---|---|---|---|---|")
    first = next(iter(samples))
    for concurrency in samples[first]:
        for name, by_load in samples.items():
            runs = by_load[concurrency]
            cells = []
            for key in ("mean_ttft_ms", "mean_itl_ms", "p99_itl_ms", "output_throughput"):
                values = [run[key] for run in runs]
                cells.append(f"{statistics.median(values):.1f} [{min(values):.1f} .. {max(values):.1f}]")
            pairs = zip(samples[first][concurrency], runs, strict=True)
            ratio = statistics.median(a["output_throughput"] / b["output_throughput"] for a, b in pairs)
            print(f"| {concurrency} | {name} | {' | '.join(cells)} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter of the environment that has vLLM")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--min-requests", type=int, default=8)
    parser.add_argument("--waves", type=int, default=3, help="requests per client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8210, help="first port of vLLM's servers")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    results = {}
    for shape in args.shapes:
        with contextlib.ExitStack() as stack:
            results[shape] = compare(shape, args, stack)
        report(shape, results[shape])
    if args.output_json:
        config = {k: v for k, v in vars(args).items() if k not in ("output_json", "vllm_python")}
        record = {"kind": "compare_servers", "config": config, "samples": results, "machine": machine_record()}
        args.output_json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

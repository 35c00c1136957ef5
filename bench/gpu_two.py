"""The engine on two GPUs of one host: does it run, do the tests pass, how fast is it, and what was missed by how much.

    python bench/gpu_two.py --out two.json                            everything, at most --seconds (570)
    python bench/gpu_two.py --out b.json --resume a.json              what a.json lacks or what failed there
    python bench/gpu_two.py --out c.json --parts machine,smoke,tune,70b-nvrar
    python bench/gpu_two.py --show c.json                             only the verdicts of a file
    python bench/gpu_two.py --list                                    the parts and their limits

Parts run in order of value, each in processes of its own with a limit; one that fails does not stop the rest, and the
file is written after each. Not all fit into ten minutes: one call for the tests (`--parts tests`), one for the rest up
to 8b-nvrar, one that resumes. NVRAR's library is compiled on first use unless YALIS_NVRAR_DIR or --nvrar names a folder
that `yalis build --output` filled. At the end: every goal of the project with met, missed or not measured, what NVRAR
gains over the others, and for each miss where the time of the step went.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from nvrar_two_gpus import QUIET, bounded

ROOT = Path(__file__).resolve().parents[1]
DEMO = "models/demo"
SHAPES = {"8b": "bench/shapes/llama-3.1-8b", "70b": "bench/shapes/llama-3.1-70b"}
CELLS = ("1x512+129", "8x512+129", "32x512+129", "1x2048+1", "8x2048+1")
# What the project asks of two H200, by part, in milliseconds per cell: decode steps at batch 1, 8, 32, then the time to
# the first tokens of 1 and 8 prompts of 2048.
GOALS = {
    "8b-tp1": (4.10, 4.30, 4.80, 51.0, 389.0),
    "8b-nvrar": (2.35, 2.50, 2.90, 33.0, 235.0),
    "70b-nvrar": (17.6, 18.2, 19.0, 253.0, 1945.0),
}
# vLLM 0.25.1 there, with its own all-reduce kernel between the two GPUs.
VLLM = {
    "8b-tp1": (4.91, 5.13, 5.79, 51.0, 389.0),
    "8b-nvrar": (3.50, 3.69, 4.03, 33.0, 235.0),
    "70b-nvrar": (20.7, 21.4, 21.7, 253.0, 1945.0),
}
START_GOAL_S = 60.0  # an 8B shape, caches empty, to the first token
TAIL = 6000  # characters of a part's output that are kept

Document = dict[str, Any]


# ---- what the figures say: pure -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One goal: what was measured is ``None`` where nothing was, and then ``met`` is, too."""

    part: str
    what: str
    measured: float | None
    goal: float
    vllm: float | None

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached."""
        return None if self.measured is None else self.measured <= self.goal


def record_of(document: Document, part: str) -> Mapping[str, Any]:
    """The results that a part's command wrote; empty where there are none."""
    found: Mapping[str, Any] = document["parts"].get(part, {}).get("record", {}).get("results", {})
    return found


def measured_ms(document: Document, part: str, cell: str) -> float | None:
    """Median of a cell of a part's table."""
    found = record_of(document, part).get("cells", {}).get(cell)
    return None if found is None else float(found["ms"]["median"])


def verdicts(document: Document) -> list[Verdict]:
    """Every goal of the project, held against the figures."""
    found = []
    for part, goals in GOALS.items():
        for cell, goal, vllm in zip(CELLS, goals, VLLM[part], strict=True):
            found.append(Verdict(part, cell, measured_ms(document, part, cell), goal, vllm))
    start = record_of(document, "start")
    first = start.get("summary_ms", {}).get("ttft", {}).get("p50")
    took = None if first is None else start["ready_s"] + first / 1e3
    found.append(Verdict("start", "seconds to the first token", took, START_GOAL_S, None))
    return found


def breakdown(document: Document, part: str, cell: str) -> str:
    """Where the time of a part's steps went, in words; empty where no trace was taken."""
    results = record_of(document, part)
    words = []
    parts_us = results.get("breakdown", {}).get(cell, {}).get("breakdown", {}).get("parts_us")
    if parts_us:
        words.append(", ".join(f"{name} {us:.0f}" for name, us in parts_us.items()) + " us a step")
    exposed = results.get("exposed_communication_ms", {}).get(cell)
    if exposed is not None:
        words.append(f"exposed communication {exposed:.3f} ms")
    return "; ".join(words)


def verdict_lines(document: Document) -> list[str]:
    """A line per goal, and under each miss where the time went."""
    lines = []
    for v in verdicts(document):
        state = {None: "not measured", True: "met", False: "MISSED"}[v.met]
        value = "-" if v.measured is None else f"{v.measured:.3f}"
        peer = "" if v.vllm is None else f" (vLLM {v.vllm:g})"
        lines.append(f"{state:12} {v.part:11} {v.what:27} {value:>9} goal {v.goal:g}{peer}")
        if v.met is False and (why := breakdown(document, v.part, v.what)):
            lines.append(f"{'':12} {why}")
    return lines


def gain_lines(document: Document) -> list[str]:
    """What NVRAR gains over the other all-reduces, in ms of a cell's median, where both were measured."""
    lines = []
    for model in SHAPES:
        for cell in CELLS:
            ours = measured_ms(document, f"{model}-nvrar", cell)
            others = {name: measured_ms(document, f"{model}-{name}", cell) for name in ("nccl", "symm_mem")}
            known = [f"{name} {ms:.3f} ({ms - ours:+.3f})" for name, ms in others.items() if ms is not None and ours]
            if ours is not None and known:
                lines.append(f"{model:4} {cell:11} nvrar {ours:.3f}; {', '.join(known)}")
    return lines


def junit_counts(text: str) -> dict[str, Any]:
    """Tests, skipped ones, and names of failed ones, of a JUnit file."""
    cases = list(ET.fromstring(text).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    names = [f"{c.get('classname')}::{c.get('name')}" for c in failed]
    why = sorted({(c.find("skipped").get("message") or "")[:200] for c in skipped})  # type: ignore[union-attr]
    return {"tests": len(cases), "failed": names, "skipped": len(skipped), "why_skipped": why}


def pending(names: Sequence[str], document: Document, asked: Sequence[str]) -> list[str]:
    """Parts to run: those that were asked for, else those that have not ended well.

    Args:
        names: of all parts.
        asked: names, or what several begin with: ``smoke`` is ``smoke-nccl`` and so on.

    Raises:
        SystemExit: a part is unknown.
    """
    chosen = {wanted: [n for n in names if n == wanted or n.startswith(f"{wanted}-")] for wanted in asked}
    for wanted, found in chosen.items():
        if not found:
            raise SystemExit(f"no part {wanted!r}; there are {', '.join(names)}")
    if asked:
        return [n for n in names if any(n in found for found in chosen.values())]
    return [n for n in names if not document["parts"].get(n, {}).get("ok")]


# ---- parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A command with a limit.

    Attributes:
        name: of the part.
        limit_s: most seconds it may take.
        command: ``{folder}`` stands for a folder of its own, empty at first; in ``env``, too.
        writes: files in that folder, by the key they get in the document: JSON, JUnit's XML, or plain text.
        env: variables that it gets.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]
    writes: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def parts() -> list[Part]:
    """All of them, in order of value."""
    yalis = (sys.executable, "-m", "yalis")
    itself = (sys.executable, str(Path(__file__).resolve()))
    made = [Part("machine", 30, (*itself, "--machine"))]
    made.append(Part("ceilings", 40, (*itself, "--ceilings", "--out", "{folder}/c.json"), {"record": "c.json"}))
    asked = ("--temperature", "0", "--max-tokens", "24", "This program is free software")
    layouts = {name: ("--tp", "2", "--all-reduce", name) for name in ("nccl", "nvrar", "symm_mem", "null")}
    for name, layout in {**layouts, "pp": ("--pp", "2")}.items():
        made.append(Part(f"smoke-{name}", 75, (*yalis, "generate", "--model", DEMO, *layout, *asked)))
    # By folder, each with its file: a run that is cut off leaves none.
    for name, limit, which, options in (
        ("shared", 240, "not alone", ("tests/gpu", "-n", "8")),
        ("engine", 400, "alone", ("tests/gpu/engine",)),
        ("nvrar", 260, "alone", ("tests/gpu/nvrar",)),
    ):
        pytest = (
            sys.executable, "-m", "pytest", "-m", f"gpu and {which}", *options, "-v", "--tb=short", "--durations=8",
        )  # fmt: skip
        made.append(Part(f"tests-{name}", limit, (*pytest, "--junitxml={folder}/junit.xml"), {"junit": "junit.xml"}))
    for per_node in ("2", "1"):
        made.append(Part(f"tune-{per_node}", 120, (*yalis, "tune", "--ranks", "2", "--ranks-per-node", per_node)))

    def latency(name: str, model: str, limit: float, *options: str) -> Part:
        command = (
            *yalis, "bench", "latency", "--table", "--model", SHAPES[model], "--load-format", "dummy",
            "--max-model-len", "4096", "--max-num-batched-tokens", "8192", "--num-iters", "3",
            "--num-iters-warmup", "1", "--output-json", "{folder}/record.json", *options,
        )  # fmt: skip
        return Part(name, limit, command, {"record": "record.json"})

    # With the weights a GPU of 80 GB has room for few pages only: it may fill up further.
    full = ("--gpu-memory-utilization", "0.95")
    closely = ("--null-comm", "--profile", "{folder}/traces")
    made += [
        latency("8b-tp1", "8b", 150, "--profile", "{folder}/traces"),
        latency("8b-flashinfer", "8b", 150, "--attention-backend", "flashinfer", "--profile", "{folder}/traces"),
        latency("70b-nvrar", "70b", 400, "--tp", "2", "--all-reduce", "nvrar", *full, *closely),
        latency("8b-nvrar", "8b", 200, "--tp", "2", "--all-reduce", "nvrar", *closely),
    ]
    for name in ("nccl", "symm_mem"):
        made.append(latency(f"8b-{name}", "8b", 120, "--tp", "2", "--all-reduce", name))
    for name in ("nccl", "symm_mem"):
        made.append(latency(f"70b-{name}", "70b", 240, "--tp", "2", "--all-reduce", name, *full))
    throughput = (
        *yalis, "bench", "throughput", "--model", SHAPES["8b"], "--load-format", "dummy", "--max-model-len", "4096",
        "--max-num-batched-tokens", "8192", "--max-num-seqs", "256", "--output-json", "{folder}/record.json",
    )  # fmt: skip
    made.append(Part("throughput", 120, throughput, {"record": "record.json"}))
    calibrate = (*yalis, "calibrate", "--device", "cuda", "--max-ranks", "2", "--output", "{folder}/host.toml")
    made.append(Part("calibrate", 200, calibrate, {"description": "host.toml"}))
    rules = (*itself, "--sampling", SHAPES["8b"], "--out", "{folder}/record.json")
    for ranks in ("1", "2"):
        made.append(Part(f"sampling-{ranks}", 120, (*rules, "--ranks", ranks), {"record": "record.json"}))
    start = [
        *yalis, "bench", "latency", "--model", SHAPES["8b"], "--load-format", "dummy", "--max-model-len", "4096",
        "--batch-size", "1", "--output-len", "2", "--num-iters", "1", "--num-iters-warmup", "0", "--output-json",
    ]  # fmt: skip
    # One after the other over the same caches, empty at first.
    twice = " && ".join(f"{shlex.join(start)} {{folder}}/{name}.json" for name in ("cold", "warm"))
    caches = {"YALIS_CACHE_DIR": "{folder}/yalis", "TRITON_CACHE_DIR": "{folder}/triton"}
    files = {"record": "cold.json", "warm": "warm.json"}
    made.append(Part("start", 200, ("bash", "-c", twice), files, caches))
    return made


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Run one part for at most ``seconds``; what is to be kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [word.replace("{folder}", folder) for word in part.command]
        env = {name: value.replace("{folder}", folder) for name, value in part.env.items()}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        status, output = bounded(command, seconds, env)
        record: dict[str, Any] = {"ok": status == 0, "command": " ".join(part.command), "output": output[-TAIL:]}
        if status != 0:
            record["error"] = f"cut off after {seconds:.0f} s" if status is None else f"exit code {status}"
        for key, name in part.writes.items():
            path = Path(folder, name)
            if path.exists():
                text = path.read_text()
                read = {".xml": junit_counts, ".json": json.loads}.get(path.suffix, str)
                record[key] = read(text)
    return record


def run_parts(chosen: Sequence[Part], document: Document, seconds: float, save: Callable[[Document], object]) -> None:
    """Each within its limit and what is left of ``seconds``; the document is saved after each."""
    end = time.monotonic() + seconds
    for part in chosen:
        left = end - time.monotonic()
        if left < part.limit_s / 3:  # a start alone would use it up
            document["parts"].setdefault(part.name, {"ok": False, "error": "no time was left"})
            continue
        started = time.monotonic()
        try:
            record = run_part(part, min(part.limit_s, left))
        except Exception as error:  # whatever it is, the other parts are worth more
            record = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        record["seconds"] = round(time.monotonic() - started, 1)
        document["parts"][part.name] = record
        save(document)
        words = "ok" if record["ok"] else f"FAILED: {record['error']}\n{record.get('output', '')[-1500:]}"
        print(f"# {part.name}: {words} [{record['seconds']} s]", flush=True)


def machine() -> None:
    """Print what the figures were measured on."""
    from yalis.utils.machine import machine_record, run_tool

    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    print(run_tool(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]) or "no nvidia-smi")
    print(run_tool(["nvidia-smi", "topo", "-m"]) or "")
    print(json.dumps(machine_record(), indent=1))


def ceilings() -> dict[str, Any]:
    """What each GPU can do at best: bytes/s of a copy, read and written counted, and FLOP/s of a large bf16 product.

    Median of 15 with random data; a step's floor is its weights' bytes over the first.
    """
    import statistics

    import torch

    found: dict[str, Any] = {"copy_bytes_per_s": [], "product_flops_per_s": []}
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_device(index)
        source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

        def median_s(work: Callable[[], object]) -> float:
            times = []
            for _ in range(18):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            return statistics.median(times[3:])

        copied = median_s(lambda source=source, target=target: target.copy_(source))  # type: ignore[misc]
        assert torch.equal(source, target)
        found["copy_bytes_per_s"].append(2 * 2 * source.numel() / copied)
        multiplied = median_s(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        found["product_flops_per_s"].append(2 * 8192**3 / multiplied)
        del source, target
        torch.cuda.empty_cache()
    print(json.dumps(found))
    return found


def sampling(model: str, ranks: int, batches: Sequence[int] = (1, 8, 64), tokens: int = 65) -> dict[str, Any]:
    """Milliseconds of a decode step by rule and batch, least of three runs: what sampling outside of the graph costs.

    Random weights give flat distributions: for ``top_p`` no few candidates suffice, unless the temperature is low.
    """
    from yalis import LLM, SamplingParams

    rules: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "temperature": {"temperature": 0.8},
        "top_k": {"temperature": 0.8, "top_k": 50},
        "top_p, flat": {"temperature": 0.8, "top_p": 0.9},
        "top_p, peaked": {"temperature": 0.02, "top_p": 0.9},
        "penalties": {"temperature": 0.0, "repetition_penalty": 1.2},
        "logprobs": {"temperature": 0.0, "logprobs": 5},
    }
    found: dict[str, Any] = {}
    with LLM(model, load_format="dummy", tensor_parallel_size=ranks, max_model_len=512, max_num_seqs=64) as llm:
        for name, rule in rules.items():
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, seed=1, **rule)
            for batch in batches:
                times = []
                for _ in range(4):  # the first is warm-up
                    outputs = llm.generate([[5 + i, 6, 7] for i in range(batch)], params)
                    first = max(o.metrics.first_token_s or 0.0 for o in outputs)
                    last = max(o.metrics.finished_s or 0.0 for o in outputs)
                    times.append(1e3 * (last - first) / (tokens - 1))
                found.setdefault(name, {})[str(batch)] = round(min(times[1:]), 4)
                print(f"{name:14} batch {batch:3} {found[name][str(batch)]:8.3f} ms", flush=True)
    return found


# ---- command line -------------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT", ".")) / "gpu-two.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file, written after every part ($OUT)")
    parser.add_argument("--resume", type=Path, help="an earlier file: its figures are kept, what ended well is not run")
    parser.add_argument("--parts", default="", help="run only these, separated by commas")
    parser.add_argument("--seconds", type=float, default=570, help="for everything (570)")
    parser.add_argument("--commit", default="", help="what is measured, where this is no checkout")
    parser.add_argument("--nvrar", type=Path, metavar="DIR", help="folder that yalis build --output filled")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the verdicts of a file")
    parser.add_argument("--list", action="store_true", help="only print the parts")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sampling", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """See the head of this file."""
    arguments = _arguments(argv)
    for name, value in QUIET.items():  # before anything starts NCCL or NVSHMEM
        os.environ.setdefault(name, value)
    if arguments.machine:
        sys.path.insert(0, str(ROOT))
        return machine()
    if arguments.ceilings:
        arguments.out.write_text(json.dumps({"results": ceilings()}))
        return None
    if arguments.sampling:
        sys.path.insert(0, str(ROOT))
        figures = {"results": sampling(arguments.sampling, arguments.ranks)}
        arguments.out.write_text(json.dumps(figures))
        return None
    if arguments.show:
        shown: Document = json.loads(arguments.show.read_text())
        return print("\n".join([*verdict_lines(shown), "", *gain_lines(shown)]))
    if arguments.list:
        return print("\n".join(f"{part.name:14} {part.limit_s:4.0f} s" for part in parts()))
    if arguments.nvrar is not None:
        os.environ["YALIS_NVRAR_DIR"] = str(arguments.nvrar.resolve())
    out = arguments.out.resolve()
    document: Document = {"parts": {}}
    if arguments.resume is not None:
        document = json.loads(arguments.resume.read_text())
    commit = arguments.commit or bounded(["git", "-C", str(ROOT), "rev-parse", "HEAD"], 10)[1]
    command = re.sub(r"/\S*/", "", " ".join(sys.argv))  # folders are of no interest to readers
    document |= {"commit": commit.strip(), "command": command}
    document["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def save(now: Document) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_name(out.name + ".draft")
        draft.write_text(json.dumps(now, indent=1))
        os.replace(draft, out)

    os.chdir(ROOT)  # models and shapes are named from there
    every = parts()
    names = pending([p.name for p in every], document, [name for name in arguments.parts.split(",") if name])
    run_parts([part for part in every if part.name in names], document, arguments.seconds, save)
    save(document)
    print("\n".join([*verdict_lines(document), "", *gain_lines(document)]))


if __name__ == "__main__":
    main()

"""NVRAR between two GPUs of one host, each declared a node, beside NCCL, torch symmetric memory and NVSHMEM.

    python bench/nvrar_two_gpus.py --out two-gpus.json                        everything, at most --seconds (570)
    python bench/nvrar_two_gpus.py --out b.json --resume a.json               what a.json lacks or what failed there
    python bench/nvrar_two_gpus.py --out c.json --stages plain,nccl           only these
    python bench/nvrar_two_gpus.py --prepare build/two-gpus --arch 90         compile ahead; needs no GPU
    yalis build --library cuda --arch 90 --output build/two-gpus              the same for the stage `tune`
    python bench/nvrar_two_gpus.py --out two-gpus.json --programs build/two-gpus

Stages run in order of value, each in processes of its own with a limit; one that fails does not stop the rest, and the
file is written after each. All figures: bf16, a CUDA graph of 40 calls that rotate through 8 buffers, all ranks start
from a barrier in shared memory, median over replays, the slower rank, the same sizes verified in the same process. At
the end: the table, and every target of the project with met, missed or not measured.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "yalis/comm/nvrar/csrc"
MPS = ROOT / "tests/gpu/nvrar/mps.sh"
KIB, MIB = 1 << 10, 1 << 20
SIZES = [8 * KIB << i for i in range(11)]  # to 8 MiB
CALLS, PLACES, REPLAYS, WARM = 40, 8, 45, 3  # as in nvrar_peers.cu
HIDDEN = 8192
VARIANTS = {"few_looks": "-DNVRAR_FEW_LOOKS", "poll_last": "-DNVRAR_POLL_LAST"}
# Multicast in the switch stays off for all contenders.
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}

# What the project asks of two H200: times NCCL's latency, and microseconds alone and with residual and norm.
RATIOS = {**dict.fromkeys(SIZES[:6], 3.5), 512 * KIB: 3.0, MIB: 3.0, 2 * MIB: 3.3}
PLAIN = {**dict.fromkeys(SIZES[:5], 3.3), 256 * KIB: 4.0, MIB: 6.5, 2 * MIB: 10.0}
NORM = {16 * KIB: 5.0, 32 * KIB: 5.0, 64 * KIB: 5.0, 256 * KIB: 6.0, MIB: 8.0, 2 * MIB: 10.5}
PIPELINE = dict.fromkeys([128 * KIB << i for i in range(5)], 2.0)

Document = dict[str, Any]
Row = Mapping[str, Any]


# ---- what the figures say: pure -----------------------------------------------------------------------------------


def rows_of(document: Document, **wanted: Any) -> list[Row]:
    """Rows of all stages that have these values."""
    every = [row for stage in document["stages"].values() for row in stage.get("rows", ())]
    return [row for row in every if all(row.get(key) == value for key, value in wanted.items())]


def best(document: Document, **wanted: Any) -> Row | None:
    """The fastest verified row."""
    found = [row for row in rows_of(document, **wanted) if row.get("verified") is True and "us" in row]
    return min(found, key=lambda row: float(row["us"])) if found else None


@dataclass(frozen=True)
class Verdict:
    """One target. ``met`` is None where nothing was measured, False also where nothing that was measured was right."""

    what: str
    nbytes: int
    measured: float | None
    target: float
    met: bool | None


def verdicts(document: Document) -> list[Verdict]:
    """Every target of the project, held against the figures."""
    found = []
    for size, target in RATIOS.items():
        ours, theirs = best(document, kind="plain", shape="2x1", bytes=size), best(document, kind="nccl", bytes=size)
        ratio = None if ours is None or theirs is None else theirs["us"] / ours["us"]
        found.append(_verdict(document, "times NCCL's latency", size, ratio, target, True, kind="plain"))
    for what, kind, targets in (("us", "plain", PLAIN), ("us with residual and norm", "norm", NORM)):
        for size, target in targets.items():
            row = best(document, kind=kind, shape="2x1", bytes=size)
            found.append(_verdict(document, what, size, None if row is None else row["us"], target, False, kind=kind))
    for shape in ("2x4", "4x2"):
        for size, target in PIPELINE.items():
            wanted = {"kind": "pipeline", "shape": shape, "graph": True}
            right = [row for row in rows_of(document, **wanted, bytes=size) if row["verified"]]
            ratio = max((row["ratio"] for row in right), default=None)
            what = f"{shape} under MPS (emulated): times the pipeline's latency"
            found.append(_verdict(document, what, size, ratio, target, True, **wanted))
    return found


def _verdict(
    document: Document, what: str, size: int, value: float | None, target: float, more: bool, **wanted: Any
) -> Verdict:
    if value is None:
        wrong = any(row.get("verified") is False for row in rows_of(document, **wanted, bytes=size))
        return Verdict(what, size, None, target, False if wrong else None)
    return Verdict(what, size, value, target, value >= target if more else value <= target)


def size_name(nbytes: int) -> str:
    """``8 KiB``, ``2 MiB``."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def table(document: Document) -> str:
    """Latencies by size as Markdown."""
    columns: dict[str, dict[str, Any]] = {
        "NVRAR 2x1": {"kind": "plain", "shape": "2x1"},
        "cells": {"kind": "plain", "shape": "2x1", "format": "cells"},
        "dense": {"kind": "plain", "shape": "2x1", "format": "dense"},
        "NVRAR 1x2": {"kind": "plain", "shape": "1x2"},
        "ordinary launch": {"kind": "ordinary", "shape": "2x1"},
        "NCCL": {"kind": "nccl"},
        "symm_mem one-shot": {"kind": "symm_mem_one_shot"},
        "two-shot": {"kind": "symm_mem_two_shot"},
        "NVSHMEM": {"kind": "nvshmem"},
        "NVRAR + norm": {"kind": "norm", "shape": "2x1"},
        "NCCL, add, norm": {"kind": "nccl_add_norm"},
    }
    lines = ["| us | " + " | ".join(columns) + " | plan |", "|---" * (len(columns) + 2) + "|"]
    for size in SIZES:
        found = [best(document, bytes=size, **wanted) for wanted in columns.values()]
        plan = "-" if found[0] is None else "{format} {blocks}x{threads}".format(**found[0])
        cells = ["-" if row is None else f"{row['us']:.2f}" for row in found]
        lines.append(f"| {size_name(size)} | " + " | ".join(cells) + f" | {plan} |")
    return "\n".join(lines)


def verdict_lines(document: Document) -> list[str]:
    """One line per target, and how many were met."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    found = verdicts(document)
    lines = []
    for v in found:
        value = "-" if v.measured is None else f"{v.measured:.2f}"
        lines.append(f"{words[v.met]:>12}  {size_name(v.nbytes):>8}  {v.what}: {value} (target {v.target:g})")
    count = {met: sum(v.met is met for v in found) for met in words}
    return [*lines, f"{count[True]} met, {count[False]} missed, {count[None]} not measured"]


def json_rows(output: str) -> list[dict[str, Any]]:
    """The JSON objects among lines; a line that was cut off is left out."""
    rows = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def pending(names: Sequence[str], document: Document, asked: Sequence[str]) -> list[str]:
    """Stages to run: those that were asked for, else those that have not ended well.

    Raises:
        SystemExit: a stage is unknown.
    """
    for name in asked:
        if name not in names:
            raise SystemExit(f"no stage {name!r}; there are {', '.join(names)}")
    stages = document["stages"]
    return [name for name in names if (name in asked if asked else not stages.get(name, {}).get("ok"))]


# ---- programs -----------------------------------------------------------------------------------------------------


def _nvshmem() -> tuple[Path, str]:
    spec = importlib.util.find_spec("nvidia.nvshmem") if importlib.util.find_spec("nvidia") else None
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no NVSHMEM; pip install nvidia-nvshmem-cu13")
    for name in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        try:
            return Path(spec.submodule_search_locations[0]), importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Path(spec.submodule_search_locations[0]), "unknown"


def library_path() -> dict[str, str]:
    """With this in its environment a program finds NVSHMEM's library."""
    return {"LD_LIBRARY_PATH": f"{_nvshmem()[0]}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def digest() -> str:
    """Of the sources of the programs."""
    found = hashlib.sha256()
    for file in sorted([*CSRC.iterdir(), *(ROOT / "bench").glob("nvrar*.cu*")]):
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def build(folder: Path, name: str, arch: int, seconds: float) -> Path:
    """Compile ``nvrar_peers`` (``nvrar_peers-VARIANT``) or ``nvrar_virtual_ranks``."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    base, _, variant = name.partition("-")
    command = [nvcc, "-std=c++17", "-O3", "--split-compile=0", f"-arch=sm_{arch}", f"-I{CSRC}"]
    command += [VARIANTS[variant]] if variant else []
    command.append(str(ROOT / f"bench/{base}.cu"))
    if base == "nvrar_peers":
        home, _ = _nvshmem()
        command += ["-rdc=true", f"-I{home}/include", str(CSRC / "nvrar.cu"), f"-L{home}/lib"]
        command += ["-l:libnvshmem_host.so.3", "-lnvshmem_device"]  # no driver needed where it is compiled
    status, output = bounded([*command, "-o", str(folder / f"{name}.draft")], seconds)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)}: {'no end' if status is None else output[-3000:]}")
    os.replace(folder / f"{name}.draft", folder / name)
    return folder / name


def prepare(folder: Path, arch: int, names: Sequence[str]) -> None:
    """Compile ahead, with a note of what from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        print("compiling", name, flush=True)
        build(folder, name, arch, 3600)
    facts = {"sources": digest(), "arch": arch, "nvshmem": _nvshmem()[1]}
    (folder / "programs.json").write_text(json.dumps(facts) + "\n")


def bounded(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """Run in a process group of its own that has ended when this returns; None: it had to be ended."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **(env or {})}
        )
        status: int | None = None
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for number, grace_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
                if process.poll() is None or number == signal.SIGKILL:
                    try:
                        os.killpg(process.pid, number)
                        process.wait(grace_s)
                    except (ProcessLookupError, subprocess.TimeoutExpired):
                        continue
        output.seek(0)
        return status, output.read()


# ---- stages -------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """What the stages share."""

    programs: Path | None
    folder: Path
    arch: int
    commit: str
    environment: dict[str, str]

    def program(self, name: str, seconds: float) -> Path:
        """The carried program if it is made of these sources, else one compiled now."""
        if self.programs is not None and (self.programs / name).exists():
            facts = json.loads((self.programs / "programs.json").read_text())
            here = {"sources": digest(), "arch": self.arch, "nvshmem": _nvshmem()[1]}
            if facts == here:
                return self.programs / name
            print(f"# {name} is compiled anew: carried {facts}, here {here}", flush=True)
        made = self.folder / name
        return made if made.exists() else build(self.folder, name, self.arch, seconds)


@dataclass(frozen=True)
class Stage:
    """One bounded part. ``run(session, seconds)`` returns rows and raises where something is wrong."""

    name: str
    limit_s: float
    run: Callable[[Session, float], list[dict[str, Any]]]


class StageFailed(Exception):
    """What went wrong, with the rows that were there before."""

    def __init__(self, words: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(words)
        self.rows = rows


def _checked(status: int | None, output: str) -> list[dict[str, Any]]:
    rows = json_rows(output)
    if status != 0 or any(row.get("verified") is False or "error" in row for row in rows):
        reason = "ended by its limit" if status is None else f"status {status}"
        raise StageFailed(f"{reason}; {output[-2000:]}", rows)
    return rows


def peers(
    session: Session, seconds: float, *, arguments: str, program: str = "nvrar_peers", per_gpu: int = 1
) -> list[dict[str, Any]]:
    """``nvrar_peers ARGUMENTS``; several ranks per GPU under an MPS daemon of their own."""
    start = time.monotonic()
    path = session.program(program, seconds)
    left = seconds - (time.monotonic() - start)
    command = [str(path), *arguments.split()]
    if per_gpu > 1:  # the daemon is not in the process group: its script must be left the time to end it
        command = ["bash", str(MPS), str(per_gpu), "timeout", "-k", "2", f"{max(left - 25, 5):.0f}", *command]
    rows = _checked(*bounded(command, left, session.environment))
    return [{**row, "program": program} for row in rows] if "-" in program else rows


def sanitized(session: Session, seconds: float, *, tool: str) -> list[dict[str, Any]]:
    """The kernels on small cases (virtual ranks of one GPU) under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise StageFailed("no compute-sanitizer on PATH", [])
    program = session.program("nvrar_virtual_ranks", seconds)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", str(program), "tiny"]
    return _checked(*bounded(command, seconds, session.environment))


def machine(session: Session, seconds: float) -> list[dict[str, Any]]:
    """Cards, driver and versions; asked in a process, so that this one holds no GPU."""
    ask = "import json, sys, torch; print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
    ask += "'nccl': '.'.join(map(str, torch.cuda.nccl.version())), 'python': sys.version.split()[0]}))"
    _, versions = bounded([sys.executable, "-c", ask], seconds / 2)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    _, cards = bounded(query, seconds / 4)
    _, links = bounded(["nvidia-smi", "nvlink", "--status"], seconds / 4)
    facts: dict[str, Any] = {
        "kind": "machine",
        "cards": cards.splitlines(),
        "nvshmem": _nvshmem()[1],
        "environment": QUIET,
    }
    facts |= {"links": links.count("GB/s"), **(json_rows(versions) or [{}])[0]}
    return [facts]


def contenders(session: Session, seconds: float, *, which: str) -> list[dict[str, Any]]:
    """NCCL or symmetric memory in two processes; their lines are kept even if they hang."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--contender", which, "--folder", folder]
        return _checked(*bounded(command, seconds, session.environment))


def tuned(session: Session, seconds: float) -> list[dict[str, Any]]:
    """``yalis tune`` on both GPUs: the Python binding checks and measures the same library."""
    target = session.folder / "tuned.json"
    command = [sys.executable, "-m", "yalis", "tune", "--ranks", "2", "--ranks-per-node", "1", "--device", "cuda"]
    command += ["-b", "8K", "-e", "2M", "-f", "4", "--output", str(target)]
    _checked(*bounded(command, seconds, session.environment))
    return [{"kind": "tuned", "table": json.loads(target.read_text())}]


def stages() -> list[Stage]:
    """In order of value."""

    def case(name: str, limit_s: float, arguments: str, **more: Any) -> Stage:
        return Stage(name, limit_s, partial(peers, arguments=arguments, **more))

    made = [
        Stage("machine", 40, machine),
        case("verify", 100, "2x1 verify 300"),  # compiles first where nothing was carried
        case("plain", 90, "2x1 latency"),
        case("norm", 90, "2x1 norm"),
        Stage("nccl", 90, partial(contenders, which="nccl")),
        Stage("symm_mem", 60, partial(contenders, which="symm_mem")),
        case("nvshmem", 40, "2x1 nvshmem"),
        case("parts", 50, "2x1 parts"),
        case("ordinary", 90, "2x1 ordinary-latency"),
        case("replays", 60, "2x1 replays 100000"),
        case("kill", 25, "2x1 kill"),
        case("stop", 25, "2x1 stop"),
        case("abort", 25, "2x1 abort"),
        case("verify-1x2", 30, "1x2 verify 300"),
        case("plain-1x2", 90, "1x2 latency"),
        case("pipeline-2x4", 90, "2x4 pipeline", per_gpu=4),
        case("pipeline-4x2", 90, "4x2 pipeline", per_gpu=4),
        case("verify-2x4", 60, "2x4 verify 100", per_gpu=4),
        case("verify-4x2", 60, "4x2 verify 100", per_gpu=4),
        case("relay", 40, "2x1 relay-verify 100"),
        case("whole-relay", 40, "2x1 whole-verify 100"),
        case("relay-2x4", 60, "2x4 relay-verify 60", per_gpu=4),
        case("mismatch", 25, "2x1 mismatch"),
        case("stamps", 25, "2x1 stamps"),
        Stage("memcheck", 70, partial(sanitized, tool="memcheck")),
        Stage("racecheck", 70, partial(sanitized, tool="racecheck")),
        Stage("tune", 100, tuned),
    ]
    made += [case(f"variant-{v}", 150, "2x1 latency", program=f"nvrar_peers-{v}") for v in VARIANTS]
    return made


def run_stages(
    chosen: Sequence[Stage], session: Session, document: Document, seconds: float, save: Callable[[Document], object]
) -> None:
    """Each within its limit and what is left of ``seconds``; saved after each. A variant's rows are no plain ones."""
    end = time.monotonic() + seconds
    for stage in chosen:
        left = end - time.monotonic()
        if left < min(15.0, stage.limit_s):
            document["stages"].setdefault(stage.name, {"ok": False, "error": "no time was left"})
            continue
        start = time.monotonic()
        record: dict[str, Any] = {"ok": False, "rows": []}
        try:
            record.update(rows=stage.run(session, min(stage.limit_s, left - 5)), ok=True)
        except StageFailed as error:
            record.update(rows=error.rows, error=str(error))
        except (Exception, SystemExit) as error:  # whatever it is, the other stages are worth more
            record["error"] = f"{type(error).__name__}: {error}"
        for row in record["rows"]:
            if "program" in row:
                row["kind"] = f"{row['kind']} ({row['program']})"
        record["seconds"] = round(time.monotonic() - start, 1)
        document["stages"][stage.name] = record
        save(document)
        words = "ok" if record["ok"] else f"FAILED: {record['error'][-600:]}"
        print(f"# {stage.name}: {words} [{record['seconds']} s]", flush=True)


# ---- the other contenders, two processes --------------------------------------------------------------------------


class Meeting:
    """A barrier of processes in shared memory: nothing runs on a GPU for it, and all leave within microseconds."""

    def __init__(self, path: Path, rank: int, ranks: int) -> None:
        with path.open("r+b") as file:
            self._words = mmap.mmap(file.fileno(), 64 * ranks)
        self._rank, self._ranks, self._turn = rank, ranks, 0

    def __call__(self, limit_s: float = 60.0) -> None:
        """Wait for all.

        Raises:
            TimeoutError: somebody did not come.
        """
        self._turn += 1
        struct.pack_into("<q", self._words, 64 * self._rank, self._turn)
        end = time.monotonic() + limit_s
        for other in range(self._ranks):
            while struct.unpack_from("<q", self._words, 64 * other)[0] < self._turn:
                if time.monotonic() > end:
                    raise TimeoutError(f"rank {other} did not come to turn {self._turn}")


def _timed(torch: Any, dist: Any, work: Callable[[int], object], meet: Meeting) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(PLACES):
            work(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(CALLS):
                work(i % PLACES)
        times = []
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(WARM + REPLAYS):
            stream.synchronize()
            meet()
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / CALLS)
    slowest = torch.tensor([statistics.median(times[WARM:])], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.item())


def _contend(rank: int, which: str, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "nccl", init_method=rendezvous, rank=rank, world_size=2, device_id=torch.device("cuda", rank)
    )
    meet = Meeting(folder / "meeting", rank, 2)
    name: Any = dist.group.WORLD.group_name  # type: ignore[union-attr]
    ops: Any = torch.ops

    def numbers(who: int, count: int) -> torch.Tensor:  # sums are exact
        dice = torch.Generator("cuda").manual_seed(who * 1009 + count)
        return torch.randint(-8, 9, (count,), device="cuda", generator=dice).bfloat16()

    def tell(kind: str, size: int, work: Callable[[int], Any], result: Callable[[], torch.Tensor]) -> None:
        row: dict[str, Any] = {"kind": kind, "bytes": size}
        try:
            expected = numbers(0, size // 2).float() + numbers(1, size // 2).float()
            right = torch.tensor([int(torch.equal(result().float().view(-1), expected))], device="cuda")
            dist.all_reduce(right, op=dist.ReduceOp.MIN)
            row |= {"verified": bool(right.item()), "us": round(_timed(torch, dist, work, meet), 3)}
        except (RuntimeError, AttributeError, TimeoutError) as error:
            row["error"] = str(error)[:300]
        if rank == 0:
            print(json.dumps(row), flush=True)

    # NCCL back to back, on the stream of its own that torch gives asynchronous calls, and as engines call it: with
    # kernels in between.
    tick = torch.zeros(1, device="cuda")
    for size in SIZES:
        count = size // 2
        mine = numbers(rank, count)
        if which == "nccl":
            places = [torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in range(PLACES)]

            def reduced(mine: torch.Tensor = mine) -> torch.Tensor:
                out = mine.clone()
                dist.all_reduce(out)
                return out

            tell("nccl", size, lambda i, places=places: dist.all_reduce(places[i]), reduced)  # type: ignore[misc]

            def apart(i: int, places: list[torch.Tensor] = places) -> None:
                dist.all_reduce(places[i], async_op=True).wait()

            def kernel_between(i: int, places: list[torch.Tensor] = places) -> None:
                dist.all_reduce(places[i])
                tick.add_(1)

            tell("nccl_own_stream", size, apart, reduced)
            tell("nccl_kernel_between", size, kernel_between, reduced)
            if size == SIZES[0]:
                tell("kernel_alone", size, lambda i: tick.add_(1), reduced)
            if count % HIDDEN == 0:
                residuals = [torch.zeros(count // HIDDEN, HIDDEN, dtype=torch.bfloat16, device="cuda") for _ in places]
                weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")

                def with_norm(
                    i: int,
                    places: list[torch.Tensor] = places,
                    residuals: list[torch.Tensor] = residuals,
                    weight: torch.Tensor = weight,
                ) -> torch.Tensor:
                    dist.all_reduce(places[i])
                    residuals[i].add_(places[i].view_as(residuals[i]))
                    return torch.nn.functional.rms_norm(residuals[i], (HIDDEN,), weight, 1e-5)

                tell("nccl_add_norm", size, with_norm, reduced)
            continue
        import torch.distributed._symmetric_memory as symmetric  # only these processes use it

        symm_mem: Any = symmetric
        shared: list[torch.Tensor] = []
        for _ in range(PLACES):
            shared.append(symm_mem.empty(count, dtype=torch.bfloat16, device="cuda").fill_(0))
            symm_mem.rendezvous(shared[-1], name)
        for kind in ("one_shot", "two_shot"):
            call = getattr(ops.symm_mem, f"{kind}_all_reduce" + ("_" if kind == "two_shot" else ""))

            def once(call: Any = call, mine: torch.Tensor = mine, shared: list[torch.Tensor] = shared) -> torch.Tensor:
                shared[0].copy_(mine)
                torch.cuda.synchronize()
                dist.barrier()
                out: torch.Tensor = call(shared[0], "sum", name)
                torch.cuda.synchronize()
                dist.barrier()
                out = out.clone()
                shared[0].zero_()
                return out

            tell(f"symm_mem_{kind}", size, lambda i, call=call, shared=shared: call(shared[i], "sum", name), once)  # type: ignore[misc]
    dist.destroy_process_group()


def contend(which: str, folder: Path) -> None:
    """Two processes; this one ends when both have."""
    import torch.multiprocessing as mp

    (folder / "meeting").write_bytes(b"\0" * 128)
    spawn: Any = mp.spawn  # type: ignore[attr-defined]
    spawn(_contend, args=(which, folder), nprocs=2)


# ---- command line -------------------------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT", ".")) / "nvrar-two-gpus.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file, written after every stage ($OUT)")
    parser.add_argument("--resume", type=Path, help="an earlier file: its figures are kept, what ended well is not run")
    parser.add_argument("--stages", default="", help="run only these, separated by commas")
    parser.add_argument("--seconds", type=float, default=570, help="for everything (570)")
    parser.add_argument("--commit", default="", help="what is measured, where this is no checkout")
    parser.add_argument("--programs", type=Path, help="folder that --prepare filled")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="only compile the programs into DIR")
    parser.add_argument("--arch", type=int, default=90, help="compute capability (90)")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print table and verdicts of a file")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """See the head of this file."""
    for name, value in QUIET.items():  # before anything starts NCCL or NVSHMEM
        os.environ.setdefault(name, value)
    arguments = _arguments()
    if arguments.contender:
        return contend(arguments.contender, arguments.folder)
    if arguments.prepare:
        every = ["nvrar_peers", "nvrar_virtual_ranks", *(f"nvrar_peers-{name}" for name in VARIANTS)]
        return prepare(arguments.prepare, arguments.arch, every)
    if arguments.show:
        shown: Document = json.loads(arguments.show.read_text())
        return print("\n".join([table(shown), "", *verdict_lines(shown)]))

    environment = library_path()
    if arguments.programs is not None and (arguments.programs / "nvrar.json").exists():
        environment["YALIS_NVRAR_DIR"] = str(arguments.programs.resolve())
    document: Document = {"stages": {}}
    if arguments.resume is not None:
        document = json.loads(arguments.resume.read_text())
    commit = arguments.commit
    if not commit:
        _, commit = bounded(["git", "-C", str(ROOT), "rev-parse", "HEAD"], 10)
    document |= {"commit": commit.strip(), "sources": digest(), "command": " ".join(sys.argv)}
    document["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def save(now: Document) -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        draft = arguments.out.with_name(arguments.out.name + ".draft")
        draft.write_text(json.dumps(now, indent=1))
        os.replace(draft, arguments.out)

    every_stage = stages()
    asked = [name for name in arguments.stages.split(",") if name]
    names = pending([stage.name for stage in every_stage], document, asked)
    programs = arguments.programs.resolve() if arguments.programs is not None else None
    with tempfile.TemporaryDirectory() as folder:
        session = Session(programs, Path(folder), arguments.arch, commit, environment)
        run_stages([s for s in every_stage if s.name in names], session, document, arguments.seconds, save)
    save(document)
    print("\n".join([table(document), "", *verdict_lines(document)]))


if __name__ == "__main__":
    main()

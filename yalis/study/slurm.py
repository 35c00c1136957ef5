"""Job scripts of a study for Slurm: one a cell, one ``srun`` line each; submitted with plain ``sbatch``.

Not through submitit: it hands in a pickled Python function, and what is wanted here is a file that a person can read,
change and hand in again, whose one line starts the ranks.
"""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from yalis.errors import ConfigError
from yalis.study.grid import Cell, Study
from yalis.study.run import rank_command, read_results, record_path

_SUBMIT_S = 60.0


def on_slurm(study: Study) -> Study:
    """The study's cells as they run on real nodes: nothing is emulated there.

    Loads over time are left out: they need a server beside the client.
    """
    cells, skipped = [], list(study.skipped)
    for cell in study.cells:
        if cell.load:
            skipped.append(f"{cell.label}: serve the model in a job of its own and use kind openai with its url")
        else:
            cells.append(replace(cell, emulate=""))
    unique = {cell.key: cell for cell in cells}
    return replace(study, cells=tuple(unique.values()), skipped=tuple(skipped))


def write_scripts(study: Study, folder: Path) -> list[Path]:
    """A script for every cell that is not measured yet.

    Ranks of yalis start as srun tasks; other engines are one task that starts what it needs.
    """
    done = {e["key"] for e in read_results(folder) if e["status"] == "ok"}
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    (folder / "records").mkdir(exist_ok=True)
    scripts = []
    for cell in study.cells:
        if cell.key in done:
            continue
        script = folder / "jobs" / f"{cell.key}.sh"
        script.write_text(_script(study, cell, folder))
        scripts.append(script)
    return scripts


def _script(study: Study, cell: Cell, folder: Path) -> str:
    own_ranks = cell.kind in ("yalis", "allreduce")
    nodes, per_node = (cell.nodes, cell.ranks_per_node) if own_ranks else (1, 1)
    options = {
        "job-name": f"{study.name}-{cell.key}",
        "nodes": nodes,
        "ntasks-per-node": per_node,
        "time": f"{max(1, math.ceil(study.timeout_s / 60))}",  # minutes
        "output": folder.resolve() / "jobs" / f"{cell.key}.log",
        **study.slurm,
    }
    command = shlex.join(rank_command(cell, record_path(folder, cell).resolve()))
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}" for key, value in options.items()),
        f"# {cell.label}",
        f"srun --ntasks={nodes * per_node} {command}",
    ]
    return "\n".join(lines) + "\n"


def submit(scripts: list[Path]) -> dict[Path, str]:
    """Hand in every script that was not yet; returns their job numbers, which are kept beside them as ``KEY.job``.

    Raises:
        ConfigError: there is no ``sbatch``, or it refused; what was handed in before stays so.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: run this on a login node of the cluster, or hand the scripts in there"
        )
    jobs = {}
    for script in scripts:
        mark = script.with_suffix(".job")
        if mark.exists():
            continue
        try:
            done = subprocess.run(
                ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=_SUBMIT_S
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"sbatch {script}: no answer within {_SUBMIT_S:g} s; try again later") from None
        if done.returncode:
            raise ConfigError(f"sbatch {script} refused: {(done.stderr or done.stdout).strip()}; see [slurm]")
        jobs[script] = done.stdout.strip().split(";")[0]
        mark.write_text(jobs[script] + "\n")
    return jobs
